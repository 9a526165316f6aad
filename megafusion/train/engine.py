"""DeepSpeed's engine around the plain model: one process here, many under its launcher."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from megafusion.errors import UserError
from megafusion.train.config import RunConfig
from megafusion.train.optimizer import make_optimizer


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


@contextmanager
def together() -> Iterator[None]:
    """What one rank refuses in this block, every rank refuses with its message: none waits for it."""
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    if found := next((m for m in messages if m is not None), None):
        raise UserError(found)


def rows_of_rank(config: RunConfig) -> range:
    """The rows of a global batch that this rank computes. UserError where they do not divide."""
    rows, micro, world = config.train.global_batch_rows, config.train.micro_batch_rows, dist.get_world_size()
    if rows % (micro * world):
        raise UserError(
            f"train.global_batch_rows {rows} is not a multiple of train.micro_batch_rows {micro} "
            f"x {world} ranks"
        )
    share = rows // world
    return range(dist.get_rank() * share, (dist.get_rank() + 1) * share)


def make_engine(model: nn.Module, config: RunConfig) -> deepspeed.DeepSpeedEngine:
    """Wrap the model: ZeRO-1, clipping, accumulation over this rank's micro-batches."""
    num_micro_batches = len(rows_of_rank(config)) // config.train.micro_batch_rows
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, config.optimizer),
        config={
            "train_micro_batch_size_per_gpu": config.train.micro_batch_rows,
            "gradient_accumulation_steps": num_micro_batches,
            "gradient_clipping": config.optimizer.gradient_clip,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    return engine
