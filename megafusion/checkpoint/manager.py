"""Saves and loads checkpoints of whole tensors by name, which any topology can load.

A checkpoint is a folder `step-00000400` with `tensors/` (torch.distributed.checkpoint: model, ema, exp_avg
and exp_avg_sq by parameter name, in the shapes of the whole parameters; every rank writes what it owns. Of a
frozen parameter there is `model` alone, in the type in which the forward reads it), `state.json` (step,
stream states, and the state of the run) and, written last, `manifest.json` with the size and hash of every
file. It is written under another name and then renamed. No random state is saved: nothing in a step samples
from a global generator but dropout, which each batch seeds.
"""

import json
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from megafusion.checkpoint.chunks import Chunks, ChunkSavePlanner
from megafusion.checkpoint.config import CheckpointConfig
from megafusion.checkpoint.folder import (
    KINDS,
    PARTIAL,
    best_checkpoint,
    clean_up,
    complete_checkpoints,
    hash_files,
    publish,
    remove,
    step_of,
    verify_checkpoint,
)
from megafusion.checkpoint.reader import CheckpointReader, TensorSource, read_chunks
from megafusion.engine.ema import Ema
from megafusion.engine.optimizer_state import OptimizerState
from megafusion.errors import UserError
from megafusion.parallel.errors import raise_on_all_ranks


class SaveFailed(UserError):
    """A checkpoint could not be written, or has weights that are not finite. Earlier ones are untouched."""


