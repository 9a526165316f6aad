"""A run: resumed equals uninterrupted, what does not fit is refused at start, what breaks is survived."""

import errno
import fcntl
import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from safetensors.torch import load_file

from megafusion.checkpoint.folder import complete_checkpoints, verify_checkpoint
from megafusion.checkpoint.manager import SaveFailed, disk_errors
from megafusion.config import load_config, parse_config
from megafusion.engine.process_group import start_process_group
from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.parallel.mesh import make_mesh
from megafusion.resilience import attempts
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.telemetry.status import show_status
from megafusion.train.build import build_components, build_engine, idle_gpu
from megafusion.train.config import RunConfig
from megafusion.train.export import model_card
from megafusion.train.loop import train, train_step
from tests.support.runs import assert_same_run, losses, start, tensors
from tests.support.small import ROOT
from tests.support.workers import run_workers


@pytest.fixture
def long_values(run_values):
    """Twelve steps, over the end of an epoch of every stream."""
    run_values["train"]["num_steps"] = 12
    run_values["checkpoint"] = {"every": 4}
    return run_values


def test_resumed_equals_uninterrupted_bit_for_bit(long_values, tmp_path):
    whole = start(long_values, out=str(tmp_path / "whole"))
    for stop in (5, 8, None):  # at a checkpoint's step, and between two
        parts = start(long_values, stop, out=str(tmp_path / "parts"))
    assert_same_run(whole, parts)
    state = json.loads((complete_checkpoints(parts / "checkpoints")[-1] / "state.json").read_text())
    assert min(stream["position"]["pairs"][0] for stream in state["data"]["streams"].values()) >= 1
    assert (whole / "pipeline/model.safetensors").read_bytes() == (
        parts / "pipeline/model.safetensors"
    ).read_bytes()


def test_same_seed_same_bits_and_another_seed_others(run_values, tmp_path):
    a, b, c = (start(run_values, out=str(tmp_path / n), seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert_same_run(a, b)
    assert losses(a) != losses(c)


def test_a_finished_run_is_left_as_it_is(run_values, tmp_path):
    run = start(run_values)
    before = losses(run)
    start(run_values)
    assert losses(run) == before


# test_lost_rank.py kills a rank of a smaller run.
@pytest.mark.full
def test_a_killed_run_goes_on_where_its_last_checkpoint_stands(long_values, tmp_path):
    whole = start(long_values, out=str(tmp_path / "whole"))
    long_values["out"] = str(tmp_path / "killed")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(long_values))
    command = [sys.executable, "-m", "megafusion.cli", "train", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed/checkpoints"
    deadline = time.monotonic() + 120
    while not complete_checkpoints(checkpoints) and time.monotonic() < deadline:
        assert process.poll() is None, "ended before its first checkpoint"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for checkpoint in complete_checkpoints(checkpoints):
        verify_checkpoint(checkpoint)
    start(long_values)
    assert_same_run(whole, tmp_path / "killed")


def test_a_run_that_another_process_trains_is_refused_and_untouched(run_values, monkeypatch):
    run = start(run_values)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setattr(attempts, "WAIT_SECONDS", 0)
    with (run / attempts.STEP).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="trains in this folder"):
            start(run_values)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_a_first_attempt_beside_another_writes_nothing(run_values, monkeypatch):
    """Two starts of one new run at once, before either has frozen its configuration."""
    monkeypatch.setattr(attempts, "WAIT_SECONDS", 0)
    run = Path(run_values["out"])
    other = attempts.Attempts(run)
    other.claim()
    with pytest.raises(UserError, match="trains in this folder"):
        start(run_values)
    assert [path.name for path in run.iterdir()] == [attempts.STEP]
    other._release()
    start(run_values, stop_after=1)  # what is left of it is no reason to refuse


def test_nothing_in_a_step_draws_from_a_global_generator(run_config):
    """So that no random state needs to be saved."""

    def states() -> tuple:
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    start_process_group()
    mesh = make_mesh(run_config.parallel)
    parts = build_components(run_config, mesh)
    engine = build_engine(run_config, mesh)
    before = states()
    for _ in range(2):
        train_step(engine, parts.loader.next(), 1e-3)
    assert states() == before
    torch.rand(1)
    assert states() != before


def test_old_checkpoints_go_and_samples_come(run_values):
    run_values["checkpoint"] = {"every": 1, "keep_last": 2}
    run_values["samples"] = {"every": 3, "num_pairs": 2}
    run = start(run_values)
    assert [c.name for c in complete_checkpoints(run / "checkpoints")] == ["step-00000005", "step-00000006"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        "step-00000003.png",
        "step-00000003.txt",
        "step-00000006.png",
        "step-00000006.txt",
    ]
    assert list((run / "tensorboard").iterdir())
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["deepspeed"]
    assert len(environment["shards"]["pairs"]) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts something that cannot be deleted")
def test_an_old_checkpoint_that_cannot_be_deleted_is_said_and_harms_nothing(run_values, capsys):
    run_values["checkpoint"]["keep_last"] = 1
    run = start(run_values, stop_after=3)
    (old,) = complete_checkpoints(run / "checkpoints")
    stuck = old / "stuck"
    stuck.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(stuck)], check=True)
    try:
        start(run_values)
        assert "step-00000003.partial: cannot be deleted (Device or resource busy)" in capsys.readouterr().err
        assert read_metrics(run)[-1]["save_errors"] == 0
        verify_checkpoint(run / "checkpoints/step-00000006")
        start(run_values)
    finally:
        for mounted in (run / "checkpoints").glob("*/stuck"):
            subprocess.run(["umount", str(mounted)], check=True)


