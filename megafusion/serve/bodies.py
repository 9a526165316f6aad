"""Bodies of requests in OpenAI's shapes, and the pipeline's requests that they ask for.

Beside OpenAI's fields, each takes the keys of `sampling`. `Body.unused` are those of OpenAI's without effect.
"""

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field

from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.generate.arguments import MAX_SEED
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.generate.row import Part, Request
from megafusion.images.sizes import Size
from megafusion.objective.config import SamplingConfig
from megafusion.objective.sampler import unsupported_sampler
from megafusion.sequence.text import clean_text
from megafusion.serve.config import ServeConfig
from megafusion.serve.content import Content, read_messages
from megafusion.serve.errors import Refusal
from megafusion.serve.unused import CHAT_FIELDS, IMAGE_FIELDS, Unused, without_unused


class Body(SamplingConfig):
    """Fields of every request."""

    unused: ClassVar[Mapping[str, Unused]] = {}

    model: str | None = None
    """The server's model, or none."""
    n: int = Field(1, ge=1)
    """Answers to the same prompt, each with a seed of its own."""
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    """Seed of the first answer, and plus one of each further one; by default another one each time."""
    size: str = "auto"
    """Width x height of drawn images, in pixels, as OpenAI writes them; auto lets the model choose."""
    stop: tuple[str, ...] = Field((), strict=False, max_length=16)
    stream: bool = False
    """Answer as server-sent events, as it is made."""


class ChatBody(Body):
    """/v1/chat/completions."""

    unused = CHAT_FIELDS

    messages: list[Any] = Field(min_length=1)
    modalities: list[Literal["text", "image"]] = Field(["text"], min_length=1)
    """Kinds of parts that the answer may hold."""
    max_images: int = Field(1, ge=1)
    """Images of an answer."""
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream_options: dict[Literal["include_usage"], bool] = Field(default_factory=dict)


class ImageBody(Body):
    """/v1/images/generations, and /v1/images/edits beside its files."""

    unused = IMAGE_FIELDS

    prompt: str
    partial_images: int = Field(0, ge=0, le=3)
    """Most previews of the image in a stream."""


B = TypeVar("B", bound=Body)
NAMES = {name for name, field in ImageBody.model_fields.items() if field.annotation in (str, str | None)}
"""Fields of a form that are text, whatever they look like."""


def read_json(body: bytes) -> dict:
    """The values of a JSON body. Raises Refusal."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"body: is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise Refusal(400, "body: is not a JSON object")
    return values


def read_form_value(name: str, text: str) -> Any:
    """The value of a form's field, which is a text or JSON."""
    if name in NAMES:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


