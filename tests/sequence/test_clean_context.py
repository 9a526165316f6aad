"""Clean context: each image twice, clean in its place and noised behind its document; mask, losses, cuts."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interval_attention import prepare
from megafusion.config import parse_config
from megafusion.generate.decoder import Decoder
from megafusion.model.config import ModelConfig
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig
from megafusion.sequence.document import FlatDocument, ImageSegment, cut_document, find_cut, images_between
from megafusion.sequence.packing import PackedBatch, SequenceShape, collate, drop_unused_slots, pack_row
from megafusion.sequence.tokenizer import Tokenizer
from tests.support.rows import latents_as_features
from tests.support.segments import flat_document
from tests.support.weights import initialize

IDS = Tokenizer(Path(), "", 30, bos=1, eos=2)
LATENTS = 1, 2, 2
GIVEN = -1

layouts = st.lists(
    st.lists(st.sampled_from([0, 0, GIVEN, 1, 2, 5]), min_size=0, max_size=5), min_size=1, max_size=3
)
"""Documents as lengths of texts, 0 for an image and -1 for a given one."""


def image_of(random: np.random.Generator, latents=LATENTS, is_given: bool = False) -> ImageSegment:
    values, noise = random.standard_normal((2, *latents), dtype=np.float32)
    t = 0.0 if is_given else float(np.float32(random.uniform(0.1, 0.9)))
    return ImageSegment(latents=values, noise=noise * (not is_given), t=t, is_given=is_given)


def document(lengths: list[int], seed: int, num_patches: int, latents=LATENTS) -> FlatDocument:
    random = np.random.default_rng(seed)
    segments = [
        random.integers(3, 30, n) if n > 0 else image_of(random, latents, n == GIVEN) for n in lengths
    ]
    return flat_document(segments, IDS, (num_patches,), clean_context=True)


def row_of(documents: list[FlatDocument], num_patches: int, padding: int = 0, latents=LATENTS) -> PackedBatch:
    length = sum(each.positions_in_row(0, len(each)) for each in documents) + padding
    slots = max(1, sum(len(each.images) for each in documents))
    shape = SequenceShape(length, slots, (num_patches,), latents[0], (latents[1:],), clean_context=True)
    return collate([pack_row(documents, shape)])


def mask_by_definition(layout: list[list[int]], num_patches: int, padding: int) -> torch.Tensor:
    """From what each position is: (document, place in reading order, image, whether it is noised)."""
    positions: list[tuple] = []
    for number, lengths in enumerate(layout):
        place, copies = 1, []
        positions.append((number, 0, None, False))
        for index, n in enumerate(lengths):
            if n > 0:
                positions += [(number, place + i, None, False) for i in range(n)]
                place += n
                continue
            positions.append((number, place, None, False))  # boi
            positions += [(number, place + 1, index, False)] * num_patches
            positions.append((number, place + 2, None, False))
            if n == 0:
                copies.append([(number, place + 1, index, True)] * num_patches)
            place += 3
        positions.append((number, place, None, False))
        for copy in reversed(copies):
            positions += copy
    positions += [(f"padding {i}", 0, None, False) for i in range(padding)]
    mask = torch.zeros(len(positions), len(positions), dtype=torch.bool)
    for i, (document, place, image, is_noised) in enumerate(positions):
        for j, (other, before, other_image, hidden) in enumerate(positions):
            own = i == j or (image is not None and (image, is_noised) == (other_image, hidden))
            mask[i, j] = document == other and (own or (before < place and not hidden))
    return mask


def check(layout: list[list[int]], num_patches: int, padding: int) -> None:
    documents = [document(lengths, seed, num_patches) for seed, lengths in enumerate(layout)]
    batch = row_of(documents, num_patches, padding)
    expected = mask_by_definition(layout, num_patches, padding)
    assert torch.equal(batch.intervals(has_holes=True).dense_mask[0, 0], expected)
    assert batch.work()[1] == expected.sum()
    prepare(batch.row_end, batch.last_query, has_holes=True, check=True)


def test_the_mask_equals_the_definition_on_1000_random_layouts():
    sampled = random.Random(0)
    for _ in range(1000):
        layout = [
            [sampled.choice([0, 0, 0, GIVEN, 1, 2, 5]) for _ in range(sampled.randint(0, 4))]
            for _ in range(sampled.randint(1, 3))
        ]
        check(layout, sampled.choice([1, 1, 2, 4]), sampled.choice([0, 0, 1, 3]))


@given(layouts, st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_mask_equals_the_definition(layout, num_patches, padding):
    check(layout, num_patches, padding)


def test_a_row_of_an_image_between_texts():
    batch = row_of([document([2, 0, 1, GIVEN, 0], 0, 2)], 2, padding=1)
    clean = [6, 7]  # 3 slots of 2 patches before them
    text, given, last = [-1] * 4, [8, 9], [10, 11]
    assert batch.patch_index[0].tolist() == [
        *text, *clean, *[-1] * 3, *given, -1, -1, *last, -1, -1, 4, 5, 0, 1, -1,
    ]  # fmt: skip
    assert batch.image_start[0].tolist() == [19, 9, 17]
    assert batch.has_loss[0].tolist() == [True, False, True]
    assert batch.positions[0].tolist() == [*range(17), 13, 14, 4, 5, 0]
    assert (batch.labels[0, 17:] == -100).all()
    assert batch.row_end[0, 17:].tolist() == [19, 19, 21, 21, 22]
    assert batch.last_query[0].tolist() == [*[21] * 4, *[19] * 9, *[17] * 4, 19, 19, 21, 21, 22]


ALIGNMENT = {"model": "vision", "feature_size": 8, "layer": 1}
CHOICES = {"linear": {}, "unet": {}, "together": {"modality_weights": "all", "qk_norm": True}}
"""Keys of the model by name; together with flow matching and alignment, too."""


@pytest.fixture(params=CHOICES)
def model(request) -> Transfusion:
    torch.manual_seed(0)
    together = {"noise_process": {"kind": "flow"}, "alignment": ALIGNMENT}
    objective = parse_config(ObjectiveConfig, together if request.param == "together" else {}, "test")
    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=48,
        vocab_size=32,
        latent_channels=2,
        latent_downsampling=1,
        image_sizes=((4, 4),),
        patch_size=2,
        image_rope="2d",
        adapter="unet" if request.param == "unet" else "linear",
        unet_channels=4,
        **CHOICES[request.param],
    )
    model = Transfusion(config, objective, clean_context=True)
    initialize(model, config.num_layers, seed=0)
    return model


def packed(layout: list[list[int]], padding: int = 0) -> tuple[list[FlatDocument], PackedBatch]:
    documents = [document(lengths, seed, 4, (2, 4, 4)) for seed, lengths in enumerate(layout)]
    batch = row_of(documents, 4, padding, (2, 4, 4))
    batch.features = latents_as_features(batch)
    return documents, batch


def losses_and_gradients(model: Transfusion, batch: PackedBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    losses = model(batch)
    losses.total.backward()
    gradients = (torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())
    return torch.stack(losses).detach(), list(gradients)


def test_a_packed_row_equals_its_documents_one_by_one(model):
    documents, batch = packed([[3, 0, 2, 0], [0, GIVEN, 4], [5], [0]], padding=2)
    whole, gradients = losses_and_gradients(model, batch)
    sums, added = torch.zeros(4), [torch.zeros_like(gradient) for gradient in gradients]
    for single in documents:
        alone = row_of([single], 4, padding=4, latents=(2, 4, 4))
        alone.features = latents_as_features(alone)
        alone.num_text_targets, alone.num_images = batch.num_text_targets, batch.num_images
        losses, found = losses_and_gradients(model, alone)
        sums += losses
        added = [a + b for a, b in zip(added, found, strict=True)]
    torch.testing.assert_close(whole, sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, added, rtol=1e-5, atol=1e-5)
    assert (whole[2] > 0) == (model.alignment is not None)


def test_unused_slots_change_no_loss_and_no_gradient(model):
    documents = [document([3, 0, 2, 0], 0, 4, (2, 4, 4))]
    shape = SequenceShape(40, 7, (4,), 2, ((4, 4),), clean_context=True)
    whole = collate([pack_row(documents, shape)])
    less = drop_unused_slots(whole, 4)
    assert less.t.shape == (1, 2)
    for found, expected in zip(*(losses_and_gradients(model, each) for each in (less, whole)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nothing_but_its_own_loss_depends_on_a_noised_image(model):
    """Gradients to the noise of each image: of the text's loss, and of each image's with it."""
    _, batch = packed([[3, 0, 2, 0, 3], [0, 4]])
    batch.noise.requires_grad_()
    for only in (None, 0, 1, 2):
        batch.has_loss = torch.arange(3)[None] == (-1 if only is None else only)
        (gradient,) = torch.autograd.grad(model(batch).total, batch.noise)
        reached = (gradient != 0).flatten(2).any(-1)[0].tolist()
        assert reached == [slot == only for slot in range(3)]


def test_later_losses_depend_on_the_clean_image(model):
    _, batch = packed([[3, 0, 2, 0]])
    batch.latents.requires_grad_()
    (gradient,) = torch.autograd.grad(model(batch).text, batch.latents)
    assert gradient[0, 0].abs().sum() > 0


def test_generation_equals_training(model):
    """The prediction of an image behind a text and an image, and the logits behind it, once it is clean."""
    (flat,), batch = packed([[3, 0, 2, 0, 4]])
    with torch.no_grad():
        trained, text = _hidden(model, batch)
    process = model.objective.noise_process
    first, second = (int(start) for start in flat.image_start)
    prompt = cut_document(flat, 0, second)
    shape = SequenceShape(len(prompt), 1, (4,), 2, ((4, 4),))
    plain = FlatDocument(**vars(prompt) | {"copies": None})
    prompts = collate([pack_row([plain], shape)])
    prompts.t.zero_()
    prompts.noise.zero_()
    decoder = Decoder(model)
    cache = decoder.new_cache(1, 64)
    decoder.read_prompts(cache, prompts, torch.tensor([len(prompt)]))
    noised = process.add_noise(batch.latents, batch.noise, batch.t)[:, 1]
    timestep = process.timesteps(batch.t[0, 1])
    with torch.no_grad():
        where = cache, decoder._image_context(cache, noised)
        found = decoder._predict(*where, noised, timestep)
        torch.testing.assert_close(found, trained[:, 1], rtol=1e-4, atol=1e-4)
        # What `denoise` ends with.
        decoder._predict(*where, batch.latents[:, 1], process.timesteps(torch.zeros(())))
        cache.advance(torch.tensor([4]))
        for position in range(second + 4, len(flat)):
            logits = decoder.read_tokens(cache, torch.tensor([flat.tokens[position]]))
            torch.testing.assert_close(logits, text[:, position], rtol=1e-4, atol=1e-4)
    assert first < second


def _hidden(model: Transfusion, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions [1, N, C, H, W] and logits [1, S, V] of a batch."""
    found = {}

    class Recorded(torch.nn.Module):
        def forward(self, head, hidden_BSD, images, targets, *alignment):
            found["images"], found["logits"] = images, head(hidden_BSD)

    objective, model.objective = model.objective, Recorded()
    model.objective.noise_process, model.objective.aligns = objective.noise_process, objective.aligns
    model(batch)
    model.objective = objective
    return found["images"], found["logits"]


