"""Slots, time, keys, clients that leave, and the end of a server."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import requests

from megafusion.serve.app import make_app
from megafusion.serve.config import ServeConfig
from megafusion.serve.server import listen, serve
from megafusion.serve.worker import Worker
from tests.support.serving import running

CHAT, DRAW = "/v1/chat/completions", "/v1/images/generations"
SHORT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
LONG = {"prompt": "pizza", "num_inference_steps": 1000}
"""Some seconds."""
STREAM = SHORT | {"modalities": ["image"], "num_inference_steps": 1000, "stream": True}


@contextmanager
def server(pipeline, keys=(), **limits) -> Iterator[tuple[str, Worker]]:
    app = make_app(pipeline, ServeConfig(**limits), "small", keys)
    with running(app) as address:
        yield address, app.state.worker


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def begin(address: str, body: dict, path: str = DRAW) -> socket.socket:
    """A connection that has sent a request, and not read its answer."""
    where = urlsplit(address)
    connection = socket.create_connection((where.hostname, where.port), timeout=30)
    content = httpx.Request("POST", address + path, json=body).read()
    head = f"POST {path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def num_steps(worker: Worker) -> float:
    return worker.metrics.registry.get_sample_value("megafusion_denoising_steps_total")


def test_a_full_server_says_when_to_come_again_and_who_leaves_makes_room(pipeline):
    with server(pipeline, max_requests=2) as (address, worker):
        waiting = [begin(address, LONG), begin(address, STREAM, CHAT)]
        wait_for(lambda: num_steps(worker) > 3)
        wait_for(lambda: worker.num_slots == 2)
        refused = requests.post(address + CHAT, json=SHORT, timeout=30)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert "max_requests 2 are in progress" in refused.json()["error"]["message"]
        with pytest.raises(openai.RateLimitError, match="the server is full"):
            openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0).images.generate(prompt="x")
        assert requests.get(f"{address}/health", timeout=5).ok
        for connection in waiting:
            connection.close()
        wait_for(lambda: worker.num_slots == 0)
        assert requests.post(address + CHAT, json=SHORT, timeout=30).ok
        wait_for(lambda: not worker._batches)
        assert num_steps(worker) < 1500
        text = requests.get(f"{address}/metrics", timeout=5).text
        assert 'requests_total{path="/v1/chat/completions",status="429"} 1.0' in text
        assert 'requests_total{path="/v1/images/generations",status="499"} 1.0' in text


def test_a_request_has_its_time(pipeline):
    with server(pipeline, timeout_seconds=0.4) as (address, worker):
        late = requests.post(address + DRAW, json=LONG, timeout=30)
        assert late.status_code == 504
        assert late.json()["error"]["message"] == "not answered within timeout_seconds 0.4"
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        options = {"modalities": ["image"], "extra_body": {"num_inference_steps": 1000}, "stream": True}
        with pytest.raises(openai.APIError, match="not answered within timeout_seconds"):
            list(client.chat.completions.create(model="small", messages=SHORT["messages"], **options))
        where = urlsplit(address)
        with socket.create_connection((where.hostname, where.port), timeout=30) as slow:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())  # and nothing more
            assert slow.recv(1000).startswith(b"HTTP/1.1 504")
            counted = 'requests_total{path="/v1/chat/completions",status="504"} 2.0'  # while it stays
            wait_for(lambda: counted in requests.get(f"{address}/metrics", timeout=5).text)
        wait_for(lambda: worker.num_slots == 0 and not worker._batches)
        assert num_steps(worker) < 1500


def test_requests_bear_a_key(pipeline):
    with server(pipeline, keys=["first", "second"]) as (address, _):
        for path in ("/v1/models", "/metrics"):
            assert requests.get(address + path, timeout=5).status_code == 401
            for key in ("", "firs", "first,second", "first second", "é"):
                headers = {"authorization": f"Bearer {key}".encode()}
                assert requests.get(address + path, headers=headers, timeout=5).status_code == 401
            headers = {"authorization": "Bearer second"}
            assert requests.get(address + path, headers=headers, timeout=5).ok
        assert requests.post(address + CHAT, json=SHORT, timeout=5).status_code == 401
        assert requests.get(f"{address}/health", timeout=5).ok
        with pytest.raises(openai.AuthenticationError, match="not a key of this server"):
            openai.OpenAI(base_url=f"{address}/v1", api_key="third").models.list()
        found = openai.OpenAI(base_url=f"{address}/v1", api_key="first").models.list()
        assert [model.id for model in found] == ["small"]


def test_sigterm_lets_what_was_accepted_be_answered_and_refuses_the_rest(pipeline):
    app, listener = make_app(pipeline, ServeConfig(), "small", []), listen("127.0.0.1", 0)
    address, worker = f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.worker
    found: dict = {}

    def ask() -> None:
        with ThreadPoolExecutor(9) as pool:
            wait_for(lambda: worker.is_alive)
            steps = {"num_inference_steps": 100}
            accepted = [pool.submit(requests.post, address + DRAW, json=LONG | steps, timeout=60)]
            for _ in range(3):
                accepted.append(pool.submit(requests.post, address + CHAT, json=STREAM | steps, timeout=60))
            wait_for(lambda: worker.num_slots == 4)
            wait_for(lambda: num_steps(worker) > 3)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: worker.is_closing)
            found["refused"] = requests.post(address + CHAT, json=SHORT, timeout=60)
            found["models"] = requests.get(f"{address}/v1/models", timeout=5)
            found["health"] = requests.get(f"{address}/health", timeout=5)
            found["accepted"] = [each.result() for each in accepted]

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    asking = threading.Thread(target=ask)
    asking.start()
    serve(app, listener)
    asking.join()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    for name in ("refused", "models"):
        assert found[name].status_code == 503
        assert int(found[name].headers["retry-after"]) >= 1
        assert found[name].json()["error"]["message"] == "the server is closing; try again"
    assert (found["health"].status_code, found["health"].json()) == (503, {"status": "closing"})
    assert [answer.status_code for answer in found["accepted"]] == [200] * 4
    assert found["accepted"][0].json()["data"][0]["b64_json"]
    for answer in found["accepted"][1:]:
        assert '"finish_reason": "stop"' in answer.text
        assert answer.text.endswith("data: [DONE]\n\n")
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{address}/health", timeout=5)