def test_a_changed_configuration_is_refused_for_an_old_run(run_values):
    run = start(run_values, stop_after=1)
    before = losses(run)
    run_values["optimizer"]["weight_decay"] = 0.5
    with pytest.raises(UserError, match=r"other values of optimizer\.weight_decay"):
        start(run_values)
    assert losses(run) == before
    del run_values["optimizer"]["weight_decay"]
    run_values["checkpoint"]["every"] = 5
    run_values["telemetry"] = {"log_every": 2}
    start(run_values)


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_a_longer_run_equals_one_that_was_so_from_the_start(long_values, tmp_path, capsys, schedule):
    long_values["optimizer"] |= {"schedule": schedule, "decay_ratio": 0.25}
    whole = start(long_values, out=str(tmp_path / "whole"))
    lengths = {n: long_values["train"] | {"num_steps": n} for n in (8, 10, 12)}
    stop = None if schedule == "constant" else 6  # before the decay of the shorter run
    parts = start(long_values, stop, train=lengths[8], out=str(tmp_path / "parts"))
    start(long_values, train=lengths[12], out=str(parts))
    said = capsys.readouterr().err
    assert "resumes with train.num_steps 12 instead of 8" in said
    assert "the learning rate of step" not in said
    assert_same_run(whole, parts)
    with pytest.raises(UserError, match=r"has trained 12 steps, more than train\.num_steps 10; give at leas"):
        start(long_values, train=lengths[10], out=str(parts))


# The quick case is the test above, of 8 and 4.
@pytest.mark.full
@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_sixty_steps_and_forty_more_equal_a_hundred(long_values, tmp_path, schedule):
    long_values["optimizer"] |= {"schedule": schedule, "num_warmup_steps": 10}
    long_values["checkpoint"]["every"] = 20
    lengths = {n: long_values["train"] | {"num_steps": n} for n in (60, 100)}
    whole = start(long_values, train=lengths[100], out=str(tmp_path / "whole"))
    out = str(tmp_path / "parts")
    if schedule == "constant":
        start(long_values, train=lengths[60], out=out)
    else:  # a run of 60 would decay, so a longer one stops there
        start(long_values, 60, train=lengths[60] | {"num_steps": 80}, out=out)
    parts = start(long_values, train=lengths[100], out=out)
    assert len(losses(whole)) >= 10
    assert_same_run(whole, parts)


