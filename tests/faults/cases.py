"""One function per fault: number of tries, and how many of them left the run as an undisturbed one."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import psutil

from megafusion.checkpoint.folder import PARTIAL, complete_checkpoints, step_of, verify_checkpoint
from megafusion.errors import ExitStatus, UserError
from megafusion.resilience.attempts import read_attempts
from megafusion.telemetry.metrics_file import read_metrics
from tests.faults.injections import nan_gradients, slow_disk, with_reference, without_batches
from tests.faults.job import Job, newest, same_bits, step_of_run
from tests.support.small import small_run

NUM_STEPS = 16
PARALLEL = {"tensor": 2}
"""For four ranks: tensor 2 x data 2."""


@dataclass
class Case:
    """A row of the table."""

    name: str
    tried: int = 0
    survived: int = 0
    failures: list[str] = field(default_factory=list)
    figures: dict = field(default_factory=dict)

    @property
    def lost(self) -> int:
        return self.tried - self.survived

    def count(self, broken: list[str]) -> None:
        """Count a try. broken: its failures."""
        self.tried += 1
        self.survived += not broken
        self.failures += broken


class Bench:
    """Folder of the runs, their shards, and the undisturbed runs that they are compared with."""

    def __init__(self, folder: Path, shards: Path, vae: Path):
        self.folder, self._shards, self._vae = folder, shards, vae
        self._undisturbed: dict[int, Path] = {}
        self._number = 0

    def values(self, world: int, **checkpoint: object) -> dict:
        """Configuration of a run of 16 steps in a new folder, with a checkpoint every 2."""
        self._number += 1
        values = small_run(self._shards, self._vae, self.folder / f"run-{self._number}")
        values["train"] |= {"num_steps": NUM_STEPS, "micro_batch_size": 1}
        values["checkpoint"] = {"every": 2, **checkpoint}
        values["telemetry"]["trackers"] = []
        values["parallel"] = PARALLEL if world == 4 else {}
        # Several random kills may fall between two checkpoints.
        values["resilience"] = {"max_crashes": 0}
        return values

    def undisturbed(self, world: int) -> Path:
        """The undisturbed run on so many ranks, with all its checkpoints."""
        if world not in self._undisturbed:
            self._undisturbed[world] = self._finish(self.values(world, keep_last=NUM_STEPS), world)
        return self._undisturbed[world]

    def finish(self, values: dict, world: int, inject: Callable | None = None) -> list[str]:
        """Train to the end; returns the differences to the undisturbed run."""
        with Job(values, world, inject=inject) as job:
            statuses = job.end()
            if statuses != [0] * world:
                return [f"ended with {statuses}: {job.output()[-300:]}"]
        return self.differences(job.run, world)

    def differences(self, run: Path, world: int) -> list[str]:
        same = step_of(newest(run)) == NUM_STEPS and same_bits(newest(run), newest(self.undisturbed(world)))
        return [] if same else [f"{run.name}: not the undisturbed run's weights and moments"]

    def _finish(self, values: dict, world: int, inject: Callable | None = None) -> Path:
        with Job(values, world, inject=inject) as job:
            assert job.end() == [0] * world, job.output()
        return job.run


def verified(run: Path) -> list[str]:
    """Errors of a run's checkpoints."""
    broken = []
    for checkpoint in complete_checkpoints(run / "checkpoints"):
        try:
            verify_checkpoint(checkpoint)
        except UserError as error:
            broken.append(str(error))
    return broken


