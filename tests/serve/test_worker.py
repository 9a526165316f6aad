"""The thread that owns the model: what is batched, what takes turns, and what a job's end leaves."""

import queue
from collections.abc import Iterator

import numpy as np
import pytest

from megafusion.generate.events import ImageDone, ImagePreview, RowDone, TextDelta
from megafusion.serve.config import ServeConfig
from megafusion.serve.metrics import Metrics
from megafusion.serve.worker import JobDone, Worker


@pytest.fixture
def worker(pipeline) -> Iterator[Worker]:
    """A worker that is not started yet: what is submitted before is there at once."""
    worker = Worker(pipeline, ServeConfig(), Metrics())
    yield worker
    if worker.is_alive:
        worker.end()


def text(pipeline, seed=0, tokens=12, count=1):
    sampling = pipeline.config.sampling.model_copy(update={"temperature": 1.0, "max_new_tokens": tokens})
    options = {"begin": "text", "max_images": 0, "seed": seed, "sampling": sampling}
    return pipeline.requests([["apple"]] * count, **options)


def image(pipeline, seed=0, steps=4, preview_every=0, **changes):
    changes = {"num_inference_steps": steps, "max_new_tokens": 0} | changes
    sampling = pipeline.config.sampling.model_copy(update=changes)
    options = {"begin": "image", "seed": seed, "sampling": sampling, "preview_every": preview_every}
    return pipeline.requests([["pizza"]], **options)


def free(pipeline, seed=0):
    sampling = pipeline.config.sampling.model_copy(update={"temperature": 1.0, "max_new_tokens": 8})
    return pipeline.requests([["cat face"]], seed=seed, sampling=sampling)


def told(events: queue.SimpleQueue) -> list:
    """The events of a job, JobDone last."""
    found = [events.get(timeout=60)]
    while not isinstance(found[-1], JobDone):
        found.append(events.get(timeout=60))
    return found


def submit(worker, requests) -> queue.SimpleQueue:
    events: queue.SimpleQueue = queue.SimpleQueue()
    worker.submit(requests, events.put)
    return events


def rows_of(worker, kind: str) -> tuple[float, float]:
    """Batches of a kind so far, and their rows."""
    value = worker.metrics.registry.get_sample_value
    return tuple(value(f"megafusion_batch_rows_{name}", {"kind": kind}) for name in ("count", "sum"))


def num_steps(worker) -> float:
    return worker.metrics.registry.get_sample_value("megafusion_denoising_steps_total")


def parts(events: list) -> list:
    """The texts and images of each row of a job."""
    rows: dict = {}
    for event in events:
        if isinstance(event, TextDelta):
            rows.setdefault(event.row, []).append(event.text)
        elif isinstance(event, ImageDone):
            rows.setdefault(event.row, []).append(np.asarray(event.image, int))
    return [rows.get(row, []) for row in range(len(events[-1].num_tokens))]


def assert_equal(found: list, expected: list) -> None:
    for a, b in zip(found, expected, strict=True):
        assert "".join(p for p in a if isinstance(p, str)) == "".join(p for p in b if isinstance(p, str))
        images = [[p for p in row if not isinstance(p, str)] for row in (a, b)]
        for one, other in zip(*images, strict=True):
            assert np.abs(one - other).max() <= 2


@pytest.mark.parametrize("order", [range(9), (8, 3, 1, 6, 5, 0, 4, 7, 2)])
def test_what_waits_is_batched_by_kind_and_each_answer_is_its_own(worker, pipeline, order):
    makers = [text, text, text, image, image, image, free, free, free]
    jobs = [make(pipeline, seed=10 + number) for number, make in enumerate(makers)]
    queued = {number: submit(worker, jobs[number]) for number in order}
    worker.start()
    together = {number: parts(told(events)) for number, events in queued.items()}
    for kind in ("text", "image", "free"):
        assert rows_of(worker, kind) == (1, 3)
    for number, job in enumerate(jobs):
        assert_equal(together[number], parts(told(submit(worker, job))))