def test_a_longer_cosine_says_how_the_rate_goes_on(run_values, capsys):
    run_values["optimizer"] |= {"learning_rate": 1e-3, "final_learning_rate": 0, "num_warmup_steps": 0}
    run = start(run_values)
    steps = run_values["train"]["num_steps"]
    run_values["train"]["num_steps"] = 2 * steps
    start(run_values)
    assert f"the learning rate of step {steps + 1} is 0.0005 instead of 0, and ends at 0 after" in (
        capsys.readouterr().err
    )
    assert len(losses(run)) == 2 * steps
    run_values["optimizer"]["learning_rate"] = 5e-4
    start(run_values)  # trains nothing
    show_status(run, console := Console(record=True, width=200))
    assert f"step {2 * steps} of {2 * steps}" in console.export_text()
    card = model_card("model", run, None)
    assert f"| steps | {2 * steps} of {2 * steps} |" in card
    earlier = model_card("model", run, None, steps - 1)
    assert f"| steps | {steps - 1} of {2 * steps} |" in earlier
    (shown,) = re.findall(r"\| text_loss \| (\S+) \|", earlier)
    assert float(shown) == pytest.approx(read_metrics(run)[steps - 2]["text_loss"], rel=1e-4)
    assert "| learning rate | 0.001, 0 warm-up steps, cosine |" in card


def test_a_lower_learning_rate_is_taken_and_recorded(run_values, capsys):
    run = start(run_values, stop_after=3)
    run_values["optimizer"]["learning_rate"] = 1e-3
    start(run_values)
    assert "resumes with optimizer.learning_rate 0.001 instead of 0.003" in capsys.readouterr().err
    assert "| learning rate | 0.001, 2 warm-up steps" in model_card("model", run, None)
    rates = [line["learning_rate"] for line in read_metrics(run)]
    assert rates[3] < 1e-3 < rates[2]
    assert [begun["changed"] for begun in attempts.read_attempts(run)] == [
        {},
        {"optimizer.learning_rate": [3e-3, 1e-3]},
    ]


def test_a_start_that_trains_nothing_says_so(run_values, capsys):
    run = start(run_values, stop_after=3)
    assert "resumes" not in capsys.readouterr().err
    start(run_values, stop_after=2)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{run}: is at step 3, so --stop-after 2 trains nothing; name a later step" in said
    start(run_values)
    assert f"{run}: resumes after step 3" in " ".join(capsys.readouterr().err.split())
    run_values["optimizer"]["learning_rate"] = 1e-3
    start(run_values)
    said = " ".join(capsys.readouterr().err.split())
    assert "learning_rate 0.001 instead of 0.003, without effect: all steps are made" in said
    assert "is finished after step 6; a larger train.num_steps makes it longer" in said
    assert "the learning rate of step" not in said
    assert len(losses(run)) == 6


def test_what_leaves_a_gpu_idle_is_told_and_the_papers_sizes_do_not(run_config):
    said = [sentence.partition(" ")[0] for sentence in idle_gpu(run_config)]
    assert said == ["train.precision", "model.attention", "data.num_workers"]
    sizes = [*(ROOT / "configs").glob("*b.yaml"), *(ROOT / "configs/baselines").glob("*b-*.yaml")]
    assert len(sizes) == 9
    for path in sizes:
        assert idle_gpu(load_config(RunConfig, path)) == [], path


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_on_a_cpu_without_it_is_warned_of(run_values, monkeypatch, capsys, has_bf16):
    monkeypatch.setattr("megafusion.train.build.multiplies_bf16", lambda device: has_bf16)
    run_values["train"]["precision"] = "bf16"
    start(run_values, stop_after=1)
    assert ("precision bf16 is about 20 times as slow" in capsys.readouterr().err) != has_bf16


def test_values_that_cannot_do_what_they_say_are_warned_of_at_the_start(run_values, capsys):
    start(run_values, stop_after=1)
    assert "warning" not in capsys.readouterr().err
    run_values["optimizer"]["num_warmup_steps"] = 60
    run_values["data"]["flip"] = 0.5
    start(run_values, stop_after=1, out=run_values["out"] + "-2")
    said = capsys.readouterr().err
    assert "warning: optimizer.num_warmup_steps 60 is not below train.num_steps 6" in said
    assert "warning: data.flip and data.crop change no image, because every source holds latents" in said


