"""Where a process is: the collective it waits in, the line of ours that called it, every thread's stack."""

import linecache
import os
import re
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import NamedTuple

# Files whose functions are collectives where their name begins like one.
_COLLECTIVE_FILES = re.compile(
    r"torch/distributed/(distributed_c10d|_functional_collectives)\.py$"
    r"|deepspeed/comm/\w+\.py$|deepspeed/runtime/pipe/p2p\.py$|megafusion/parallel/collectives\.py$"
)
_COLLECTIVE_NAMES = re.compile(
    r"_?(all_?(reduce|gather|to_all)|reduce|gather|scatter|broadcast|(monitored_|store_based_)?barrier"
    r"|i?send|i?recv|batch_isend|new_group|wait)"
)
_PACKAGE = Path(__file__).parents[2]


class Place(NamedTuple):
    """A place in running code; a frame is written as `megafusion/train/loop.py:70 _train`."""

    collective: str | None
    """Function of the collective that is waited in; "wait" for one that was started before."""
    where: str
    """Nearest frame of ours, or the innermost if none is ours."""
    inside: str | None
    """The innermost frame outside the collective, if that is another."""


def place_of_process(main: int) -> Place:
    """Where the thread `main` is, or another that waits in a collective while it does not.

    Backward passes on a device run in autograd's threads.
    """
    stacks = [list(traceback.walk_stack(frame)) for frame in _frames(main).values()]  # innermost first
    place, *rest = [_find(stack) for stack in stacks]
    for other in rest:
        if other.collective and not place.collective:
            return Place(other.collective, other.where if _is_ours(other.where) else place.where, None)
    return place


def place_of_error(error: BaseException) -> Place:
    """Where the exception that this one came from was raised."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _find([*traceback.walk_tb(error.__traceback__)][::-1])


def format_stacks(main: int) -> list[str]:
    """The stack of every thread, the main one's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for thread, frame in _frames(main).items():
        lines += [f"thread {thread} {names.get(thread, '')}", *traceback.format_stack(frame)]
    return lines


def _frames(main: int) -> dict[int, FrameType]:
    """The innermost frame of every thread but the watchdog's own, the main one first."""
    own = {thread.ident for thread in threading.enumerate() if thread.name.startswith("watchdog")}
    frames = {thread: frame for thread, frame in sys._current_frames().items() if thread not in own}
    return {main: frames.pop(main), **frames}


def _find(stack: list[tuple[FrameType, int]]) -> Place:
    """The place of a stack of frames with their lines, innermost first."""
    collective, after = None, 0
    for index, (frame, line) in enumerate(stack):
        code = frame.f_code
        path = Path(code.co_filename).as_posix()
        if _COLLECTIVE_FILES.search(path) and _COLLECTIVE_NAMES.match(code.co_name):
            collective, after = code.co_name, index + 1
            break
        # Waiting for a collective that was started before happens in C, below the frame that asks for it.
        if index == 0 and ".wait(" in linecache.getline(code.co_filename, line):
            collective = "wait"
            break
    callers = [_name(*entry) for entry in stack[after:] or stack]
    where = next(filter(_is_ours, callers), callers[0])
    return Place(collective, where, None if where == callers[0] else callers[0])


def _is_ours(name: str) -> bool:
    """Whether a frame is of this package, and not of its collectives, which many call."""
    return name.startswith(f"{_PACKAGE.name}{os.sep}") and "parallel/collectives" not in name


def _name(frame: FrameType, line: int) -> str:
    path = frame.f_code.co_filename.removeprefix(f"{_PACKAGE.parent}{os.sep}")
    path = re.sub(r"^.*/(site-packages|python3\.\d+)/", "", path)
    return f"{path}:{line} {frame.f_code.co_name}"
