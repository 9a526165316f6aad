"""A run from its configuration to its last step: resume, loop, publish."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.filesize import decimal

from megafusion.checkpoint.checkpointer import Checkpointer
from megafusion.checkpoint.folder import complete_checkpoints
from megafusion.checkpoint.masters import masters
from megafusion.checkpoint.reader import read_whole
from megafusion.data.stream import packed_and_skipped
from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.objective.losses import Losses
from megafusion.parallel.memory import state_bytes
from megafusion.parallel.topology import AXES, make_topology
from megafusion.train.assemble import Parts, assemble, make_pipeline
from megafusion.train.config import RunConfig
from megafusion.train.ema import Ema
from megafusion.train.engine import Engine, make_engine, start_process_group, together
from megafusion.train.metrics import Metrics
from megafusion.train.optimizer import learning_rate
from megafusion.train.pictures import PictureEncoder
from megafusion.train.record import freeze, peak_memory_bytes
from megafusion.train.samples import sample_pairs, show_samples
from megafusion.train.step import train_step
from megafusion.watch.watchdog import Watchdog


def train(config: RunConfig, stop_after: int | None = None) -> None:
    """Train, resuming from the newest checkpoint of the run folder if there is one.

    stop_after: end the process's work after this many steps of the run, with a checkpoint, as a time
    limit would. Raises UserError before the first step for whatever does not fit together.
    """
    # A minute more than the watchdog gives, so that its message comes before torch's.
    start_process_group(config.train.timeout_seconds + 60)
    with Watchdog(config.out, config.train.timeout_seconds) as watchdog:
        _train(config, stop_after, watchdog)


def _train(config: RunConfig, stop_after: int | None, watchdog: Watchdog) -> None:
    is_first = dist.get_rank() == 0
    with together():
        topology = make_topology(config.parallel)
    with together():
        parts = assemble(config, topology)
        if is_first:
            freeze(config)
    watchdog.beat(0, "engine")
    engine = make_engine(config, topology)
    owned = masters(engine.deepspeed, engine.stage.named_parameters())
    ema = Ema(owned, config.train.ema_decay)
    checkpoints = config.out / "checkpoints"
    checkpointer = Checkpointer(
        checkpoints, engine.deepspeed, owned, ema, config.train.keep_last, config.train.keep_every
    )
    laid_out = {"world_size": dist.get_world_size(), **config.parallel.model_dump()}
    step, spent_seconds = 0, 0.0
    if newest := _newest(checkpoints):
        watchdog.beat(0, "load checkpoint")
        state = checkpointer.load(newest)
        step, spent_seconds = state["step"], state["seconds"]
        parts.stream.restore(state["data"])
    last_step = min(config.train.num_steps, stop_after or config.train.num_steps)
    sampler = _Sampler(config, parts, engine.device) if is_first else None
    clock = _Clock(step, spent_seconds, config.train.global_batch_rows * config.data.sequence_length)

    encoder = PictureEncoder(parts.codec, engine)
    packing = _Packing(config, engine, parts.stream.state())

    def due(every: int) -> bool:
        return step == last_step or (every > 0 and step % every == 0)

    silent = not is_first
    with checkpointer, parts.stream, Metrics(config.out, config.train, step, silent) as metrics:
        if is_first and dist.get_world_size() > 1:
            metrics.progress.console.print(_laid_out(engine, config))
        while step < last_step:
            watchdog.beat(step + 1, "train")
            batch = parts.stream.next()
            rate = learning_rate(step, config.train.num_steps, config.optimizer)
            losses = train_step(engine, encoder.encode(batch.micro_batches), rate)
            step += 1
            ema.update(step)
            metrics.advance(step)
            if due(config.train.log_every) or step == 1:
                figures = _figures(step, losses, engine, rate)
                metrics.log(step, figures | packing.read(batch.state) | clock.read(step))
            if due(config.train.checkpoint_every):
                watchdog.beat(step, "checkpoint")
                _check_finite(step, losses, engine)
                state = {"step": step, "seconds": clock.seconds(), "topology": laid_out}
                checkpointer.save(state, batch.state)
            # From the checkpoint of this step, for no rank holds the whole average; the others go on.
            if sampler and config.samples.every and due(config.samples.every):
                watchdog.beat(step, "samples")
                if checkpoint := checkpointer.published():
                    metrics.show(step, *sampler.show(step, checkpoint))
        watchdog.beat(step, "end")
    if sampler and step == config.train.num_steps:
        sampler.pipeline(complete_checkpoints(checkpoints)[-1]).save_pretrained(config.out / "pipeline")
        metrics.progress.console.print(
            f"{config.out / 'pipeline'}: the model; megafusion generate {config.out}"
        )


def _laid_out(engine: Engine, config: RunConfig) -> str:
    """How the run lies over its ranks, and what one holds."""
    axes = " x ".join(f"{axis} {engine.topology.size(axis)}" for axis in AXES)
    held = state_bytes(engine.stage, engine.topology, config)
    parts = ", ".join(f"{name} {decimal(size)}" for name, size in held._asdict().items())
    return f"{dist.get_world_size()} ranks: {axes}; rank 0 holds {parts}"


def _newest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, as rank 0 sees it: all ranks must load the same."""
    found = [(complete_checkpoints(checkpoints) or [None])[-1]]
    dist.broadcast_object_list(found)
    return found[0]


