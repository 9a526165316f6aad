"""Streams: the same rows at any number of ranks and after restarts; each document once an epoch."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megafusion.config import parse_config
from megafusion.data.config import DataConfig
from megafusion.data.loader import DataLoader
from megafusion.data.logical_stream import LogicalStream
from megafusion.data.reader import ShardFolder
from megafusion.data.source import Source, open_sources
from megafusion.errors import UserError
from megafusion.objective.ddpm import DDPMConfig
from megafusion.sequence.packing import SequenceShape, collate
from tests.support.rows import arrays, digest, stored, write_shards

NUM_ROWS = 4


@pytest.fixture
def data(run_values) -> DataConfig:
    return parse_config(DataConfig, run_values["data"], "test")


@pytest.fixture
def make_stream(data, tokenizer, codec):
    def make(rows=range(NUM_ROWS), seed=0, data=data, micro=1) -> DataLoader:
        sources = open_sources(data, tokenizer, codec.hash, seed)
        shape = SequenceShape(data.sequence_length, data.images_per_row, (16,), 4, ((8, 8),))
        return DataLoader(data, sources, shape, tokenizer, DDPMConfig().build(), NUM_ROWS, rows, micro)

    return make


@pytest.fixture
def make_logical_stream(data, tokenizer, codec, tmp_path):
    """Stream 0 of 1 over hand-made sources: weight, documents and manifest fields, by name."""

    def make(made: dict[str, tuple[float, list, dict]], seed: int = 0, **changes) -> LogicalStream:
        values = data.model_dump() | {"num_streams": 1, "sources": {}} | changes
        for name, (weight, segments, fields) in made.items():
            documents = [stored({}, *s) for s in segments]
            origin = {"tokenizer_sha256": tokenizer.hash, "provenance": {}}
            write_shards(tmp_path / name, documents, 16, **origin | fields)
            values["sources"][name] = {"path": tmp_path / name, "weight": weight}
        config = DataConfig(**values)
        shape = SequenceShape(config.sequence_length, config.images_per_row, (16,), 4, ((8, 8),))
        sources = open_sources(config, tokenizer, codec.hash, seed)
        return LogicalStream(0, sources, config, shape, tokenizer, DDPMConfig().build())

    return make


def texts_of(lengths) -> tuple[list, dict]:
    """Documents of these numbers of positions, bos and eos included."""
    return [(np.full(length - 2, 7, np.int32),) for length in lengths], {"kind": "text"}


def pairs_of(num: int, codec, mean: float, log_variance: float) -> tuple[list, dict]:
    """Pairs with the same mean and log-variance everywhere."""
    moments = np.stack([np.full((4, 8, 8), value, np.float16) for value in (mean, log_variance)])
    fields = {"kind": "pair", "vae_sha256": codec.hash, "latent_shape": (4, 8, 8)}
    scale = {"latent_scale": 2.0, "latent_shift": 0.1}
    return [(np.array([7, 8], np.int32), moments)] * num, fields | scale


def test_the_same_rows_at_any_number_of_ranks(make_stream):
    whole = make_stream()
    expected = [digest(whole.next()) for _ in range(12)]
    for num_ranks in (2, 4):
        share = NUM_ROWS // num_ranks
        ranks = [make_stream(range(r * share, (r + 1) * share)) for r in range(num_ranks)]
        found = [[row for rank in ranks for row in digest(rank.next())] for _ in range(12)]
        assert found == expected


def test_another_seed_gives_other_rows(make_stream):
    assert digest(make_stream(seed=0).next()) != digest(make_stream(seed=1).next())


@pytest.mark.parametrize("stop", [1, 3, 7, 15])
def test_a_restart_resumes_with_the_same_rows_past_the_end_of_an_epoch(make_stream, stop):
    """22 pairs in 4 streams: an epoch ends after a few rows."""
    whole = make_stream()
    expected = [digest(whole.next()) for _ in range(20)]
    assert max(s["position"]["pairs"][0] for s in whole.state_dict()["streams"].values()) >= 2
    first = make_stream()
    for _ in range(stop):
        first.next()
    state = json.loads(json.dumps(first.state_dict()))
    # Restarted at another number of ranks.
    ranks = [make_stream(range(2)), make_stream(range(2, 4))]
    for rank in ranks:
        rank.load_state_dict(state)
    for step in range(stop, 20):
        assert [row for rank in ranks for row in digest(rank.next())] == expected[step]


def test_row_g_of_batch_k_comes_from_stream_kb_plus_g_modulo_m(make_stream, data, tokenizer, codec):
    """With twice as many streams as rows every stream is read, also by ranks and after a restart."""
    data = data.model_copy(update={"num_streams": 2 * NUM_ROWS})
    shape = SequenceShape(data.sequence_length, data.images_per_row, (16,), 4, ((8, 8),))
    sources = open_sources(data, tokenizer, codec.hash, 0)
    streams = [
        LogicalStream(m, sources, data, shape, tokenizer, DDPMConfig().build()) for m in range(2 * NUM_ROWS)
    ]
    expected = []
    for batch in range(7):
        rows = [streams[(batch * NUM_ROWS + g) % (2 * NUM_ROWS)].next_row() for g in range(NUM_ROWS)]
        expected.append(digest([collate(rows)]))
    whole, first = make_stream(data=data), make_stream(data=data)
    assert [digest(whole.next()) for _ in range(7)] == expected
    assert all(sum(s["positions_packed"].values()) for s in whole.state_dict()["streams"].values())
    for _ in range(3):  # odd, so that the second half of the streams is next
        first.next()
    state = json.loads(json.dumps(first.state_dict()))
    ranks = [make_stream(range(2), data=data), make_stream(range(2, 4), data=data)]
    for rank in ranks:
        rank.load_state_dict(state)
    for rows in expected[3:]:
        assert [row for rank in ranks for row in digest(rank.next())] == rows


@given(num_documents=st.integers(1, 50), num_streams=st.integers(1, 7), seed=st.integers(0, 3))
@settings(max_examples=40)
def test_every_document_occurs_exactly_once_in_an_epoch(num_documents, num_streams, seed):
    if num_documents < num_streams:
        return
    source = source_of(num_documents, num_streams, seed)
    for epoch in range(2):
        seen = [
            source.document_at(stream, epoch, order)
            for stream in range(num_streams)
            for order in range(source.size(stream))
        ]
        assert sorted(seen) == list(range(num_documents))


def source_of(num_documents: int, num_streams: int, seed: int, number: int = 0) -> Source:
    """A source with only a manifest: shards of 7 documents, the last one short."""

    class Folder:
        folder = "nowhere"
        starts = np.array([*range(0, num_documents, 7), num_documents])

        def __len__(self):
            return num_documents

    return Source("s", number, Folder(), num_streams, seed)


def test_epochs_are_reshuffled():
    source = source_of(40, 2, 0)
    orders = [[source.document_at(0, epoch, i) for i in range(20)] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_shards_are_shuffled_and_each_is_read_completely():
    source = source_of(42, 1, 0)
    shard_orders = []
    for epoch in range(3):
        shards = [source.document_at(0, epoch, i) // 7 for i in range(42)]
        assert all(len(set(shards[i : i + 7])) == 1 for i in range(0, 42, 7))
        shard_orders.append(shards[::7])
        within = {tuple(source.document_at(0, epoch, i + k) % 7 for k in range(7)) for i in range(0, 42, 7)}
        assert len(within) == 6  # each shard has an order of its own
    assert all(sorted(order) == list(range(6)) != order for order in shard_orders)
    assert shard_orders[0] != shard_orders[1]


def test_every_stream_source_and_seed_has_its_own_shuffle():
    def order(source: Source, stream: int) -> list[int]:
        """Indices in the stream's range, so that the orders of two streams can be compared."""
        return [source.document_at(stream, 0, i) - 42 * stream for i in range(42)]

    orders = [
        order(source_of(84, 2, seed, number), stream)
        for seed in (0, 1)
        for number in (0, 1)
        for stream in (0, 1)
    ]
    assert all(sorted(each) == list(range(42)) for each in orders)
    assert len({tuple(each) for each in orders}) == len(orders)


