"""The thread that owns the model: what waits is batched, and batches take turns.

There is at most one batch of each kind (answers of text alone, images, answers of both), and each gets turns
of TURN_SECONDS, or of one step where that is longer. So between two turns of a text pass at most one turn of
images and one of answers of both, and a request waits for those of its kind that came before it, never for
another kind to end.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megafusion.generate.events import Event, ImageDone, ImageStep, RowDone
from megafusion.generate.generation import Generation, image_options
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.generate.row import Request
from megafusion.serve.config import ServeConfig
from megafusion.serve.metrics import Metrics

TURN_SECONDS = 0.02
MAX_RETRY_SECONDS = 60

logger = logging.getLogger(__name__)


class NoSlot(Exception):
    """No slot for another request: the server is full, or closing."""

    def __init__(self, is_closing: bool, retry_seconds: int):
        super().__init__("the server is closing" if is_closing else "the server is full")
        self.is_closing, self.retry_seconds = is_closing, retry_seconds


@dataclass(frozen=True)
class JobDone:
    """A job's last event. error: what ended it, if not its rows. num_tokens: sampled for each row.

    num_prompt_tokens: positions of its prompt; 0 where it was not read.
    """

    error: Exception | None
    num_tokens: tuple[int, ...]
    num_prompt_tokens: int = 0


@dataclass(eq=False)
class Job:
    """Requests that are answered together, each a row of its own, and who receives their events."""

    requests: Sequence[Request]
    receive: Callable[[Any], object]
    is_cancelled: bool = False
    num_tokens: list[int] = field(default_factory=list)
    rows_left: int = 0

    def __post_init__(self) -> None:
        self.rows_left, self.num_tokens = len(self.requests), [0] * len(self.requests)

    def cancel(self) -> None:
        """End the job before its next step. May be called from any thread, also after its end."""
        self.is_cancelled = True

    @property
    def kind(self) -> str:
        """Which jobs' rows are worth one batch: text, image or free."""
        if all(request.begin == "image" for request in self.requests):
            return "image"
        return "free" if any(request.max_images for request in self.requests) else "text"

    @property
    def batch_key(self) -> Any:
        """Jobs of equal keys are batched; images only where they are denoised together."""
        first = self.requests[0]
        return (self.kind, first.size, image_options(first)) if self.kind == "image" else self.kind

    def tell(self, event: Event | JobDone) -> None:
        """Hand an event to the receiver; a job whose receiver fails is cancelled."""
        try:
            self.receive(event)
        except Exception:
            logger.exception("a receiver of events failed")
            self.cancel()


