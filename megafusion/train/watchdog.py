"""Ends a run that hangs or has lost a rank: every process, in bounded time, with a message that names both.

Each rank's thread writes a heartbeat into the job's store every few seconds and reads rank 0's; rank 0 reads
all. Whoever finds a reason to end writes it into the store, every rank writes its stacks and ends with status
75, and one of them says who is where. Where rank 0, which keeps the store, is lost, the stacks tell that.
"""

import faulthandler
import itertools
import json
import linecache
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil
import torch.distributed as dist

from megafusion.errors import UserError
from megafusion.storage import write_file

# "Try again later" in sysexits.h: what a launcher or a queue may start anew.
EXIT_STATUS = os.EX_TEMPFAIL

# Files whose functions are collectives where their name begins like one.
_COLLECTIVE_FILES = re.compile(
    r"torch/distributed/(distributed_c10d|_functional_collectives)\.py$"
    r"|deepspeed/comm/\w+\.py$|deepspeed/runtime/pipe/p2p\.py$"
)
_COLLECTIVE_NAMES = re.compile(
    r"_?(all_?(reduce|gather|to_all)|reduce|gather|scatter|broadcast|(monitored_|store_based_)?barrier"
    r"|i?send|i?recv|batch_isend|new_group|wait)"
)
# What gloo, NCCL and the store say when a peer is gone, as opposed to wrong arguments of a collective.
_LOST = re.compile(
    r"gloo/transport|connection (was |likely )*(closed|reset|refused)|broken pipe", re.IGNORECASE
)
_PACKAGE = Path(__file__).parents[1]

_instances = itertools.count()


