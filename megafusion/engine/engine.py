"""DeepSpeed's engine around this rank's stage of the model, on one process or many."""

import contextlib
import io
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import import_module

from megafusion.device import default_device

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime import compiler
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from megafusion.engine.config import OptimizerConfig, TrainConfig
from megafusion.engine.copies import CopyAhead
from megafusion.engine.ema import EmaUpdate
from megafusion.engine.optimizer import make_optimizer, set_learning_rate
from megafusion.engine.optimizer_state import OptimizerState
from megafusion.engine.update import Update
from megafusion.model.config import ModelConfig
from megafusion.model.lora import add_lora
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig
from megafusion.objective.losses import Losses
from megafusion.parallel.interleaved import InterleavedPipeline
from megafusion.parallel.mesh import Mesh
from megafusion.parallel.parallelize import parallelize, shard_objective
from megafusion.parallel.pipeline import ModelWithLoss, PipelineLosses, Stage
from megafusion.resilience.config import ResilienceConfig
from megafusion.resilience.consensus import SpikeDetector, StepConsensus
from megafusion.sequence.packing import Inputs, PackedBatch, SequenceShape, Targets, with_counts


def rows_of_rank(global_batch_size: int, mesh: Mesh) -> range:
    """Indices of this rank's packed sequences in a global batch: its data rank's share."""
    share = global_batch_size // mesh.size("data")
    return range(mesh.rank("data") * share, (mesh.rank("data") + 1) * share)


class Engine:
    """Trains this rank's stage of the model: forward, backward, accumulation, clipping, optimizer, ZeRO.

    stage: the layers on this rank, with the parameter names of a checkpoint. consensus: what all ranks agreed
    on about the latest step. optimizer_state: this rank's master weights and moments. interleaved: makes the
    passes in place of DeepSpeed's pipeline engine.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        stage: Stage,
        mesh: Mesh,
        consensus: StepConsensus,
        gradient_clip: float,
        interleaved: InterleavedPipeline | None = None,
    ):
        self._deepspeed = engine  # a PipelineEngine if there are several stages
        self._interleaved = interleaved
        self.stage, self.mesh, self.consensus = stage, mesh, consensus
        self.device: torch.device = engine.device
        self._copies = CopyAhead(self.device)
        self.optimizer_state = OptimizerState(engine.optimizer, stage.named_parameters())
        sharded = {n for n, p in stage.named_parameters() if getattr(p, "tensor_model_parallel", False)}
        clip = gradient_clip or math.inf
        self._update = Update(engine, self.optimizer_state, consensus, mesh, sharded, clip)

    def forward_backward(self, micro_batches: list[PackedBatch]) -> None:
        """Accumulate the gradients of a global batch, reduced over data ranks.

        UserError on every rank, before anything is computed, if a rank deferred one; that rank may pass [].
        """
        counts = self.consensus.reduce_counts(sum(batch.counts() for batch in micro_batches))
        batches = (with_counts(batch, counts) for batch in self._copies(micro_batches))
        if self._interleaved:
            self.stage.image_sizes = deque(batch.image_size for batch in micro_batches)
            self._interleaved.train(batches, len(micro_batches))
            self._deepspeed._exec_reduce_grads()
        elif isinstance(self._deepspeed, PipelineEngine):
            self._run_schedule(self._deepspeed, micro_batches, batches)
        else:
            self._accumulate(batches, len(micro_batches))

    def clip_and_step(self, learning_rate: float, average: EmaUpdate | None = None) -> Losses:
        """Clip and update weights and averages, or skip on all ranks, as `consensus` tells.

        Returns the losses, on the device, for which the host does not wait.
        """
        set_learning_rate(self._deepspeed.optimizer, learning_rate)
        self._update.make_or_skip(average)
        return Losses(*self.consensus.losses.unbind())

    def _accumulate(self, batches: Iterable[PackedBatch], num_batches: int) -> None:
        # DeepSpeed averages over micro-batches and data ranks, but the losses are shares of global means.
        averaged_over = num_batches * self.mesh.size("data") * self.mesh.size("ulysses")
        for batch in batches:
            losses: Losses = self._deepspeed(batch)
            self.consensus.add_losses(losses)
            self._deepspeed.backward(losses.total * averaged_over)
            self._update.end_micro_batch()
            self._deepspeed.step()  # counts micro-batches; the update after the last one is held back

    def _run_schedule(
        self, engine: PipelineEngine, micro_batches: list[PackedBatch], batches: Iterable[PackedBatch]
    ) -> None:
        """1F1B. Not train_batch, which then exchanges losses that nobody reads, and makes the host wait."""
        engine.set_dataiterator(self._stage_batches(micro_batches, batches))
        engine.module.train()
        engine.total_loss, engine._compute_loss = None, True
        engine._exec_schedule(engine._train_schedule())

    def _stage_batches(
        self, micro_batches: list[PackedBatch], batches: Iterable[PackedBatch]
    ) -> Iterator[tuple[Inputs, Targets]]:
        """Inputs of the first stage and targets of the last, on the device: DeepSpeed waits to send."""
        self.stage.image_sizes = deque(batch.image_size for batch in micro_batches)
        return (self._on_device(batch) for batch in batches)

    def _on_device(self, batch: PackedBatch) -> tuple[Inputs, Targets]:
        sent = replace(batch, image_size=batch.image_size.to(self.device, non_blocking=True))
        return sent.inputs(), sent.targets()

    def evaluate(self, micro_batches: list[PackedBatch]) -> list[float]:
        """`Objective.sums` over packed rows of every data rank. Changes nothing that training reads."""
        batches = self._copies(micro_batches)
        self._deepspeed.eval()
        if self._interleaved:
            self.stage.image_sizes = deque(batch.image_size for batch in micro_batches)
            self._interleaved.evaluate(batches, len(micro_batches))
        elif isinstance(self._deepspeed, PipelineEngine):
            rows = self._stage_batches(micro_batches, batches)
            self._deepspeed.eval_batch(rows, num_micro_batches=len(micro_batches))
        else:
            with torch.no_grad():
                for batch in batches:
                    self.consensus.add_sums(self._deepspeed(batch))
        self._deepspeed.train()
        return self.consensus.reduce_sums()

    def close(self) -> None:
        """Remove hooks, which would keep all of this engine's memory until the process ends."""
        self._update.close()
        with contextlib.redirect_stdout(io.StringIO()):
            self._deepspeed.destroy()

    def grad_norm(self) -> float:
        """Global gradient norm of the latest step, before clipping. Synchronises with the device."""
        return float(self.consensus.grad_norm)


