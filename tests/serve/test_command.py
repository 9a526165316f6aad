"""`megafusion serve`: what it refuses before it loads torch, and a server from its start to its end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests

from benchmarks.serve import start_server
from megafusion.errors import UserError
from megafusion.serve.server import model_name, read_keys

WITHOUT_TORCH = """
import os, sys
sys.argv = ["megafusion", "serve", *sys.argv[1:]]
from megafusion.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules
"""


def run(*arguments: object, **environment: str) -> tuple[int, str]:
    """Exit status and output of a command that must end before torch is loaded."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder that looks like a pipeline's as far as can be seen without torch."""
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: neither a pipeline folder, a run folder nor a checkpoint"),
        ([".", "--port", "0"], "error: .: neither a pipeline folder"),
        (["FOLDER", "max_batch=0"], "serve: key 'max_batch': .*it must be > 0 and <= 1024"),
        (["FOLDER", "max_bach=3"], "unknown key 'max_bach'; did you mean 'max_batch'"),
        (["FOLDER", "--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in: set MEGAFUSION_API_KEYS"),
        (["FOLDER", "--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
    ],
)
def test_wrong_starts_are_refused_before_torch_is_loaded(folder, arguments, message):
    status, text = run(*(folder if each == "FOLDER" else each for each in arguments))
    assert status == 2
    assert re.search(message, text), text
    assert "Traceback" not in text


def test_a_busy_port_is_refused_before_torch_is_loaded(folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, text = run(folder, "--port", port)
    assert (status, text.strip()) == (
        2,
        f"error: --host 127.0.0.1 --port {port}: Address already in use; choose another one",
    )


def test_other_machines_need_a_key_and_are_warned_of(monkeypatch, capsys):
    monkeypatch.setenv("MEGAFUSION_API_KEYS", " one, two ,")
    assert read_keys("127.0.0.1") == ["one", "two"]
    assert capsys.readouterr().err == ""
    assert read_keys("0.0.0.0") == ["one", "two"]
    assert "warning: --host 0.0.0.0: other machines reach this server, without TLS" in capsys.readouterr().err
    for keys in ("", " , "):
        monkeypatch.setenv("MEGAFUSION_API_KEYS", keys)
        assert read_keys("localhost") == []
        with pytest.raises(UserError, match="set MEGAFUSION_API_KEYS to the keys"):
            read_keys("::")


def test_a_model_has_the_name_of_its_run():
    assert model_name(Path("runs/quickstart")) == model_name(Path("runs/quickstart/pipeline")) == "quickstart"


def denoises_with_all_accepted(address: str, num_requests: int) -> bool:
    text = requests.get(f"{address}/metrics", timeout=30).text
    waiting, begun, steps = (
        sum(map(float, re.findall(rf"^megafusion_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))
        for name in ("waiting", "batch_rows_sum", "denoising_steps_total")
    )
    return waiting + begun == num_requests and steps > 0


@pytest.mark.full
def test_a_server_from_its_start_to_its_end(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "small")
    server, address = start_server(tmp_path / "small", "max_requests=5")
    body = {"prompt": "pizza", "num_inference_steps": 200}
    answers: list = []

    def ask() -> None:
        answers.append(requests.post(f"{address}/v1/images/generations", json=body, timeout=120))

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    while not denoises_with_all_accepted(address, len(asking)):
        pass
    server.send_signal(signal.SIGTERM)
    for thread in asking:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 4
    assert server.wait(timeout=60) == 0
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{address}/health", timeout=5)


@pytest.mark.full
def test_under_load_every_request_is_answered_or_refused(pipeline, tmp_path):
    """benchmarks/serve.py on a smaller scale."""
    pipeline.save_pretrained(tmp_path / "small")
    script = Path(__file__).parents[2] / "benchmarks/serve.py"
    command = [sys.executable, script, tmp_path / "small", "--requests", "120", "--clients", "16"]
    subprocess.run([*command, "--json", tmp_path / "found.json"], check=True, timeout=280)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["lost"] == found["stuck"] == 0
    assert found["requests"] == 120
    assert sum(found["outcomes"].values()) == 120
    assert found["at_the_end"]["exit_status"] == 0
    assert found["at_the_end"]["accepted_not_answered"] == 0