class Reader:
    """Turns bodies into requests of a pipeline, which it has checked. Raises Refusal and UserError."""

    def __init__(self, pipeline: TransfusionPipeline, config: ServeConfig, name: str):
        self.pipeline, self.config, self.name = pipeline, config, name
        self.limits = {
            "n": (1, config.max_batch),
            "max_images": (1, config.max_images),
            "max_tokens": (1, config.max_tokens),
            "max_completion_tokens": (1, config.max_tokens),
            "max_new_tokens": (0, config.max_tokens),
            "num_inference_steps": (1, config.max_steps),
        }

    def read(self, kind: type[B], values: Mapping[str, Any]) -> B:
        """Validated fields; null is as if left out. The messages of errors have the field and its limit."""
        given = without_unused({k: v for k, v in values.items() if v is not None}, kind.unused)
        for name, (least, most) in self.limits.items():
            if type(value := given.get(name)) is int and not least <= value <= most:
                raise Refusal(400, f"{name}={value}: this server takes {least} to {most}")
        check_sampler(self.pipeline, given.get("sampler"))
        if isinstance(given.get("stop"), str):
            given["stop"] = [given["stop"]]
        return parse_config(kind, given, "body")

    def chat(self, body: ChatBody) -> list[Request]:
        """The answers that a chat asks for."""
        content = Content(self.config)
        document = read_messages(body.messages, content)
        if not any(clean_text(part) if isinstance(part, str) else True for part in document):
            raise Refusal(400, "messages: have no text and no image")
        tokens = {}
        for field in ("max_tokens", "max_completion_tokens"):
            if (value := getattr(body, field)) is not None:
                tokens = {"max_new_tokens": value}
        if body.modalities == ["image"]:
            return self._requests(body, content, document, begin="image", max_new_tokens=0)
        if "image" in body.modalities:
            return self._requests(body, content, document, max_images=body.max_images, **tokens)
        return self._requests(body, content, document, begin="text", max_images=0, **tokens)

    def draw(self, body: ImageBody, files: Mapping[str, bytes]) -> list[Request]:
        """The images that a prompt asks for, after those that it tells how to edit."""
        content = Content(self.config)
        images = [content.image(file, field) for field, file in files.items()]
        if not clean_text(content.text(body.prompt, "prompt")):
            raise Refusal(400, "prompt: is empty; give a text")
        if body.n > 1 and body.stream:
            raise Refusal(400, f"n={body.n}: the events of a stream are of one image; ask for each by itself")
        if body.partial_images and not body.stream:
            raise Refusal(400, f"partial_images={body.partial_images}: needs stream true")
        document: list[Part] = [*images, body.prompt]
        return self._requests(
            body, content, document, begin="image", num_previews=body.partial_images, max_new_tokens=0
        )

    def _requests(
        self,
        body: Body,
        content: Content,
        document: list[Part],
        begin: str = "free",
        max_images: int = 1,
        num_previews: int = 0,
        **changes: Any,
    ) -> list[Request]:
        if body.model not in (None, self.name):
            raise Refusal(404, f"model={body.model!r:.80}: this server has {self.name!r}")
        for field, text in (
            ("negative_prompt", body.negative_prompt),
            *(("stop", stop) for stop in body.stop),
        ):
            content.text(text, field)
        own = self.pipeline.config.sampling
        names = body.model_fields_set & SamplingConfig.model_fields.keys()
        given = {name: getattr(body, name) for name in names}
        sampling = limited(own, self.config).model_copy(update={**given, **changes})
        requests = self.pipeline.requests(
            [document] * body.n,
            begin=begin,
            max_images=max_images,
            seed=secrets.randbelow(2**53) if body.seed is None else body.seed,
            size=self._size(body.size),
            sampling=sampling,
            preview_every=self._preview_every(num_previews, sampling),
        )
        self.pipeline.check(requests[0], "messages" if isinstance(body, ChatBody) else "prompt")
        return requests

    def _preview_every(self, num_previews: int, sampling: SamplingConfig) -> int:
        """Steps between the previews of an image, of which there are at most so many."""
        model = self.pipeline.config.model
        steps = max(model.patches) if model.codebook_size else sampling.num_inference_steps
        return -(-steps // (num_previews + 1)) if num_previews else 0

    def _size(self, text: str) -> Size | None:
        if text == "auto":
            return None
        sizes = {f"{width}x{height}": (height, width) for height, width in self.pipeline.sizes}
        if text not in sizes:
            known = f"{', '.join(sizes)} (width x height, in pixels)"
            raise Refusal(400, f"size={text!r:.80}: the model has {known}; give one of these, or auto")
        return sizes[text]


def limited(sampling: SamplingConfig, config: ServeConfig) -> SamplingConfig:
    """A model's own sampling within the limits of a server."""
    return sampling.model_copy(
        update={
            "max_new_tokens": min(sampling.max_new_tokens, config.max_tokens),
            "num_inference_steps": min(sampling.num_inference_steps, config.max_steps),
        }
    )


def check_sampler(pipeline: TransfusionPipeline, name: Any) -> None:
    """Raise UserError for the name of a sampler that a pipeline's noise process does not have."""
    if isinstance(name, str):
        process, short = pipeline.config.objective.noise_process, name.removesuffix("Scheduler")
        if reason := unsupported_sampler(short, process.build().samplers, process.kind):
            raise UserError(reason)


def is_image_field(name: str) -> bool:
    """Whether a form's field is one of an edit's images: image, image[] or image[0]."""
    return bool(re.fullmatch(r"image(\[\d*\])?", name))
