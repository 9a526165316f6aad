"""Answers of /v1/images in OpenAI's shapes, from the events of their rows."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Literal

from PIL import Image

from megafusion.generate.events import ImageDone, ImagePreview
from megafusion.generate.row import Request, count_positions
from megafusion.serve.answers import base64_png, sse, told
from megafusion.serve.errors import Refusal
from megafusion.serve.worker import Worker


class Drawings:
    """The answer of a route: an image for each request.

    kind: the first half of the names of its events, `image_generation.completed` and others.
    """

    def __init__(
        self, worker: Worker, requests: Sequence[Request], kind: Literal["image_generation", "image_edit"]
    ):
        self.worker, self.requests, self.kind = worker, requests, kind

    async def whole(self) -> dict:
        """The answer when it is complete."""
        images: list[Any] = [None] * len(self.requests)
        async with aclosing(told(self.worker, self.requests)) as events:
            async for event in events:
                if isinstance(event, ImageDone):
                    images[event.row] = event.image
        data = [{"b64_json": await base64_png(image)} for image in images]
        made = {"created": int(time.time()), "background": "opaque", "output_format": "png"}
        return {**made, "data": data, "usage": self._usage(images)}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer to one request as server-sent events: previews, then the image."""
        num_previews = 0
        try:
            async with aclosing(told(self.worker, self.requests)) as events:
                async for event in events:
                    if isinstance(event, ImagePreview):
                        index = {"partial_image_index": num_previews}
                        yield await self._event("partial_image", event.image, index)
                        num_previews += 1
                    elif isinstance(event, ImageDone):
                        yield await self._event(
                            "completed", event.image, {"usage": self._usage([event.image])}
                        )
        except Refusal as refusal:  # too late for a status
            yield sse(refusal.body())

    async def _event(self, name: str, image: Image.Image, more: dict) -> bytes:
        kind = f"{self.kind}.{name}"
        look = {"background": "opaque", "output_format": "png", "quality": "auto"}
        made = {"size": f"{image.width}x{image.height}", "created_at": int(time.time())}
        return sse({"type": kind, "b64_json": await base64_png(image), **look, **made, **more}, kind)

    def _usage(self, images: Sequence[Image.Image]) -> dict:
        """Positions of the prompt, which is the same for all, and of the images drawn."""
        pipeline, prompt = self.worker.pipeline, self.requests[0].prompt
        model = pipeline.config.model
        num = count_positions(prompt, pipeline.tokenizer, model)
        texts = [part for part in prompt if isinstance(part, str)]
        num_text = count_positions(texts, pipeline.tokenizer, model)
        drawn = sum(model.patches[pipeline.size_index((image.height, image.width))] for image in images)
        return {
            "input_tokens": num,
            "input_tokens_details": {"text_tokens": num_text, "image_tokens": num - num_text},
            "output_tokens": drawn,
            "total_tokens": num + drawn,
        }