def test_a_run_leaves_nothing_in_its_process(run_values):
    """Neither threads of process groups nor open shards: a further run adds none to what libraries keep."""

    def held() -> tuple[int, int]:
        gc.collect()
        return len([*Path("/proc/self/task").iterdir()]), len([*Path("/proc/self/fd").iterdir()])

    counts = []
    for name in "abc":
        start(run_values, stop_after=1, out=f"{run_values['out']}-{name}")
        counts.append(held())
    assert counts[1] == counts[2]
    assert not dist.is_initialized()


def test_a_checkpoint_that_cannot_be_written_says_what_the_run_resumes_from(tmp_path):
    start_process_group()
    for then in ("has no earlier checkpoint, and begins anew", "resumes from step-00000002"):
        message = rf"rank 0: No space left .*free space and start again: the run {then}"
        with pytest.raises(SaveFailed, match=message), disk_errors(tmp_path / "step-00000005"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        (tmp_path / "step-00000002").mkdir(exist_ok=True)
        (tmp_path / "step-00000002" / "manifest.json").touch()


@pytest.mark.parametrize("left", ["environment.json", ".environment.json.x1y2", ".config.yaml.x1y2"])
def test_what_a_kill_leaves_of_the_record_is_no_reason_to_refuse(run_values, left):
    run = Path(run_values["out"])
    run.mkdir()
    (run / left).write_text("{")
    start(run_values, stop_after=1)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("state.json", "cut", r"state\.json: damaged"),
        ("tensors/__0_0.distcp", "flip", r"\.distcp: damaged"),
        ("tensors/.metadata", "remove", r"\.metadata: missing from the checkpoint"),
        ("manifest.json", "remove", None),
    ],
)
def test_a_damaged_checkpoint_is_named(run_values, name, damage, message):
    run = start(run_values, stop_after=2)
    (checkpoint,) = complete_checkpoints(run / "checkpoints")
    file = checkpoint / name
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "flip":  # of the same size, so that only the hash tells
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    if message is None:  # without its manifest it is no checkpoint
        assert complete_checkpoints(run / "checkpoints") == []
        with pytest.raises(UserError, match="the checkpoint is incomplete"):
            verify_checkpoint(checkpoint)
        return
    before = losses(run)
    with pytest.raises(UserError, match=message):
        start(run_values)
    assert losses(run) == before
    assert (run / "checkpoints/step-00000002.damaged").is_dir()
    with pytest.raises(UserError, match=r"only damaged checkpoints are left \(step-00000002.damaged\)"):
        start(run_values)  # and does not begin anew
    assert losses(run) == before


