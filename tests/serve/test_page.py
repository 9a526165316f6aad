"""The page, asked by gradio's client as a browser asks it."""

import base64
import io
import re
import time
from html import escape, unescape
from pathlib import Path

import pytest
import requests
from gradio_client import Client, handle_file
from PIL import Image

from megafusion.images.grid import encode_png
from megafusion.serve.app import make_app
from megafusion.serve.config import ServeConfig
from megafusion.serve.page import answer
from megafusion.serve.page.mount import POLICY, mount_page, read_captions
from tests.serve.test_refused_requests import assert_refuses_other_routes
from tests.support.serving import running

SETTINGS = {
    "guidance_scale": 2.0,
    "num_inference_steps": 4,
    "sampler": None,
    "negative_prompt": "",
    "image_guidance_scale": None,
    "temperature": 0,
    "top_p": 1,
    "max_new_tokens": 5,
    "size": "the model's choice",
    "seed": 7,
    "is_random": False,
}


@pytest.fixture(scope="module")
def app(pipeline):
    config = ServeConfig(max_pixels=10_000, max_batch=8, max_prompt_characters=700)
    return mount_page(make_app(pipeline, config, "small", []), "small", ["red apple"], [])


@pytest.fixture(scope="module")
def page_address(app):
    with running(app) as address:
        yield address


@pytest.fixture(scope="module")
def page(page_address):
    client = Client(page_address, verbose=False)
    yield client
    client.close()


@pytest.fixture(scope="module")
def image_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "given.png"
    Image.linear_gradient("L").resize((48, 40)).convert("RGB").save(path)
    return path


def ask(page, name, *values, **settings):
    """The values that a handler shows: each of its first output, and each status."""
    job = page.submit(*values, *(SETTINGS | settings).values(), api_name=f"/{name}")
    job.result(timeout=60)
    first, *_, last = zip(*job.outputs(), strict=True)
    return [value for value in first if not is_skipped(value)], [
        text for text in last if not is_skipped(text)
    ]


def is_skipped(value):
    return isinstance(value, dict) and value.get("__type__") == "update"


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
def test_a_path_that_was_not_uploaded_is_not_opened(page, page_address, image_path, meta):
    values = [{"path": str(image_path)} | meta, *SETTINGS.values()]
    body = {"data": values, "session_hash": "x", "api_name": "/describe"}
    names = {value["api_name"]: number for number, value in enumerate(page.config["dependencies"])}
    body["fn_index"] = names["describe"]
    session = requests.post(f"{page_address}/gradio_api/queue/join", json=body, timeout=30)
    assert session.status_code == 200, session.text
    address = f"{page_address}/gradio_api/queue/data?session_hash=x"
    with requests.get(address, stream=True, timeout=30) as stream:
        said = []
        for line in stream.iter_lines():
            said.append(unescape(line.decode()))
            if "process_completed" in said[-1]:
                break
    assert any("was not uploaded here" in text or '"success":false' in text for text in said), said


def images_in(text):
    """The images that are done: PNGs; previews are JPEGs."""
    found = re.findall(r'<img src="data:image/png;base64,(.*?)"', text)
    return [Image.open(io.BytesIO(base64.b64decode(each))).tobytes() for each in found]


def sampling_of(pipeline, **changes):
    return pipeline.config.sampling.model_copy(update={"guidance_scale": 2.0} | changes)


def test_page_stands_beside_the_routes_and_names_no_other_machine(page_address):
    answer = requests.get(page_address, timeout=10)
    assert answer.headers["content-security-policy"] == POLICY
    assert not re.findall(r'<(?:script|link)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', answer.text)
    assert requests.get(f"{page_address}/health", timeout=10).json() == {"status": "ok"}
    assert requests.get(f"{page_address}/v1/models", timeout=10).json()["data"][0]["id"] == "small"
    assert requests.get(page_address, timeout=10, headers={"host": "elsewhere.example"}).status_code == 403
    assert_refuses_other_routes(page_address)


def test_draws_what_the_pipeline_draws_and_shows_it_sharpen(page, pipeline):
    shown, statuses = ask(page, "draw", "red apple", 2, num_inference_steps=60)
    expected = pipeline.draw(
        ["red apple"] * 2, seed=7, sampling=sampling_of(pipeline, num_inference_steps=60)
    )
    assert images_in(shown[-1]) == [image.tobytes() for image in expected]
    assert re.findall('download="(.*?)"', shown[-1]) == ["red-apple-7.png", "red-apple-8.png"]
    assert any(text.count("data:image/jpeg") == 2 and text.count("mf-bar") == 2 for text in shown)
    assert any(re.search(r"Step \d+ of 60", text) for text in statuses)
    assert "Done in" in statuses[-1]


def test_describes(page, pipeline, image_path):
    shown, _ = ask(page, "describe", handle_file(image_path))
    assert [shown[-1]] == pipeline.describe([image_path], seed=7)
    assert shown[-1]


def test_edits_at_once_and_after_writing(page, pipeline, image_path):
    expected = pipeline.edit(image_path, "make it blue", seed=7, sampling=sampling_of(pipeline))
    shown, _ = ask(page, "edit", handle_file(image_path), "make it blue", False)
    assert images_in(shown[-1]) == [expected.tobytes()]
    answer = pipeline.chat([image_path, "make it blue"], seed=7, sampling=sampling_of(pipeline))
    shown, statuses = ask(page, "edit", handle_file(image_path), "make it blue", True)
    assert images_in(shown[-1]) == [part.tobytes() for part in answer if not isinstance(part, str)]
    assert ("ended without an image" in statuses[-1]) == (images_in(shown[-1]) == [])