def kills(bench: Bench, number: int, seed: int = 0) -> Case:
    """SIGKILL of a random rank of 2 x 2 at random moments, every third time during a save."""
    case, draw, world = Case(f"SIGKILL of one of 2 x 2 ranks, {number} times"), random.Random(seed), 4
    undisturbed = bench.undisturbed(world)
    values = bench.values(world, keep_last=3)
    in_checkpoints = 0
    for kill in range(number):
        run = Path(values["out"])
        num_attempts = len(read_attempts(run))
        before = [step_of(path) for path in complete_checkpoints(run / "checkpoints")][-1:] or [0]
        with Job(values, world) as job:
            if kill % 3 == 2:
                job.wait_for(partial(_is_saving, run))
                time.sleep(draw.uniform(0, 0.02))
                in_checkpoints += _is_saving(run)
            elif draw.random() < 0.2:  # as it starts, resumes, and lays itself out
                time.sleep(draw.uniform(0, 1.5))
            else:
                job.wait_for(partial(_has_passed, run, step_of_run(run)))
                time.sleep(draw.uniform(0, 0.5))
            victim = draw.randrange(world)
            job.processes[victim].kill()
            statuses = job.end()
        broken = verified(run)
        others = {status for rank, status in enumerate(statuses) if rank != victim}
        # A rank that has not started the command yet is terminated by the launcher.
        has_begun = len(read_attempts(run)) > num_attempts
        if not others <= ({ExitStatus.RETRY, 0} if has_begun else {ExitStatus.RETRY, 0, -15, -9}):
            broken.append(f"kill {kill} of rank {victim}: the others ended with {others}")
        after = complete_checkpoints(run / "checkpoints")
        if (after and step_of(after[-1]) < before[0]) or (before[0] and not after):
            broken.append(f"kill {kill}: the checkpoint of step {before[0]} is missing")
        if after and not same_bits(after[-1], undisturbed / "checkpoints" / after[-1].name):
            broken.append(f"kill {kill}: {after[-1].name} is not the undisturbed run's")
        case.count(broken)
        if (after and step_of(after[-1]) >= NUM_STEPS - 2) or kill == number - 1:
            case.failures += bench.finish(values, world)
            values = bench.values(world, keep_last=3)
    case.figures["during a save"] = in_checkpoints
    if in_checkpoints < number // 6:
        case.failures.append(f"only {in_checkpoints} kills fell into a save")
    return case


def _has_passed(run: Path, step: int) -> bool:
    return step_of_run(run) > step


def _is_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(f"step-*{PARTIAL}"))


