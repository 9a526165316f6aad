"""Checkpoints: tensors under canonical names, complete or not there at all, for any topology.

A checkpoint is a folder `step-00000400` with `tensors/` (torch.distributed.checkpoint: model, ema, exp_avg
and exp_avg_sq, each by parameter name and in its whole shape; every rank writes what it owns), `state.json`
(step, stream states, and what else the run says) and, written last, `manifest.json` with the size and hash
of every file. It is made beside its place and renamed into it. No random state is kept, for nothing in a
step draws from a global generator.
"""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import megafusion.device  # noqa: F401 - before deepspeed

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from deepspeed import DeepSpeedEngine
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from megafusion.checkpoint.chunks import Chunks
from megafusion.checkpoint.folder import (
    KINDS,
    PARTIAL,
    complete_checkpoints,
    hash_files,
    publish,
    remove,
    step_of,
    verify_checkpoint,
)
from megafusion.checkpoint.planners import ChunkSavePlanner
from megafusion.checkpoint.reader import read_chunks
from megafusion.engine.ema import Ema
from megafusion.engine.optimizer_state import OptimizerShard, sync_model_from_master
from megafusion.errors import UserError
from megafusion.parallel.errors import raise_on_all_ranks


class SaveFailed(UserError):
    """A checkpoint could not be written, or is not worth keeping; the ones before are as they were."""


