"""Texts and images that a request gives, within its limits."""

import base64
import binascii
import re
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image

from megafusion.generate.row import Part
from megafusion.images.reader import BadImage, TooManyPixels, convert_to_rgb, open_image
from megafusion.serve.config import ServeConfig
from megafusion.serve.errors import Refusal

DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")
ADDRESS = re.compile(r"(?!data:)[a-z]+:", re.IGNORECASE)
MESSAGE = '{"role": "user", "content": "..."}'
TEXT = '{"type": "text", "text": "..."}'
IMAGE = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
ROLES = ("system", "developer", "user", "assistant")
_decoding = threading.Lock()
"""One image is decoded at a time: reading changes Python's filters of warnings for a while."""


class Content:
    """Reads the texts and images of one request, and counts them."""

    def __init__(self, config: ServeConfig):
        self.config = config
        self.num_characters = self.num_images = self.num_pixels = 0

    def text(self, value: Any, field: str) -> str:
        """A text. Raises Refusal."""
        if not isinstance(value, str):
            raise Refusal(400, f"{field}={value!r:.80}: is not a text")
        self.num_characters += len(value)
        if self.num_characters > (most := self.config.max_prompt_characters):
            raise Refusal(400, f"{field}: the request has more than max_prompt_characters {most}; shorten it")
        return value

    def count(self, parts: Iterable[Part], field: str) -> None:
        """Count texts and images that were read before and belong to this request, too. Raises Refusal."""
        for part in parts:
            if isinstance(part, str):
                self.text(part, field)
            else:
                self._count_image(field)
                if (num := part.width * part.height) > self.config.max_pixels - self.num_pixels:
                    raise self._too_many_pixels(field, f"its images have {self.num_pixels + num} pixels")
                self.num_pixels += num

    def data_url(self, value: Any, field: str) -> Image.Image:
        """The image of a data URL. Raises Refusal; no address is fetched."""
        if not isinstance(value, str) or not (head := DATA_URL.match(value)):
            is_address = isinstance(value, str) and ADDRESS.match(value)
            reason = "addresses are not fetched" if is_address else "is not a data URL of an image"
            raise Refusal(400, f"{field}={value!r:.80}: {reason}; send it as data:image/png;base64,...")
        try:
            content = base64.b64decode(value[head.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise Refusal(400, f"{field}: its data is not base64 ({error})") from error
        return self.image(content, field)

    def image(self, content: bytes, field: str) -> Image.Image:
        """An encoded image as upright RGB. Raises Refusal before it decodes one that has too many pixels."""
        self._count_image(field)
        left = self.config.max_pixels - self.num_pixels

        def convert(image: Image.Image) -> Image.Image:
            if image.width * image.height > left:
                raise TooManyPixels(f"image of {image.width} x {image.height} has too many pixels")
            return convert_to_rgb(image)

        try:
            with _decoding:
                image = open_image(content, convert)
        except TooManyPixels as error:
            raise self._too_many_pixels(field, str(error)) from error
        except BadImage as error:
            raise Refusal(400, f"{field}: {error}") from error
        self.num_pixels += image.width * image.height
        return image

    def _count_image(self, field: str) -> None:
        self.num_images += 1
        if self.num_images > (most := self.config.max_images):
            raise Refusal(400, f"{field}: the request has more than max_images {most} images")

    def _too_many_pixels(self, field: str, reason: str) -> Refusal:
        limit = f"max_pixels {self.config.max_pixels} for all images of a request"
        return Refusal(400, f"{field}: {reason}; the limit is {limit}")


def read_messages(messages: list, content: Content) -> list[Part]:
    """The texts and images of a chat's messages, in order: the model knows documents, not roles.

    Raises Refusal naming the message and the part.
    """
    document: list[Part] = []
    for number, message in enumerate(messages):
        document += _read_message(message, f"messages[{number}]", content)
    return document


def _read_message(message: Any, field: str, content: Content) -> Iterator[Part]:
    if not isinstance(message, dict):
        raise Refusal(400, f"{field}={message!r:.80}: is not a message, as {MESSAGE}")
    values = {key: value for key, value in message.items() if value is not None}
    role, body = values.pop("role", None), values.pop("content", "")
    images = values.pop("images", []) if role == "assistant" else []
    values.pop("name", None)
    if role not in ROLES:
        raise Refusal(400, f"{field}.role={role!r:.80}: give one of {', '.join(ROLES)}")
    if values := {key: value for key, value in values.items() if value != []}:  # as of no tool calls
        raise Refusal(400, f"{field}: unknown key {next(iter(values))!r:.80}; give role and content")
    if isinstance(body, list):
        for number, part in enumerate(body):
            yield _read_part(part, f"{field}.content[{number}]", content)
    else:
        yield from _read_answer(content.text(body, f"{field}.content"), images, field, content)


def _read_part(part: Any, field: str, content: Content) -> Part:
    match part:
        case {"type": "text", "text": text}:
            return content.text(text, f"{field}.text")
        case {"type": "image_url", "image_url": {"url": url}}:
            return content.data_url(url, f"{field}.image_url.url")
    kind = part.get("type") if isinstance(part, dict) else part
    raise Refusal(400, f"{field}: {kind!r:.80} is not a part as {TEXT} or {IMAGE}")


def _read_answer(text: str, images: Any, field: str, content: Content) -> Iterator[Part]:
    """A message's text with the images of an answer of ours, each after the `offset`-th character."""
    start = 0
    if not isinstance(images, list):
        raise Refusal(400, f"{field}.images={images!r:.80}: is not a list")
    for number, image in enumerate(images):
        offset = image.get("offset", len(text)) if isinstance(image, dict) else -1
        if type(offset) is not int or not start <= offset <= len(text):
            raise Refusal(400, f"{field}.images[{number}]: offset is not from {start} to {len(text)}")
        if offset > start:
            yield text[start:offset]
        yield _read_part(image, f"{field}.images[{number}]", content)
        start = offset
    if text[start:]:
        yield text[start:]
