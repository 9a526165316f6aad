"""Load a server: clients that ask, leave early and send malformed requests; then SIGTERM in the middle.

    python benchmarks/serve.py PIPELINE [--requests 400] [--clients 32] [--steps 10] [--json FILE]

Starts `megafusion serve PIPELINE` with slots for three quarters of the clients, so that some requests are
refused with 429; such a client asks for the next thing half a second later. Of the requests, which --seed
decides on, a tenth is malformed, a tenth leaves after 10 to 300 ms, and the rest are chats, streamed chats,
chats with an image, images and edits. `lost` counts those without an answer, `stuck` those without one for
--patience seconds; `wrong` lists statuses that a request should not get. Memory is the server's resident set,
after a quarter of the requests, a half and all. Then twice as many requests as clients come, the server gets
SIGTERM, and each must be answered, refused with 503 or find the port closed.
"""

import argparse
import base64
import io
import json
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import requests
from PIL import Image

CHAT, DRAW, EDIT = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"
MALFORMED = (
    (CHAT, {"data": b"{"}, 400),
    (CHAT, {"json": {"messages": []}}, 400),
    (CHAT, {"json": {"messages": [{"role": "user", "content": "x"}], "temperature": -1}}, 400),
    (DRAW, {"json": {"prompt": "x", "seed": -1}}, 400),
    (DRAW, {"json": {"prompt": " "}}, 400),
    (DRAW, {"json": {"prompt": "x", "sampler": "EulerDiscret"}}, 400),
    (EDIT, {"files": {"image": b"no image"}, "data": {"prompt": "x"}}, 400),
    (DRAW, {"data": b" " * (2**25 + 1)}, 413),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--patience", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    server, address = start_server(arguments.pipeline, f"max_requests={max(1, arguments.clients * 3 // 4)}")
    try:
        found = load(server, address, arguments) | {"at_the_end": end(server, address, arguments)}
    finally:
        server.kill()
    found |= {
        "device": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "fastapi", "uvicorn")},
        "date": time.strftime("%Y-%m-%d"),
        "pipeline": str(arguments.pipeline),
    }
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def start_server(pipeline: Path, *limits: str) -> tuple[subprocess.Popen, str]:
    """A server on a free port, and its address, when it answers."""
    command = [sys.executable, "-m", "megafusion.cli", "serve", str(pipeline), "--port", "0", *limits]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    line = server.stdout.readline()
    if "http://" not in line:
        raise SystemExit(f"no server: {line or server.wait()}")
    address = line.split(" at ")[1].split("/v1")[0]
    requests.get(f"{address}/health", timeout=120).raise_for_status()
    return server, address


def image() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Client:
    """Asks for one thing after the other, and keeps what became of each."""

    def __init__(self, address: str, steps: int, patience: float):
        self.address, self.steps, self.patience = address, steps, patience
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self.lost = self.stuck = 0
        self._lock = threading.Lock()
        self._png = image()

    def ask(self, number: int, source: random.Random) -> None:
        """One request of some kind; its number is the seed of its answer."""
        kind, start = source.random(), time.monotonic()
        try:
            if kind < 0.1:
                self._ask_malformed(source)
            elif kind < 0.2:
                self._leave_early(number, source)
            else:
                self._ask(number, source, start)
        except requests.Timeout:
            with self._lock:
                self.stuck += 1
                self.outcomes["stuck"] += 1
        except requests.RequestException as error:
            with self._lock:
                self.lost += 1
                self.outcomes["lost"] += 1
                self.wrong.append(f"{type(error).__name__}: {error}"[:300])

    def body(self, number: int, source: random.Random) -> tuple[str, dict]:
        """A good request: its path and what to send."""
        chat: dict = {"messages": [{"role": "user", "content": "red apple, 3d style"}], "seed": number}
        chat |= {"max_tokens": source.randint(1, 40), "temperature": 1.0}
        url = {"url": f"data:image/png;base64,{base64.b64encode(self._png).decode()}"}
        drawn = {"prompt": "pizza, flat style", "num_inference_steps": self.steps, "seed": number}
        return source.choice(
            [
                (CHAT, {"json": chat}),
                (CHAT, {"json": chat | {"stream": True}}),
                (CHAT, {"json": chat | {"modalities": ["text", "image"], "num_inference_steps": self.steps}}),
                (
                    CHAT,
                    {
                        "json": chat
                        | {
                            "messages": [
                                {"role": "user", "content": [{"type": "image_url", "image_url": url}]}
                            ]
                        }
                    },
                ),
                (DRAW, {"json": drawn}),
                (EDIT, {"files": {"image": self._png}, "data": drawn}),
            ]
        )

    def _post(self, path: str, **what) -> requests.Response:
        if "data" in what and "files" not in what:
            what["headers"] = {"content-type": "application/json"}
        return requests.post(self.address + path, timeout=self.patience, **what)

    def _ask(self, number: int, source: random.Random, start: float) -> None:
        path, what = self.body(number, source)
        answer = self._post(path, **what)
        self._count(str(answer.status_code), answer.status_code in (200, 429), answer.text)
        if answer.status_code == 200:
            with self._lock:
                self.seconds.append(time.monotonic() - start)
                is_whole = "[DONE]" in answer.text or '"data"' in answer.text or '"usage"' in answer.text
                if not is_whole:
                    self.wrong.append(f"{path}: not whole: {answer.text[:200]}")

    def _ask_malformed(self, source: random.Random) -> None:
        path, what, status = source.choice(MALFORMED)
        answer = self._post(path, **what)
        self._count(str(answer.status_code), answer.status_code in (status, 429), answer.text)

    def _leave_early(self, number: int, source: random.Random) -> None:
        """Send a request, and close the connection before its answer has come, if that takes longer."""
        path, what = self.body(number, source)
        with requests.Session() as session:
            prepared = session.prepare_request(requests.Request("POST", self.address + path, **what))
            seconds = source.uniform(0.01, 0.3)
            try:
                answer = session.send(prepared, timeout=(self.patience, seconds), stream=True)
                answer.close()
                self._count(f"left at {answer.status_code}", answer.status_code in (200, 429), "")
            except requests.ReadTimeout:
                self._count("left", True, "")

    def _count(self, outcome: str, is_right: bool, text: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1
            if not is_right:
                self.wrong.append(f"{outcome}: {text[:300]}")
        if outcome.endswith("429"):
            time.sleep(0.5)


def load(server: subprocess.Popen, address: str, arguments: argparse.Namespace) -> dict:
    """Answers to the requests of all clients, and the server's memory meanwhile."""
    client, start = Client(address, arguments.steps, arguments.patience), time.monotonic()
    megabytes: dict[int, float] = {}
    done = 0
    with ThreadPoolExecutor(arguments.clients) as pool:
        sources = [random.Random(f"{arguments.seed} {number}") for number in range(arguments.requests)]
        for _ in pool.map(client.ask, range(arguments.requests), sources):
            done += 1
            if done in (arguments.requests // 4, arguments.requests // 2, arguments.requests):
                megabytes[done] = round(psutil.Process(server.pid).memory_info().rss / 2**20, 1)
    seconds = sorted(client.seconds)
    waiting = figures(address)
    return {
        "requests": arguments.requests,
        "clients": arguments.clients,
        "denoising_steps": arguments.steps,
        "outcomes": dict(sorted(client.outcomes.items())),
        "lost": client.lost,
        "stuck": client.stuck,
        "wrong": client.wrong,
        "seconds": round(time.monotonic() - start, 1),
        "seconds_median": round(seconds[len(seconds) // 2], 3),
        "seconds_p95": round(seconds[int(len(seconds) * 0.95)], 3),
        "server_megabytes_after_requests": megabytes,
        "server": waiting,
    }


def figures(address: str) -> dict:
    """The counts of the server: answers a batch by kind, tokens, images."""
    lines = requests.get(f"{address}/metrics", timeout=60).text.splitlines()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[0] != "#"}
    found = {name: values[f"megafusion_{name}_total"] for name in ("tokens", "images", "denoising_steps")}
    for kind in ("text", "image", "free"):
        name = "megafusion_batch_rows_{}{{kind=" + f'"{kind}"' + "}}"
        rows, batches = values.get(name.format("sum"), 0), values.get(name.format("count"), 0)
        found[f"answers a batch of {kind}"] = round(rows / max(1, batches), 2)
    return found


def end(server: subprocess.Popen, address: str, arguments: argparse.Namespace) -> dict:
    """SIGTERM while all clients ask: what becomes of their requests, and of the server."""
    client = Client(address, 4 * arguments.steps, arguments.patience)
    outcomes: Counter[str] = Counter()

    def ask(number: int) -> None:
        path, what = client.body(number, random.Random(f"end {number}"))
        # Some come before the signal, some with it, some after.
        time.sleep(0.05 * (number % 16))
        try:
            outcomes[str(client._post(path, **what).status_code)] += 1
        except requests.ConnectionError as error:
            is_closed = "Connection refused" in str(error)
            outcomes["port closed" if is_closed else f"broken: {error}"[:300]] += 1

    with ThreadPoolExecutor(arguments.clients) as pool:
        asked = [pool.submit(ask, number) for number in range(2 * arguments.clients)]
        time.sleep(0.4)
        server.send_signal(signal.SIGTERM)
        for each in asked:
            each.result()
    start = time.monotonic()
    status = server.wait(timeout=arguments.patience)
    return {
        "requests": 2 * arguments.clients,
        "outcomes": dict(sorted(outcomes.items())),
        "accepted_not_answered": sum(n for name, n in outcomes.items() if name.startswith("broken")),
        "exit_status": status,
        "seconds_after_the_last_answer": round(time.monotonic() - start, 1),
    }


if __name__ == "__main__":
    main()