def test_chats_with_texts_and_images_that_stay_text(page, pipeline, image_path):
    text = "what is <b>this</b>"
    job = page.submit(
        {"text": text, "files": [handle_file(image_path)]}, False, *SETTINGS.values(), api_name="/chat"
    )
    job.result(timeout=60)
    views = [update[1] for update in job.outputs() if not is_skipped(update[1])]
    (expected,) = pipeline.generate([[Path(image_path), text]], seed=7, sampling=sampling_of(pipeline))
    user, assistant = (message["content"][0]["text"] for message in views[-1])
    assert len(images_in(user)) == 1
    assert "what is &lt;b&gt;this&lt;/b&gt;" in user
    assert images_in(assistant) == [part.tobytes() for part in expected if not isinstance(part, str)]
    assert all(escape(part) in assistant for part in expected if isinstance(part, str))


def test_a_whole_conversation_counts_towards_the_limits(page_address):
    """400 characters, nearly all invisible, twice: with what came before, more than 700."""
    page, long = Client(page_address, verbose=False), {"text": "a" + "\u200b" * 398 + "b", "files": []}
    for sees_all in (False, True, False):
        _, statuses = ask(page, "chat", long, sees_all)
        assert ("max_prompt_characters 700" in statuses[-1]) == sees_all, statuses
    page.close()


def test_an_image_is_encoded_once_however_often_it_is_shown(page, monkeypatch):
    encoded = []
    monkeypatch.setattr(answer, "encode_png", lambda image: encoded.append(image) or encode_png(image))
    shown, _ = ask(page, "draw", "red apple", 2, num_inference_steps=60)
    assert len(encoded) == len(images_in(shown[-1])) == 2


@pytest.mark.parametrize(
    ("name", "values", "settings", "message"),
    [
        ("draw", ("  ", 1), {}, "Prompt is empty"),
        ("draw", ("word " * 90, 1), {}, "the model was trained on sequences of 96"),
        ("draw", ("apple", 9), {}, "Images=9: give an integer from 1 to 8"),
        ("draw", ("apple", 1), {"guidance_scale": -1}, "guidance_scale"),
        ("draw", ("apple", 1), {"num_inference_steps": 0}, "num_inference_steps"),
        ("draw", ("apple", 1), {"num_inference_steps": 10_000}, "Steps of 10000: at most 1000"),
        (
            "draw",
            ("apple", 1),
            {"sampler": "eulr"},
            "eulr does not sample objective.noise_process.kind ddpm; did you mean 'euler'",
        ),
        ("draw", ("apple", 1), {"seed": -1}, "Seed -1"),
        ("draw", ("apple", 1), {"seed": None}, "Seed None"),
        ("draw", ("apple", 1), {"size": "20000x20000"}, "the model has 32x32"),
        ("describe", (None,), {}, "Image is missing"),
        ("chat", ({"text": " ", "files": []}, False), {}, "Message is empty"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_words(page, app, name, values, settings, message):
    _, statuses = ask(page, name, *values, **settings)
    assert 'role="alert"' in statuses[-1]
    assert message in unescape(statuses[-1])
    assert app.state.worker.num_slots == 0


def test_images_that_cannot_be_used_are_refused_in_words(page, tmp_path):
    Image.new("L", (200, 200)).save(tmp_path / "large.png")
    (tmp_path / "not.png").write_bytes(b"not an image")
    for name, message in (("large", "max_pixels 10000"), ("not", "does not decode")):
        _, statuses = ask(page, "describe", handle_file(tmp_path / f"{name}.png"))
        assert message in statuses[-1]


def test_a_stopped_generation_frees_its_slot(page, app):
    job = page.submit("red apple", 4, *(SETTINGS | {"num_inference_steps": 1000}).values(), api_name="/draw")
    wait_for(lambda: any("mf-bar" in str(update[0]) for update in job.outputs()))
    assert app.state.worker.num_slots == 1
    job.cancel()
    wait_for(lambda: app.state.worker.num_slots == 0)


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_page_asks_for_a_key_where_the_server_does(pipeline):
    app = mount_page(make_app(pipeline, ServeConfig(), "small", ["secret"]), "small", [], ["secret"])
    with running(app) as address:
        assert requests.get(f"{address}/config", timeout=10).status_code == 401
        session = requests.Session()
        for password, status in (("wrong", 400), ("secret", 200)):
            form = {"username": "anybody", "password": password}
            assert session.post(f"{address}/login", data=form, timeout=10).status_code == status
        assert session.get(f"{address}/config", timeout=10).json()["title"] == "MegaFusion"


def test_captions_are_those_that_came_out_right(tmp_path):
    lines = [
        "# caption -> output",
        *(f"= right {n}, style -> right {n}, style" for n in range(30)),
        "x wrong -> other",
    ]
    assert read_captions(tmp_path / "pipeline") == []
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    captions = read_captions(tmp_path / "pipeline")
    assert captions == read_captions(tmp_path)
    assert len(captions) == 8
    assert set(captions) <= {f"right {n}, style" for n in range(30)}