def _check_finite(step: int, losses: Losses, engine: Engine) -> None:
    """UserError, before anything is saved, when losses or gradients are no longer numbers."""
    norm = torch.as_tensor(engine.deepspeed.get_global_grad_norm())
    if not (torch.isfinite(losses.total) and torch.isfinite(norm)):
        raise UserError(
            f"step {step}: the loss is {losses.total.item()} and the gradient norm {norm.item()}; lower "
            "optimizer.learning_rate or lengthen optimizer.num_warmup_steps. The last checkpoint is kept"
        )


def _figures(step: int, losses: Losses, engine: Engine, rate: float) -> dict[str, float]:
    """What a line of metrics says about a step."""
    _check_finite(step, losses, engine)
    return {
        "text_loss": losses.text.item(),
        "image_loss": losses.image.item(),
        "gradient_norm": float(engine.deepspeed.get_global_grad_norm()),
        "learning_rate": rate,
        "memory_bytes": peak_memory_bytes(),
    }


class _Clock:
    """Seconds that a run has trained, restarts included, and its speed since the last reading."""

    def __init__(self, step: int, spent_seconds: float, positions_per_step: int):
        self._started = self._read = time.monotonic()
        self._read_step, self._spent, self._positions = step, spent_seconds, positions_per_step

    def seconds(self) -> float:
        return self._spent + time.monotonic() - self._started

    def read(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        speed = (step - self._read_step) * self._positions / (now - self._read)
        self._read, self._read_step = now, step
        return {"tokens_per_second": speed, "seconds": self.seconds()}


class _Packing:
    """How full the rows of all ranks are and of what, since the last reading; called by every rank."""

    def __init__(self, config: RunConfig, engine: Engine, state: dict):
        self._names, self._engine = list(config.data.sources), engine
        self._row_positions = config.train.global_batch_rows * config.data.sequence_length
        self._before = self._counts(state)

    def read(self, state: dict) -> dict[str, float]:
        """Share of the positions that are real, and padding; each source's share of the real ones; how many
        documents have been left out since the run began."""
        counts = self._counts(state)
        *packed, _, batches = (counts - self._before).tolist()
        self._before = counts
        fill = sum(packed) / (batches * self._row_positions)
        shares = {f"share/{n}": p / sum(packed) for n, p in zip(self._names, packed, strict=True)}
        return {"fill": fill, "padding": 1 - fill, **shares, "documents_skipped": int(counts[-2])}

    def _counts(self, state: dict) -> torch.Tensor:
        """int64 [sources + 2]: positions packed by source and documents left out, over the data-parallel
        ranks; global batches."""
        packed, skipped = packed_and_skipped(state)
        values = [*(packed[name] for name in self._names), skipped]
        counts = torch.tensor(values, dtype=torch.int64, device=self._engine.device)
        dist.all_reduce(counts, group=self._engine.topology.group("data"))
        return torch.cat([counts, counts.new_tensor([state["batch_number"]])])


class _Sampler:
    """A second copy of the model that carries a checkpoint's averaged weights, and the pairs to try it on.

    It is in host memory until it draws: training leaves no room on a device for a whole large model.
    """

    def __init__(self, config: RunConfig, parts: Parts, device: torch.device):
        self._config, self._parts, self._device = config, parts, device
        self._pipeline: TransfusionPipeline | None = None
        self._pairs = None

    def pipeline(self, checkpoint: Path) -> TransfusionPipeline:
        """The pipeline with the averaged weights of a checkpoint."""
        if self._pipeline is None:
            self._pipeline = make_pipeline(self._config, self._parts.tokenizer, self._parts.codec)
        shapes = {name: p.shape for name, p in self._pipeline.model.named_parameters()}
        self._pipeline.model.load_state_dict(read_whole(checkpoint, shapes, "ema"))
        return self._pipeline

    def show(self, step: int, checkpoint: Path):
        """A sheet of pictures drawn, and the captions written, both also in the run folder."""
        pipeline = self.pipeline(checkpoint).to(self._device)
        self._pairs = self._pairs or sample_pairs(
            self._parts.sources, pipeline, self._config.samples.num_pairs
        )
        return show_samples(pipeline, self._pairs, self._config.out / "samples" / f"step-{step:08d}.png")
