"""Shared by the tabs: the worker, the settings, the gallery, and the buttons that start and stop."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from megafusion.errors import UserError
from megafusion.generate.row import Begin, Part
from megafusion.serve.content import Content
from megafusion.serve.errors import Refusal
from megafusion.serve.page.answer import Answer, follow
from megafusion.serve.page.gallery import Gallery
from megafusion.serve.page.render import status
from megafusion.serve.page.settings import Options, Settings
from megafusion.serve.worker import NoSlot, Worker

Update = dict[Any, Any]
"""Components with their new values."""

WAITING = "Waiting for its turn ..."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Page:
    """The things that the tabs share.

    captions: examples of what the model knows. files: the folder of what was uploaded or drawn.
    """

    worker: Worker
    settings: Settings
    gallery: Gallery
    tabs: gr.Tabs
    captions: Sequence[str]
    files: Path

    async def answers(
        self, prompts: Sequence[Sequence[Part]], options: Options, begin: Begin, max_images: int = 1
    ) -> AsyncIterator[list[Answer]]:
        """The answers to prompts, as `follow` gives them; closing the iterator ends them.

        Raises UserError for a prompt that cannot be answered or an answer that takes too long, and NoSlot.
        """
        pipeline, seconds = self.worker.pipeline, self.worker.config.timeout_seconds
        deadline = asyncio.get_running_loop().time() + seconds
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
            await asyncio.to_thread(pipeline.check, requests[0], "What you wrote")
            async with aclosing(self.worker.stream(requests)) as events:
                shown = follow(events, len(requests))
                while True:
                    try:
                        async with asyncio.timeout_at(deadline):
                            answers = await anext(shown)
                    except StopAsyncIteration:
                        return
                    except TimeoutError:
                        raise UserError(f"Not answered within timeout_seconds {seconds:g}") from None
                    yield answers

    async def load(self, file: Any, content: Content) -> Image.Image:
        """An image that was uploaded. Raises Refusal for one that is missing or cannot be used."""
        if not file:
            raise Refusal(400, "Image is missing: upload one, paste one, or take one from the gallery")
        return await asyncio.to_thread(lambda: content.image(self._read(file), "Image"))

    def _read(self, file: Any) -> bytes:
        """An uploaded file. A client of gradio's routes may name any path: only the page's own are opened."""
        name = file.get("path") if isinstance(file, dict) else file
        path = Path(str(name)).resolve()
        if not (path.is_relative_to(self.files.resolve()) and path.is_file()):
            raise Refusal(400, "Image is no longer there or was not uploaded here: upload it again")
        if path.stat().st_size > (most := self.worker.config.max_body_bytes):
            raise Refusal(413, f"Image exceeds max_body_bytes {most}")
        return path.read_bytes()

    def text(self, text: str, field: str, content: Content) -> str:
        """A text that was written. Raises Refusal for an empty or too long one."""
        if not text.strip():
            raise Refusal(400, f"{field} is empty: write a text")
        return content.text(text, field)

    def content(self) -> Content:
        """A reader of the texts and images of one request, which counts them."""
        return Content(self.worker.config)


def image_file(elem_id: str) -> gr.Image:
    """A place to upload or paste an image. Handlers get its file as it is: see `Controls.wire`."""
    sources: list[Any] = ["upload", "clipboard"]
    return gr.Image(
        type="filepath", sources=sources, label="Image", height=340, elem_id=elem_id, buttons=["fullscreen"]
    )


class Controls:
    """A button that starts a generation, one that stops it, and a line of status."""

    def __init__(self, label: str):
        with gr.Row():
            self.run = gr.Button(label, variant="primary", scale=4, min_width=120)
            self.stop = gr.Button("Stop", interactive=False, min_width=80)
        self.status = gr.HTML(status(""))
        self.outputs = [self.run, self.stop, self.status]
        self.stops: dict[str | None, asyncio.Event] = {}  # of what runs, by session

    def idle(self, text: str, is_error: bool = False) -> Update:
        """The look of both when nothing runs."""
        shown = status(text, is_error)
        return {
            self.run: gr.Button(interactive=True),
            self.stop: gr.Button(interactive=False),
            self.status: shown,
        }

    def wire(
        self,
        handler: Callable[..., AsyncGenerator[Update]],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        api_name: str,
        also: Sequence[Callable] = (),
    ) -> None:
        """Start a handler with the button (and by further events), and stop it with the other.

        It gets values as the browser sent them, images as files in the folder of uploads, so that errors are
        its own; those that it raises become the line of status.
        """

        async def start(request: gr.Request, *values: Any) -> AsyncIterator[Update]:
            begin, stopped = time.monotonic(), asyncio.Event()
            self.stops[request.session_hash] = stopped
            yield {
                self.run: gr.Button(interactive=False),
                self.stop: gr.Button(interactive=True),
                self.status: status(WAITING),
            }
            try:
                async with aclosing(until(stopped, handler(*values))) as updates:
                    async for update in updates:
                        yield update
                words = "Stopped after" if stopped.is_set() else "Done in"
                yield self.idle(f"{words} {time.monotonic() - begin:.1f} s.")
            except (Refusal, UserError) as error:
                yield self.idle(str(error), is_error=True)
            except NoSlot as error:
                yield self.idle(f"{error}; try again in {error.retry_seconds} s".capitalize(), is_error=True)
            except Exception:
                logger.exception("%s of the page failed", api_name)
                yield self.idle("This failed; the server's log says why", is_error=True)
            finally:
                self.stops.pop(request.session_hash, None)

        async def stop(request: gr.Request) -> None:
            if stopped := self.stops.get(request.session_hash):
                stopped.set()

        start.__doc__ = handler.__doc__  # which the page's API shows
        gr.on(
            [self.run.click, *also],
            start,
            list(inputs),
            [*outputs, *self.outputs],
            show_progress="hidden",
            preprocess=False,
            concurrency_limit=None,
            api_name=api_name,
        )
        self.stop.click(stop, None, None, queue=False, api_visibility="private")


async def until(stopped: asyncio.Event, updates: AsyncGenerator[Update]) -> AsyncGenerator[Update]:
    """Updates until an event is set, or the iterator is closed, which ends what they wait for."""
    stop = asyncio.ensure_future(stopped.wait())
    following: asyncio.Future[Update | None] = stop  # type: ignore[assignment]
    try:
        while not stopped.is_set():
            following = asyncio.ensure_future(_next(updates))
            await asyncio.wait({following, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done() or (update := following.result()) is None:
                return
            yield update
    finally:
        for task in (following, stop):
            task.cancel()
        await asyncio.gather(following, stop, return_exceptions=True)
        await updates.aclose()


async def _next(updates: AsyncGenerator[Update]) -> Update | None:
    return await anext(updates, None)


def progress(answers: Sequence[Answer]) -> str:
    """How far answers are, as a line of status."""
    live = [answer for answer in answers if answer.preview is not None]
    if live:
        return status(f"Step {live[0].step} of {live[0].num_steps}")
    return status("Writing ..." if any(answer.parts for answer in answers) else WAITING)


def file_name(text: str, seed: int) -> str:
    """The name of a drawn image's file."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "image"
    return f"{slug}-{seed}.png"