def test_packing_neither_loses_nor_repeats_images(data, tokenizer, codec):
    """Over complete epochs, each image is packed once an epoch."""
    data = data.model_copy(update={"caption_first": 1.0, "caption_dropout": 0.0, "num_streams": 1})
    sources = open_sources(data, tokenizer, codec.hash, 0)
    shape = SequenceShape(data.sequence_length, data.images_per_row, (16,), 4, ((8, 8),))
    stream = LogicalStream(0, sources, data, shape, tokenizer, DDPMConfig().build())
    found = Counter()
    for _ in range(60):
        row = arrays(stream.next_row())
        for start in row["image_start"][row["image_start"] >= 0]:
            document = start - row["positions"][start]
            found[tuple(row["tokens"][document:start])] += 1
    epoch, order, _ = stream.state.position["pairs"]
    waiting = sum(pending.key.source == "pairs" for pending in stream.state.pending)
    assert epoch >= 2
    assert sum(found.values()) == epoch * 22 + order - waiting
    assert len(found) == 22
    assert max(found.values()) - min(found.values()) <= 1


def test_mixture_follows_the_weights(data, tokenizer, codec):
    values = data.model_dump()
    values["sources"]["text"]["weight"] = 1.5
    data = DataConfig(**values)
    sources = open_sources(data, tokenizer, codec.hash, 0)
    shape = SequenceShape(data.sequence_length, data.images_per_row, (16,), 4, ((8, 8),))
    stream = LogicalStream(0, sources, data, shape, tokenizer, DDPMConfig().build())
    for _ in range(120):
        stream.next_row()
    packed = stream.state.positions_packed
    assert packed["text"] / sum(packed.values()) == pytest.approx(0.75, abs=0.02)