@contextmanager
def small_disk(bench: Bench, values: dict, world: int) -> Iterator[Path]:
    """Train two steps and move the checkpoints to a small tmpfs; yields its folder."""
    run = Path(values["out"])
    with Job(values, world, "--stop-after", "2") as job:
        assert job.end() == [0] * world, job.output()
    disk = run.with_name(run.name + "-disk")
    disk.mkdir()
    size = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={6 * size}", "tmpfs", str(disk)], check=True)
    try:
        (run / "checkpoints/step-00000002").rename(run / "moved")
        (run / "checkpoints").rmdir()
        subprocess.run(["cp", "-r", str(run / "moved"), str(disk / "step-00000002")], check=True)
        (run / "checkpoints").symlink_to(disk)
        yield disk
        # Copy the checkpoints back, to be verified.
        (run / "checkpoints").unlink()
        subprocess.run(["cp", "-r", str(disk), str(run / "checkpoints")], check=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def refusing_disk(bench: Bench, kind: str, policy: str) -> Case:
    """The disk of the checkpoints becomes full or read-only, and later writable again."""
    case, world = Case(f"disk {kind}, on_save_error: {policy}"), 1
    values = bench.values(world, on_save_error=policy)
    run = Path(values["out"])
    bench.undisturbed(world)
    broken = []
    with small_disk(bench, values, world) as disk:
        _refuse(disk, kind)
        with Job(values, world) as job:
            if policy == "continue":
                if not job.wait_for(lambda: "training continues (checkpoint.on_save_error)" in job.output()):
                    broken.append(f"no warning: {job.output()[-300:]}")
                _allow(disk, kind)
                status = ExitStatus.OK
            else:
                status = ExitStatus.REFUSED
            if job.end() != [status]:
                broken.append(f"ended with {job.end()}, not {status}: {job.output()[-300:]}")
        kept = complete_checkpoints(disk)
        if not kept or (policy == "stop" and step_of(kept[-1]) != 2):
            broken.append(f"checkpoints are {[path.name for path in kept]}")
        broken += verified(run)
        if policy == "stop":
            _allow(disk, kind)
            broken += bench.finish(values, world)
        elif not (errors := read_metrics(run)[-1]["save_errors"]):
            broken.append(f"{errors} errors counted")
    case.count(broken + bench.differences(run, world))
    return case


def full_run_folder(bench: Bench, policy: str) -> Case:
    """The disk of the whole run fills up: checkpoints, metrics, the launcher's log."""
    case, world = Case(f"disk full under the whole run, on_save_error: {policy}"), 2
    values = bench.values(world, on_save_error=policy)
    disk = Path(values["out"] + "-disk")
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True)
    run = disk / "run"
    values["out"] = str(run)
    try:
        with Job(values, world) as job:
            job.wait_for(lambda: step_of_run(run) >= 4)
            _refuse(disk, "full")
            with (
                job.log.open("ab", buffering=0) as log,
                suppress(OSError),
            ):  # the free bytes of its last block
                while True:
                    log.write(b"\n")
            if policy == "continue":
                began = step_of_run(run)
                job.wait_for(lambda: step_of_run(run) >= min(began + 5, NUM_STEPS - 2))
                _allow(disk, "full")
            statuses = job.end()
        if policy == "stop":
            _allow(disk, "full")
        expected = [ExitStatus.OK if policy == "continue" else ExitStatus.REFUSED] * world
        broken = [] if statuses == expected else [f"ended with {statuses}, not {expected}"]
        broken += verified(run)
        if policy == "stop":
            broken += bench.finish(values, world)
        elif not (errors := read_metrics(run)[-1]["save_errors"]):
            broken.append(f"{errors} errors counted")
        case.count(broken + bench.differences(run, world))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return case


