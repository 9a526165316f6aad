"""A run from its configuration to its last step: assemble, resume, loop, publish."""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megafusion.autoencoder.codec import ImageCodec
from megafusion.data.source import Source, open_sources
from megafusion.data.stream import BatchStream
from megafusion.errors import UserError
from megafusion.generate.pipeline import PipelineConfig, TransfusionPipeline, check_parts
from megafusion.model.transfusion import Transfusion
from megafusion.sequence.packing import RowShape
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.train.checkpoint import complete_checkpoints, load_checkpoint, save_checkpoint
from megafusion.train.config import RunConfig
from megafusion.train.ema import Ema
from megafusion.train.engine import make_engine, rows_of_rank, start_process_group
from megafusion.train.metrics import Metrics
from megafusion.train.optimizer import learning_rate
from megafusion.train.record import freeze, peak_memory_bytes
from megafusion.train.samples import sample_pairs, show_samples, with_weights
from megafusion.train.step import train_step


@dataclass
class Parts:
    """What a run is assembled from."""

    tokenizer: Tokenizer
    codec: ImageCodec
    sources: dict[str, Source]
    stream: BatchStream
    model: Transfusion


def train(config: RunConfig, stop_after: int | None = None) -> None:
    """Train, resuming from the newest checkpoint of the run folder if there is one.

    stop_after: end the process's work after this many steps of the run, with a checkpoint, as a time
    limit would. Raises UserError before the first step for whatever does not fit together.
    """
    start_process_group()
    parts = assemble(config)
    is_first = dist.get_rank() == 0
    if is_first:
        freeze(config)
    dist.barrier()
    engine = make_engine(parts.model, config)
    ema = Ema(engine.module, config.train.ema_decay)
    checkpoints = config.output / "checkpoints"
    step, spent_seconds = 0, 0.0
    if newest := complete_checkpoints(checkpoints)[-1:]:
        state = load_checkpoint(newest[0], engine, ema)
        step, spent_seconds = state["step"], state["seconds"]
        parts.stream.restore(state["data"])
    last_step = min(config.train.num_steps, stop_after or config.train.num_steps)
    sampler = _Sampler(config, parts, ema) if is_first else None
    tokens_a_step = config.train.global_batch_rows * config.data.sequence_length
    with Metrics(
        config.output, config.train.num_steps, step, not is_first, config.train.wandb_project
    ) as metrics:
        if step:
            metrics.progress.console.print(f"resuming {config.output} after step {step}")
        started = logged = time.monotonic()
        logged_step = step
        while step < last_step:
            batch = parts.stream.next()
            rate = learning_rate(step, config.train.num_steps, config.optimizer)
            losses = train_step(engine, batch.micro_batches, rate)
            step += 1
            ema.update(engine.module, step)
            metrics.advance(step)
            if step % config.train.log_every == 0 or step in (1, last_step):
                _check_finite(losses.total, step)
                now = time.monotonic()
                speed = (step - logged_step) * tokens_a_step / (now - logged)
                logged, logged_step = now, step
                metrics.log(
                    step,
                    {
                        "text_loss": losses.text.item(),
                        "image_loss": losses.image.item(),
                        "gradient_norm": float(engine.get_global_grad_norm()),
                        "learning_rate": rate,
                        "tokens_per_second": speed,
                        "seconds": spent_seconds + now - started,
                        "memory_bytes": peak_memory_bytes(),
                    },
                )
            if step % config.train.checkpoint_every == 0 or step == last_step:
                state = {"step": step, "seconds": spent_seconds + time.monotonic() - started}
                save_checkpoint(checkpoints, engine, ema, state, batch.state, config.train.keep_last)
            if sampler and config.samples.every and step % config.samples.every == 0:
                metrics.show(step, *sampler.show(step))
    if is_first and step == config.train.num_steps:
        sampler.pipeline().save_pretrained(config.output / "pipeline")


def assemble(config: RunConfig) -> Parts:
    """Open and check everything that a run needs, before anything is written."""
    tokenizer = Tokenizer(config.data.tokenizer)
    codec = ImageCodec.from_pretrained(config.data.vae)
    check_parts(config.model, tokenizer, codec, None)
    sources = open_sources(config.data, tokenizer, codec.hash, config.seed)
    for name, source in sources.items():
        shape = source.folder.manifest.latent_shape
        if shape not in (None, config.model.latent_shape):
            raise UserError(
                f"data.sources.{name}: latents of shape {shape}, but model.latent_shape is "
                f"{config.model.latent_shape}"
            )
    stream = BatchStream(
        config.data,
        sources,
        row_shape(config),
        tokenizer,
        config.objective.schedule.num_steps,
        config.train.global_batch_rows,
        rows_of_rank(config),
        config.train.micro_batch_rows,
    )
    torch.manual_seed(config.seed)
    return Parts(tokenizer, codec, sources, stream, Transfusion(config.model, config.objective))


def row_shape(config: RunConfig) -> RowShape:
    """The shape of a packed row that data and model agree on."""
    return RowShape(
        config.data.sequence_length,
        config.data.images_per_row,
        config.model.num_patches,
        config.model.latent_shape,
    )


class _Sampler:
    """A second copy of the model that carries the averaged weights, and the pairs to try it on."""

    def __init__(self, config: RunConfig, parts: Parts, ema: Ema):
        self._config, self._parts, self._ema = config, parts, ema
        self._pipeline: TransfusionPipeline | None = None
        self._pairs = None

    def pipeline(self) -> TransfusionPipeline:
        """The pipeline with the averaged weights as they are now."""
        if self._pipeline is None:
            self._pipeline = make_pipeline(self._config, self._parts.tokenizer, self._parts.codec)
        with_weights(self._pipeline.model, self._ema.weights)
        return self._pipeline

    def show(self, step: int):
        pipeline = self.pipeline()
        self._pairs = self._pairs or sample_pairs(
            self._parts.sources, pipeline, self._config.samples.num_pairs
        )
        return show_samples(pipeline, self._pairs, self._config.output / "samples" / f"step-{step:08d}.png")


def make_pipeline(config: RunConfig, tokenizer: Tokenizer, codec: ImageCodec) -> TransfusionPipeline:
    """A pipeline of a run's model, its weights still to be put in."""
    _, height, width = config.model.latent_shape
    image_size = (height * codec.downsampling, width * codec.downsampling)
    pipeline_config = PipelineConfig(
        image_size=image_size, model=config.model, objective=config.objective, sampling=config.sampling
    )
    return TransfusionPipeline(Transfusion(config.model, config.objective), tokenizer, codec, pipeline_config)


def _check_finite(loss: torch.Tensor, step: int) -> None:
    if not torch.isfinite(loss):
        raise UserError(
            f"step {step}: the loss is {loss.item()}; lower optimizer.learning_rate or lengthen the warm-up. "
            "The last checkpoint is kept"
        )
