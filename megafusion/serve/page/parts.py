"""What the tabs share: the worker, the settings, the gallery, and the buttons that start and stop."""

import logging
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import anyio
import gradio as gr
from PIL import Image

from megafusion.errors import UserError
from megafusion.generate.row import Begin, Part
from megafusion.images.reader import open_image, read_image
from megafusion.serve.page.answer import Answer, follow
from megafusion.serve.page.gallery import Gallery
from megafusion.serve.page.render import status
from megafusion.serve.page.settings import Options, Settings
from megafusion.serve.worker import NoSlot, Worker

Update = dict[Any, Any]
"""Components with their new values."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Page:
    """What the tabs share. captions: examples of what the model knows."""

    worker: Worker
    settings: Settings
    gallery: Gallery
    tabs: gr.Tabs
    captions: Sequence[str]

    async def answers(
        self, prompts: Sequence[Sequence[Part]], options: Options, begin: Begin, max_images: int = 1
    ) -> AsyncIterator[list[Answer]]:
        """The answers to prompts, as `follow` gives them. Raises UserError for a prompt that cannot be answered.

        The worker ends them when the iterator is closed.
        """
        limits, pipeline = self.worker.config, self.worker.pipeline
        texts = sum(len(part) for prompt in prompts[:1] for part in prompt if isinstance(part, str))
        if texts > limits.max_prompt_characters:
            raise UserError(f"The text has {texts} characters: at most {limits.max_prompt_characters} are allowed")
        with self.worker.slot():
            requests = pipeline.requests(
                prompts,
                begin=begin,
                max_images=max_images,
                seed=options.seed,
                size=options.size,
                sampling=options.sampling,
                preview_every=options.preview_every,
            )
            await anyio.to_thread.run_sync(pipeline.check, requests[0], "The document")
            async with aclosing(self.worker.stream(requests)) as events:
                async for answers in follow(events, len(requests)):
                    yield answers

    async def load(self, path: str | None) -> Image.Image:
        """An image that was uploaded. Raises UserError for one that is missing or cannot be used."""
        if path is None:
            raise UserError("Image is missing: upload one, paste one, or take one from the gallery")
        return await anyio.to_thread.run_sync(_load, path, self.worker.config.max_pixels)


def _load(path: str, max_pixels: int) -> Image.Image:
    content = Path(path).read_bytes()
    width, height = open_image(content, lambda image: image.size)
    if width * height > max_pixels:
        raise UserError(f"Image of {height} x {width} pixels: at most {max_pixels} pixels are allowed; resize it")
    return read_image(content)


class ImageFile(gr.Image):
    """An image that is uploaded, as the path of its file, which `Page.load` decodes."""

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        """The path of the file, which is not opened here."""
        return payload and payload.path


def image_file(elem_id: str) -> ImageFile:
    """A place to upload or paste an image."""
    sources: list[Any] = ["upload", "clipboard"]
    return ImageFile(
        type="filepath", sources=sources, label="Image", height=340, elem_id=elem_id, buttons=["fullscreen"]
    )


class Controls:
    """A button that starts a generation, one that stops it, and a line of status."""

    def __init__(self, label: str):
        with gr.Row():
            self.run = gr.Button(label, variant="primary", scale=4, min_width=120)
            self.stop = gr.Button("Stop", variant="stop", interactive=False, min_width=80)
        self.status = gr.HTML(status(""))
        self.outputs = [self.run, self.stop, self.status]

    def idle(self, text: str, is_error: bool = False) -> Update:
        """What they show when nothing runs."""
        shown = status(text, is_error)
        return {self.run: gr.Button(interactive=True), self.stop: gr.Button(interactive=False), self.status: shown}

    def wire(
        self,
        handler: Callable[..., AsyncIterator[Update]],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        api_name: str,
        also: Sequence[Callable] = (),
    ) -> None:
        """Start a handler with the button (and by further events), and cancel it with the other.

        Errors that it raises become the line of status.
        """

        @wraps(handler)
        async def start(*values: Any) -> AsyncIterator[Update]:
            yield {
                self.run: gr.Button(interactive=False),
                self.stop: gr.Button(interactive=True),
                self.status: status("Waiting for its turn ..."),
            }
            try:
                async with aclosing(handler(*values)) as updates:
                    async for update in updates:
                        yield update
            except UserError as error:
                yield self.idle(str(error), is_error=True)
            except NoSlot as error:
                yield self.idle(f"{error}; try again in {error.retry_seconds} s".capitalize(), is_error=True)
            except Exception:
                logger.exception("the page's %s failed", api_name)
                yield self.idle("This failed; the server's log says why", is_error=True)

        started = gr.on(
            [self.run.click, *also],
            start,
            list(inputs),
            [*outputs, *self.outputs],
            show_progress="hidden",
            concurrency_limit=None,
            api_name=api_name,
        )
        self.stop.click(
            lambda: self.idle("Stopped."), None, self.outputs, cancels=[started], queue=False, api_visibility="private"
        )


def progress(answers: Sequence[Answer]) -> str:
    """How far the images of answers are, in words."""
    live = [answer for answer in answers if answer.preview is not None]
    if not live:
        return "Waiting for its turn ..." if not any(answer.parts for answer in answers) else "Writing ..."
    return f"Step {live[0].step} of {live[0].num_steps}"


def file_name(text: str, seed: int) -> str:
    """The name of a drawn image's file."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "image"
    return f"{slug}-{seed}.png"
