"""Calls of the Python interface that are refused."""

import pytest
from PIL import Image

from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.draw("red apple"), r"list of str, got 'red apple'; call it as draw"),
        (lambda p: p.draw([1]), r"list of str, got \[1\]"),
        (lambda p: p.describe(["image.png"]), r"list of Image, got \['image.png'\]"),
        (lambda p: p.describe("image.png"), r"list of Image"),
        (lambda p: p(["red apple", "pizza"]), r"list of list or tuple"),
        (lambda p: p([["red apple", 3]]), r"list of str or Image"),
        (lambda p: p([[Image.new("RGB", (4, 4))]], begin="image", max_images=0), r"max_images of at least 1"),
    ],
)
def test_arguments_of_other_types_are_refused_with_the_right_call(call, message):
    # Refused before the model is used, so the test needs none.
    with pytest.raises(UserError, match=message):
        call(object.__new__(TransfusionPipeline))
