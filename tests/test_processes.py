"""Which ranks a process belongs to, by an environment that is set in whole, in part or badly; signals."""

import signal
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megafusion.errors import UserError
from megafusion.processes import RANK_VARIABLES, stop_signals_wait, world_size

numbers = st.sampled_from(["", "0", "1", "2", "7", "00", "65536", "-1", "1.5", "x", " 1", "\u0661", "9" * 99])
environments = st.dictionaries(st.sampled_from(RANK_VARIABLES), numbers | st.just("localhost"))


def size_or_refusal() -> tuple[int, str]:
    try:
        return world_size(), ""
    except UserError as error:
        return 0, str(error)


@given(environments)
def test_half_an_environment_runs_alone_or_is_refused_in_a_sentence(found):
    with pytest.MonkeyPatch.context() as patch:
        for name in RANK_VARIABLES:
            patch.delenv(name, raising=False)
        for name, value in found.items():
            patch.setenv(name, value)
        world, refused = size_or_refusal()
    if refused:
        assert "unset RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in refused
        assert "\n" not in refused
        return
    given_values = {name: value for name, value in found.items() if value}
    assert world == int(given_values.get("WORLD_SIZE", 1))
    assert int(given_values.get("RANK", 0)) < world
    assert world == 1 or len(given_values) == len(RANK_VARIABLES)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"RANK": "1"}, "RANK 1 is not below WORLD_SIZE 1"),
        ({"WORLD_SIZE": "0"}, "RANK 0 is not below WORLD_SIZE 0"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many: not a number below 65536"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: not a number below 65536"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: not a number"),
    ],
)
def test_what_is_wrong_is_named(monkeypatch, found, message):
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        world_size()


@pytest.mark.parametrize("name", RANK_VARIABLES)
def test_a_rank_s_place_alone_is_no_world(monkeypatch, name):
    for other in RANK_VARIABLES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, {"MASTER_ADDR": "localhost", "WORLD_SIZE": "1"}.get(name, "0"))
    assert world_size() == 1


def block_of(*numbers: int) -> list[bool]:
    """Raise signals within a block; before and after each, whether one had come. A list that is never whole
    where the block was left."""
    seen: list[bool] = []
    BLOCKS.append(seen)
    with stop_signals_wait() as stopped:
        for number in numbers:
            seen.append(stopped())
            signal.raise_signal(number)
        seen.append(stopped())
    return seen


BLOCKS: list[list[bool]] = []


def test_a_stop_signal_waits_for_the_end_of_a_block_and_a_second_does_not():
    with pytest.raises(KeyboardInterrupt):
        block_of(signal.SIGINT)
    assert BLOCKS[-1] == [False, True]
    with pytest.raises(KeyboardInterrupt):
        block_of(signal.SIGINT, signal.SIGINT)
    assert BLOCKS[-1] == [False, True], "it left the block"
    assert block_of() == [False]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_that_are_ignored_or_only_noted_and_other_threads():
    noted: list[int] = []
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    user = signal.signal(signal.SIGUSR1, lambda number, frame: noted.append(number))
    try:
        assert block_of(signal.SIGHUP) == [False, False]
        with pytest.raises(SystemExit) as ended:
            block_of(signal.SIGUSR1)
        assert (ended.value.code, noted) == (75, [signal.SIGUSR1])
    finally:
        signal.signal(signal.SIGHUP, hang_up)
        signal.signal(signal.SIGUSR1, user)
    thread = threading.Thread(target=block_of)
    thread.start()
    thread.join()
    assert BLOCKS[-1] == [False]
