"""The data order: the same at any number of ranks and workers, and after a restart at any step."""

import json
import random

import pytest

from megafusion.errors import UserError
from tests.support.marks import full
from tests.support.rows import digest, stream_of, write_pairs, write_texts

NUM_ROWS, NUM_STEPS = 8, 250


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Counts that neither streams nor shards divide; an epoch of pairs ends after about 60 steps."""
    folder = tmp_path_factory.mktemp("order")
    pairs = write_pairs(folder / "pairs", 1237, 100, caption=lambda r: int(r.integers(1, 12)))
    texts = write_texts(folder / "text", 331, 70, length=lambda r: int(r.integers(1, 200)))
    return {"pairs": (pairs, 0.6), "text": (texts, 0.4)}


@pytest.fixture(scope="module")
def expected(sources):
    """Every row's hash in one process, and the state after each step."""
    stream = stream_of(sources, range(NUM_ROWS), NUM_ROWS, num_streams=16)
    hashes, states = [], []
    for _ in range(NUM_STEPS):
        batch = stream.next()
        hashes.append(digest(batch))
        states.append(json.dumps(stream.state_dict()))
    ends = [s["position"]["pairs"][0] for s in json.loads(states[-1])["streams"].values()]
    assert min(ends) >= 3  # far past an epoch's end
    return hashes, states


def ranks_of(sources, num_ranks: int, **changes):
    share = NUM_ROWS // num_ranks
    rows = [range(r * share, (r + 1) * share) for r in range(num_ranks)]
    return [stream_of(sources, r, NUM_ROWS, num_streams=16, **changes) for r in rows]


def rows_of(ranks) -> list[str]:
    return [row for rank in ranks for row in digest(rank.next())]


# 4 ranks and 4 workers stand for other numbers; the restart below takes all numbers of ranks.
@pytest.mark.parametrize("num_ranks", [4, *full(2, 8)])
def test_any_number_of_ranks(sources, expected, num_ranks):
    ranks = ranks_of(sources, num_ranks)
    assert [rows_of(ranks) for _ in range(NUM_STEPS)] == expected[0]


@pytest.mark.parametrize("num_workers", [4, *full(1)])
def test_any_number_of_workers(sources, expected, num_workers):
    hashes, states = expected
    (stream,) = ranks_of(sources, 1, num_workers=num_workers)
    with stream:
        for step in range(NUM_STEPS):
            batch = stream.next()
            assert digest(batch) == hashes[step]
            assert json.dumps(stream.state_dict(), sort_keys=True) == json.dumps(
                json.loads(states[step]), sort_keys=True
            )


def test_a_restart_at_any_step_with_other_ranks(sources, expected):
    """At 20 random steps: the state of that step, loaded by 1, 2, 4 or 8 ranks."""
    hashes, states = expected
    draw = random.Random(0)
    for stop in draw.sample(range(1, NUM_STEPS - 20), 20):
        ranks = ranks_of(sources, draw.choice((1, 2, 4, 8)))
        for rank in ranks:
            rank.load_state_dict(json.loads(states[stop - 1]))
        for step in range(stop, stop + 20):
            assert rows_of(ranks) == hashes[step], (stop, step)


def test_a_state_is_of_the_last_batch_however_far_ahead_workers_are(sources, expected):
    """The ranks' states are merged, as a checkpoint does, and loaded by other ranks and workers."""
    hashes, _ = expected
    ranks = ranks_of(sources, 2, num_workers=2, prefetch=5)
    for _ in range(7):
        [rank.next() for rank in ranks]
    states = [rank.state_dict() for rank in ranks]
    state = {**states[0], "streams": {k: v for s in states for k, v in s["streams"].items()}}
    [rank.close() for rank in ranks]
    assert rows_of(ranks) == hashes[7]  # after a close, workers start after the last batch
    others = ranks_of(sources, 4, num_workers=1)
    for rank in others:
        rank.load_state_dict(json.loads(json.dumps(state)))
    assert rows_of(others) == hashes[7]
    assert rows_of(others) == hashes[8]
    for rank in [*ranks, *others]:
        rank.close()


def test_the_number_of_streams_and_the_seed_give_other_orders(sources, expected):
    first = expected[0][0]
    assert digest(stream_of(sources, range(8), 8, num_streams=24).next()) != first
    assert digest(stream_of(sources, range(8), 8, num_streams=16, seed=1).next()) != first


def test_states_of_another_format_or_mixture_are_refused(sources, expected):
    state = json.loads(expected[1][0])
    (stream,) = ranks_of(sources, 1)
    old = {
        "batch_number": 3,
        "streams": {"0": {"position": {"pairs": [0, 1]}, "pending": [["pairs", 0, 0, 0]]}},
    }
    with pytest.raises(UserError, match="data state has format 1, and this version reads 2"):
        stream.load_state_dict(old)
    with pytest.raises(UserError, match="has no stream 8"):
        stream.load_state_dict({**state, "streams": {k: v for k, v in state["streams"].items() if k != "8"}})
    with pytest.raises(UserError, match="another mixture"):
        stream_of({"pairs": sources["pairs"]}, range(8), 8, num_streams=16).load_state_dict(state)
