"""Calls of the Python interface that are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.objective.config import SamplingConfig
from tests.support.generation import make_pipeline


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.draw(5), r"list of str, got 5; call it as draw"),
        (lambda p: p.draw([1]), r"list of str, got \[1\]"),
        (lambda p: p.describe(["none.png"]), r"none.png: no such image"),
        (lambda p: p.describe(["https://x.org/a.png"]), r"addresses are not fetched; give a path"),
        (lambda p: p.describe([Image.new("RGB", (0, 5))]), r"image of 5 x 0 pixels: give 1 to \d+ pixels"),
        (lambda p: p.describe(5), r"list of Image or str or Path"),
        (lambda p: p.describe("image.png"), r"image.png: no such image"),
        (lambda p: p.generate(["red apple", "pizza"]), r"list of list or tuple"),
        (lambda p: p.generate([["red apple", 3]]), r"list of str or Path or Image"),
        (lambda p: p.generate(5), r"list of list or tuple, got 5"),
        (lambda p: p([["red apple"]]), r"list of str, got \[\['red apple'\]\]; call it as .*generate"),
        (lambda p: p(5), r"list of str, got 5"),
        (lambda p: p(""), r"prompt 0 is empty"),
        (lambda p: p(["x", " "]), r"prompt 1 is empty"),
        (lambda p: p("x", output_type="jpeg"), r"output_type='jpeg': give one of pil, np, pt, latent"),
        (lambda p: p("x", num_images_per_prompt=0), r"num_images_per_prompt=0: give an integer from 1 to"),
        (lambda p: p("x", image=3), r"image=3: give a Image or str or Path, or a list of 1"),
        (lambda p: p("x", image=["a", "b"]), r"image=\['a', 'b'\]: give a Image"),
        (lambda p: p.edit(Image.new("RGB", (1, 1)), " "), r"instruction=' ': give a text"),
        (lambda p: p.edit(3, "x"), r"image=3: give a PIL image or the path of one"),
        (lambda p: p.stream([]), r"prompts is empty"),
        (lambda p: p.stream([["x"]], preview_every=-1), r"preview_every=-1: give an integer from 0"),
        (lambda p: p.generate([["x"]], seed=[1, 2]), r"seed has 2 values for 1 prompts"),
        (lambda p: p.draw(None), r"list of str, got None"),
        (
            lambda p: p.generate([["x"]], begin="picture"),
            r"begin='picture': give one of 'free', 'text'",
        ),
        (lambda p: p.generate([["x"]], begin=None), r"begin=None"),
        (
            lambda p: p.generate([["x"]], begin="image", max_images=0),
            r"max_images=0: give an integer from 1 to",
        ),
    ],
)
def test_arguments_of_other_types_are_refused_with_the_right_call(call, message):
    # Refused before the model is used, so the test needs none.
    with pytest.raises(UserError, match=message):
        call(object.__new__(TransfusionPipeline))


@given(
    st.sampled_from(["seed", "max_images"]),
    st.one_of(st.integers(max_value=-1), st.integers(min_value=2**63), st.floats(), st.text(), st.none()),
)
def test_integers_that_torch_cannot_take_are_refused_with_their_range(name, value):
    with pytest.raises(UserError, match=rf"^{name}=.*: give an integer from 0 to \d+$"):
        object.__new__(TransfusionPipeline).generate([["x"]], **{name: value})


@pytest.fixture
def pipeline(run_config, tokenizer, codec) -> TransfusionPipeline:
    return make_pipeline(run_config, tokenizer, codec, num_steps=1)


@pytest.mark.parametrize("seed", [0, np.int64(5), np.uint8(5), 2**63 - 1])
def test_every_seed_in_the_range_draws_every_prompt(pipeline, seed):
    assert len(pipeline.draw(["x", "red apple", "pizza"], seed=seed)) == 3


@pytest.mark.parametrize("size", [5, "32x32", (32,), (2**70, 32), [32, 33], (32, 32, 3), {32, 33}])
def test_a_size_that_the_model_lacks_is_refused_with_its_sizes(pipeline, size):
    with pytest.raises(UserError, match=r"the model has 32x32 \(height"):
        pipeline.draw(["x"], size=size)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"sampler": "dpm++"}, "give a SamplingConfig"),
        ("dpm++", "give a SamplingConfig"),
        (SamplingConfig(sampler="heun"), "sampler heun does not sample"),
        (SamplingConfig(num_inference_steps=1001), "exceeds the 1000 timesteps of training"),
    ],
)
@pytest.mark.parametrize(
    "draw", [lambda p, s: p.draw(["x"], sampling=s), lambda p, s: p.generate([["x"]], sampling=s)]
)
def test_options_that_cannot_be_used_are_refused_before_anything_is_generated(
    pipeline, draw, sampling, message
):
    with pytest.raises(UserError, match=message):
        draw(pipeline, sampling)


def test_an_iterator_of_captions_is_drawn(pipeline):
    assert len(pipeline.draw(caption for caption in ["x", "pizza"])) == 2