def test_pending_documents_count_for_the_mixture(make_logical_stream):
    """After any row, not only in the long run, the sources are read in step to within one document."""
    lengths, weights = {"short": 12, "long": 22}, {"short": 1.0, "long": 2.0}
    made = {name: (weights[name], *texts_of([lengths[name]] * 20)) for name in lengths}
    stream = make_logical_stream(made, packing_buffer_size=16, sequence_length=50)
    ahead = []
    for _ in range(30):
        stream.next_row()
        position = stream.state.position
        read = {n: (position[n][0] * 20 + position[n][1]) * lengths[n] / weights[n] for n in lengths}
        ahead.append(read["short"] - read["long"])
    assert max(ahead) - min(ahead) <= 2 * 12  # relative to the stream's initial phase


def test_no_document_waits_for_more_rows_than_the_packing_buffer_holds(make_logical_stream):
    """Two of 20 positions fill a row of 40, so that the ones of 21 would never be the best fit."""
    made = {"text": (1.0, *texts_of([21 if i % 5 == 0 else 20 for i in range(200)]))}
    stream = make_logical_stream(made, packing_buffer_size=8, sequence_length=40)
    rows_waited = Counter()
    for _ in range(60):
        stream.next_row()
        rows_waited.update((*p.key, p.start, p.end) for p in stream.state.pending)
    assert max(rows_waited.values()) < 8


