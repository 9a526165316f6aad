"""Interleaved documents in packed rows: texts cut anywhere, images complete, none lost or sampled again."""

import json
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megafusion.data.loader import packed_and_skipped
from megafusion.data.logical_stream import LogicalStream
from megafusion.errors import UserError
from megafusion.sequence.document import IGNORED_LABEL
from tests.support.rows import (
    IDS,
    MANY_IDS,
    NUM_PATCHES,
    arrays,
    digest,
    document_starts,
    stream_of,
    write_documents,
    write_pairs,
    write_texts,
)

PATCH = -1


def logical_of(folder, **values) -> LogicalStream:
    (logical,) = stream_of({"web": (folder, 1.0)}, range(1), 1, ids=MANY_IDS, **values)._streams.values()
    return logical


def laid_out(segments) -> list[tuple[int, int]]:
    """Token and target of each position of a document, by the rules of docs/data.md."""
    tokens = [MANY_IDS.bos]
    for segment in segments:
        tokens += (
            segment.data.tolist()
            if segment.kind == "tokens"
            else [MANY_IDS.boi, *[PATCH] * NUM_PATCHES, MANY_IDS.eoi]
        )
    tokens.append(MANY_IDS.eos)
    following = [*tokens[1:], IGNORED_LABEL]
    return [
        (token, IGNORED_LABEL if token in (PATCH, MANY_IDS.boi) else label)
        for token, label in zip(tokens, following, strict=True)
    ]


def packed_by_state(logical: LogicalStream) -> tuple[Counter, Counter]:
    """Positions (token, target) and images that are packed according to the state: read and not pending."""
    source = logical._sources["web"]
    positions, images = Counter(), Counter()

    def count(epoch, order, first, last, sign):
        segments = source.folder.read(source.document_at(0, epoch, order)).segments
        whole = laid_out(segments)
        starts = [n for n in range(1, len(whole)) if whole[n][0] == PATCH != whole[n - 1][0]]
        numbers = [int(s.data[0, 0, 0, 0]) for s in segments if s.kind == "moments"]
        for position in whole[first:last]:
            positions[position] += sign
        for number, start in zip(numbers, starts, strict=True):
            if first <= start < (len(whole) if last is None else last):
                assert last is None or start + NUM_PATCHES < last, "an image is split"
                assert start > first, "boi is not with its image"
                images[number] += sign

    epoch, order, offset = logical.state.position["web"]
    for e in range(epoch + 1):
        for o in range(source.size(0) if e < epoch else order):
            count(e, o, 0, None, 1)
    if offset:
        count(epoch, order, 0, offset, 1)
    for pending in logical.state.pending:
        before = images.total()
        count(*pending.key[1:], pending.start, pending.end, -1)
        assert before - images.total() == pending.num_images
    return +positions, +images


def found_in(row, positions: Counter, images: Counter, slots: int) -> None:
    """Count a row's positions and images, and check that its documents do not see each other."""
    length = len(row["tokens"])
    # Padding is documents of one filler position without a target.
    real = (row["tokens"] > 0) | (row["patch_index"] >= 0)
    tokens = np.where(row["patch_index"] >= 0, PATCH, row["tokens"])[real]
    positions.update(zip(tokens.tolist(), row["labels"][real].tolist(), strict=True))
    own = np.arange(length)
    assert (row["positions"][real] == (own - document_starts(row))[real]).all()
    is_patch = row["patch_index"] >= 0
    assert (row["row_end"][~is_patch] == own[~is_patch] + 1).all()
    used = np.flatnonzero(row["image_start"] >= 0)
    assert len(used) <= slots
    assert is_patch.sum() == len(used) * NUM_PATCHES
    for slot in used:
        start = row["image_start"][slot]
        here = slice(start, start + NUM_PATCHES)
        assert row["patch_index"][here].tolist() == list(range(slot * NUM_PATCHES, (slot + 1) * NUM_PATCHES))
        assert (row["row_end"][here] == here.stop).all()
        assert (row["tokens"][start - 1], row["tokens"][here.stop]) == (MANY_IDS.boi, MANY_IDS.eoi)
        assert len(set(row["last_query"][start - 1 : here.stop + 1])) == 1
        images[round(float(row["latents"][slot].mean()))] += 1


