"""benchmarks/peers.py: peers of one size, on the same rows; those that are not installed are named."""

import sys

import pytest
import torch

from tests.support.small import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import peers

SIZE = peers.Size(32, 2, 16, length=160, num_rows=2, vocab_size=300)


@pytest.fixture(autouse=True)
def tokens(monkeypatch):
    """Of a vocabulary that the quickstart's is not."""
    monkeypatch.setattr(peers, "DEVICE", torch.device("cpu"))


def test_peers_have_our_size_and_learn():
    found, reasons = peers.compare(SIZE, 1)
    assert {"ours", "plain"} <= set(found)
    assert set(found) | set(reasons) == set(peers.PEERS)
    assert all("ModuleNotFoundError" in reason for reason in reasons.values())
    # The adapters between latents and the residual stream are ours alone.
    adapters = 48 * 32 + 32 + 32 * 48 + 48 + 256 * 48 + 48 + 48 * 48 + 48
    assert found["ours"]["parameters"] == found["plain"]["parameters"] + adapters
    peer = peers.plain(SIZE)
    assert found["plain"]["seconds_over_ours"] > 0
    assert peer.num_parameters == found["plain"]["parameters"]


def test_samples_hold_every_token_and_image_of_the_rows():
    rows = SIZE.rows()
    for row, sample in enumerate(peers.samples(rows)):
        texts = [part for part in sample if part.ndim == 1]
        images = [part for part in sample if part.ndim == 3]
        slots = rows.image_start[row] >= 0
        assert len(images) == int(slots.sum()) >= 1
        assert all(image.shape == (8, 8, 48) for image in images)
        # A boi and an eoi beside each image are the peer's own.
        taken = sum(map(len, texts)) + len(images) * (64 + 2)
        assert taken == SIZE.length
        latents = torch.nn.functional.pixel_shuffle(images[0].permute(2, 0, 1), 4)
        assert torch.equal(latents, rows.latents[row, 0])
        first = int(rows.image_start[row, 0])
        assert torch.equal(texts[0], rows.tokens[row, : first - 1])
