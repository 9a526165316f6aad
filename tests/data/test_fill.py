"""Packed rows: nearly every position is real, source weights are kept, nothing is lost or repeated."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megafusion.config import load_config
from megafusion.data.loader import DataLoader, packed_and_skipped
from megafusion.train.config import RunConfig
from tests.support.rows import IDS, arrays, stream_of, write_pairs, write_texts
from tests.support.small import GLOSSES, PACK, ROOT


@pytest.fixture(scope="module")
def captions(tokenizer):
    """Lengths of the starter split's captions and of glosses, in the quickstart's tokenizer."""
    from data_prep.readers.webdataset import tar_pairs

    wanted = set((ROOT / "data_prep/emoji/starter.txt").read_text().split())
    texts = [p.caption.decode().strip() for p in tar_pairs(PACK) if p.key in wanted]
    glosses = GLOSSES.read_text().splitlines()[:4000]
    return [len(tokenizer.encode(t)) for t in texts], [len(tokenizer.encode(t)) for t in glosses]


def in_turn(lengths):
    turns = iter(lengths)
    return lambda random: next(turns)


def packed(stream: DataLoader, num_steps: int) -> tuple[Counter, list[Counter]]:
    """Positions packed by source: in all, and by batch."""
    totals = []
    for _ in range(num_steps):
        stream.next()
        totals.append(Counter(packed_and_skipped(stream.state_dict())[0]))
    return totals[-1], [totals[0]] + [b - a for a, b in itertools.pairwise(totals)]


@pytest.mark.full
def test_the_quickstart_has_full_rows_and_follows_its_weights(captions, tmp_path):
    """Its shape, weights, captions and glosses over 512 000 positions; latents have one channel."""
    config = load_config(RunConfig, ROOT / "configs/quickstart.yaml").data
    lengths, glosses = captions
    write_pairs(tmp_path / "pairs", len(lengths), latents=(1, 4, 4), caption=in_turn(lengths))
    write_texts(tmp_path / "text", len(glosses), length=in_turn(glosses))
    weights = {name: source.weight for name, source in config.sources.items()}
    stream = stream_of(
        {"emoji": (tmp_path / "pairs", weights["emoji"]), "glosses": (tmp_path / "text", weights["glosses"])},
        range(16),
        16,
        length=config.sequence_length,
        slots=config.images_per_row,
        num_patches=16,
        packing_buffer_size=config.packing_buffer_size,
    )
    total, batches = packed(stream, 250)
    assert total.total() / (250 * 16 * config.sequence_length) >= 0.97
    assert total["emoji"] / total.total() == pytest.approx(0.9, abs=0.009)
    shares = np.array([b["emoji"] / b.total() for b in batches])
    assert shares[:5] == pytest.approx(0.9, abs=0.08)
    assert shares.std() < 0.03


def test_lengths_like_cc12m_fill_rows_and_follow_the_weights(tmp_path):
    """Captions of about 20 tokens, images of 256 patches, long texts: rows of 4,096, over a million."""
    write_pairs(
        tmp_path / "pairs",
        3000,
        latents=(1, 2, 2),
        caption=lambda r: int(np.clip(r.lognormal(np.log(18), 0.5), 3, 200)),
    )
    write_texts(
        tmp_path / "text", 600, length=lambda r: int(np.clip(r.lognormal(np.log(1200), 1.2), 20, 60000))
    )
    sources = {"pairs": (tmp_path / "pairs", 0.5), "text": (tmp_path / "text", 0.5)}
    stream = stream_of(sources, range(16), 16, length=4096, slots=15, num_patches=256, latents=(1, 2, 2))
    total, batches = packed(stream, 17)
    assert total.total() / (17 * 16 * 4096) >= 0.97
    assert total["pairs"] / total.total() == pytest.approx(0.5, abs=0.01)
    shares = np.array([b["pairs"] / b.total() for b in batches])
    assert shares.std() < 0.05
    assert abs(shares[0] - 0.5) < 0.15  # the first batch holds both, too


def test_every_target_is_in_the_rows_once_an_epoch(tmp_path):
    """Texts cut anywhere: the pairs of input and target of two epochs are those of the documents, twice."""
    lengths = [1, 2, 300, 64, 62, 61, 63, 65, 7, 130, 90, 15]
    folder = write_texts(tmp_path / "text", len(lengths), 5, length=in_turn(lengths))
    stream = stream_of({"text": (folder, 1.0)}, range(1), 1, packing_buffer_size=5)
    (logical,) = stream._streams.values()
    source = logical._sources["text"]
    read = source.folder.read
    wanted: Counter = Counter()
    for number in range(len(lengths)):
        ids = [IDS.bos, *read(number).segments[0].data.tolist(), IDS.eos]
        wanted.update(itertools.pairwise(ids))
    found: Counter = Counter()
    while logical.state.position["text"][0] < 2 or any(p.key.epoch < 2 for p in logical.state.pending):
        row = arrays(logical.next_row())
        asked = row["labels"] >= 0
        found.update(zip(row["tokens"][asked].tolist(), row["labels"][asked].tolist(), strict=True))
        ends = np.unique(row["last_query"]) - 1
        lengths_here = row["positions"][ends] + 1
        assert (lengths_here[row["tokens"][ends] > 0] >= 2).all()  # no piece of eos alone
        if logical.state.position["text"][0] > 2:
            break
    # Corrected by what is packed of the third epoch and what is pending.
    extra: Counter = Counter()
    epoch, order, offset = logical.state.position["text"]
    for e in range(2, epoch + 1):
        for o in range(len(lengths) if e < epoch else order + (offset > 0)):
            ids = [IDS.bos, *read(source.document_at(0, e, o)).segments[0].data.tolist(), IDS.eos]
            end = offset if (e, o) == (epoch, order) else len(ids) - 1
            extra.update(list(itertools.pairwise(ids))[:end])
    for pending in logical.state.pending:
        document = source.document_at(0, *pending.key[1:])
        ids = [IDS.bos, *read(document).segments[0].data.tolist(), IDS.eos]
        extra.subtract(list(itertools.pairwise(ids))[pending.start : pending.end])
    wanted = Counter({pair: 2 * n for pair, n in wanted.items()})
    wanted.update(extra)
    assert found == wanted


def test_a_piece_sees_only_itself_and_restarts_its_positions(tmp_path):
    folder = write_texts(tmp_path / "text", 1, 1, length=lambda r: 150)
    stream = stream_of({"text": (folder, 1.0)}, range(1), 1, packing_buffer_size=2)
    rows = [stream.next()[0] for _ in range(3)]
    assert rows[1].tokens[0, 0] == rows[0].labels[0, -1]  # a piece's last target opens the next one
    for row in rows:
        last = row.last_query[0].unique()
        assert (row.positions[0, [0, *last[:-1]]] == 0).all()
        assert (row.positions[0] == 0).sum() == len(last)
        assert (row.row_end[0] == row.row_end[0].sort().values).all()


@given(
    num_documents=st.integers(3, 60),
    per_shard=st.integers(1, 17),
    num_streams=st.integers(1, 3),
    length=st.sampled_from([24, 40, 64]),
    packing_buffer_size=st.integers(1, 9),
    seed=st.integers(0, 5),
)
@settings(max_examples=25)
def test_each_sample_exactly_once_an_epoch(
    tmp_path_factory, num_documents, per_shard, num_streams, length, packing_buffer_size, seed
):
    """Counts that divide nothing: each epoch has every image of the source once."""
    folder = tmp_path_factory.mktemp("once") / "pairs"
    write_pairs(folder, num_documents, per_shard)
    stream = stream_of(
        {"pairs": (folder, 1.0)},
        range(num_streams),
        num_streams,
        length=length,
        packing_buffer_size=packing_buffer_size,
        seed=seed,
    )
    seen: Counter = Counter()
    for logical in stream._streams.values():
        documents = logical._documents
        load = documents._load

        def spy(key, load=load, logical=logical):
            source = logical._sources[key.source]
            seen[source.document_at(logical.number, key.epoch, key.order), key.epoch] += 1
            return load(key)

        documents._load = spy
        while logical.state.position["pairs"][0] < 2:
            logical.next_row()
    for epoch in (0, 1):
        assert [seen[d, epoch] for d in range(num_documents)] == [1] * num_documents


def test_a_long_text_does_not_delay_earlier_documents(tmp_path):
    """No document waits for more rows than the packing buffer holds, even with cuts and full slots."""
    pairs, texts = write_pairs(tmp_path / "pairs", 200), write_texts(tmp_path / "text", 50)
    stream = stream_of({"pairs": (pairs, 1.0), "text": (texts, 2.0)}, range(1), 1, packing_buffer_size=8)
    (logical,) = stream._streams.values()
    waited: Counter = Counter()
    for _ in range(300):
        logical.next_row()
        waited.update((*pending.key, pending.end) for pending in logical.state.pending)
    assert max(waited.values()) < 8


def test_streams_start_at_different_phases_of_the_mixture(tmp_path):
    """Documents of one length per source, so that streams that start alike would stay in step."""
    write_pairs(tmp_path / "pairs", 600, latents=(1, 2, 2), caption=lambda r: 20)
    write_texts(tmp_path / "text", 600, length=lambda r: 3000)
    sources = {"pairs": (tmp_path / "pairs", 0.5), "text": (tmp_path / "text", 0.5)}
    stream = stream_of(sources, range(16), 16, length=4096, slots=15, num_patches=256, latents=(1, 2, 2))
    _, batches = packed(stream, 12)
    shares = np.array([b["pairs"] / b.total() for b in batches])
    assert np.abs(shares - 0.5).max() < 0.13  # 0.16 if all started alike
    assert shares.std() < 0.065  # 0.084


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_stays_flat_over_100_000_rows(tmp_path):
    import psutil

    pairs, texts = write_pairs(tmp_path / "pairs", 20_000, 1000), write_texts(tmp_path / "text", 20_000, 1000)
    stream = stream_of({"pairs": (pairs, 1.0), "text": (texts, 1.0)}, range(16), 16)
    resident = []
    for step in range(100_000 // 16 + 1):
        stream.next()
        if step % 625 == 624:
            resident.append(psutil.Process().memory_info().rss)
    assert max(resident) < 1.05 * resident[0]


def test_the_shards_open_at_once_are_bounded(tmp_path):
    import psutil

    from megafusion.data import reader

    folder = write_texts(tmp_path / "text", 300, 1)
    stream = stream_of({"text": (folder, 1.0)}, range(1), 1)
    for _ in range(400):
        stream.next()
    held = [f for f in psutil.Process().open_files() if str(tmp_path) in f.path and f.path.endswith(".tar")]
    assert len(held) <= reader.MAX_OPEN


def test_images_alone_leave_the_positions_that_no_image_fits(tmp_path):
    """Having no text to fill a row with is not an error: the rest stays empty."""
    folder = write_pairs(tmp_path / "pairs", 40)
    stream = stream_of({"pairs": (folder, 1.0)}, range(2), 2, slots=2)
    row = stream.next()[0]
    assert (row.image_start >= 0).sum() == 2
    assert (row.last_query[0] == np.arange(1, 65))[-20:].all()
