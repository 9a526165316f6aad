"""Rotary positions of image patches by row and column."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.model.config import ModelConfig
from megafusion.model.rope import rope_at, rope_positions
from megafusion.sequence.packing import collate, pack_row
from tests.model.test_sizes import MODEL, PATCHES, document, model, shape
from tests.support.generation import full_hidden
from tests.support.runs import start

GRIDS = ((2, 4), (4, 4), (5, 1))


@given(st.lists(st.lists(st.integers(-3, 4).filter(bool), min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_patch_is_at_its_row_and_column_and_a_text_where_it_was(layout):
    """Against a loop over documents, with images of three sizes."""
    packed = [document(parts, seed) for seed, parts in enumerate(layout)]
    batch = collate([pack_row(packed, shape(sum(map(len, packed)) + 3, 12))])
    config = ModelConfig(**MODEL, image_rope="2d")
    expected = []
    for parts in layout:
        own = [(0, 0)]
        for part in parts:
            if part > 0:
                own += [(len(own) + i,) * 2 for i in range(part)]
                continue
            assert PATCHES[-1 - part] == GRIDS[-1 - part][0] * GRIDS[-1 - part][1]
            rows, columns = GRIDS[-1 - part]
            first = len(own) + 1
            own += [(first - 1,) * 2]
            own += [(first + r, first + c) for r in range(rows) for c in range(columns)]
            own += [(len(own),) * 2]
        expected += [*own, (len(own),) * 2]
    found = rope_positions(config, batch.positions, batch.patch_index, batch.image_size)
    assert found[0].tolist() == [list(pair) for pair in [*expected, *[(0, 0)] * 3]]


def test_rows_and_columns_take_turns_over_the_frequencies():
    places = torch.tensor([[[3, 3], [3, 9], [7, 3]]])
    rope = rope_at(places, 16, 100.0)
    by_axis = [rope_at(places[..., axis], 16, 100.0) for axis in (0, 1)]
    for axis, one in enumerate(by_axis):
        assert torch.equal(rope.cos[..., axis::2], one.cos[..., axis::2])
        assert torch.equal(rope.sin[..., axis::2], one.sin[..., axis::2])


def test_texts_have_the_same_bits_and_images_do_not():
    plain, places = model("linear"), model("linear", image_rope="2d")
    places.load_state_dict(plain.state_dict())
    texts = collate([pack_row([document([7], 0), document([3, 4], 1)], shape(24, 12))])
    assert torch.equal(*(full_hidden(net, texts)[0] for net in (plain, places)))
    images = collate([pack_row([document([3, -2, 2], 0)], shape(40, 12))])
    with torch.no_grad():
        one, other = plain(images), places(images)
    assert not torch.isclose(one.image, other.image, rtol=1e-5)
    assert not torch.isclose(one.text, other.text, rtol=1e-6)  # of the text after the image


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 6}, "image_rope 2d divides head_dim 6 into pairs"),
        (
            {"codebook_size": 8, "latent_channels": 0, "patch_size": 1},
            "image_rope 2d: is for images that are latents",
        ),
    ],
)
def test_what_it_does_not_go_with_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**MODEL | changes, image_rope="2d")


def test_a_run_keeps_it_and_a_new_one_may_start_from_another(run_values, tmp_path):
    run_values["train"]["num_steps"] = 1
    run = start(run_values)
    run_values["model"]["image_rope"] = "2d"
    with pytest.raises(UserError, match=r"other values of model\.image_rope"):
        start(run_values)
    run_values["train"]["init_from"] = str(run)
    run_values["optimizer"] = {"learning_rate": 1e-12, "num_warmup_steps": 1}
    other = start(run_values, out=str(tmp_path / "other"))
    began, now = (TransfusionPipeline.from_pretrained(path) for path in (run, other))
    assert (began.config.model.image_rope, now.config.model.image_rope) == ("1d", "2d")