class Watchdog:
    """Watches the process while its block runs; entered on every rank once the process group exists.

    folder: the run folder; stacks go to its `stacks/rank-00000.txt` and so on, the message to `stacks/report-
    <time>.txt`. timeout_seconds: longest time between two beats. interval_seconds: between two heartbeats.
    silence_seconds: a rank without a heartbeat for so long is dead or stopped.

    Exceptions of the block pass, and the other ranks are told; but one that says that a peer is gone ends
    the process with EXIT_STATUS. A lone process only looks at its own beats.
    """

    def __init__(
        self,
        folder: Path,
        timeout_seconds: float,
        interval_seconds: float = 3.0,
        silence_seconds: float = 15.0,
    ):
        self._folder = folder / "stacks"
        self._timeout, self._interval, self._silence = timeout_seconds, interval_seconds, silence_seconds
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._beat: tuple[int, str] = (0, "start")
        self._error: BaseException | None = None  # of a collective whose peer is gone
        self._end: str | None = None  # how the block ended, once it has
        self._parted = False  # whether rank 0 has ended, and this rank knows: it needs no store any more
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int, phase: str) -> None:
        """Say that the run has come to a phase of a step (a string such as "train" or "checkpoint")."""
        self._beat = (step, phase)

    def __enter__(self) -> "Watchdog":
        self._started = time.strftime("%Y%m%d-%H%M%S")  # rank 0's names the incident for all
        self._main = threading.get_ident()
        self._last_beat = self._beat
        self._seen = time.monotonic()
        # Seconds that this process ran: a process that was stopped and goes on has not stalled meanwhile.
        self._now = self._beat_at = 0.0
        self._error_at: float | None = None
        if self._world > 1:
            # A connection of its own: the main thread may block in the other one.
            store = dist.distributed_c10d._get_default_store().clone()
            self._store = dist.PrefixStore(f"watchdog-{next(_instances)}", store)
            peers = range(self._world) if self._rank == 0 else [0]
            self._heard: dict[int, dict] = {rank: {} for rank in peers}
            self._heard_at = dict.fromkeys(peers, 0.0)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._world > 1 and _is_lost(error):
            # The launcher ends all others as soon as it sees the lost rank, within a second; the message
            # comes first, and this process ends by itself.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._error = error
            self._wake.set()
            self._thread.join()  # it ends the process
        self._end = "finished" if error is None else _describe_error(error)
        self._stopped.set()
        self._wake.set()
        self._thread.join(self._silence)
        if self._world > 1:
            faulthandler.cancel_dump_traceback_later()
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        """Tell the others; rank 0, whose end may be the store's, stays until they know."""
        if self._store is None:
            return
        deadline = time.monotonic() + self._silence
        try:
            _within(self._silence, self._exchange)
            while self._rank == 0 and time.monotonic() < deadline:
                if all(status.get("end") or status.get("parted") for status in self._heard.values()):
                    return
                time.sleep(0.05)
                _within(self._silence, self._exchange)
        except (RuntimeError, TimeoutError):
            return  # whoever kept the store has ended before: nobody is left to be told

    def _watch(self) -> None:
        while not self._stopped.is_set():
            reason = self._look()
            if reason and not self._stopped.is_set():
                self._finish(reason)
            self._wake.wait(self._interval)
            self._wake.clear()

    def _look(self) -> str | None:
        """Exchange heartbeats; the reason to end the run, if there is one."""
        seen = time.monotonic()
        self._now += min(seen - self._seen, 2 * self._interval)
        self._seen = seen
        if self._beat is not self._last_beat:
            self._last_beat, self._beat_at = self._beat, self._now
        if self._error and self._error_at is None:
            self._error_at = self._now
        if self._world > 1 and (reason := self._look_at_others()):
            return reason
        if self._now - self._beat_at > self._timeout:
            step, phase = self._beat
            return (
                f"rank {self._rank} made no progress for {self._timeout:g} s (train.timeout_seconds) "
                f"at step {step}, {phase}"
            )
        return None

    def _look_at_others(self) -> str | None:
        # Should some call keep Python's lock, this thread cannot run: a timer in C ends the process then.
        faulthandler.dump_traceback_later(3 * self._silence, exit=True, file=sys.__stderr__)
        if self._store is not None:
            try:
                if verdict := _within(self._silence, self._exchange):
                    return verdict
                if self._rank and self._heard[0].get("end"):
                    self._parted = True
                    _within(self._silence, self._exchange)
                    self._store = None
            except (RuntimeError, TimeoutError) as error:
                self._store = None
                if self._stopped.is_set() or self._parted:
                    return None
                self._heard_at[0] = self._now - self._silence
                keeper = "the job's store" if _has_agents() else "rank 0, which keeps the job's store,"
                return f"{keeper} does not answer ({_describe_error(error)})"
        if silent := self._silent():
            return f"{_ranks(silent)} {_do(silent, 'not answer')}"
        failed_at = [self._heard_at[rank] for rank in self._heard if self._failed(rank)]
        if failed_at and (self._error or self._now - min(failed_at) > self._silence):
            return self._ended()
        if self._error_at is None:
            return None
        # On this machine the missing heartbeat need not be waited for.
        if gone := [r for r, s in self._heard.items() if not s.get("end") and _process(s) == "gone"]:
            return f"{_ranks(gone)} {_do(gone, 'not answer')}"
        if self._now - self._error_at > self._silence + 2 * self._interval:
            return f"rank {self._rank} lost its connection to another rank ({_describe_error(self._error)})"
        return None

    def _silent(self) -> list[int]:
        """Ranks whose heartbeat is missing."""
        return [
            rank
            for rank, at in self._heard_at.items()
            if rank != self._rank
            and self._now - at >= self._silence
            and (self._store is not None or rank == 0)
            and not self._heard[rank].get("end")
        ]

    def _failed(self, rank: int) -> bool:
        return self._heard[rank].get("end") not in (None, "finished")

    def _ended(self) -> str | None:
        """Which ranks ended with an exception while others go on."""
        failed = [f"rank {r} has ended with {self._heard[r]['end']}" for r in self._heard if self._failed(r)]
        return "; ".join(failed) or None

    def _exchange(self) -> str | None:
        """Write this rank's heartbeat, read the others'; the verdict, if some rank has written one."""
        self._store.set(str(self._rank), json.dumps(self._status()))
        # A key that is not there yet would be waited for.
        there = [rank for rank in self._heard if self._heard[rank] or self._store.check([str(rank)])]
        values = self._store.multi_get([str(rank) for rank in there]) if there else []
        for rank, value in zip(there, values, strict=True):
            status = json.loads(value)
            if status != self._heard[rank]:
                self._heard[rank], self._heard_at[rank] = status, self._now
        self._started = self._heard[0].get("started", self._started)
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else None

    def _status(self) -> dict[str, Any]:
        """Where this rank is: what a heartbeat says."""
        step, phase = self._beat
        collective, where, inside = _collective_of_error(self._error) if self._error else _place(self._main)
        return {
            "started": self._started,
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": step,
            "phase": phase,
            "collective": collective,
            "where": where,
            "inside": inside,
            "raised": _describe_error(self._error) if self._error else None,
            "end": self._end,
            "parted": self._parted,
        }

    def _finish(self, reason: str) -> None:
        """Let every rank know, write the stacks, see to it that one rank prints the message, and end."""
        # A disk or a store that hangs, which may be what is wrong, must not keep the process.
        limit = threading.Timer(10 * self._interval, os._exit, (EXIT_STATUS,))
        limit.daemon, limit.name = True, "watchdog-limit"
        limit.start()
        try:
            if self._world == 1:
                self._publish(_report(reason, {0: self._status()}, [], self._folder))
                self._write_stacks(reason)
            elif self._rank == 0:
                self._finish_first(reason)
            else:
                self._finish_other(reason)
        except BaseException:  # whatever it is, the process ends
            traceback.print_exc()
        finally:
            os._exit(EXIT_STATUS)

    def _finish_first(self, reason: str) -> None:
        """Rank 0 waits until every rank that answers has written where it is, and reports."""
        silent = self._silent()
        silent += [r for r, s in self._heard.items() if r not in silent and not s.get("end") and _process(s)]
        others = [r for r, s in self._heard.items() if r and r not in silent and not s.get("end")]
        if self._store is not None:
            _within(self._interval, lambda: self._store.set("verdict", reason))
            self._await_keys([f"told-{rank}" for rank in others], 2 * self._interval)
            _within(self._interval, self._exchange)
        # Having been stopped and gone on, it may come late.
        if not _within(self._interval, self._report_file().exists):
            message = _report(reason, self._heard, silent, self._folder)
            _print(message)  # before anything is written, for which a disk may make it wait
            write_file(self._report_file(), message)
        self._write_stacks(reason)
        if self._store is not None:
            _within(self._interval, lambda: self._store.set("reported", "yes"))
            # The store ends with this process.
            self._await_keys([f"done-{rank}" for rank in others], self._interval)

    def _finish_other(self, reason: str) -> None:
        """Any other rank waits for rank 0's message, or writes it where that does not come."""
        try:
            if self._store is None:
                raise RuntimeError
            if not _within(self._interval, lambda: self._store.check(["verdict"])):
                _within(self._interval, lambda: self._store.set("verdict", reason))
            _within(self._interval, self._exchange)
            _within(self._interval, lambda: self._store.set(f"told-{self._rank}", "yes"))
            self._write_stacks(reason)
            if self._await_keys(["reported"], 4 * self._interval):
                _within(self._interval, lambda: self._store.set(f"done-{self._rank}", "yes"))
                return
        except (RuntimeError, TimeoutError):  # no store
            self._write_stacks(reason)
            time.sleep(self._interval + 1)  # for the other ranks to do the same
        statuses: dict[int, dict] = {rank: {} for rank in range(self._world)}
        statuses |= {0: self._heard[0], **self._written()}
        silent = [rank for rank, s in statuses.items() if rank not in self._written() and not s.get("end")]
        self._publish(_report(reason, statuses, silent, self._folder))

    def _await_keys(self, keys: list[str], seconds: float) -> bool:
        """Whether all keys are there before so many seconds are over."""
        deadline = time.monotonic() + seconds
        while not (there := _within(self._interval, lambda: not keys or self._store.check(keys))):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return there

    def _report_file(self) -> Path:
        return self._folder / f"report-{self._started}.txt"

    def _publish(self, message: str) -> None:
        """Print the message unless another rank has: the one that makes the file."""
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            with self._report_file().open("x") as file:
                file.write(message)
        except FileExistsError:
            return
        _print(message)

    def _write_stacks(self, reason: str) -> None:
        status = self._status()
        lines = [f"rank {self._rank}: {_locate(status)}", json.dumps(status), reason, ""]
        if self._error:
            lines += traceback.format_exception(self._error)
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for thread, frame in _frames(self._main).items():
            lines += [f"thread {thread} {names.get(thread, '')}", *traceback.format_stack(frame)]
        write_file(self._folder / f"rank-{self._rank:05}.txt", "\n".join(line.rstrip("\n") for line in lines))

    def _written(self) -> dict[int, dict]:
        """Where the ranks are that wrote their stacks in this incident."""
        statuses = {}
        for path in sorted(self._folder.glob("rank-*.txt")):
            status = json.loads(path.read_text().splitlines()[1])
            if status["started"] == self._started:
                statuses[int(path.stem.removeprefix("rank-"))] = status
        return statuses


