"""Packing: targets of positions; losses and gradients of a packed row equal those of its documents."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megafusion.model.config import ModelConfig
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig
from megafusion.sequence.document import ImageSegment, cut_document
from megafusion.sequence.packing import SequenceShape, collate, drop_unused_slots, pack_row, with_counts
from megafusion.sequence.tokenizer import Tokenizer
from tests.support.rows import arrays
from tests.support.segments import flat_document, image_of

VOCABULARY, LATENTS, NUM_PATCHES = 32, (2, 4, 4), 4


IDS = Tokenizer(Path(), "", 30, bos=1, eos=2)


def image(random: np.random.Generator) -> ImageSegment:
    latents, noise = random.standard_normal((2, *LATENTS), dtype=np.float32)
    return image_of(latents, noise, int(random.integers(1000)) / 1000)


def document(lengths: list[int], seed: int):
    """A document of texts of these lengths, an image for each 0."""
    random = np.random.default_rng(seed)
    segments = [random.integers(3, 30, n) if n else image(random) for n in lengths]
    return flat_document(segments, IDS, (NUM_PATCHES,))


def test_targets_of_a_caption_and_its_image():
    flat = document([3, 0], seed=0)
    a, b, c = flat.tokens[1:4]
    # bos and the caption predict the caption and boi; boi, patches predict nothing; eoi predicts eos.
    assert flat.labels.tolist() == [a, b, c, 30, -100, -100, -100, -100, -100, 2, -100]
    assert flat.patch.tolist() == [-1, -1, -1, -1, -1, 0, 1, 2, 3, -1, -1]
    assert flat.row_end.tolist() == [1, 2, 3, 4, 5, 9, 9, 9, 9, 10, 11]
    assert flat.image_start.tolist() == [5]


def test_targets_of_two_adjacent_images_and_a_caption():
    flat = document([0, 0, 2], seed=1)
    assert flat.tokens[:3].tolist() == [1, 30, 31]
    assert flat.labels[0] == 30  # bos predicts boi
    assert flat.labels[6] == 30  # eoi of the first predicts boi of the second
    assert flat.labels[12] == flat.tokens[13]  # eoi of the second predicts the caption
    assert flat.image_start.tolist() == [2, 8]


def test_a_row_concatenates_its_documents():
    first, second = document([3, 0], 0), document([0, 2], 1)
    shape = SequenceShape(26, 3, (NUM_PATCHES,), 2, ((4, 4),))
    row = arrays(pack_row([first, second], shape))
    n, m = len(first), len(second)
    assert row["positions"].tolist() == [*range(n), *range(m), *[0] * (26 - n - m)]
    assert row["last_query"].tolist() == [*[n] * n, *[n + m] * m, *range(n + m + 1, 27)]
    assert row["image_start"].tolist() == [5, n + 2, -1]
    assert (row["patch_index"] >= 0).sum() == 2 * NUM_PATCHES
    assert row["patch_index"].max() == 2 * NUM_PATCHES - 1
    assert np.array_equal(row["latents"][1], second.images[0].latents)
    assert row["t"].tolist() == pytest.approx([first.images[0].t, second.images[0].t, 0])


def test_a_text_is_cut_into_documents_that_keep_its_targets():
    flat = document([20], 0)
    pieces = [cut_document(flat, first, last) for first, last in ((0, 8), (8, 11), (11, 22))]
    assert np.array_equal(np.concatenate([p.labels for p in pieces]), flat.labels)
    assert pieces[0].labels[-1] == pieces[1].tokens[0]
    assert [p.row_end.tolist() for p in pieces] == [[*range(1, n + 1)] for n in (8, 3, 11)]
    row = arrays(pack_row(pieces, SequenceShape(22, 1, (NUM_PATCHES,), 2, ((4, 4),))))
    assert row["last_query"].tolist() == [8] * 8 + [11] * 3 + [22] * 11
    assert row["positions"].tolist() == [*range(8), *range(3), *range(11)]


def model(adapter: str) -> Transfusion:
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=48,
        vocab_size=VOCABULARY,
        latent_channels=2,
        latent_downsampling=1,
        image_sizes=((4, 4),),
        patch_size=2,
        adapter=adapter,
        unet_channels=4,
    )
    return Transfusion(config, ObjectiveConfig())


def losses_and_gradients(net, rows, shape, counts=None):
    net.zero_grad()
    batch = collate([pack_row(row, shape) for row in rows])
    if counts is not None:
        batch = with_counts(batch, counts)
    losses = net(batch)
    losses.total.backward()
    return (
        torch.stack(losses).detach(),
        {n: p.grad.clone() for n, p in net.named_parameters()},
        batch.counts(),
    )


@pytest.mark.parametrize("adapter", ["linear", "unet"])
@given(
    layout=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), min_size=2, max_size=4).filter(
        lambda documents: any(0 in d for d in documents)
    )
)
@settings(max_examples=12)
def test_a_packed_row_equals_its_documents_one_by_one(adapter, layout):
    net = model(adapter)
    documents = [document(lengths, seed) for seed, lengths in enumerate(layout)]
    total_length = sum(len(d) for d in documents)
    num_images = sum(len(d.images) for d in documents)
    packed, packed_gradients, counts = losses_and_gradients(
        net, [documents], SequenceShape(total_length + 2, num_images + 1, (NUM_PATCHES,), 2, ((4, 4),))
    )
    summed, summed_gradients = torch.zeros(4), {n: torch.zeros_like(g) for n, g in packed_gradients.items()}
    for single in documents:
        shape = SequenceShape(
            max(NUM_PATCHES, len(single)), max(1, len(single.images)), (NUM_PATCHES,), 2, ((4, 4),)
        )
        losses, gradients, _ = losses_and_gradients(net, [[single]], shape, counts)
        summed += losses
        for name, gradient in gradients.items():
            summed_gradients[name] += gradient
    torch.testing.assert_close(packed, summed, rtol=1e-5, atol=1e-5)
    for name, gradient in packed_gradients.items():
        torch.testing.assert_close(gradient, summed_gradients[name], rtol=1e-5, atol=1e-5)


def test_micro_batches_with_global_counts_add_up_to_the_whole():
    net = model("linear")
    rows = [[document([3, 0], 0)], [document([6], 1)], [document([0, 0], 2)], [document([1], 3)]]
    shape = SequenceShape(24, 2, (NUM_PATCHES,), 2, ((4, 4),))
    whole, _, counts = losses_and_gradients(net, rows, shape)
    parts = [losses_and_gradients(net, rows[i : i + 2], shape, counts)[0] for i in (0, 2)]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-6, atol=1e-6)


def test_a_batch_without_images_or_without_text_has_finite_losses():
    net = model("unet")
    shape = SequenceShape(12, 1, (NUM_PATCHES,), 2, ((4, 4),))
    text_only, gradients, _ = losses_and_gradients(net, [[document([4], 0)]], shape)
    assert text_only[1] == 0
    assert torch.isfinite(text_only).all()
    assert all(torch.isfinite(g).all() for g in gradients.values())
    empty, _, _ = losses_and_gradients(net, [[]], shape)
    assert empty.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("adapter", ["linear", "unet"])
@pytest.mark.parametrize(("lengths", "kept"), [([[4], [6]], 2), ([[0], [0, 0, 0]], 4), ([[0] * 7, [3]], 7)])
def test_unused_slots_change_no_loss_and_no_gradient(adapter, lengths, kept):
    """Images per row at most 0, 3 and 7, of 7 slots."""
    net, shape = model(adapter), SequenceShape(48, 7, (NUM_PATCHES,), 2, ((4, 4),))
    rows = [pack_row([document(row, seed)], shape) for seed, row in enumerate(lengths)]
    whole = collate(rows)
    less = drop_unused_slots(whole, NUM_PATCHES)
    assert less.latents.shape[:2] == less.t.shape == less.has_pixels.shape == (2, kept)
    assert torch.equal(less.tokens, whole.tokens)
    found = []
    for batch in (whole, less):
        net.zero_grad()
        losses = net(batch)
        losses.total.backward()
        found.append([torch.stack(losses).detach(), *(p.grad.clone() for p in net.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