def test_the_seed_determines_noise_t_and_layout_of_a_document(make_logical_stream, codec):
    """A single document, epoch after epoch, so that no shuffle distinguishes two seeds."""

    def samples(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        made = {"pair": (1.0, *pairs_of(1, codec, 0.0, 0.0))}
        stream = make_logical_stream(made, seed, packing_buffer_size=1, images_per_row=1, caption_first=0.5)
        rows = [arrays(stream.next_row()) for _ in range(20)]
        names = ("noise", "latents", "t", "tokens")
        return tuple(np.stack([row[name] for row in rows]) for name in names)

    first, again, other = samples(0), samples(0), samples(1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    noise, latents, t, tokens = (a == b for a, b in zip(first, other, strict=True))
    assert noise.mean() < 0.01
    assert latents.mean() < 0.01
    assert t.mean() < 0.2
    assert not tokens.all()  # the order of image and caption, and caption dropout


def test_a_log_variance_of_two_is_a_standard_deviation_of_e(make_logical_stream, codec):
    made = {"pair": (1.0, *pairs_of(8, codec, 3.0, 2.0))}
    stream = make_logical_stream(made)
    rows = [arrays(stream.next_row()) for _ in range(10)]
    latents = np.concatenate([row["latents"][row["image_start"] >= 0] for row in rows])
    sample = latents / 2.0 + 0.1
    assert len(latents) > 20
    assert sample.mean() == pytest.approx(3.0, abs=0.15)
    assert sample.std() == pytest.approx(np.e, rel=0.05)


def test_layout_t_and_the_noise_limit(data, tokenizer, codec):
    """Caption first in 80%, dropped in a tenth of those; t < 0.5 where the image is first."""
    values = data.model_dump() | {"num_streams": 1}
    del values["sources"]["text"]
    data = DataConfig(**values)
    sources = open_sources(data, tokenizer, codec.hash, 0)
    shape = SequenceShape(96, 4, (16,), 4, ((8, 8),))
    stream = LogicalStream(0, sources, data, shape, tokenizer, DDPMConfig().build())
    kinds, limited, free = Counter(), [], []
    for _ in range(300):
        row = arrays(stream.next_row())
        for slot, start in enumerate(row["image_start"]):
            if start < 0:
                continue
            document = start - row["positions"][start]
            after = start + 16 + 1
            if start - document > 2:
                kinds["caption first"] += 1
                free.append(row["t"][slot])
            elif row["tokens"][after] == tokenizer.eos:
                kinds["no caption"] += 1
                free.append(row["t"][slot])
            else:
                kinds["image first"] += 1
                limited.append(row["t"][slot])
    total = kinds.total()
    assert kinds["image first"] / total == pytest.approx(0.2, abs=0.04)
    assert kinds["no caption"] / total == pytest.approx(0.08, abs=0.03)
    assert max(limited) < 0.5
    assert max(free) > 0.9
    assert np.mean(free) == pytest.approx(0.5, abs=0.04)


def test_latents_are_normalized_samples_of_the_posterior(make_stream, shards):
    folder = ShardFolder(shards / "pairs")
    moments = [folder.read(document).segments[1].data.astype(np.float32) for document in range(len(folder))]
    batch = make_stream().next()
    latents = [m.latents[0, 0].numpy() for m in batch if m.image_start[0, 0] >= 0]
    for latent in latents:
        raw = latent / folder.manifest.latent_scale + folder.manifest.latent_shift
        standard = [(raw - mean) * np.exp(-0.5 * log_variance) for mean, log_variance in moments]
        nearest = min(standard, key=lambda x: np.abs(x).mean())
        assert nearest.std() == pytest.approx(1, abs=0.2)
        assert nearest.mean() == pytest.approx(0, abs=0.2)


def test_other_tokenizer_or_autoencoder_is_refused(data, tokenizer, codec):
    with pytest.raises(UserError, match=r"data\.sources\.pairs.*made with a vae of hash"):
        open_sources(data, tokenizer, "0" * 64, 0)

    class Other:
        hash = "1" * 64

    with pytest.raises(UserError, match=r"made with a tokenizer of hash"):
        open_sources(data, Other(), codec.hash, 0)


def test_invalid_numbers_of_streams_are_refused(make_stream, data):
    with pytest.raises(UserError, match=r"num_streams 6 is not a multiple of train.global_batch_size 4"):
        make_stream(data=data.model_copy(update={"num_streams": 6}))
    with pytest.raises(
        UserError, match=r"holds 22 documents, fewer than 40 logical streams; lower data.num_streams"
    ):
        make_stream(data=data.model_copy(update={"num_streams": 40}))
