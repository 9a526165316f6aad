"""Streams of images of several sizes: the same rows at any split over ranks, with complete images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megafusion.config import parse_config
from megafusion.data.reader import ShardFolder
from megafusion.engine.process_group import start_process_group
from megafusion.errors import UserError
from megafusion.parallel.mesh import make_mesh
from megafusion.sequence.document import ImageSegment, Segment, cut_document, find_cut, flatten
from megafusion.sequence.packing import SequenceShape
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.train.build import build_components
from megafusion.train.config import RunConfig
from megafusion.train.loop import train
from tests.data.test_pixels import options, webp, write_pixels
from tests.support.raw import drawing
from tests.support.rows import IDS, digest, stored, stream_of, write_shards, write_texts
from tests.support.workers import run_workers

SIZES, PATCHES = ((4, 4), (2, 6), (8, 2)), (4, 3, 4)


def write_mixed(folder: Path, num: int = 90) -> Path:
    random = np.random.default_rng(0)

    def documents():
        for i in range(num):
            tokens = random.integers(3, 60, int(random.integers(1, 9))).astype(np.int32)
            moments = random.standard_normal((2, 1, *SIZES[i % 3])).astype(np.float16)
            yield stored({"key": f"k{i}", "caption": f"image {i}"}, tokens, moments)

    fields = {"kind": "pair", "tokenizer_sha256": "t", "vae_sha256": "v", "provenance": {}}
    write_shards(folder, documents(), 16, latent_shape=(1, *SIZES[0]), more_sizes=SIZES[1:], **fields)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("mixed-sources")
    return {
        "pairs": (write_mixed(folder / "pairs"), 0.6),
        "pixels": (write_pixels(folder / "pixels", 60), 0.2),
        "text": (write_texts(folder / "text", 60), 0.2),
    }


OPTIONS = {"more_sizes": SIZES[1:], "pixels_per_latent": 4, "crop": 0.8, "num_streams": 4}


def test_the_manifest_counts_images_by_size(sources):
    manifest = ShardFolder(sources["pairs"][0]).manifest
    assert manifest.count_by_size == dict.fromkeys(SIZES, 30)
    assert manifest.images_by_size == {"2x6": 30, "4x4": 30, "8x2": 30}


def test_rows_are_the_same_at_any_split_and_after_a_restart(sources):
    whole = stream_of(sources, range(4), 4, **OPTIONS)
    halves = [
        stream_of(sources, rows, 4, num_workers=n, **OPTIONS) for rows, n in ((range(2), 0), (range(2, 4), 2))
    ]
    with halves[0], halves[1]:
        for number in range(24):
            state = whole.state_dict()
            expected = digest(whole.next())
            assert [row for half in halves for row in digest(half.next())] == expected
            if number in (7, 20):  # past the epoch's end, too
                resumed = stream_of(sources, range(4), 4, **OPTIONS)
                resumed.load_state_dict(state)
                assert digest(resumed.next()) == expected


def test_each_image_has_its_patches_and_zeros_beside_it(sources):
    stream = stream_of(sources, range(1), 1, **OPTIONS)
    seen = set()
    for _ in range(60):
        (batch,) = stream.next()
        for slot in (batch.image_start[0] >= 0).nonzero()[:, 0].tolist():
            size, start = int(batch.image_size[0, slot]), int(batch.image_start[0, slot])
            here = (batch.patch_index[0] // 4 == slot) & (batch.patch_index[0] >= 0)
            assert here.nonzero()[:, 0].tolist() == list(range(start, start + PATCHES[size]))
            assert batch.tokens[0, start - 1] == IDS.boi_of_size(size)
            assert batch.tokens[0, start + PATCHES[size]] == IDS.eoi
            height, width = SIZES[size]
            for whole, factor in ((batch.noise[0, slot], 1), (batch.pixels[0, slot], 4)):
                beside = whole.clone()
                beside[..., : factor * height, : factor * width] = 0
                assert not beside.any()
            assert (batch.noise[0, slot, 0, :height, :width] != 0).all()
            kept = bool(batch.has_pixels[0, slot])
            if kept:
                assert batch.pixels[0, slot, :, 4 * height - 1, 4 * width - 1].any()
            seen.add((kept, size))
    assert seen >= {(False, 0), (False, 1), (False, 2), (True, 0)}


def test_images_of_the_first_size_do_not_depend_on_further_sizes(tmp_path, sources):
    """Their rows are the same with one size and with several."""
    documents = [
        stored({"key": f"k{i}"}, np.arange(3, 9, dtype=np.int32), np.zeros((2, 1, 4, 4), np.float16))
        for i in range(20)
    ]
    fields = {"kind": "pair", "tokenizer_sha256": "t", "vae_sha256": "v", "provenance": {}}
    write_shards(tmp_path / "pairs", documents, 16, latent_shape=(1, 4, 4), **fields)
    one, several = (
        stream_of({"pairs": (tmp_path / "pairs", 1.0)}, range(1), 1, more_sizes=more)
        for more in ((), SIZES[1:])
    )
    for _ in range(5):
        (first,), (second,) = one.next(), several.next()
        for name in ("tokens", "labels", "positions", "patch_index", "row_end", "t", "image_start"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
        assert torch.equal(first.noise, second.noise[..., :4, :4])


def test_mean_lengths_count_the_patches_of_each_size(sources):
    from megafusion.data.source import Source

    source = Source("pairs", 0, ShardFolder(sources["pairs"][0]), 4, 0)
    shape = SequenceShape(64, 4, tuple(h * w // 4 for h, w in SIZES), 1, SIZES)
    manifest = source.folder.manifest
    expected = 2 + (manifest.num_tokens + 30 * (4 + 3 + 4) + 90 * 2) / 90
    assert source.positions_per_document(shape) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_sizes": [[32, 32], [48, 16]]},
            r"data\.sources\.pairs: latents of 8x8, 6x10, 12x4, but the model's are 8x8, 12x4 .*image_sizes",
        ),
        (
            {"latent_channels": 3},
            r"model\.latent_channels is 3, but the autoencoder's is 4",
        ),
        (
            {"latent_downsampling": 8, "patch_size": 1},
            r"model\.latent_downsampling is 8, but the autoencoder's is 4",
        ),
        (
            {"vocab_size": 2048},
            r"vocab_size 2048, but .* has 2050 ids .*a boi for each of the 2 further model\.image_sizes",
        ),
    ],
)
def test_shards_that_do_not_fit_the_model_are_refused(mixed_values, changes, message):
    mixed_values["model"] |= changes
    if len(mixed_values["model"]["image_sizes"]) == 2:
        mixed_values["model"]["vocab_size"] = 2049
    config = parse_config(RunConfig, mixed_values, "test")
    start_process_group()
    with pytest.raises(UserError, match=message):
        build_components(config, make_mesh(config.parallel))


PARTS = st.lists(st.one_of(st.integers(1, 40), st.sampled_from([0, -1, -2])), min_size=1, max_size=10)


@given(parts=PARTS, room=st.integers(24, 70), slots=st.integers(1, 3))
def test_pieces_of_a_document_hold_complete_images_of_any_size(parts, room, slots):
    """parts: lengths of texts; 0, -1, -2 for images of the three sizes."""
    patches = (16, 6, 20)
    segments = [
        Segment("tokens", np.full(part, 7, np.int32)) if part > 0 else ImageSegment(size=-part)
        for part in parts
    ]
    whole = flatten(segments, IDS, patches)
    first, images, tokens, labels = 0, [], [], []
    while first < len(whole):
        last = find_cut(whole, first, len(whole), room, slots, 2)
        assert last > first
        piece = cut_document(whole, first, last)
        assert len(piece) <= room
        assert len(piece.images) <= slots
        for number, (image, start) in enumerate(zip(piece.images, piece.image_start, strict=True)):
            here = slice(start, start + patches[image.size])
            assert piece.patch[here].tolist() == list(range(number * 20, number * 20 + patches[image.size]))
            assert (piece.row_end[here] == here.stop).all()
            assert piece.tokens[here.stop] == IDS.eoi
        assert (piece.patch >= 0).sum() == sum(patches[image.size] for image in piece.images)
        images += piece.images
        tokens += piece.tokens.tolist()
        labels += piece.labels.tolist()
        first = last
    assert images == list(whole.images)
    assert (tokens, labels) == (whole.tokens.tolist(), whole.labels.tolist())


def test_an_image_of_the_largest_size_must_fit_in_a_row(mixed_values):
    mixed_values["model"] |= {"image_sizes": [[80, 80]]}
    with pytest.raises(UserError, match=r"an image takes 104 positions, more than data\.sequence_length 96"):
        parse_config(RunConfig, mixed_values, "test")


def run(values: dict) -> None:
    train(parse_config(RunConfig, values, "test"))


def losses(values: dict) -> list[float]:
    return [line[name] for line in read_metrics(Path(values["out"])) for name in ("text_loss", "image_loss")]


@pytest.mark.full
def test_pixels_and_their_latents_give_the_same_losses(mixed_values, codec, tokenizer, tmp_path):
    """Pixels are cropped to the size nearest in aspect, and encoded as preprocessing would have."""
    from megafusion.data.images import augment, sample_view

    shapes = (((32, 32), 0), ((60, 36), 1), ((20, 60), 2), ((30, 33), 0))
    kept, latents = [], []
    for number in range(24):
        pixels, size = shapes[number % 4]
        tokens = np.arange(5, 9 + number % 3, dtype=np.int32)
        content = webp(drawing(number, pixels))
        height, width = ((32, 32), (24, 40), (48, 16))[size]
        shown = augment(content, (height, width), sample_view(options(), np.random.default_rng(0)))
        moments = torch.stack(codec.encode(torch.from_numpy(shown)[None].float() / 127.5 - 1), 1)[0]
        about = {"key": f"k{number}", "caption": ""}
        kept.append(stored(about, tokens, content))
        latents.append(stored(about, tokens, moments.half().numpy()))
    fields = {"kind": "pair", "tokenizer_sha256": tokenizer.hash, "provenance": {}}
    write_shards(tmp_path / "kept", kept, 8, images="pictures", **fields)
    fields |= {"latent_scale": codec.scaling_factor, "latent_shift": codec.shift_factor}
    fields |= {"vae_sha256": codec.hash, "latent_shape": (4, 8, 8), "more_sizes": ((6, 10), (12, 4))}
    write_shards(tmp_path / "stored", latents, 8, **fields)
    found = []
    for name in ("kept", "stored"):
        mixed_values |= {"out": str(tmp_path / f"run-{name}")}
        mixed_values["data"] |= {"sources": {"pairs": {"path": str(tmp_path / name)}}}
        mixed_values["train"] |= {"num_steps": 3}
        run_workers(run, 1, mixed_values)
        found.append(losses(mixed_values))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert len(set(found[0])) == 6