PARTS = st.lists(st.one_of(st.just(0), st.integers(1, 90)), min_size=1, max_size=12)


@given(
    documents=st.lists(PARTS, min_size=1, max_size=6),
    length=st.one_of(st.integers(NUM_PATCHES + 4, 150), st.just(640)),
    slots=st.integers(1, 4),
    packing_buffer_size=st.integers(1, 6),
    stops=st.sets(st.integers(0, 30), max_size=3),
)
@example([[0, 1]], NUM_PATCHES + 4, 1, 1, set())
@example([[1, 0, 1, 0], [0] * 9], NUM_PATCHES + 4, 2, 2, {1, 2})
# Rows in which an image alone is shorter than the minimum piece.
@example([[0] * 9, [3, 0, 0, 3, 0]], 640, 1, 2, {1})
@settings(max_examples=60, deadline=None)
def test_each_patch_and_each_target_once_an_epoch(
    tmp_path_factory, documents, length, slots, packing_buffer_size, stops
):
    """After any row and any restart, the rows so far hold exactly what was read and is not pending."""
    folder = write_documents(tmp_path_factory.mktemp("once") / "web", documents)
    values = {"length": length, "slots": slots, "packing_buffer_size": packing_buffer_size}
    logical = logical_of(folder, **values)
    positions, images = Counter(), Counter()
    number = 0
    while logical.state.position["web"][0] < 2 or number < 31:
        if number in stops:
            state = json.loads(json.dumps(logical.state.state_dict()))
            logical = logical_of(folder, **values)
            logical.load_state_dict(state)
        found_in(arrays(logical.next_row()), positions, images, slots)
        number += 1
        assert number < 2000
    assert (positions, images) == packed_by_state(logical)


def test_an_images_samples_do_not_depend_on_where_its_document_is_cut(tmp_path):
    shapes = [[20, 0, 0, 30, 0], [0, 40, 0, 0], [5, 0, 50, 0, 0, 0, 7]]
    folder = write_documents(tmp_path / "web", shapes)

    def samples(num_epochs: int, **values) -> dict[int, set]:
        logical, found = logical_of(folder, **values), defaultdict(set)
        while min(p.key.epoch for p in logical.state.pending) < num_epochs if logical.state.pending else True:
            row = arrays(logical.next_row())
            for slot in np.flatnonzero(row["image_start"] >= 0):
                sample = row["noise"][slot].tobytes(), row["latents"][slot].tobytes(), row["t"][slot]
                found[round(float(row["latents"][slot].mean()))].add(sample)
        return found

    whole = samples(9, length=256, slots=8)
    for length, slots in ((24, 4), (37, 2), (64, 1)):
        cut = samples(4, length=length, slots=slots)
        assert sorted(cut) == list(range(10))
        for image, draws in cut.items():
            assert len(draws) >= 4
            assert draws <= whole[image]


def test_an_image_that_opens_a_piece_keeps_its_range_of_t(tmp_path):
    """Rows of one image: an image that opens a piece has the range of t of its whole document."""
    folder = write_documents(tmp_path / "web", [[0, 3, 0, 0]])
    logical = logical_of(folder, length=NUM_PATCHES + 5, slots=1, image_first_max_t=0.01)
    times, opens = defaultdict(list), Counter()
    for _ in range(400):
        row = arrays(logical.next_row())
        if row["image_start"][0] >= 0:
            image = round(float(row["latents"][0].mean()))
            times[image].append(row["t"][0])
            opens[image] += row["positions"][row["image_start"][0]] == 1
    assert max(times[0]) < 0.01
    assert min(opens[2], len(times[2])) > 50
    assert max(times[1]) > 0.8
    assert max(times[2]) > 0.8


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    draw = random.Random(0)
    shapes = [
        [draw.choice((0, 0, draw.randint(1, 60))) for _ in range(draw.randint(1, 20))] for _ in range(21)
    ]
    return {
        "web": (write_documents(folder / "web", shapes, 7), 0.5),
        "pairs": (write_pairs(folder / "pairs", 90, 20), 0.3),
        "text": (write_texts(folder / "text", 40, 9), 0.2),
    }


NUM_ROWS, NUM_STEPS = 4, 100