def _report(reason: str, statuses: dict[int, dict], silent: list[int], folder: Path) -> str:
    """The message: the reason, then who does not answer, who waits where, and who does not wait."""
    places: dict[str, list[int]] = {}
    waiting = any(s.get("collective") for r, s in statuses.items() if r not in silent)
    all_there = not silent and not any(status.get("end") for status in statuses.values())
    for rank, status in statuses.items():
        if rank in silent:
            state = _process(status)
            text = f"its process is {state}" if state else "no heartbeat: killed, stopped or cut off"
            text += f"; last seen at {_locate(status)}" if status else ""
        elif status.get("end"):
            text = f"has ended: {status['end']}"
        elif all_there and waiting and not status.get("collective"):
            text = f"in no collective while others wait, so look there first: {_locate(status)}"
        else:
            text = _locate(status)
        places.setdefault(text, []).append(rank)
    lines = [f"megafusion: {reason}. Every process ends with exit status {EXIT_STATUS}."]
    lines += [f"  {_ranks(ranks)}: {text}" for text, ranks in places.items()]
    return "\n".join([*lines, f"  stacks: {folder}/rank-*.txt", ""])


def _locate(status: dict[str, Any]) -> str:
    """A status in words."""
    at = f"step {status['step']}, {status['phase']}, "
    if status["collective"]:
        at += f"in {status['collective']} called from {status['where']}"
    else:
        at += f"at {status['where']}" + (f" (in {status['inside']})" if status["inside"] else "")
    return at + (f", which raised {status['raised']}" if status["raised"] else "")


