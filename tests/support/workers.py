"""Several ranks in a test: processes that meet over gloo on this machine and run one function.

They are forked from a server that has loaded torch, DeepSpeed and megafusion once, so a rank starts in a
fraction of a second.
"""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait

import torch.distributed as dist

import megafusion.data.workers  # noqa: F401  names what the same server loads: to be named anew after it

_CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = [
    "megafusion.train.loop",
    "torch._dynamo",
    "diffusers.schedulers.scheduling_ddpm",
]
"""The trainer, and what optimizers and the noise process import late: seconds for each rank."""
_CONTEXT.set_forkserver_preload(PRELOAD)


class WorkersFailed(AssertionError):
    """Errors of the failed ranks, the first failure first."""


def run_workers(
    function: Callable,
    world_size: int,
    *arguments: object,
    timeout: float = 120,
    seconds_after_failure: float = 15,
) -> list:
    """Run `function(*arguments)` on each rank of a process group; the results by rank.

    seconds_after_failure: how long the other ranks may take to end after one has failed.
    function: of a module's top level. A rank reads its number from torch.distributed.
    Raises WorkersFailed with each failed rank's traceback or exit status; no process stays.
    """
    # The store is here, so no two tests choose the same port and no rank's end takes it away.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(world_size):
        receive, send = _CONTEXT.Pipe(duplex=False)
        place = (rank, world_size, store.port)
        process = _CONTEXT.Process(target=_work, args=(send, place, function, arguments), daemon=True)
        process.start()
        send.close()
        pipes.append(receive)
        processes.append(process)
    results: dict[int, object] = {}
    failures: list[str] = []
    deadline = time.monotonic() + timeout
    waiting = dict(zip(pipes, range(world_size), strict=True))
    while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                succeeded, answer = pickle.loads(pipe.recv_bytes())
            except EOFError:  # killed, so it said nothing
                processes[rank].join(5)
                succeeded, answer = False, f"ended with status {processes[rank].exitcode}"
            if succeeded:
                results[rank] = answer
            else:
                failures.append(f"rank {rank}: {answer}")
                deadline = min(deadline, time.monotonic() + seconds_after_failure)
    failures += [
        f"rank {rank}: still running after {timeout} s or others' failure" for rank in waiting.values()
    ]
    for process in processes:
        process.join(0 if failures else 10)
        if process.is_alive():
            process.kill()
            process.join()
    if failures:
        raise WorkersFailed("\n".join(failures))
    return [results[rank] for rank in range(world_size)]


def _work(answer: Connection, place: tuple[int, int, int], function: Callable, arguments: tuple) -> None:
    rank, world_size, port = place
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the parent's: no rank starts one
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    try:
        import torch

        from megafusion.engine.process_group import start_process_group

        torch.set_num_threads(1)
        start_process_group()
        result = True, function(*arguments)
    except BaseException:
        result = False, traceback.format_exc()
    # Not as multiprocessing pickles, by which torch hands over memory that ends with this process.
    answer.send_bytes(pickle.dumps(result))
    with suppress(RuntimeError):  # the connections of this rank stay until all have answered
        dist.barrier()
