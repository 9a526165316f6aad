"""Position of a process in the code: its collective, the line of this package that called it, all stacks."""

import linecache
import os
import re
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import NamedTuple

# A function is a collective if its file and the beginning of its name match.
_COLLECTIVE_FILES = re.compile(
    r"torch/distributed/(distributed_c10d|_functional_collectives)\.py$"
    r"|deepspeed/comm/\w+\.py$|deepspeed/runtime/pipe/p2p\.py$|megafusion/parallel/collectives\.py$"
)
_COLLECTIVE_NAMES = re.compile(
    r"_?(all_?(reduce|gather|to_all)|reduce|gather|scatter|broadcast|(monitored_|store_based_)?barrier"
    r"|i?send|i?recv|batch_isend|new_group|wait)"
)
_PACKAGE = Path(__file__).parents[2]


class CodeLocation(NamedTuple):
    """A position in running code; a frame is written as `megafusion/train/loop.py:70 _train`."""

    collective: str | None
    """The collective's function; "wait" for the wait for an asynchronous one."""
    where: str
    """Innermost frame of this package; the innermost frame at all if none is."""
    inside: str | None
    """The innermost frame outside the collective, if it is another."""

    def __str__(self) -> str:
        if self.collective:
            return f"in {self.collective} called from {self.where}"
        return f"at {self.where}" + (f" (in {self.inside})" if self.inside else "")


def locate_process(main: int) -> CodeLocation:
    """Location of the thread `main`, or of another (autograd's) that waits in a collective if it does not."""
    stacks = [list(traceback.walk_stack(frame)) for frame in _frames(main).values()]  # innermost first
    location, *rest = [_locate(stack) for stack in stacks]
    for other in rest:
        if other.collective and not location.collective:
            where = other.where if _is_ours(other.where) else location.where
            return CodeLocation(other.collective, where, None)
    return location


def locate_error(error: BaseException) -> CodeLocation:
    """Location where an exception's first cause was raised."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _locate([*traceback.walk_tb(error.__traceback__)][::-1])


def format_stacks(main: int) -> list[str]:
    """Stacks of all threads, the main one's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for thread, frame in _frames(main).items():
        lines += [f"thread {thread} {names.get(thread, '')}", *traceback.format_stack(frame)]
    return lines


def _frames(main: int) -> dict[int, FrameType]:
    """Innermost frames of all threads but the watchdog's, the main one's first."""
    own = {thread.ident for thread in threading.enumerate() if thread.name.startswith("watchdog")}
    frames = {thread: frame for thread, frame in sys._current_frames().items() if thread not in own}
    return {main: frames.pop(main), **frames}


def _locate(stack: list[tuple[FrameType, int]]) -> CodeLocation:
    """Location of a stack: frames with their lines, innermost first."""
    collective, after = None, 0
    for index, (frame, line) in enumerate(stack):
        code = frame.f_code
        path = Path(code.co_filename).as_posix()
        if _COLLECTIVE_FILES.search(path) and _COLLECTIVE_NAMES.match(code.co_name):
            collective, after = code.co_name, index + 1
            break
        # The wait for an asynchronous collective runs in C, below the frame that calls it.
        if index == 0 and ".wait(" in linecache.getline(code.co_filename, line):
            collective = "wait"
            break
    callers = [_name(*entry) for entry in stack[after:] or stack]
    where = next(filter(_is_ours, callers), callers[0])
    return CodeLocation(collective, where, None if where == callers[0] else callers[0])


def _is_ours(name: str) -> bool:
    """Whether a frame is of this package, except its collectives, which many functions call."""
    return name.startswith(f"{_PACKAGE.name}{os.sep}") and "parallel/collectives" not in name


def _name(frame: FrameType, line: int) -> str:
    path = frame.f_code.co_filename.removeprefix(f"{_PACKAGE.parent}{os.sep}")
    path = re.sub(r"^.*/(site-packages|python3\.\d+)/", "", path)
    return f"{path}:{line} {frame.f_code.co_name}"