def test_a_batch_has_a_limit_and_images_of_unlike_options_are_apart(worker, pipeline):
    queued = [submit(worker, text(pipeline, seed, count=3)) for seed in range(4)]
    queued += [submit(worker, image(pipeline, seed, guidance_scale=1.0 + seed % 2)) for seed in range(4)]
    worker.start()
    answers = [told(events) for events in queued]
    assert all(events[-1].error is None for events in answers)
    assert len({"".join(row) for events in answers[:4] for row in parts(events)}) == 6
    assert rows_of(worker, "text") == (2, 12)
    assert rows_of(worker, "image") == (2, 4)


def test_a_long_image_holds_no_text_up(worker, pipeline):
    """40 tokens, one after the other, pass beside a thousand denoising steps of which few are between two."""
    log: list = []
    worker.submit(image(pipeline, steps=1000, preview_every=1), lambda event: log.append(("image", event)))
    worker.start()
    while len(log) < 3:
        assert worker.is_alive
    for seed in range(2):
        events: queue.SimpleQueue = queue.SimpleQueue()

        def receive(event, events=events):
            log.append(("text", event))
            events.put(event)

        worker.submit(text(pipeline, seed, tokens=40), receive)
        assert told(events)[-1].error is None
    kinds = [kind for kind, event in log if isinstance(event, TextDelta | ImagePreview)]
    assert kinds.count("text") > 40
    assert kinds.count("image") < 900, "the image was finished first"
    first = kinds.index("text")
    between = "".join("t" if kind == "text" else "i" for kind in kinds[first:]).rstrip("i").split("t")
    assert max(map(len, between)) < 100


def test_a_cancelled_job_ends_and_its_neighbours_do_not(worker, pipeline):
    queues = [queue.SimpleQueue() for _ in range(3)]
    jobs = [worker.submit(text(pipeline, seed, tokens=30), q.put) for seed, q in enumerate(queues)]
    jobs[2].cancel()  # while it waits
    worker.start()
    assert told(queues[2]) == [JobDone(None, (0,))]
    queues[1].get(timeout=60)
    jobs[1].cancel()
    cancelled, (answer,) = told(queues[1]), parts(told(queues[0]))
    assert cancelled[-2] == RowDone(0, "cancelled")
    assert cancelled[-1].num_tokens[0] < 30
    ((expected,),) = pipeline.generation(text(pipeline, 0, tokens=30)).run()
    assert "".join(answer) == expected


def test_an_image_that_nobody_waits_for_is_not_denoised(worker, pipeline):
    events: queue.SimpleQueue = queue.SimpleQueue()
    job = worker.submit(image(pipeline, steps=1000, preview_every=1), events.put)
    worker.start()
    events.get(timeout=60)
    job.cancel()
    assert isinstance(told(events)[-2], RowDone)
    assert num_steps(worker) < 500


def test_a_failure_ends_the_jobs_of_its_batch_alone(worker, pipeline):
    fails = [True]

    def hook(*_):
        if fails and fails.pop():
            raise RuntimeError("a fault of the device")

    handle = pipeline.model.tail.head.register_forward_hook(hook)
    try:
        first, second = submit(worker, text(pipeline)), submit(worker, text(pipeline, 1))
        worker.start()
        assert [str(told(events)[-1].error) for events in (first, second)] == ["a fault of the device"] * 2
        assert told(submit(worker, text(pipeline)))[-1].error is None
    finally:
        handle.remove()


def test_a_receiver_that_fails_is_not_told_further(worker, pipeline):
    seen = []

    def receive(event):
        seen.append(event)
        if len(seen) == 1:
            raise RuntimeError("gone")

    worker.submit(text(pipeline, tokens=30), receive)
    worker.start()
    assert told(submit(worker, text(pipeline, 1)))[-1].error is None
    worker.end()
    assert seen[-1].num_tokens[0] < 30


def test_what_is_not_answered_at_the_end_is_told(worker, pipeline):
    jobs = [image(pipeline, seed, steps=1000, guidance_scale=1.0 + seed) for seed in range(3)]
    queued = [submit(worker, job) for job in jobs]
    worker.start()
    while not num_steps(worker):
        pass
    worker.end()
    assert [str(told(events)[-1].error) for events in queued] == ["the server has ended"] * 3
