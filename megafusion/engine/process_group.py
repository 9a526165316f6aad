"""The process group of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import megafusion.device  # noqa: F401 - before deepspeed

import deepspeed
import torch
import torch.distributed as dist

from megafusion.errors import UserError
from megafusion.processes import world_size


def start_process_group(timeout_seconds: float = 600.0) -> None:
    """Join the launcher's process group, or form one of this single process; select this rank's GPU.

    timeout_seconds: how long a collective of any group waits. UserError for an incomplete environment of
    ranks.
    """
    if dist.is_initialized():
        return
    world = world_size()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        local_rank, num_gpus = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise UserError(f"LOCAL_RANK {local_rank}: this process sees {num_gpus} GPUs; start fewer ranks")
        torch.cuda.set_device(local_rank)
    backend = "nccl" if on_gpu else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    # Of the groups within it, whose makers here and in DeepSpeed name none: torch has no other way.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout
    if world == 1:
        # Single-process runs use an in-process HashStore and open no port.
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    # DeepSpeed would look in turn which of its operators could be compiled here, with a compiler and for
    # seconds, and then compile its shared-memory collectives for CPUs. None is used: gloo and NCCL suffice.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout)


@contextmanager
def process_group(timeout_seconds: float) -> Iterator[None]:
    """The process group for a block, destroyed after it if it was formed here.

    After an error only a lone process's is, because the other ranks of a larger one may not answer.
    """
    is_ours, has_failed = not dist.is_initialized(), True
    start_process_group(timeout_seconds)
    try:
        yield
        has_failed = False
    finally:
        if is_ours and (dist.get_world_size() == 1 or not has_failed):
            dist.destroy_process_group()
