"""Images of several sizes: the choice of a size, the layout in rows, and losses per image."""

from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megafusion.errors import UserError
from megafusion.images.sizes import nearest_size
from megafusion.model.adapters import SizeGroups, adapter_module
from megafusion.model.config import ModelConfig
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig
from megafusion.sequence.document import FlatDocument, ImageSegment
from megafusion.sequence.packing import SequenceShape, collate, pack_row, with_counts
from megafusion.sequence.tokenizer import Tokenizer
from tests.support.rows import arrays
from tests.support.segments import flat_document, image_of

SIZES, CHANNELS, PATCH = ((4, 8), (8, 8), (10, 2)), 2, 2
PATCHES = (8, 16, 5)
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 48,
    "vocab_size": 34,
    "latent_channels": CHANNELS,
    "latent_downsampling": 1,
    "image_sizes": SIZES,
    "patch_size": PATCH,
    "unet_channels": 4,
}


IDS = Tokenizer(Path(), "", 30, bos=1, eos=2)


def image(size: int, seed: int, as_only_size: bool = False) -> ImageSegment:
    random = np.random.default_rng(seed)
    latents, noise = random.standard_normal((2, CHANNELS, *SIZES[size]), dtype=np.float32)
    return image_of(latents, noise, int(random.integers(1000)) / 1000, size=0 if as_only_size else size)


def document(parts: list[int], seed: int) -> FlatDocument:
    """Texts of these lengths; an image of size n for -1 - n."""
    random = np.random.default_rng(seed)
    segments = [
        random.integers(3, 30, part) if part > 0 else image(-1 - part, 10 * seed + index)
        for index, part in enumerate(parts)
    ]
    return flat_document(segments, IDS, PATCHES)


def shape(length: int, slots: int) -> SequenceShape:
    return SequenceShape(length, slots, PATCHES, CHANNELS, SIZES)


def model(adapter: str, **changes) -> Transfusion:
    torch.manual_seed(0)
    return Transfusion(ModelConfig(**MODEL | {"adapter": adapter} | changes), ObjectiveConfig())


def losses_and_gradients(net, batch):
    net.zero_grad()
    losses = net(batch)
    losses.total.backward()
    return torch.stack(losses).detach(), {name: p.grad.clone() for name, p in net.named_parameters()}


def assert_equal(found: tuple, expected: tuple) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-5)


def summed(results: list[tuple]) -> tuple:
    return (
        sum(losses for losses, _ in results),
        {name: sum(gradients[name] for _, gradients in results) for name in results[0][1]},
    )


@pytest.mark.parametrize(
    ("image_size", "sizes", "expected"),
    [
        ((100, 100), ((64, 64), (48, 80), (80, 48)), 0),
        ((60, 100), ((64, 64), (48, 80), (80, 48)), 1),
        ((1000, 1), ((64, 64), (48, 80), (80, 48)), 2),
        (
            (77, 100),
            ((64, 64), (48, 80)),
            1,
        ),  # the middle is sqrt(0.6) = 0.7746
        ((78, 100), ((64, 64), (48, 80)), 0),
        ((7, 7), ((80, 48), (48, 80)), 0),  # equally far from both, to the last bit
        ((7, 7), ((48, 80), (80, 48)), 0),
        ((30, 30), ((64, 64), (32, 32)), 0),  # equal aspects: the first
        ((3, 12), ((1, 2), (1, 8)), 0),  # the geometric middle is a tie
    ],
)
def test_an_image_gets_the_size_nearest_in_aspect(image_size, sizes, expected):
    assert nearest_size(*image_size, sizes) == expected


