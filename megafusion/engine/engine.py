"""DeepSpeed's engine around this rank's part of the model: one process here, many under its launcher."""

import contextlib
import io
import math
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import megafusion.device  # noqa: F401 - before deepspeed

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.utils import clip_grad_norm_
from torch import nn

from megafusion.engine.optimizer import make_optimizer
from megafusion.engine.skipped_updates import skip_bad_updates
from megafusion.model.transfusion import Transfusion
from megafusion.objective.losses import Objective
from megafusion.parallel.mesh import Mesh
from megafusion.parallel.parallelize import parallelize, shard_objective
from megafusion.parallel.pipeline import ModelWithLoss, PipelineLosses, Stage
from megafusion.resilience.consensus import StepConsensus
from megafusion.resilience.spikes import SpikeDetector
from megafusion.train.config import RunConfig


def start_process_group(timeout_seconds: float = 600.0) -> None:
    """Join the launcher's processes, or be one alone; from then on this rank's device is the default.

    timeout_seconds: longest time that a collective waits for another rank.
    """
    if dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if on_gpu else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "MASTER_ADDR" not in os.environ:
        # No launcher: a process alone needs no meeting point, and nothing to be reached at from outside.
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    # DeepSpeed's shared-memory collectives for CPUs are compiled at start, for which a user would
    # need a compiler; gloo's serve.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout)


def this_device() -> torch.device:
    """Where this rank computes."""
    return torch.device(get_accelerator().current_device_name())


def rows_of_rank(config: RunConfig, mesh: Mesh) -> range:
    """The rows of a global batch that this rank computes, alike for all that share them."""
    share = config.train.global_batch_size // mesh.size("data")
    return range(mesh.rank("data") * share, (mesh.rank("data") + 1) * share)


@dataclass(frozen=True)
class Engine:
    """DeepSpeed's engine around this rank's stage of the model."""

    deepspeed: deepspeed.DeepSpeedEngine
    """PipelineEngine with several stages, the plain engine with one."""
    stage: Stage
    """The layers on this rank; its parameters' names are the checkpoint's."""
    mesh: Mesh
    consensus: StepConsensus
    """What all ranks decided about the latest step."""

    @property
    def device(self) -> torch.device:
        return self.deepspeed.device


def make_engine(config: RunConfig, mesh: Mesh) -> Engine:
    """This rank's part of a model with its random start, wrapped by DeepSpeed. Called by every rank."""
    with torch.device("meta"):
        model = Transfusion(config.model, config.objective)
    device = this_device()
    stage = parallelize(model, mesh, config, device)
    objective = shard_objective(config, mesh).to(device)
    consensus = StepConsensus(mesh, device, SpikeDetector(config.resilience))
    pipelined = mesh.size("pipeline") > 1
    if pipelined:
        module = _pipeline(stage, objective, config, mesh, consensus)
    else:
        module = ModelWithLoss(stage, objective)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(stage, config.optimizer),
            config=_deepspeed_config(config, mesh),
            mpu=None if pipelined else mesh.grid,
        )
    if config.parallel.zero_stage == 0:
        engine.clip_fp32_gradients = partial(_clip, engine)
    skip_bad_updates(engine, consensus)
    return Engine(engine, stage, mesh, consensus)


def num_micro_batches(config: RunConfig, mesh: Mesh) -> int:
    """Micro-batches that this rank computes for a step."""
    return len(rows_of_rank(config, mesh)) // config.train.micro_batch_size


def _clip(engine: deepspeed.DeepSpeedEngine) -> None:
    """What DeepSpeed's stage 0 does, which forgets the norm that it found."""
    engine._global_grad_norm = clip_grad_norm_(
        list(engine.module.parameters()), engine.gradient_clipping(), mpu=engine.mpu
    )


def _pipeline(
    stage: Stage, objective: Objective, config: RunConfig, mesh: Mesh, consensus: StepConsensus
) -> PipelineModule:
    """DeepSpeed's pipeline of one layer a stage: ours; the others' stand elsewhere."""
    layers = [LayerSpec(nn.Identity)] * mesh.size("pipeline")
    layers[mesh.rank("pipeline")] = stage
    losses = PipelineLosses(objective, mesh, num_micro_batches(config, mesh), consensus.add_losses)
    with contextlib.redirect_stdout(io.StringIO()):
        return PipelineModule(
            layers, topology=mesh.grid.topology(), loss_fn=losses, partition_method="uniform"
        )


def _deepspeed_config(config: RunConfig, mesh: Mesh) -> dict:
    parallel = config.parallel
    zero = {
        "stage": parallel.zero_stage,
        "overlap_comm": mesh.size("pipeline") == 1,
        # Vectors of the model's width stay whole on every rank: gathering them costs more than they do.
        "param_persistence_threshold": config.model.hidden_size,
    }
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    values = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches(config, mesh),
        # Without clipping, DeepSpeed's stage 0 would not measure the norm.
        "gradient_clipping": config.optimizer.gradient_clip or math.inf,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if config.train.precision != "fp32":
        # Gradients are summed in float32 over micro-batches, and over ranks, where DeepSpeed would use bf16.
        sums = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        values |= {"bf16": {"enabled": True}, **sums}
    return values
