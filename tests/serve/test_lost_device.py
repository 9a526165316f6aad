"""A device that fails for good ends the server, with its reason; any other failure does not."""

import asyncio
import signal
import threading

import pytest
import requests
import torch
import uvicorn

from megafusion.errors import ExitStatus, UserError
from megafusion.serve.app import make_app
from megafusion.serve.config import ServeConfig
from megafusion.serve.server import _Server, listen, serve

LOST = "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA` ..."
BODY = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


@pytest.fixture
def fails(pipeline):
    """The errors that the model raises next."""
    errors: list[Exception] = []

    def hook(*_):
        if errors:
            raise errors.pop()

    handle = pipeline.model.tail.head.register_forward_hook(hook)
    yield errors
    handle.remove()


def test_a_lost_device_ends_the_server_and_memory_that_is_full_does_not(pipeline, fails):
    app, listener, ended = make_app(pipeline, ServeConfig(), "small", []), listen("127.0.0.1", 0), []

    def run() -> None:
        try:
            serve(app, listener)
        except UserError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    chat = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"
    assert requests.post(chat, json=BODY, timeout=60).status_code == 200
    fails.append(torch.OutOfMemoryError("CUDA out of memory"))
    assert requests.post(chat, json=BODY, timeout=60).status_code == 500
    assert requests.post(chat, json=BODY, timeout=60).status_code == 200
    fails.append(torch.AcceleratorError(LOST))
    answer = requests.post(chat, json=BODY, timeout=60)
    assert answer.status_code == 500
    assert "generation failed with AcceleratorError" in answer.json()["error"]["message"]
    thread.join(timeout=30)
    assert not thread.is_alive()
    (error,) = ended
    assert error.exit_status == ExitStatus.FAILED
    assert "model cannot go on: AcceleratorError: CUDA error: device-side assert triggered;" in str(error)


def test_what_waits_for_a_lost_device_is_told(pipeline, fails):
    from tests.serve.test_worker import image, submit, text, told

    fails.append(torch.AcceleratorError(LOST))
    worker = make_app(pipeline, ServeConfig(max_batch=1), "small", []).state.worker
    queued = [submit(worker, job) for job in (text(pipeline), text(pipeline, 1), image(pipeline))]
    worker.start()
    queued.append(submit(worker, text(pipeline, 2)))
    for events in queued:
        assert isinstance(told(events)[-1].error, torch.AcceleratorError)
    assert isinstance(told(submit(worker, text(pipeline)))[-1].error, torch.AcceleratorError)
    assert worker.is_closing
    worker.end()


def test_one_signal_after_a_lost_device_cuts_no_answer_off(pipeline, fails):
    from tests.serve.test_worker import submit, text, told

    app = make_app(pipeline, ServeConfig(), "small", [])
    worker, server = app.state.worker, _Server(uvicorn.Config(app), app)
    worker.start()
    fails.append(torch.AcceleratorError(LOST))
    told(submit(worker, text(pipeline)))
    worker.end()

    async def stop() -> bool:
        server.handle_exit(signal.SIGTERM, None)
        await asyncio.sleep(0)
        return server.force_exit

    assert worker.is_closing
    assert not asyncio.run(stop())
    assert asyncio.run(stop())