def _ranks(ranks: Iterable[int]) -> str:
    """ "rank 3" or "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(spans) > 1 or spans[0][0] != spans[0][1] else ''} {text}"


def _do(ranks: list[int], rest: str) -> str:
    return f"{'does' if len(ranks) == 1 else 'do'} {rest}"


def _print(message: str) -> None:
    # Past sys.stderr, which a progress bar may have in hand; on a line of its own behind that.
    os.write(2, f"\n{message}".encode())


def _has_agents() -> bool:
    """Whether torchrun's agent keeps the store, not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _process(status: dict[str, Any]) -> str | None:
    """ "gone" or "stopped" where a rank's process is that; None where it runs or on another machine."""
    if status.get("host") != socket.gethostname():
        return None
    try:
        state = psutil.Process(status["pid"]).status()
    except psutil.NoSuchProcess:
        return "gone"
    return {psutil.STATUS_ZOMBIE: "gone", psutil.STATUS_STOPPED: "stopped"}.get(state)


def _is_lost(error: BaseException) -> bool:
    """Whether an exception, or what it came from, says that a peer of a collective does not answer."""
    if isinstance(error, UserError):
        return False
    if isinstance(error, RuntimeError):
        is_backend = isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError)
        if is_backend or _LOST.search(str(error)):
            return True
    return error.__cause__ is not None and _is_lost(error.__cause__)


def _describe_error(error: BaseException) -> str:
    """Class and first line of an exception, without what gloo says of itself: ranks are to say the same."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"^\[\S*gloo/\S*\] ", "", lines[0])
    text = re.sub(r" \[[\w.:]+\]:\d+\b.*| for (send|recv) operation to complete", "", text)
    return f"{type(error).__name__}: {text[:300]}"


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """What the function returns or raises, from a thread of its own; TimeoutError where that takes longer.

    A store whose keeper is stopped answers nothing and raises nothing.
    """
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def call() -> None:
        try:
            answers.put((function(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=call, name="watchdog-store", daemon=True).start()
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if error is not None:
        raise error
    return value


def _frames(main: int) -> dict[int, FrameType]:
    """The innermost frame of every thread but the watchdog's own, the main one first."""
    own = {thread.ident for thread in threading.enumerate() if thread.name.startswith("watchdog")}
    frames = {thread: frame for thread, frame in sys._current_frames().items() if thread not in own}
    return {main: frames.pop(main), **frames}


def _place(main: int) -> tuple[str | None, str, str | None]:
    """The collective that a thread of this process sits in, ours that called it, and the innermost frame.

    Backward passes on a device run in autograd's threads, so all are looked at, the main one first.
    """
    stacks = [list(traceback.walk_stack(frame)) for frame in _frames(main).values()]  # innermost first
    place = _name_frames(stacks[0])
    for stack in stacks[1:]:
        if place[0]:
            break
        collective, where, _ = _name_frames(stack)
        if collective:
            place = collective, where if where.startswith(f"{_PACKAGE.name}{os.sep}") else place[1], None
    return place


def _collective_of_error(error: BaseException) -> tuple[str | None, str, str | None]:
    while error.__cause__ is not None:
        error = error.__cause__
    return _name_frames([*traceback.walk_tb(error.__traceback__)][::-1])


def _name_frames(stack: list[tuple[FrameType, int]]) -> tuple[str | None, str, str | None]:
    """Of a stack, innermost first: collective, nearest frame of ours, and the innermost if it is another."""
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
    callers = [_name_frame(*entry) for entry in stack[after:] if entry[0].f_code.co_filename != __file__]
    innermost = callers[0]
    where = next((caller for caller in callers if caller.startswith(f"{_PACKAGE.name}{os.sep}")), innermost)
    return collective, where, None if where == innermost else innermost


def _name_frame(frame: FrameType, line: int) -> str:
    path = frame.f_code.co_filename
    short = path.removeprefix(f"{_PACKAGE.parent}{os.sep}")
    short = re.sub(r"^.*/(site-packages|python3\.\d+)/", "", short)
    return f"{short}:{line} {frame.f_code.co_name}"