def _refuse(disk: Path, kind: str) -> None:
    if kind == "full":
        with (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(4096))
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def _allow(disk: Path, kind: str) -> None:
    if kind == "full":
        (disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


def slow_saves(bench: Bench, policy: str) -> Case:
    """Writing a file of a checkpoint takes half a second; a step takes a tenth."""
    case = Case(f"disk slow, on_save_error: {policy}")
    values = bench.values(1, on_save_error=policy)
    broken = bench.finish(values, 1, partial(slow_disk, seconds=0.5)) + verified(Path(values["out"]))
    num_skipped = read_metrics(Path(values["out"]))[-1]["saves_skipped"]
    if (num_skipped > 0) != (policy == "continue"):
        broken.append(f"{num_skipped} saves skipped")
    case.figures["saves skipped"] = num_skipped
    case.count(broken)
    return case


def nans(bench: Bench, victims: Sequence[int] = range(4)) -> Case:
    """NaN in one rank's gradient: all ranks skip the step, as if its batch did not exist, and count it."""
    case, world, bad = Case("NaN in one rank's gradient, 2 x 2 ranks"), 4, range(5, 6)
    without = bench._finish(bench.values(world), world, partial(without_batches, batches=bad))
    for victim in victims:
        values = bench.values(world)
        with Job(values, world, inject=partial(nan_gradients, victim=victim, batches=bad)) as job:
            statuses = job.end()
        broken = [] if statuses == [0] * world else [f"ended with {statuses}: {job.output()[-300:]}"]
        num_skipped = read_metrics(job.run)[-1]["skipped_steps"]
        if num_skipped != 1:
            broken.append(f"{num_skipped} steps skipped")
        if not broken and not same_bits(newest(job.run), newest(without)):
            broken.append(f"rank {victim}: not the run without the batch")
        case.count(broken)
    return case


def rollback(bench: Bench) -> Case:
    """Five consecutive bad steps: rollback to the last checkpoint, without the data since then."""
    case, bad = Case("five consecutive bad steps"), range(7, 12)
    # The checkpoint is of step 6; the good batch of step 7 is skipped as well.
    without = bench._finish(bench.values(1), 1, partial(without_batches, batches=range(6, 12)))
    values = bench.values(1)
    with Job(values, 1, inject=partial(nan_gradients, victim=0, batches=bad)) as job:
        statuses = job.end()
    broken = [] if statuses == [0] else [f"ended with {statuses}: {job.output()[-300:]}"]
    line = read_metrics(job.run)[-1]
    if (line["skipped_steps"], line["rollbacks"]) != (5, 1):
        broken.append(f"{line['skipped_steps']} skipped, {line['rollbacks']} rollbacks")
    if not broken and not same_bits(newest(job.run), newest(without)):
        broken.append("not the run without the data since the checkpoint")
    case.count(broken)
    return case


def stopped_rank(bench: Bench) -> Case:
    """SIGSTOP: the watchdog names the rank and dumps the stacks, and every other rank exits with RETRY."""
    case, world, victim = Case("SIGSTOP of one of 2 x 2 ranks"), 4, 2
    values = bench.values(world)
    run = Path(values["out"])
    with Job(values, world) as job:
        job.wait_for(lambda: step_of_run(run) >= 3)
        os.kill(job.processes[victim].pid, signal.SIGSTOP)
        began = time.monotonic()
        for rank, process in enumerate(job.processes):
            if rank != victim:
                process.join(60)
        seconds = time.monotonic() - began
        statuses = [p.exitcode for rank, p in enumerate(job.processes) if rank != victim]
        broken = [] if statuses == [ExitStatus.RETRY] * 3 else [f"the others ended with {statuses}"]
        if f"rank {victim} does not answer" not in job.output():
            broken.append(f"not named: {job.output()[-300:]}")
    if seconds > 60:
        broken.append(f"the others ended after {seconds:.0f} s")
    if len(list((run / "stacks").glob("rank-*.txt"))) < 3:
        broken.append("stacks are missing")
    case.figures["seconds until all ended"] = round(seconds, 1)
    case.count(broken + bench.finish(values, world))
    return case


def flipped_bits(bench: Bench, each: int, names: Sequence[str] = (), seed: int = 0) -> Case:
    """A flipped bit in the newest checkpoint: detected by its hash and reported; the one before is loaded."""
    case, draw, world = Case("a bit flipped in any file of the newest checkpoint"), random.Random(seed), 2
    bench.undisturbed(world)
    values = bench.values(world)
    with Job(values, world, "--stop-after", "6") as job:
        assert job.end() == [0] * world, job.output()
    files = [str(p.relative_to(newest(job.run))) for p in sorted(newest(job.run).rglob("*")) if p.is_file()]
    names = names or files
    for name in [name for name in names for _ in range(each)]:
        again = bench.values(world)
        subprocess.run(["cp", "-r", str(job.run), again["out"]], check=True)
        file = newest(Path(again["out"])) / name
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        with Job(again, world) as resumed:
            statuses = resumed.end()
            output = resumed.output()
        broken = [] if statuses == [0] * world else [f"{name}: ended with {statuses}: {output[-300:]}"]
        if "resuming from the previous checkpoint" not in output or "resumes after step 4" not in output:
            broken.append(f"{name}: not reported: {output[:300]}")
        case.count(broken or bench.differences(resumed.run, world))
    case.figures["files"] = len(names)
    return case


def preemptions(bench: Bench, number: int, seed: int = 0) -> Case:
    """SIGTERM or SIGUSR1 to a rank of 2 x 2 at random moments, once or twice: all save and exit."""
    case, draw, world = Case("SIGTERM or SIGUSR1 to one of 2 x 2 ranks"), random.Random(seed), 4
    bench.undisturbed(world)
    values = bench.values(world)
    for _ in range(number):
        run = Path(values["out"])
        with Job(values, world) as job:
            moment = draw.choice(["start", "step", "checkpoint"])
            if moment == "start":
                job.wait_for(lambda: job.log.exists() and job.output() != "")
            elif moment == "step":
                job.wait_for(partial(_has_passed, run, step_of_run(run)))
            else:
                job.wait_for(partial(_is_saving, run))
            for _ in range(draw.choice([1, 2])):
                number_of_signal = draw.choice([signal.SIGTERM, signal.SIGUSR1])
                os.kill(job.processes[draw.randrange(world)].pid, number_of_signal)
                time.sleep(0.05)
            statuses = job.end()
            output = job.output()
        finished = statuses == [0] * world
        broken = (
            []
            if finished or statuses == [ExitStatus.RETRY] * world
            else [f"{moment}: {statuses}: {output[-300:]}"]
        )
        if moment != "start" and not finished and step_of(newest(run)) != step_of_run(run):
            broken.append(f"{moment}: step {step_of_run(run)} is not saved")
        case.count(broken + verified(run))
        if finished:
            case.failures += bench.differences(run, world)
            values = bench.values(world)
    case.failures += bench.finish(values, world)
    return case


def endurance(bench: Bench, num_steps: int) -> Case:
    """Tiny steps: memory, open files and the time of a step stay constant.

    The time is measured relative to a fixed piece of work in the same process, to exclude the drift of the
    machine; the drift in plain seconds is reported as well.
    """
    case = Case(f"{num_steps:,} tiny steps")
    every = num_steps // 200
    values = bench.values(1, every=num_steps // 10)
    values["train"] |= {"num_steps": num_steps, "global_batch_size": 1}
    values["telemetry"] = {"log_every": every, "trackers": ["tensorboard", "prometheus"]}
    values["data"] |= {"num_streams": 1, "sequence_length": 32, "images_per_row": 1}
    values["model"] |= {
        "num_layers": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "num_kv_heads": 1,
        "ffn_hidden_size": 16,
    }
    values["model"]["patch_size"] = 4
    run, seen = Path(values["out"]), []
    references = run.with_name(run.name + ".references")
    with Job(values, 1, inject=partial(with_reference, every=every // 4, path=references)) as job:
        process = psutil.Process(job.processes[0].pid)
        while job.processes[0].is_alive():
            try:
                seen.append((step_of_run(run), process.memory_info().rss, process.num_fds()))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.5)
        if job.end() != [0]:
            case.count([f"ended with {job.end()}: {job.output()[-300:]}"])
            return case
    # A save uses memory and files for a moment, so the minimum of a tenth of the run counts.
    first, last = (
        [entry for entry in seen if low * num_steps <= entry[0] < high * num_steps]
        for low, high in ((0.15, 0.25), (0.85, 0.95))
    )
    memory = [min(entry[1] for entry in part) for part in (first, last)]
    files = [min(entry[2] for entry in part) for part in (first, last)]
    seconds = [line["step_seconds"] for line in read_metrics(run)[1:]]
    work = [float(line) for line in references.read_text().split()]
    work = [median(work[first : first + 4]) for first in range(0, len(work), 4)]  # of a line of metrics each
    ratios = [step / reference for step, reference in zip(seconds, work, strict=True)]
    early, late = slice(20, 70), slice(-50, None)
    growth, drift = memory[1] / memory[0] - 1, median(ratios[late]) / median(ratios[early]) - 1
    plain = median(seconds[early])
    case.figures = {
        "memory growth": f"{growth:+.2%} of {memory[0] / 2**20:.0f} MiB",
        "open files": files,
        "step time drift": f"{drift:+.2%} of {plain * 1e3:.2f} ms, in units of a fixed piece of work",
        "in plain seconds": f"{median(seconds[late]) / plain - 1:+.2%}",
    }
    is_flat = growth <= 0.02 and files[1] <= files[0] and drift <= 0.05
    case.count([] if is_flat else [str(case.figures)])
    return case