def test_the_token_before_an_image_names_its_size():
    flat = document([2, -1, -3, -2], 0)
    a, b = flat.tokens[1:3]
    begins = {4 - 1: 30, 3 + 8 + 2: 33, 13 + 5 + 2: 32}
    assert {at: flat.tokens[at] for at in begins} == begins
    assert len(flat) == 2 + 2 + sum(PATCHES) + 2 * 3
    labelled = np.flatnonzero(flat.labels != -100).tolist()
    # The token before a boi has it as its label; a boi and patches have none; an eoi has the next token.
    assert labelled == [0, 1, 2, 12, 19, len(flat) - 2]
    assert flat.labels[labelled].tolist() == [a, b, 30, 33, 32, 2]
    assert flat.image_start.tolist() == [4, 14, 21]
    for number, (start, size) in enumerate(zip(flat.image_start, (0, 2, 1), strict=True)):
        here = slice(start, start + PATCHES[size])
        assert flat.patch[here].tolist() == list(range(16 * number, 16 * number + PATCHES[size]))
        assert (flat.row_end[here] == here.stop).all()
        assert flat.tokens[here.stop] == 31


def test_a_row_holds_each_image_at_the_top_left():
    flat = document([2, -1, -3, -2], 0)
    row = arrays(pack_row([document([3], 1), flat], shape(50, 4)))
    assert row["image_size"].tolist() == [0, 2, 1, 0]
    assert row["latents"].shape == row["noise"].shape == (4, CHANNELS, 10, 8)
    for slot, segment in enumerate(flat.images):
        height, width = segment.latents.shape[1:]
        for name in ("latents", "noise"):
            whole = row[name][slot].copy()
            assert np.array_equal(whole[:, :height, :width], getattr(segment, name))
            whole[:, :height, :width] = 0
            assert not whole.any()
    assert row["patch_index"].max() == 2 * 16 + 16 - 1


LAYOUTS = st.lists(st.lists(st.integers(-3, 4).filter(bool), min_size=1, max_size=3), min_size=2, max_size=4)


