"""Limits of the texts and images of one request, counted together."""

import pytest
from PIL import Image

from megafusion.serve.config import ServeConfig
from megafusion.serve.content import Content
from megafusion.serve.errors import Refusal
from tests.support.serving import png

SQUARE = Image.new("RGB", (10, 10))


@pytest.mark.parametrize(
    ("earlier", "limits", "message"),
    [
        (["1234567"], {"max_prompt_characters": 8}, "more than max_prompt_characters 8"),
        ([SQUARE, SQUARE], {"max_images": 2}, "more than max_images 2 images"),
        ([SQUARE, "x", SQUARE], {"max_pixels": 299}, "max_pixels 299 for all images of a request"),
    ],
)
def test_what_was_read_before_counts_too(earlier, limits, message):
    content = Content(ServeConfig(**limits))
    content.count(earlier, "The conversation")
    with pytest.raises(Refusal, match=message):
        read_message(content)
    fewer = Content(ServeConfig(**limits))
    fewer.count(earlier[1:], "The conversation")
    read_message(fewer)


def read_message(content: Content) -> None:
    content.text("89", "Message")
    content.image(png(SQUARE), "Message")


def test_a_conversation_beyond_the_limits_is_refused_before_a_message_is_read():
    for limits in ({"max_images": 1}, {"max_pixels": 199}):
        with pytest.raises(Refusal, match=r"The conversation: .*max_"):
            Content(ServeConfig(**limits)).count([SQUARE, SQUARE], "The conversation")
