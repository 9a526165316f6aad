"""Requests that are refused, each with a status, the field and its limit. The server goes on answering."""

import base64
import http.client
import io
import json
import re
import socket
import zlib
from urllib.parse import urlsplit

import openai
import pytest
import requests
from PIL import Image

from tests.support.serving import data_url, png, sample_image

CHAT, DRAW, EDIT = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"


@pytest.fixture(autouse=True)
def the_server_goes_on(address):
    yield
    assert requests.get(f"{address}/health", timeout=5).json() == {"status": "ok"}
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert requests.post(address + CHAT, json=body, timeout=60).status_code == 200


def refused(answer: requests.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert error["type"]
    assert len(error["message"]) < 2100
    return answer.status_code, error["message"]


def assert_says(pattern: str, text: str) -> None:
    assert re.search(pattern, text, re.DOTALL), text


def post(address: str, path: str, **body) -> tuple[int, str]:
    # Python's JSON has NaN, as some clients send it.
    content, headers = json.dumps(body), {"content-type": "application/json"}
    return refused(requests.post(address + path, data=content, headers=headers, timeout=60))


def large_png(width: int, height: int) -> bytes:
    """A PNG whose header tells of so many pixels, of which few are there."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    data = zlib.compress(b"\0" * 10_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb() -> bytes:
    """16 million pixels and more, each there, in a few thousand bytes."""
    buffer = io.BytesIO()
    Image.new("1", (4200, 4000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 10_000
    return buffer.getvalue()


def as_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed.*it must be >= 0 and <= 9223372036854775807"),
        ({"seed": 2**63}, "seed.*it must be >= 0 and <= 9223372036854775807"),
        ({"guidance_scale": float("nan")}, "guidance_scale.*finite number"),
        ({"guidance_scale": float("inf")}, "guidance_scale.*finite number"),
        ({"guidance_scale": "high"}, "guidance_scale.*valid number"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: this server takes 1 to 1000$"),
        ({"num_inference_steps": 10_000}, "num_inference_steps=10000: this server takes 1 to 1000$"),
        ({"sampler": "EulerDiscret"}, "did you mean 'EulerDiscrete'.*It has ddim, .*UniPCMultistep$"),
        ({"sampler": "HeunDiscrete"}, "HeunDiscrete does not.*draws worse.*use one of ddim, "),
        ({"sampler": "Heun"}, "sampler Heun does not sample.*ddpm; use one of ddim, "),
        ({"sampler": "heun"}, "sampler heun does not sample"),
        ({"n": 0}, "^n=0: this server takes 1 to 8$"),
        ({"n": 9}, "^n=9: this server takes 1 to 8$"),
        ({"n": True}, "'n'.*valid integer"),
        ({"size": "33x32"}, r"size='33x32': the model has 32x32 \(width x height"),
        ({"size": "100000000x1"}, "the model has 32x32"),
        ({"guidence_scale": 3}, "unknown key 'guidence_scale'; did you mean 'guidance_scale'"),
        ({"quality": "hd"}, 'quality="hd" is not supported, only "auto" or "standard"; give num_inf'),
        ({"style": "natural"}, 'style="natural" is not supported, only "vivid"; write it in the prompt'),
        ({"output_format": "webp"}, 'output_format="webp" is not supported, only "png"'),
        ({"background": "transparent"}, 'background="transparent" is not supported.*opaque'),
        ({"response_format": "url"}, 'response_format="url" is not supported, only "b64_json"'),
        ({"partial_images": 2}, "partial_images=2: needs stream true"),
        ({"partial_images": 4, "stream": True}, "partial_images.*it must be >= 0 and <= 3"),
        ({"n": 2, "stream": True}, "n=2: the events of a stream are of one image"),
        ({"prompt": ""}, "prompt: is empty"),
        ({"prompt": " \u200b\n"}, "prompt: is empty"),
        ({"prompt": 5}, "prompt.*valid string"),
        ({"prompt": None}, "key 'prompt' is required"),
        ({"prompt": "\ud800"}, "body"),
        ({"prompt": "apple " * 90}, r"prompt takes \d+ positions and 18 of the image to draw.*of 96"),
        ({"prompt": "x" * 100_001}, "prompt: the request has more than max_prompt_characters 100000"),
        ({"negative_prompt": "apple " * 90}, r"negative_prompt takes \d+ positions"),
        ({"stop": ["x"] * 17}, "stop.*at most 16"),
        ({"stop": [""]}, "stop has an empty text"),
    ],
)
def test_wrong_fields_of_images(address, change, message):
    status, found = post(address, DRAW, **({"prompt": "apple"} | change))
    assert status == 400
    assert_says(message, found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages.*at least 1"),
        ({"messages": None}, "key 'messages' is required"),
        ({"messages": "hello"}, "messages.*array"),
        ({"messages": ["hello"]}, r"messages\[0\]='hello': is not a message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].role='tool': give one of system"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\].role=None"),
        ({"messages": [{"role": "user", "content": ""}]}, "have no text and no image"),
        ({"messages": [{"role": "user"}, {"role": "user", "content": []}]}, "have no text and no image"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\].content=5: is not a text"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "unknown key 'tool_calls'"),
        ({"messages": [{"role": "user", "content": "apple " * 99}]}, r"messages takes \d+ positions.*of 96"),
        ({"max_tokens": 5000}, "max_tokens=5000: this server takes 1 to 4096"),
        ({"max_completion_tokens": 0}, "^max_completion_tokens=0: this server takes 1 to 4096"),
        ({"temperature": -1}, "temperature.*it must be >= 0 and <= 100"),
        ({"top_p": 0}, "top_p.*it must be > 0 and <= 1"),
        ({"top_k": -1}, "top_k.*greater than or equal to 0"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"max_images": 9}, "max_images=9: this server takes 1 to 8$"),
        ({"stream": "yes"}, "stream.*valid boolean"),
        (
            {"tools": [{"type": "function"}]},
            r"tools=.* is not supported, only \[\]; the model calls no tools",
        ),
        ({"logprobs": True}, "logprobs=true is not supported, only false; leave it out"),
        ({"presence_penalty": 0.5}, "presence_penalty=0.5 is not supported, only 0; give repetition_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format=.*only ..type.: .text.."),
    ],
)
def test_wrong_fields_of_chats(address, change, message):
    status, found = post(address, CHAT, **({"messages": [{"role": "user", "content": "apple"}]} | change))
    assert status == 400
    assert_says(message, found)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.org/a.png", "addresses are not fetched; send it as data:image/png;base64"),
        ("file:///etc/passwd", "addresses are not fetched"),
        ("/etc/passwd", "is not a data URL of an image"),
        ("data:text/html;base64,AAAA", "is not a data URL of an image"),
        (5, "=5: is not a data URL"),
        ("data:image/png;base64,!!!!", "its data is not base64"),
        ("data:image/png;base64,AAAAA", "its data is not base64"),
        ("data:image/png;base64,", "does not decode as AVIF"),
        (as_url(b"hello"), "does not decode as AVIF, .*WEBP$"),
        (as_url(png(sample_image())[:200]), "does not decode"),
        (as_url(large_png(20_000, 20_000)), "too many pixels; the limit is max_pixels 16777216"),
        (
            as_url(large_png(5_000, 5_000)),
            "5000 x 5000 has too many pixels; the limit is max_pixels 16777216",
        ),
        (as_url(bomb()), "4200 x 4000 has too many pixels"),
    ],
)
def test_images_that_cannot_be_used(address, url, message):
    part = {"type": "image_url", "image_url": {"url": url}}
    status, found = post(address, CHAT, messages=[{"role": "user", "content": [part]}])
    assert status == 400
    assert_says(r"messages\[0\].content\[0\].image_url.url.*" + message, found)


def test_limits_are_of_all_images_of_a_request(address):
    part = {"type": "image_url", "image_url": {"url": as_url(png(Image.new("L", (4096, 2100))))}}
    status, found = post(address, CHAT, messages=[{"role": "user", "content": [part, part]}])
    assert status == 400
    assert_says(r"content\[1\].*4096 x 2100 has too many pixels.*for all images of a request", found)
    part = {"type": "image_url", "image_url": {"url": data_url(Image.new("RGB", (1, 1)))}}
    status, found = post(address, CHAT, messages=[{"role": "user", "content": [part] * 9}])
    assert (status, "content[8].image_url.url: the request has more than max_images 8" in found) == (
        400,
        True,
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_small_and_narrow_images_are_answered(client, size):
    edited = client.images.edit(image=png(Image.new("RGB", size)), prompt="x", extra_body={"seed": 1})
    assert edited.data[0].b64_json


@pytest.mark.parametrize(
    ("files", "fields", "message"),
    [
        ({}, {"prompt": "x"}, "image: is missing"),
        ({"image": b"hello"}, {"prompt": "x"}, r"^image\[0\]: image does not decode as AVIF, .*WEBP$"),
        ({"image": large_png(20_000, 20_000)}, {"prompt": "x"}, r"image\[0\]: .*max_pixels 16777216"),
        ({"image": png(sample_image())}, {}, "key 'prompt' is required"),
        ({"image": png(sample_image())}, {"prompt": " "}, "prompt: is empty"),
        ({"image": png(sample_image())}, {"prompt": "x", "n": "two"}, "'n'.*valid integer"),
        ({"image": png(sample_image())}, {"prompt": "x", "guidance_scale": "NaN"}, "guidance_scale.*finite"),
        ({"image": png(sample_image()), "mask": b"x"}, {"prompt": "x"}, "mask: is not taken"),
    ],
)
def test_wrong_edits(address, files, fields, message):
    form = {name: (name, content) for name, content in files.items()} | {
        n: (None, v) for n, v in fields.items()
    }
    status, found = refused(requests.post(address + EDIT, files=form, timeout=60))
    assert status == 400
    assert_says(message, found)


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"", "application/json", 400, "is not JSON"),
        (b"{", "application/json", 400, "is not JSON"),
        (b"[1]", "application/json", 400, "is not a JSON object"),
        (b"\xff\xfe{", "application/json", 400, "is not JSON"),
        (b"[" * 100_000, "application/json", 400, "is not JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "application/json", 400, "is not JSON"),
        (b'{"prompt": "x"}', "text/plain", 415, "send application/json"),
    ],
)
def test_bodies_that_are_no_json(address, content, kind, status, message):
    headers = {"content-type": kind}
    answer = requests.post(address + DRAW, data=content, headers=headers, timeout=60)
    found = refused(answer)
    assert found[0] == status
    assert message in found[1]


def test_an_edit_that_is_no_form(address):
    answer = requests.post(address + EDIT, json={"prompt": "x"}, timeout=60)
    assert refused(answer) == (400, "image: is missing; send one as a file of a form (multipart/form-data)")
    headers = {"content-type": "multipart/form-data"}
    answer = requests.post(address + EDIT, data=b"hello", headers=headers, timeout=60)
    assert answer.status_code == 400


def test_of_a_body_that_is_too_large_a_part_is_read(address, client):
    """100 MB of JSON, by each of two clients, and by one that does not say beforehand how much."""
    prompt = "x" * 100_000_000
    with pytest.raises(openai.APIStatusError, match="body exceeds max_body_bytes 33554432") as raised:
        client.images.generate(prompt=prompt)
    assert raised.value.status_code == 413
    where = urlsplit(address)
    head = f"POST {DRAW} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: 100000000\r\n\r\n".encode())  # and nothing of it
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    sent = 0
    with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        try:
            while sent < 100_000_000:
                connection.sendall(b"100000\r\n" + b" " * 2**20 + b"\r\n")
                sent += 2**20
        except OSError:
            pass
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    assert sent < 90_000_000


def test_a_refusal_of_a_body_reaches_a_client_that_is_still_sending(address):
    """The server reads on: closing with data unread would reset the connection, and the answer with it."""
    where = urlsplit(address)
    head = f"POST {DRAW} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    for _ in range(5):
        with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
            connection.sendall(f"{head}Content-Length: {2**25 + 1}\r\n\r\n".encode())
            for _ in range(2**5):
                connection.sendall(b" " * 2**20)
            connection.sendall(b" ")
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 413
            assert "body exceeds max_body_bytes" in json.loads(answer.read())["error"]["message"]


def test_other_routes_and_methods(address):
    assert_refuses_other_routes(address)
    assert refused(requests.get(f"{address}/../../etc/passwd", timeout=5))[0] == 404


def assert_refuses_other_routes(address: str) -> None:
    for method, path, message in (
        ("GET", CHAT, f"GET {CHAT}: this route takes POST"),
        ("GET", DRAW, f"GET {DRAW}: this route takes POST"),
        ("DELETE", "/v1/models", "DELETE /v1/models: this route takes GET"),
        ("DELETE", "/health", "DELETE /health: this route takes GET"),
    ):
        answer = requests.request(method, address + path, timeout=5, headers={"content-length": "0"})
        assert refused(answer) == (405, message)
        assert answer.headers["allow"] == message[-4:].strip()
    for method, path in (("GET", "/v1/foo"), ("POST", "/v1/completions"), ("GET", "/v1"), ("GET", "/v1/")):
        status, message = refused(requests.request(method, address + path, timeout=5))
        assert status == 404
        assert message.startswith(f"{method} {path}: no such route; the routes are GET /health, ")
        assert all(
            route in message for route in (f"POST {CHAT}", f"POST {EDIT}", "GET /v1/models/{model_id}")
        )


def test_pages_of_other_sites_are_refused(address):
    body = {"messages": [{"role": "user", "content": "x"}]}
    for headers in ({"origin": "https://example.org"}, {"host": "example.org"}):
        status, message = refused(requests.post(address + CHAT, json=body, headers=headers, timeout=5))
        assert status == 403
        assert "example.org" in message
    own = {"origin": address}
    assert requests.post(address + CHAT, json=body | {"max_tokens": 1}, headers=own, timeout=60).ok