@pytest.mark.parametrize("changes", [{}, {"adapter": "unet"}, {"image_rope": "2d"}])
@given(layout=LAYOUTS.filter(lambda documents: any(part < 0 for d in documents for part in d)))
@settings(max_examples=12)
def test_a_packed_row_equals_its_documents_one_by_one(changes, layout):
    net = model(**{"adapter": "linear"} | changes)
    documents = [document(parts, seed) for seed, parts in enumerate(layout)]
    # The last image ends with the row, where the largest size would not fit.
    packed = collate([pack_row(documents, shape(sum(map(len, documents)), 12))])
    alone = [collate([pack_row([d], shape(len(d), max(1, len(d.images))))]) for d in documents]
    counts = packed.counts()
    assert_equal(
        losses_and_gradients(net, packed),
        summed([losses_and_gradients(net, with_counts(batch, counts)) for batch in alone]),
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("adapter", ["linear", "unet"])
def test_each_image_has_the_loss_of_a_model_of_its_size_only(adapter, prediction):
    objective = ObjectiveConfig(noise_process={"prediction_type": prediction})
    torch.manual_seed(0)
    net = Transfusion(ModelConfig(**MODEL, adapter=adapter), objective)
    order = [1, 0, 2, 2, 1, 0, 0]
    documents = [flat_document([image(s, i)], IDS, PATCHES) for i, s in enumerate(order)]
    rows = [pack_row(documents[:4], shape(60, 5)), pack_row(documents[4:], shape(60, 5))]
    mixed = collate(rows)
    results = []
    for number, size in enumerate(order):
        only = {"image_sizes": (SIZES[size],)}
        single = Transfusion(ModelConfig(**MODEL | only, adapter=adapter), objective)
        single.load_state_dict(net.state_dict())
        only_ids = copy(IDS)
        only_ids.reserved = (IDS.boi_of_size(size), IDS.eoi)
        flat = flat_document([image(size, number, as_only_size=True)], only_ids, (PATCHES[size],))
        row = pack_row([flat], SequenceShape(len(flat), 1, (PATCHES[size],), CHANNELS, (SIZES[size],)))
        results.append(losses_and_gradients(single, with_counts(collate([row]), mixed.counts())))
    assert_equal(losses_and_gradients(net, mixed), summed(results))


def test_every_parameter_has_a_gradient_if_a_batch_lacks_a_size():
    net = model("unet")
    for parts in ([-2, 3], [4], [-1], [-3, -3]):
        batch = collate([pack_row([document(parts, 0)], shape(40, 2))])
        losses, gradients = losses_and_gradients(net, batch)
        assert torch.isfinite(losses).all()
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@given(sizes=st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_merge_inverts_split(sizes):
    index = torch.arange(len(sizes))[:, None]
    groups = SizeGroups(torch.tensor(sizes), 4, index.device)
    split = groups.split(index)
    assert all(len(group) for group in split)
    for size, group in enumerate(split):
        if size in sizes:
            assert group[:, 0].tolist() == [slot for slot, s in enumerate(sizes) if s == size]
    assert torch.equal(groups.merge(split), index)


@pytest.mark.parametrize(("adapter", "rope"), [("linear", "2d"), ("unet", "1d")])
def test_a_step_groups_images_without_reading_from_the_device(adapter, rope):
    """Tensors of the meta device have no values: reading one raises."""
    batch = collate([pack_row([document([-1, -2, 3, -1], 0)], shape(60, 4))]).to("meta")
    losses, gradients = losses_and_gradients(model(adapter, image_rope=rope).to("meta"), batch)
    assert losses.is_meta
    assert all(gradient.is_meta for gradient in gradients.values())


def test_merge_pads_to_the_longest():
    groups = SizeGroups(torch.tensor([1, 0]), 2, torch.device("cpu"))
    merged = groups.merge([torch.ones(1, 3, 2), torch.ones(1, 1, 2)])
    assert merged[..., 0].tolist() == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_the_skips_of_the_unet_have_the_predicted_shapes(patch_size):
    config = ModelConfig(**MODEL | {"adapter": "unet", "patch_size": patch_size, "image_sizes": ((16, 8),)})
    unet = adapter_module("unet")
    down, up = unet.Down(config), unet.Up(config)
    latents, timesteps = torch.randn(3, 2, 16, 8), torch.tensor([0, 10, 999])
    patches, skips = down.encode(latents, timesteps)
    assert tuple(skip.shape for skip in skips) == up.skip_shapes(3)
    assert up.decode(patches, timesteps, skips, config.grids[0]).shape == latents.shape


def test_the_skips_of_the_stem_have_the_shapes_that_the_tail_predicts():
    """Pipeline stages exchange them in buffers of one shape, whatever the sizes in a batch."""
    net = model("unet")
    for sizes in ([0, 0, 0], [2, 1, 0], [2, 2, 1]):
        latents, timesteps = torch.randn(3, CHANNELS, 10, 8), torch.tensor([7, 90, 900])
        _, skips = net.stem.adapter(latents, timesteps, torch.tensor(sizes))
        assert tuple(skip.shape for skip in skips) == net.tail.adapter.skip_shapes(3)


def test_latents_outside_an_image_do_not_change_it():
    """Bitwise: convolutions see the image's own border, not the padding."""
    net = model("unet")
    latents, timesteps = torch.randn(2, CHANNELS, 10, 8), torch.tensor([7, 900])
    patches, _ = net.stem.adapter(latents, timesteps, torch.tensor([0, 2]))
    other = latents.clone()
    other[0, :, 4:], other[1, :, :, 2:] = 100.0, 100.0
    again, _ = net.stem.adapter(other, timesteps, torch.tensor([0, 2]))
    assert torch.equal(patches, again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_sizes": ((8, 8), (7, 4))},
            "7x4 is not a multiple of .* x patch_size = 2 pixels",
        ),
        ({"image_sizes": ((4, 8), (8, 8), (8, 8))}, "image_sizes: 4x8, 8x8, 8x8 has a size twice"),
        ({"image_sizes": ()}, "at least 1 item"),
        ({"image_sizes": ((0, 8),)}, "greater than 0"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**MODEL | changes)