@given(
    st.lists(st.sampled_from([0, 0, GIVEN, 1, 3, 9]), min_size=1, max_size=8),
    st.integers(1, 3),
    st.integers(4, 40),
    st.integers(1, 3),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_cuts_leave_room_for_the_copies_and_are_as_late_as_they_can_be(lengths, patches, room, slots, data):
    flat = document(lengths, 0, patches)
    may_begin = [at for at in range(len(flat) - 1) if flat.patch[at] < 0 and flat.tokens[at] != IDS.eoi]
    start = data.draw(st.sampled_from(may_begin))

    def takes(cut: int) -> tuple[int, int]:
        here = images_between(flat, start, cut)
        return flat.positions_in_row(start, cut), here.stop - here.start

    def fits(cut: int) -> bool:
        length, images = takes(cut)
        return length <= room and images <= slots

    cut = find_cut(flat, start, len(flat), room, slots, 2)
    splits = {
        at
        for first, last in zip(flat.image_start, flat.image_end, strict=True)
        for at in range(first, last + 1)
    }
    whole = [at for at in range(start + 2, len(flat) + 1) if at not in splits and fits(at)]
    if cut > start:
        assert cut in whole
        assert cut >= max((at for at in whole if at == len(flat) or at <= len(flat) - 2), default=0)
    else:
        assert not [at for at in whole if at == len(flat) or at <= len(flat) - 2]
    assert len(cut_document(flat, start, cut).copies) == takes(cut)[1]