class CheckpointManager:
    """Saves and loads a run's checkpoints. Every rank makes one and calls it at the same steps.

    A save blocks for a copy to host memory; a thread then writes while training continues, over a process
    group of its own, so that its collectives do not mix with those of training.

    folder: of the checkpoints. config: which ones to keep. Needs host memory for this rank's state: 16 bytes
    a trained parameter.
    """

    def __init__(self, folder: Path, optimizer_state: OptimizerState, ema: Ema, config: CheckpointConfig):
        self.folder, self._optimizer_state, self._config = folder, optimizer_state, config
        self._on_device: dict[str, Chunks] = {}
        """By tensor name: what this rank's optimizer owns, in its own storage."""
        self._frozen = {
            f"model.{shard.name}": Chunks(shard.weight, shard.start, shard.shard_spec)
            for shard in optimizer_state.frozen
        }
        """By tensor name: what this rank holds of frozen parameters, written from there: it never changes."""
        for shard, average in zip(optimizer_state.shards, ema.fragments, strict=True):
            values = (shard.weight, average, shard.exp_avg, shard.exp_avg_sq)
            for kind, fragment in zip(KINDS, values, strict=True):
                self._on_device[f"{kind}.{shard.name}"] = Chunks(fragment, shard.start, shard.shard_spec)
        self._on_host: dict[str, Chunks] = {}
        """Copies of the same, allocated at the first save and used again."""
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[Path] | None = None
        if dist.get_rank() == 0:
            clean_up(folder)

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the running save; raise its failure unless another error is being raised.

        At a KeyboardInterrupt the save is left unfinished: the next start deletes what there is of it.
        """
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown(wait=kind is not KeyboardInterrupt)

    def save(self, state: dict, stream_state: dict) -> None:
        """Begin to write `folder`/step-N; once it is complete, delete the checkpoints not to be kept.

        state: plain values, `step` among them. The streams of all ranks are saved with it as `data`. Raises
        SaveFailed on every rank if the previous save failed.
        """
        self.wait()
        self._copy_to_host()
        self._saving = self._thread.submit(self._write, state, stream_state)

    @property
    def is_saving(self) -> bool:
        """Whether this rank is still writing; other ranks may have just finished."""
        return self._saving is not None and not self._saving.done()

    def wait(self) -> None:
        """Wait for the running save. Called by every rank.

        Raises SaveFailed on every rank if it failed; its partial checkpoint is then deleted.
        """
        saving, self._saving = self._saving, None
        with raise_on_all_ranks(self._group):
            if saving is not None:
                saving.result()

    def latest_complete(self) -> Path | None:
        """Wait on this rank for the running save; its checkpoint, or None if there is none or it failed.

        The next `save` or `wait` raises the failure on every rank.
        """
        if self._saving is None or self._saving.exception() is not None:
            return None
        return self._saving.result()

    def load(self, path: Path) -> dict:
        """Load weights, moments and averages, saved in any topology; returns the checkpoint's `state`.

        Raises, on every rank and before anything is overwritten: DamagedCheckpoint if a file is missing or
        differs from the manifest, UserError if the checkpoint holds another model.
        """
        with raise_on_all_ranks(self._group):
            verify_checkpoint(path, dist.get_rank(), dist.get_world_size())
        parts: list[dict] = [{}] * dist.get_world_size()
        on_device = self._on_device | self._frozen
        own = {name: chunks.size() for name, chunks in on_device.items()}
        dist.all_gather_object(parts, own, self._group)
        shapes = {name: shape for part in parts for name, shape in part.items()}
        state = json.loads((path / "state.json").read_text())
        with raise_on_all_ranks(self._group):
            read_chunks(CheckpointReader(path), on_device, shapes)
        self._optimizer_state.sync_model_from_master(state["step"])
        return state

    def initialize(self, source: TensorSource, names: Collection[str]) -> None:
        """Fill weights of these names, and all averages, before the first step.

        Where the source has fewer rows, the others keep their values. A UserError of one rank is raised on
        every rank.
        """
        shapes, chunks, on_device = source.shapes(), {}, self._on_device | self._frozen
        for name in names:
            if own := on_device.get(f"model.{name}"):
                chunks[name] = own.first_rows(shapes[name][0])
        with raise_on_all_ranks(self._group):
            source.read(chunks)
        for name, own in self._on_device.items():
            if name.startswith("ema."):
                own.fragment.copy_(self._on_device[name.replace("ema.", "model.", 1)].fragment)
        self._optimizer_state.sync_model_from_master(0)

    def _copy_to_host(self) -> None:
        on_gpu = torch.cuda.is_available()
        if not self._on_host:
            lengths = [len(chunks.fragment) for chunks in self._on_device.values()]
            copies = torch.empty(sum(lengths), pin_memory=on_gpu).split(lengths)
            for (name, chunks), copy in zip(self._on_device.items(), copies, strict=True):
                self._on_host[name] = Chunks(copy, chunks.start, chunks.shard_spec)
        for name, chunks in self._on_device.items():
            self._on_host[name].fragment.copy_(chunks.fragment, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()

    def _write(self, state: dict, stream_state: dict) -> Path:
        """Write, hash, publish, delete: the work of the threads of all ranks together."""
        rank, group = dist.get_rank(), self._group
        is_first = rank == 0
        path = self.folder / f"step-{state['step']:08d}"
        partial = path.with_name(path.name + PARTIAL)
        parts: list[dict] = [{}] * dist.get_world_size()
        dist.gather_object(stream_state["streams"], parts if is_first else None, group=group)
        try:
            with raise_on_all_ranks(group), disk_errors(path):
                self._check_finite(path)
                if is_first:
                    streams = {number: stream for part in parts for number, stream in part.items()}
                    shutil.rmtree(partial, ignore_errors=True)
                    (partial / "tensors").mkdir(parents=True)
                    (partial / "state.json").write_text(
                        json.dumps({**state, "data": {**stream_state, "streams": streams}})
                    )
            # No copying ahead: DCP would do it with a CUDA stream, on the first device.
            writer = _Writer(partial / "tensors", per_thread_copy_ahead=0)
            planner = ChunkSavePlanner()
            with raise_on_all_ranks(group), disk_errors(path):
                tensors = self._on_host | self._frozen
                dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group)
                own = hash_files(partial, f"tensors/__{rank}_*.distcp")
            dist.gather_object(own, parts if is_first else None, group=group)
            with raise_on_all_ranks(group), disk_errors(path):
                if is_first:
                    own = hash_files(partial, "state.json") | hash_files(partial, "tensors/.metadata")
                    files = {name: entry for part in (own, *parts) for name, entry in part.items()}
                    publish(partial, path, files)
            if is_first:
                self._delete_old()
        finally:
            if is_first:
                shutil.rmtree(partial, ignore_errors=True)
        return path

    def _check_finite(self, path: Path) -> None:
        """SaveFailed if a weight is not finite: such a checkpoint must not push out a good one."""
        for name, chunks in self._on_host.items():
            if name.partition(".")[0] in ("model", "ema") and not chunks.fragment.isfinite().all():
                way_out = "start again with a lower optimizer.learning_rate"
                raise SaveFailed(f"{path}: not saved: {name} contains NaN or Inf; {way_out}")

    def _delete_old(self) -> None:
        keep_every, complete = self._config.keep_every, complete_checkpoints(self.folder)
        best = best_checkpoint(complete) if self._config.keep_best else None
        for old in complete[: -self._config.keep_last]:
            if old != best and (not keep_every or step_of(old) % keep_every):
                remove(old)


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, which raises the disk's own error."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch.save hits a full disk once more as it closes its archive, and raises that instead.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise the disk errors of any rank as SaveFailed, naming the checkpoint and the ranks."""
    try:
        yield
    except OSError as error:
        failures = {dist.get_rank(): error}
    except dcp.api.CheckpointException as error:
        failures = {rank: cause for rank, (cause, _) in error.failures.items() if isinstance(cause, OSError)}
        if len(failures) < len(error.failures):
            raise  # a bug
    else:
        return
    reasons = ", ".join(f"rank {rank}: {error.strerror or error}" for rank, error in sorted(failures.items()))
    complete = complete_checkpoints(path.parent)
    then = f"resumes from {complete[-1].name}" if complete else "has no earlier checkpoint, and begins anew"
    raise SaveFailed(
        f"{path}: cannot write the checkpoint ({reasons}); free space and start again: the run {then}"
    )
