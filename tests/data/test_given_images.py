"""Images that are given: clean, without a loss, and seen by what follows."""

import numpy as np
import pytest
import torch

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
    for field in ("tokens", "labels", "row_start", "row_end", "positions", "latents", "image_start"):
        assert torch.equal(getattr(given, field), getattr(plain, field)), field
    assert torch.equal(given.t[given.has_loss], plain.t[given.has_loss])
    assert torch.equal(given.noise[given.has_loss], plain.noise[given.has_loss])


@pytest.mark.parametrize("given", [[2], [-1], [True], ["0"], {"0": 1}, 0, None])
def test_what_is_no_list_of_its_images_is_refused(tmp_path, given):
    with pytest.raises(BadDocument, match="'given' is not a list of indices of its images"):
        rows_of(tmp_path / "edits", [triple(n, {GIVEN: given}) for n in (1, 2)]).next()
