"""Calls of the Python interface that are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.objective.config import SamplingConfig
from tests.support.generation import make_pipeline


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.draw("red apple"), r"list of str, got 'red apple'; call it as draw"),
        (lambda p: p.draw([1]), r"list of str, got \[1\]"),
        (lambda p: p.describe(["image.png"]), r"list of Image, got \['image.png'\]"),
        (lambda p: p.describe("image.png"), r"list of Image"),
        (lambda p: p(["red apple", "pizza"]), r"list of list or tuple"),
        (lambda p: p([["red apple", 3]]), r"list of str or Image"),
        (lambda p: p(5), r"list of list or tuple, got 5"),
        (lambda p: p.draw(None), r"list of str, got None"),
        (lambda p: p([["x"]], begin="picture"), r"begin='picture': give one of 'free', 'text', 'image'"),
        (lambda p: p([["x"]], begin=None), r"begin=None"),
        (lambda p: p([["x"]], begin="image", max_images=0), r"max_images=0: give an integer from 1 to"),
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
        object.__new__(TransfusionPipeline)([["x"]], **{name: value})


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
        (SamplingConfig(sampler="euler"), "sampler euler does not sample"),
        (SamplingConfig(num_inference_steps=1001), "exceeds the 1000 timesteps of training"),
    ],
)
@pytest.mark.parametrize(
    "draw", [lambda p, s: p.draw(["x"], sampling=s), lambda p, s: p([["x"]], sampling=s)]
)
def test_options_that_cannot_be_used_are_refused_before_anything_is_generated(
    pipeline, draw, sampling, message
):
    with pytest.raises(UserError, match=message):
        draw(pipeline, sampling)


def test_an_iterator_of_captions_is_drawn(pipeline):
    assert len(pipeline.draw(caption for caption in ["x", "pizza"])) == 2