class CheckpointManager:
    """Saves and loads a run's checkpoints. Every rank makes one and calls it at the same steps.

    A save takes as long as a copy to host memory; a thread writes while training goes on. Only ranks of this
    group of threads talk to one another, so nothing mixes with what training sends.

    folder: of the checkpoints; keep_last: newest ones that stay; keep_every: steps whose multiples stay too,
    0 for none. Needs host memory for what this rank owns: 16 bytes a parameter.
    """

    def __init__(
        self,
        folder: Path,
        engine: DeepSpeedEngine,
        optimizer_shards: list[OptimizerShard],
        ema: Ema,
        keep_last: int,
        keep_every: int = 0,
    ):
        self._folder, self._engine = folder, engine
        self._keep_last, self._keep_every = keep_last, keep_every
        # What is kept: by name, the master whose place it has, and the fragment on the device.
        self._fragments: dict[str, tuple[OptimizerShard, Tensor]] = {}
        for master, average in zip(optimizer_shards, ema.fragments, strict=True):
            values = (master.weight, average, master.exp_avg, master.exp_avg_sq)
            for kind, fragment in zip(KINDS, values, strict=True):
                self._fragments[f"{kind}.{master.name}"] = (master, fragment)
        self._copies: list[Tensor] = []
        self._boxes: dict[str, Chunks] = {}
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[Path] | None = None
        if dist.get_rank() == 0:
            for left_behind in folder.glob(f"step-*{PARTIAL}"):
                remove(left_behind)

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let the save under way end; report its failure unless something else failed already."""
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown()

    def save(self, state: dict, stream_state: dict) -> None:
        """Begin to write `folder`/step-N; all but the ones to be kept are deleted once it is complete.

        state: plain values, `step` among them, to which the streams of all ranks are added as `data`.

        Raises SaveFailed, on every rank, where the save before this one failed.
        """
        self.wait()
        self._copy_to_host()
        self._saving = self._thread.submit(self._write, state, stream_state)

    @property
    def is_saving(self) -> bool:
        """Whether this rank still writes; others may have ended a moment before."""
        return self._saving is not None and not self._saving.done()

    def wait(self) -> None:
        """Wait for the save under way. Called by every rank.

        Raises SaveFailed on every rank, naming the folder and the rank, where it could not be written;
        nothing half-written stays then.
        """
        saving, self._saving = self._saving, None
        with raise_on_all_ranks(self._group):
            if saving is not None:
                saving.result()

    def published(self) -> Path | None:
        """Wait for the save under way, on this rank alone: its folder; None where there is none or it failed.

        A failure is told by the next `save` or `wait`, to every rank.
        """
        if self._saving is None or self._saving.exception() is not None:
            return None
        return self._saving.result()

    def load(self, path: Path) -> dict:
        """Put weights, moments and averages in place, whatever the topology; returns the plain state.

        Raises, on every rank, before anything is overwritten: DamagedCheckpoint where a file is missing or
        not as it was written, UserError where the checkpoint is of another model.
        """
        with raise_on_all_ranks(self._group):
            verify_checkpoint(path, dist.get_rank(), dist.get_world_size())
        boxes = {
            name: Chunks(fragment, master.start, master.layout)
            for name, (master, fragment) in self._fragments.items()
        }
        parts: list[dict | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, {name: entry.shape for name, entry in boxes.items()}, self._group)
        shapes = {name: shape for part in parts for name, shape in part.items()}
        state = json.loads((path / "state.json").read_text())
        with raise_on_all_ranks(self._group):
            read_chunks(path, boxes, shapes, KINDS)
        sync_model_from_master(self._engine, state["step"])
        return state

    def _copy_to_host(self) -> None:
        """Fill the host's copies, which are made at the first save and used again."""
        if not self._copies:
            on_gpu = torch.cuda.is_available()
            lengths = [len(fragment) for _, fragment in self._fragments.values()]
            self._copies = list(torch.empty(sum(lengths), pin_memory=on_gpu).split(lengths))
            self._boxes = {
                name: Chunks(copy, master.start, master.layout)
                for (name, (master, _)), copy in zip(self._fragments.items(), self._copies, strict=True)
            }
        for copy, (_, fragment) in zip(self._copies, self._fragments.values(), strict=True):
            copy.copy_(fragment, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _write(self, state: dict, stream_state: dict) -> Path:
        """The thread's work, on all ranks together: write, hash, publish, delete."""
        rank, group = dist.get_rank(), self._group
        is_first = rank == 0
        path = self._folder / f"step-{state['step']:08d}"
        partial = path.with_name(path.name + PARTIAL)
        parts = [None] * dist.get_world_size() if is_first else None
        dist.gather_object(stream_state["streams"], parts, group=group)
        try:
            with raise_on_all_ranks(group):
                self._check_finite(path)
            with raise_on_all_ranks(group), _named(path):
                if is_first:
                    streams = {number: stream for part in parts for number, stream in part.items()}
                    shutil.rmtree(partial, ignore_errors=True)
                    (partial / "tensors").mkdir(parents=True)
                    (partial / "state.json").write_text(
                        json.dumps({**state, "data": {**stream_state, "streams": streams}})
                    )
            # No copying ahead: torch would do it with a CUDA stream, on the first device.
            writer = _Writer(partial / "tensors", per_thread_copy_ahead=0)
            with raise_on_all_ranks(group), _named(path):
                dcp.save(self._boxes, storage_writer=writer, planner=ChunkSavePlanner(), process_group=group)
            with raise_on_all_ranks(group), _named(path):
                own = hash_files(partial, f"tensors/__{rank}_*.distcp")
            dist.gather_object(own, parts, group=group)
            with raise_on_all_ranks(group), _named(path):
                if is_first:
                    own = hash_files(partial, "state.json") | hash_files(partial, "tensors/.metadata")
                    publish(
                        partial, path, {name: entry for part in (own, *parts) for name, entry in part.items()}
                    )
            if is_first:
                self._delete_old()
        finally:
            if is_first:
                shutil.rmtree(partial, ignore_errors=True)
        return path

    def _check_finite(self, path: Path) -> None:
        """SaveFailed where a weight is no number: such a checkpoint must not push out a good one."""
        for name, copy in zip(self._fragments, self._copies, strict=True):
            if name.partition(".")[0] in ("model", "ema") and not torch.isfinite(copy).all():
                raise SaveFailed(
                    f"{path}: not kept, for {name} holds values that are no numbers; go on with a "
                    "lower optimizer.learning_rate"
                )

    def _delete_old(self) -> None:
        for old in complete_checkpoints(self._folder)[: -self._keep_last]:
            if not self._keep_every or step_of(old) % self._keep_every:
                remove(old)


class _Writer(dcp.FileSystemWriter):
    """torch's writer of a checkpoint's folder, which says what the disk said."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch.save notices a full disk once more as it closes its archive, and reports that.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What a rank's disk refuses, as a UserError that names the checkpoint and the rank."""
    try:
        yield
    except OSError as error:
        refused = {dist.get_rank(): error}
    except dcp.api.CheckpointException as error:
        refused = {rank: failure[0] for rank, failure in error.failures.items()}
        if not all(isinstance(failure, OSError) for failure in refused.values()):
            raise  # a defect of ours
    else:
        return
    reasons = ", ".join(f"rank {rank}: {error.strerror or error}" for rank, error in sorted(refused.items()))
    raise SaveFailed(
        f"{path}: cannot write the checkpoint ({reasons}); free space and start again: the run resumes from "
        "the checkpoint before"
    )
