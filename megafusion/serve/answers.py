"""Answers in OpenAI's shapes, from the events of their rows."""

import asyncio
import base64
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from PIL import Image

from megafusion.errors import UserError
from megafusion.generate.events import Event, ImageDone, RowDone, TextDelta
from megafusion.generate.row import Request
from megafusion.images.grid import encode_png
from megafusion.serve.errors import Refusal
from megafusion.serve.worker import JobDone, Worker

logger = logging.getLogger(__name__)


def sse(data: dict | str, name: str | None = None) -> bytes:
    """A server-sent event, with its name if it has one."""
    event = f"event: {name}\n" if name else ""
    return f"{event}data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()


async def told(worker: Worker, requests: Sequence[Request]) -> AsyncGenerator[Event | JobDone, None]:
    """The events of requests. Raises Refusal for what ended them."""
    try:
        async with aclosing(worker.stream(requests)) as events:
            async for event in events:
                yield event
    except UserError as error:
        raise Refusal(400, str(error)) from error
    except Exception as error:
        name = type(error).__name__
        raise Refusal(500, f"generation failed with {name}; the server's log has the error") from error


class Chat:
    """The answer of /v1/chat/completions: a choice for each request.

    Its images are `images` of the message, as OpenRouter's; `offset` is the number of characters of its text
    before an image.
    """

    def __init__(self, worker: Worker, requests: Sequence[Request], model: str):
        self.worker, self.requests = worker, requests
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self.usage: dict = {}
        self._num_characters = [0] * len(requests)
        self._num_images = [0] * len(requests)

    async def deltas(self) -> AsyncGenerator[dict, None]:
        """Choices as of a stream: each with what is new of a message."""
        async with aclosing(told(self.worker, self.requests)) as events:
            async for event in events:
                match event:
                    case TextDelta(row, text):
                        self._num_characters[row] += len(text)
                        yield _choice(row, {"content": text})
                    case ImageDone(row, image):
                        yield _choice(row, {"images": [await self._image(row, image)]})
                    case RowDone(row, reason):
                        # An answer that is an image is complete, and has no text to go on with.
                        is_cut = reason == "length" and self.requests[row].begin != "image"
                        yield _choice(row, {}, "length" if is_cut else "stop")
                    case JobDone(_, num_tokens, num_prompt_tokens):
                        sampled = sum(num_tokens)
                        self.usage = {
                            "prompt_tokens": num_prompt_tokens,
                            "completion_tokens": sampled,
                            "total_tokens": num_prompt_tokens + sampled,
                        }

    async def whole(self) -> dict:
        """The answer when it is complete."""
        choices: list[dict[str, Any]] = [
            {"index": row, "message": {"role": "assistant", "content": ""}, "logprobs": None}
            for row in range(len(self.requests))
        ]
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                choice, new = choices[delta["index"]], delta["delta"]
                message = choice["message"]
                message["content"] += new.get("content", "")
                if "images" in new:
                    message.setdefault("images", []).extend(new["images"])
                choice["finish_reason"] = delta["finish_reason"]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage}

    async def chunks(self, tells_usage: bool) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, as it is made."""
        usage = {"usage": None} if tells_usage else {}
        try:
            for row in range(len(self.requests)):
                yield self._chunk([_choice(row, {"role": "assistant", "content": ""})], usage)
            async with aclosing(self.deltas()) as deltas:
                async for delta in deltas:
                    yield self._chunk([delta], usage)
            if tells_usage:
                yield self._chunk([], {"usage": self.usage})
            yield sse("[DONE]")
        except Refusal as refusal:  # too late for a status
            yield sse(refusal.body())

    def _chunk(self, choices: list[dict], usage: dict) -> bytes:
        return sse({**self.head, "object": "chat.completion.chunk", "choices": choices, **usage})

    async def _image(self, row: int, image: Image.Image) -> dict:
        index = self._num_images[row]
        self._num_images[row] += 1
        url = {"url": f"data:image/png;base64,{await base64_png(image)}"}
        return {"type": "image_url", "image_url": url, "index": index, "offset": self._num_characters[row]}


def _choice(row: int, delta: dict, reason: str | None = None) -> dict:
    return {"index": row, "delta": delta, "logprobs": None, "finish_reason": reason}


async def base64_png(image: Image.Image) -> str:
    """An image as the base64 of a PNG."""
    return base64.b64encode(await asyncio.to_thread(encode_png, image)).decode()