def make_engine(
    mesh: Mesh,
    *,
    model: ModelConfig,
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    resilience: ResilienceConfig,
    shape: SequenceShape,
    seed: int,
    is_read: Callable[[str], bool] = lambda name: False,
) -> Engine:
    """This rank's part of a model, under DeepSpeed. Called by every rank.

    Weights start at random, or as zeros where `is_read` says of a canonical name that the caller reads it.
    """
    with torch.device("meta"):
        whole_model = Transfusion(model, objective, shape.clean_context)
        if train.lora:
            add_lora(whole_model, train.lora)
    device = default_device()
    stage = parallelize(
        whole_model,
        mesh,
        shape=shape,
        micro_batch_size=train.micro_batch_size,
        precision=train.precision,
        recompute=train.recompute,
        compile=train.compile,
        seed=seed,
        device=device,
        trains=train.trains,
        is_read=is_read,
    )
    if train.compile and mesh.config.zero_stage == 3:
        for block in stage.blocks.values():
            _gather_whole(block)
    _import_muon()
    losses = shard_objective(objective, model, mesh).to(device)
    consensus = StepConsensus(mesh, device, SpikeDetector(resilience))
    accumulation = train.global_batch_size // (train.micro_batch_size * mesh.size("data"))
    module: nn.Module
    interleaved = None
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its ranks and its memory
        if mesh.size("pipeline") > 1:
            # DeepSpeed's passes average over micro-batches, the interleaved ones do not.
            is_interleaved = mesh.config.virtual_stages > 1
            averaged = 1 if is_interleaved else accumulation
            pipeline_losses = PipelineLosses(
                stage, losses, mesh, averaged, consensus.add_losses, consensus.add_sums
            )
            if is_interleaved:
                interleaved = InterleavedPipeline(stage, pipeline_losses, mesh, device)
            module, grid = _pipeline(stage, pipeline_losses, mesh), None
        else:
            module, grid = ModelWithLoss(stage, losses), PipelineParallelGrid(make_topology(mesh))
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(stage, optimizer),
            config=_deepspeed_config(train, mesh, accumulation, model.hidden_size),
            mpu=grid,
        )
    return Engine(engine, stage, mesh, consensus, optimizer.gradient_clip, interleaved)


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer without compiling it, which would import Inductor at every start.

    DeepSpeed's ZeRO optimizers import it to ask whether they wrap it. Here they wrap another. Muon stays
    uncompiled in this process.
    """
    decorator = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = decorator


def _gather_whole(block: nn.Module) -> None:
    """Make ZeRO 3 gather a compiled block at once, as its hooks on the modules inside would break the graph.

    DeepSpeed then reduces the block's gradients when that of its input is there, so the input must have one.
    """

    def require_gradient(_: nn.Module, inputs: tuple) -> None:
        if torch.is_grad_enabled():
            inputs[0].requires_grad_()

    set_z3_leaf_module(block, True)
    block.register_forward_pre_hook(require_gradient)


def make_topology(mesh: Mesh) -> PipeModelDataParallelTopology:
    """Pipeline, data and tensor ranks. Ulysses ranks hold the same weights, so they count as data ranks."""
    num_replicas = mesh.size("data") * mesh.size("ulysses")
    return PipeModelDataParallelTopology(mesh.size("pipeline"), mesh.size("tensor"), num_replicas)


def _pipeline(stage: Stage, losses: PipelineLosses, mesh: Mesh) -> PipelineModule:
    """A pipeline of one layer a stage, in which the other ranks' stages are placeholders."""
    layers = [LayerSpec(nn.Identity)] * mesh.size("pipeline")
    layers[mesh.rank("pipeline")] = stage
    return PipelineModule(layers, topology=make_topology(mesh), loss_fn=losses, partition_method="uniform")


def _deepspeed_config(train: TrainConfig, mesh: Mesh, accumulation: int, hidden_size: int) -> dict:
    parallel = mesh.config
    zero: dict[str, object] = {
        "stage": parallel.zero_stage,
        # ZeRO 0 has no such setting, engine/buckets.py reduces at 1 and 2, and with offload DeepSpeed waits
        # for the device at each bucket.
        "overlap_comm": parallel.zero_stage == 3,
        # ZeRO 3 keeps vectors whole on every rank: gathering them costs more than their memory.
        "param_persistence_threshold": hidden_size,
    }
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    values: dict[str, object] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        # Its timer waits for the device twice a micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    if train.precision != "fp32":
        # Accumulate and reduce gradients in float32, where DeepSpeed would use bf16.
        values |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return values