# tests/faults/test_faults.py fills a small disk, and tests/checkpoint has the same limit on two ranks.
@pytest.mark.full
def test_a_disk_that_is_full_ends_the_run_with_its_last_checkpoint_whole(run_values, tmp_path):
    """The limit on a file's size makes the real writes fail, as a full disk does."""
    start(run_values, stop_after=3)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run_values))
    size = max(p.stat().st_size for p in Path(run_values["out"]).rglob("*.distcp"))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    command = [sys.executable, "-m", "megafusion.cli", "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 2, done.stderr
    assert "step-00000006: cannot write the checkpoint" in done.stderr
    assert "free space" in done.stderr
    checkpoints = Path(run_values["out"]) / "checkpoints"
    assert [p.name for p in checkpoints.iterdir()] == ["step-00000003"]
    verify_checkpoint(checkpoints / "step-00000003")


def test_what_does_not_fit_is_refused_before_anything_is_written(run_values, tmp_path):
    cases = [
        (("model", "vocab_size"), 2000, r"model\.vocab_size 2000.*has 2048 ids"),
        (
            ("model", "image_sizes"),
            [[64, 64]],
            r"pairs: latents of 8x8, but the model's are 16x16",
        ),
        (("data", "tokenizer"), str(tmp_path / "none.model"), r"none\.model: no such tokenizer"),
        (("data", "vae"), str(tmp_path / "none"), r"none: no config\.json"),
        (("data", "num_streams"), 6, r"num_streams 6"),
        (
            ("train", "micro_batch_size"),
            3,
            r"global_batch_size 4 is not a multiple of train\.micro_batch_size 3",
        ),
    ]
    for (room, key), value, message in cases:
        changed = {**run_values, room: {**run_values[room], key: value}}
        with pytest.raises(UserError, match=message):
            start(changed)
    assert not Path(run_values["out"]).exists()


def test_non_finite_losses_stop_the_run(run_values):
    run_values["optimizer"] = {"learning_rate": 1e30, "num_warmup_steps": 0, "gradient_clip": 0.0}
    message = r"no checkpoint to roll back to; start again with a lower optimizer\.learning_rate"
    with pytest.raises(UserError, match=message) as found:
        start(run_values)
    assert found.value.exit_status == 1


def start_two_ranks(values: dict, config: Path) -> None:
    """Train with two processes under DeepSpeed's launcher."""
    config.write_text(yaml.safe_dump(values))
    launcher = shutil.which("deepspeed") or str(Path(sys.executable).parent / "deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    module = ["--num_gpus", "2", "--no_local_rank", "--master_port", port, "--module", "megafusion.cli"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [launcher, *module, "train", str(config)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def assert_same_course(alone: Path, other: Path) -> None:
    """Losses but for rounding, and the streams of every rank where they should stand."""
    torch.testing.assert_close(torch.tensor(losses(alone)), torch.tensor(losses(other)), rtol=2e-4, atol=1e-5)
    last = [complete_checkpoints(run / "checkpoints")[-1] / "state.json" for run in (alone, other)]
    first, second = (json.loads(path.read_text()) for path in last)
    assert (first["step"], first["data"]) == (second["step"], second["data"])


# Two ranks without the launcher resume below; local.sh, in test_launch.py, starts DeepSpeed's launcher.
@pytest.mark.full
def test_two_ranks_under_the_deepspeed_launcher_equal_one_which_can_go_on_from_them(run_values, tmp_path):
    """The same code, gradients and data; only the order of float additions differs."""
    alone, two = start(run_values, out=str(tmp_path / "alone")), tmp_path / "two"
    start_two_ranks(run_values | {"out": str(two)}, tmp_path / "config.yaml")
    assert_same_course(alone, two)
    shutil.rmtree(complete_checkpoints(two / "checkpoints")[-1])
    start(run_values, out=str(two))  # one rank from step 3
    assert_same_course(alone, two)


def train_values(values: dict) -> None:
    train(parse_config(RunConfig, values, "test"))


def test_sheets_and_the_published_model_come_from_checkpoints_where_no_rank_holds_the_whole(run_values):
    run_values["samples"] = {"every": 3, "num_pairs": 1}
    run_workers(train_values, 2, run_values)
    run = Path(run_values["out"])
    assert [p.name for p in sorted((run / "samples").glob("*.png"))] == [
        "step-00000003.png",
        "step-00000006.png",
    ]
    published = load_file(run / "pipeline/model.safetensors")
    stored = tensors(run / "checkpoints/step-00000006")
    assert all(torch.equal(tensor, stored[f"ema.{name}"]) for name, tensor in published.items())
    assert any(not torch.equal(tensor, stored[f"model.{name}"]) for name, tensor in published.items())


@pytest.mark.full
def test_two_ranks_go_on_from_the_checkpoint_of_one(run_values, tmp_path):
    alone = start(run_values, out=str(tmp_path / "alone"))
    resumed = start(run_values, stop_after=3, out=str(tmp_path / "resumed"))
    run_workers(train_values, 2, run_values | {"out": str(resumed)})
    assert_same_course(alone, resumed)


def test_a_flow_model_is_trained_published_and_drawn_from(run_values):
    run_values["objective"] = {"noise_process": {"kind": "flow", "prediction_type": "sample"}}
    run_values["sampling"] = {"num_inference_steps": 3, "max_new_tokens": 2}
    with pytest.raises(UserError, match=r"sampling\.sampler ddim"):
        start(run_values, sampling={"sampler": "ddim"})
    run = start(run_values)
    assert losses(run)[-1][2] > 0
    pipeline = TransfusionPipeline.from_pretrained(run / "pipeline")
    (image,) = pipeline.draw(["red apple"])
    assert np.asarray(image).std() > 0


def test_the_model_is_published_from_host_memory(run_values, monkeypatch):
    """A device that training fills has no room for a second, whole model."""
    monkeypatch.setattr(TransfusionPipeline, "to", lambda *_: pytest.fail("moved to a device"))
    assert (start(run_values) / "pipeline/model.safetensors").is_file()