class Worker:
    """Generates for jobs from any thread, in one thread of its own.

    >>> worker.start()
    >>> with worker.slot():  # raises NoSlot
    ...     requests = pipeline.requests([["red apple"]], begin="image", seed=7, preview_every=5)
    ...     async for event in worker.stream(requests):
    ...         ...  # TextDelta, ImagePreview, ImageDone and RowDone, whose row is the index of its request
    """

    def __init__(self, pipeline: TransfusionPipeline, config: ServeConfig, metrics: Metrics):
        self.pipeline, self.config, self.metrics = pipeline, config, metrics
        self.is_closing = False
        self.failure: Exception | None = None
        """The error that ended the thread before its time."""
        self._changed = threading.Condition()
        self._num_slots, self._mean_seconds = 0, 1.0
        self._waiting: list[Job] = []
        self._batches: dict[str, _Batch] = {}
        self._is_ended = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def num_slots(self) -> int:
        """Requests that hold a slot."""
        return self._num_slots

    @property
    def retry_seconds(self) -> int:
        """When to ask again for what is refused now."""
        return min(MAX_RETRY_SECONDS, 1 + int(self._mean_seconds))

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the `max_requests` slots while a request is received and answered. Raises NoSlot."""
        start = time.monotonic()
        with self._changed:
            if self.is_closing or self._num_slots >= self.config.max_requests:
                raise NoSlot(self.is_closing, self.retry_seconds)
            self._num_slots += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_slots -= 1
                self._mean_seconds += 0.1 * (time.monotonic() - start - self._mean_seconds)

    def submit(self, requests: Sequence[Request], receive: Callable[[Any], object]) -> Job:
        """Queue requests that `pipeline.check` has passed, at most max_batch.

        receive is called in the worker's thread with each event, a JobDone last; in the caller's if the
        thread has ended.
        """
        job = Job(requests, receive)
        with self._changed:
            is_late = self._is_ended
            if not is_late:
                self._waiting.append(job)
                self._changed.notify()
        if is_late:
            job.tell(JobDone(self.failure or RuntimeError("the server has ended"), tuple(job.num_tokens)))
        return job

    async def stream(self, requests: Sequence[Request]) -> AsyncGenerator[Event | JobDone, None]:
        """The events of requests, on any event loop, a JobDone last; closing the iterator cancels them.

        Raises what ended the generation.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | JobDone]()
        job = self.submit(requests, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        try:
            while True:
                event = await events.get()
                if isinstance(event, JobDone) and event.error:
                    raise event.error
                yield event
                if isinstance(event, JobDone):
                    return
        finally:
            job.cancel()

    def close(self) -> None:
        """Refuse further slots; those held are kept."""
        with self._changed:
            self.is_closing = True

    def end(self) -> None:
        """End the thread; what is not answered by then ends as cancelled."""
        with self._changed:
            self.is_closing = self._is_ended = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._admit():
                for kind, batch in list(self._batches.items()):
                    if not batch.take_turn():
                        del self._batches[kind]
                    del batch  # its memory, while the worker waits
        except Exception as error:  # of a device that answers no further call, or a fault of ours
            logger.exception("the thread of the model ends")
            self.failure = error.with_traceback(None)
        with self._changed:
            self.is_closing = self._is_ended = True
            jobs = [*self._waiting, *(job for batch in self._batches.values() for job in batch.jobs)]
        reason = self.failure or RuntimeError("the server has ended")
        for job in jobs:
            if job.rows_left:
                job.tell(JobDone(reason, tuple(job.num_tokens)))

    def _admit(self) -> bool:
        """Start batches of kinds that have none, waiting while there is nothing to do; false at the end."""
        with self._changed:
            while not (self._waiting or self._batches or self._is_ended):
                self._changed.wait()
            if self._is_ended:
                return False
            gone = [job for job in self._waiting if job.is_cancelled]
            self._waiting = [job for job in self._waiting if not job.is_cancelled]
            chosen = [self._take(kind) for kind in ("text", "image", "free") if kind not in self._batches]
            self.metrics.waiting.set(len(self._waiting))
        for job in gone:
            job.tell(JobDone(None, tuple(job.num_tokens)))
        for jobs in filter(None, chosen):
            self._batches[jobs[0].kind] = _Batch(self.pipeline, jobs, self.metrics)
        return True

    def _take(self, kind: str) -> list[Job]:
        """The oldest waiting job of a kind, with the next ones that fit into a batch with it."""
        same = [job for job in self._waiting if job.kind == kind]
        taken: list[Job] = []
        room = self.config.max_batch
        for job in same:
            if job.batch_key != same[0].batch_key:
                continue
            if len(job.requests) > room:
                break
            room -= len(job.requests)
            taken.append(job)
        self._waiting = [job for job in self._waiting if job not in taken]
        return taken


class _Batch:
    """Jobs in one Generation."""

    def __init__(self, pipeline: TransfusionPipeline, jobs: list[Job], metrics: Metrics):
        self.pipeline, self.jobs, self.metrics = pipeline, jobs, metrics
        self.rows = [(job, index) for job in jobs for index in range(len(job.requests))]
        self.generation: Generation | None = None
        self.events: Iterator[Event] = iter(())
        metrics.batch_rows.labels(jobs[0].kind).observe(len(self.rows))

    def take_turn(self) -> bool:
        """Generate for TURN_SECONDS or one step; false once all has ended. An error ends the batch's jobs.

        Raises AcceleratorError, after which the device does nothing more in this process.
        """
        end = time.monotonic() + TURN_SECONDS
        try:
            if self.generation is None:
                self.generation = self.pipeline.generation([job.requests[i] for job, i in self.rows])
                self.events = iter(self.generation)
            while self._advance(self.generation):
                if time.monotonic() > end:
                    return True
        except torch.AcceleratorError:
            raise
        except Exception as error:
            logger.exception("generation failed")
            error = error.with_traceback(None)  # which would keep the generation's memory
            for job in self.jobs:
                if job.rows_left:
                    job.rows_left = 0
                    job.tell(JobDone(error, tuple(job.num_tokens)))
        return False

    def _advance(self, generation: Generation) -> bool:
        """Tell the next event; false at the end."""
        for row, (job, _) in enumerate(self.rows):
            if job.is_cancelled:
                generation.cancel(row)
        event = next(self.events, None)
        if event is None:
            return False
        if isinstance(event, ImageStep):
            self.metrics.denoising_steps.inc(len(event.rows))
            return True
        job, index = self.rows[event.row]
        job.tell(replace(event, row=index))
        if isinstance(event, ImageDone):
            self.metrics.images.inc()
        if isinstance(event, RowDone):
            job.num_tokens[index] = generation.rows[event.row].steps
            self.metrics.tokens.inc(job.num_tokens[index])
            job.rows_left -= 1
            if not job.rows_left:
                num_prompt_tokens = generation.rows[event.row].num_prompt_tokens
                job.tell(JobDone(None, tuple(job.num_tokens), num_prompt_tokens))
        return True
