"""Images that are given: clean, without a loss, and seen by what follows."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megafusion.data.document_format import GIVEN, BadDocument
from megafusion.sequence.packing import collate
from tests.support.rows import LATENTS, stored, stream_of, write_shards

FIELDS = {"kind": "interleaved", "tokenizer_sha256": "t", "vae_sha256": "v", "latent_shape": LATENTS}


def triple(number: int, metadata: dict):
    """Image, instruction, image; latents without deviation, of the value `number`, then its negative."""
    source = np.stack([np.full(LATENTS, number), np.full(LATENTS, -60)]).astype(np.float16)
    target = np.stack([np.full(LATENTS, -number), np.full(LATENTS, -60)]).astype(np.float16)
    return stored({"key": str(number)} | metadata, source, np.arange(5, 9, dtype=np.int32), target)


def rows_of(folder, documents, **changes):
    write_shards(folder, documents, 8, provenance={}, **FIELDS)
    return stream_of({"edits": (folder, 1.0)}, range(2), 2, num_streams=2, **changes)


def pixel_edits(folder) -> Path:
    """Edits whose source and target are the same ramp, red across and green down."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 4 * np.arange(64), 4 * np.arange(64)[:, None]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True)
    ids = np.arange(5, 9, dtype=np.int32)
    documents = [
        stored({"key": str(n), GIVEN: [0]}, buffer.getvalue(), ids, buffer.getvalue()) for n in range(20)
    ]
    fields = {"kind": "interleaved", "images": "pictures", "tokenizer_sha256": "t", "provenance": {}}
    write_shards(folder, documents, 8, **fields)
    return folder


def test_given_images_are_clean_and_have_no_loss(tmp_path):
    stream = rows_of(tmp_path / "edits", [triple(n, {GIVEN: [0]}) for n in range(1, 20)])
    batch = collate(stream.next())
    used = batch.image_start >= 0
    value = batch.latents.flatten(2).mean(2)
    given = used & (value > 0)
    assert given.sum() > 0
    assert torch.equal(batch.has_loss, used & ~given)
    assert not batch.noise[given].any()
    assert not batch.t[given].any()
    assert batch.noise[batch.has_loss].flatten(1).std(1).min() > 0.3
    assert (batch.t[batch.has_loss] > 0).float().mean() > 0.8
    assert batch.counts()[1] == batch.has_loss.sum() == batch.num_images


def test_the_other_samples_are_those_of_a_document_without_given_images(tmp_path):
    streams = [
        rows_of(tmp_path / name, [triple(n, metadata) for n in range(1, 20)])
        for name, metadata in (("given", {GIVEN: [0]}), ("plain", {}))
    ]
    given, plain = (collate(stream.next()) for stream in streams)
    assert plain.has_loss.equal(plain.image_start >= 0)
    for field in ("tokens", "labels", "row_end", "last_query", "positions", "latents", "image_start"):
        assert torch.equal(getattr(given, field), getattr(plain, field)), field
    assert torch.equal(given.t[given.has_loss], plain.t[given.has_loss])
    assert torch.equal(given.noise[given.has_loss], plain.noise[given.has_loss])


def times_of(folder, given: list[int], num: int, **changes) -> list[list[float]]:
    """Times by document, in order of a stream, of the images that are denoised."""
    rows = rows_of(
        folder, [triple(n, {GIVEN: given}) for n in range(1, num)], packing_buffer_size=1, **changes
    )
    found = []
    for row in (row for _ in range(8) for row in rows.next()):
        at = row.image_start[0].clamp(min=0)
        starts = at - row.positions[0][at]
        for start in starts[row.has_loss[0]].unique():
            found.append(row.t[0][row.has_loss[0] & (starts == start)].tolist())
    return found


def test_a_document_may_have_one_time_and_by_default_each_image_its_own(tmp_path):
    """Without a limit of t; with one, the first image, which no text precedes, has as far to its limit."""
    own = times_of(tmp_path / "edits", [], 20, image_first_max_t=1.0)
    shared, again = (
        times_of(tmp_path / "edits", [], 20, image_first_max_t=1.0, t_per="document") for _ in range(2)
    )
    pairs = [times for times in shared if len(times) == 2]
    assert len(pairs) > 10
    assert all(one == other for one, other in pairs)
    assert len({one for one, _ in pairs}) > 10
    assert not any(times[0] == times[1] for times in own if len(times) == 2)
    assert shared == again
    limited = times_of(tmp_path / "edits", [], 20, image_first_max_t=0.5, t_per="document")
    for one, other in [times for times in limited if len(times) == 2]:
        assert one == pytest.approx(other / 2, abs=2e-3)


@pytest.mark.parametrize("given", [[2], [-1], [True], ["0"], {"0": 1}, 0, None])
def test_what_is_no_list_of_its_images_is_refused(tmp_path, given):
    with pytest.raises(BadDocument, match="'given' is not a list of indices of its images"):
        rows_of(tmp_path / "edits", [triple(n, {GIVEN: given}) for n in (1, 2)]).next()


@pytest.mark.parametrize(("metadata", "is_cut"), [({GIVEN: [0]}, False), ({}, True)])
def test_an_edit_is_not_cut_to_fill_a_row(tmp_path, metadata, is_cut):
    """Its target sees its source, where another document's images may be parted."""
    stream = rows_of(tmp_path / "edits", [triple(n, metadata) for n in range(1, 20)], slots=8)
    parted = 0
    for row in (row for _ in range(10) for row in stream.next()):
        starts, value = row.image_start[0], row.latents.flatten(2).mean(2)[0]
        for target in starts[(starts >= 0) & (value < 0)].tolist():
            document = target - row.positions[0, target].item()
            parted += not any(document <= start < target for start in starts.tolist())
    assert (parted > 0) == is_cut


def test_images_of_an_edit_are_cropped_and_mirrored_alike(tmp_path):
    stream = stream_of(
        {"edits": (pixel_edits(tmp_path / "edits"), 1.0)},
        range(2),
        2,
        pixels_per_latent=8,
        crop=0.5,
        flip=0.5,
    )
    views = set()
    for row in (row for _ in range(4) for row in stream.next()):
        for source, target in row.pixels[0][row.has_pixels[0]].unflatten(0, (-1, 2)):
            assert torch.equal(source, target)
            views.add(source.numpy().tobytes())
    assert len(views) > 8