def ranks_of(mixture, num_ranks: int, **changes):
    share = NUM_ROWS // num_ranks
    rows = [range(r * share, (r + 1) * share) for r in range(num_ranks)]
    return [stream_of(mixture, r, NUM_ROWS, num_streams=8, ids=MANY_IDS, **changes) for r in rows]


def rows_of(ranks) -> list[str]:
    return [row for rank in ranks for row in digest(rank.next())]


def test_the_order_is_the_same_at_any_number_of_ranks_and_workers_and_after_restarts(mixture):
    (whole,) = ranks_of(mixture, 1)
    expected, states = [], []
    for _ in range(NUM_STEPS):
        batch = whole.next()
        expected.append(digest(batch))
        states.append(json.dumps(whole.state_dict()))
    assert min(s["position"]["web"][0] for s in json.loads(states[-1])["streams"].values()) >= 2
    # Some stops are in the middle of a document with images.
    waiting = [p for s in json.loads(states[40])["streams"].values() for p in s["pending"]]
    assert any(p[0] == "web" and p[3] and p[5] for p in waiting)
    for num_ranks in (2, 4):
        ranks = ranks_of(mixture, num_ranks)
        assert [rows_of(ranks) for _ in range(NUM_STEPS)] == expected
    (stream,) = ranks_of(mixture, 1, num_workers=2)
    with stream:
        assert [digest(stream.next()) for _ in range(NUM_STEPS)] == expected
    draw = random.Random(1)
    for stop in draw.sample(range(1, NUM_STEPS - 8), 20):
        ranks = ranks_of(mixture, draw.choice((1, 2, 4)))
        for rank in ranks:
            rank.load_state_dict(json.loads(states[stop - 1]))
        assert [rows_of(ranks) for _ in range(8)] == expected[stop : stop + 8], stop


def test_interleaved_documents_fill_their_rows(tmp_path):
    """Web pages: some 6 images of 256 patches, paragraphs of some 90 tokens, some longer than rows."""
    draw = np.random.default_rng(0)
    shapes = []
    for _ in range(500):
        parts = [max(1, int(n)) for n in draw.lognormal(np.log(60), 0.9, int(draw.integers(1, 14)))]
        for _ in range(min(80, int(draw.lognormal(np.log(4), 0.8)))):
            parts.insert(int(draw.integers(len(parts) + 1)), 0)
        shapes.append(parts)
    folder = write_documents(tmp_path / "web", shapes, 100, latents=(1, 2, 2))
    values = {"length": 4096, "num_patches": 256, "latents": (1, 2, 2), "ids": MANY_IDS}
    for slots in (15, 12):
        stream = stream_of({"web": (folder, 1.0)}, range(16), 16, slots=slots, **values)
        for _ in range(17):
            stream.next()
        packed = packed_and_skipped(stream.state_dict())[0].total()
        assert packed / (17 * 16 * 4096) >= 0.97, slots


def test_a_caption_longer_than_a_row_is_cut_and_its_image_stays_complete(tmp_path):
    """Only pairs that are longer than a row are cut."""
    lengths = iter([100, 5, 30, 200])
    pairs = write_pairs(tmp_path / "pairs", 4, caption=lambda r: next(lengths))
    (logical,) = stream_of(
        {"pairs": (pairs, 1.0)}, range(1), 1, length=64, packing_buffer_size=3
    )._streams.values()
    cut = set()
    for _ in range(60):
        cut |= {pending.key.order for pending in logical.state.pending if pending.start}
        row = arrays(logical.next_row())
        starts = row["image_start"][row["image_start"] >= 0]
        assert (row["tokens"][starts - 1] == IDS.boi).all()
        assert (row["tokens"][starts + NUM_PATCHES] == IDS.eoi).all()
    assert cut
    assert logical.state.position["pairs"][0] > 5


def test_an_image_that_fits_in_no_row_is_refused(tmp_path):
    folder = write_documents(tmp_path / "web", [[3, 0, 3]])
    assert logical_of(folder, length=NUM_PATCHES + 4).next_row()
    message = r"web, document 0 .*: an image takes 8 positions .* fit in data\.sequence_length 7; raise it"
    with pytest.raises(UserError, match=message):
        logical_of(folder, length=NUM_PATCHES + 3).next_row()
