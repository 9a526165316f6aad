"""The page in headless Chromium, with a model that is trained for it in half a minute.

Slow, and skipped where there is no Chromium or playwright: `python -m pytest -m slow` and this file.
"""

import shutil

import pytest
from PIL import Image

from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.serve.app import make_app
from megafusion.serve.config import ServeConfig
from megafusion.serve.page.mount import mount_page
from tests.support.runs import start
from tests.support.serving import running
from tests.support.small import small_run

pytest.importorskip("playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def pipeline(shards, vae_folder, tmp_path_factory):
    """A trained model: what a random one expects an image to become does not approach what it draws."""
    values = small_run(shards, vae_folder, tmp_path_factory.mktemp("page") / "run")
    values["data"]["sources"]["text"]["weight"] = 0.1
    values["model"] |= {"hidden_size": 64, "ffn_hidden_size": 128}
    values["objective"] = {"noise_process": {"kind": "flow"}}
    values["train"] |= {"num_steps": 300, "micro_batch_size": 4}
    values["checkpoint"] = {"every": 300}
    values["sampling"] |= {"num_inference_steps": 600}  # so that there is time to see them, and to stop
    values["telemetry"] = {"log_every": 100}
    return TransfusionPipeline.from_pretrained(start(values))


@pytest.fixture(scope="module")
def page_address(pipeline):
    app = mount_page(make_app(pipeline, ServeConfig(), "small", []), "small", ["red apple, 3d style"], [])
    with running(app) as address:
        yield address


@pytest.fixture
def visitor(page_address):
    from tests.serve.browser import visit

    with visit(page_address) as visitor:
        yield visitor


@pytest.fixture
def image_path(tmp_path):
    Image.linear_gradient("L").resize((48, 40)).convert("RGB").save(tmp_path / "given.png")
    return tmp_path / "given.png"


def test_a_prompt_becomes_an_image_that_sharpens(visitor):
    from tests.serve.browser import distances

    far = distances(visitor.draw("red apple, 3d style"))
    assert len(far) >= 4
    assert far[0] > 2 * far[-2] > far[-1] == 0


def test_an_example_is_drawn_again_with_the_same_seed(visitor):
    visitor.panel.get_by_role("button", name="red apple, 3d style").click()
    first = visitor.draw("red apple, 3d style")[-1]
    visitor.page.get_by_label("a new seed each time").uncheck()
    assert visitor.draw("red apple, 3d style")[-1].tobytes() == first.tobytes()


def test_an_uploaded_image_is_described_and_its_caption_drawn(visitor, image_path, pipeline):
    caption = visitor.describe(image_path)
    assert [caption] == pipeline.describe([image_path])
    visitor.press("Draw this caption")
    visitor.page.locator("#prompt:visible").wait_for()
    assert visitor.page.locator("#prompt textarea").input_value() == caption


def test_an_image_is_edited_and_the_result_edited_again(visitor, image_path):
    visitor.open("Edit")
    visitor.page.get_by_label("let the model write first").uncheck()
    visitor.edit(image_path, "make it blue")
    before = visitor.page.locator("#edit-image img").get_attribute("src")
    visitor.press("Edit the result")
    visitor.page.wait_for_function("old => document.querySelector('#edit-image img').src !== old", arg=before)


def test_texts_and_images_are_chatted_in_any_order(visitor, image_path):
    visitor.open("Chat")
    visitor.send("first", button="Add without an answer")
    visitor.page.locator("#chat .mf-text", has_text="first").wait_for()
    visitor.send("", image_path, "Add without an answer")
    visitor.page.locator("#chat .mf-part img").wait_for()
    visitor.send("last")
    visitor.panel.get_by_role("button", name="Send").and_(visitor.page.locator(":enabled")).wait_for()
    shown = visitor.page.locator("#chat .mf-text, #chat .mf-part")
    assert shown.nth(0).inner_text() == "first"
    assert shown.nth(1).locator("img").count() == 1
    assert shown.nth(2).inner_text() == "last"


def test_stop_ends_a_drawing_and_the_next_one_works(visitor):
    visitor.page.locator("#prompt textarea").fill("ghost")
    visitor.press("Draw")
    visitor.panel.locator(".mf-live img").first.wait_for()
    visitor.press("Stop")
    visitor.wait_for_status("Stopped")
    assert visitor.draw("ghost")


def test_what_is_wrong_is_said_and_the_gallery_is_downloaded(visitor):
    visitor.press("Draw")
    visitor.wait_for_status("Prompt is empty")
    visitor.draw("ghost, flat style")
    visitor.open("Gallery")
    with visitor.page.expect_download() as download:
        visitor.press("Download all")
    assert download.value.suggested_filename == "megafusion.zip"
    visitor.press("Describe it")
    visitor.page.locator("#describe-image img").wait_for()


def test_a_narrow_screen_begins_with_the_page(page_address):
    from tests.serve.browser import visit

    with visit(page_address, 420, 800) as visitor:
        visitor.page.wait_for_timeout(1000)
        visitor.page.locator("#prompt textarea").click(timeout=5000)
