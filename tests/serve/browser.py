"""Drives the page in headless Chromium as a person does.

`python -m tests.serve.browser ADDRESS` takes the docs' pictures.
"""

import argparse
import base64
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright

from megafusion.images.grid import make_image_grid

CHROMIUM = shutil.which("chromium")
WAIT_MS = 60_000
RECORD = """() => {
    window.frames_seen = [];
    new MutationObserver(() => {
        const image = document.querySelector("#images img");
        if (image && image.src !== window.frames_seen.at(-1)) window.frames_seen.push(image.src);
    }).observe(document.body, {childList: true, subtree: true, attributes: true});
}"""


@contextmanager
def visit(address: str, width: int = 1280, height: int = 860) -> Iterator["Visit"]:
    """The page in a browser's window. Asserts that no script failed, and that nothing else was asked."""
    asked: list[str] = []
    failures: list[str] = []
    with sync_playwright() as playwright:
        # Chromium's sandbox does not run as root.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(address)
        page.locator("#prompt textarea").wait_for(state="attached")
        yield Visit(page)
        browser.close()
    assert not failures
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


class Visit:
    """A person on the page."""

    def __init__(self, page: Page):
        self.page = page

    @property
    def panel(self) -> Locator:
        """The tab that is open."""
        return self.page.locator("[role=tabpanel]:visible")

    def open(self, tab: str) -> None:
        """Open a tab."""
        self.page.get_by_role("tab", name=tab, exact=True).click()
        self.panel.get_by_role("button").first.wait_for()

    def press(self, button: str) -> None:
        """Press a button of the open tab."""
        self.panel.get_by_role("button", name=button, exact=True).click()

    def wait_for_status(self, text: str) -> None:
        """Wait until the open tab's status has a text."""
        self.panel.locator(".mf-status", has_text=text).wait_for()

    def upload(self, where: str, path: Path) -> None:
        """Upload an image to a component, and wait until it is shown."""
        self.page.locator(f"{where} input[type=file]").set_input_files(path)
        self.page.locator(f"{where} img, {where} .thumbnail-item").first.wait_for()

    def draw(self, prompt: str) -> list[Image.Image]:
        """Draw a prompt; the first image each time that it changed, at last done."""
        self.page.evaluate(RECORD)
        self.page.locator("#prompt textarea").fill(prompt)
        self.press("Draw")
        self.wait_for_status("Done")
        addresses = self.page.evaluate("window.frames_seen")
        decoded = [base64.b64decode(address.partition(",")[2]) for address in addresses]
        return [Image.open(io.BytesIO(content)).convert("RGB") for content in decoded]

    def describe(self, path: Path) -> str:
        """The caption of an image that is uploaded."""
        self.open("Describe")
        self.upload("#describe-image", path)
        self.press("Describe")
        self.wait_for_status("Done")
        return self.page.locator("#caption textarea").input_value()

    def edit(self, path: Path, instruction: str) -> None:
        """Edit an image that is uploaded."""
        self.open("Edit")
        self.upload("#edit-image", path)
        self.page.locator("#instruction").locator("textarea, input").fill(instruction)
        self.press("Edit")
        self.page.locator("#edited .mf-part a").wait_for()

    def send(self, text: str, image: Path | None = None, button: str = "Send") -> None:
        """Write a part of a chat."""
        if image:
            self.upload("#box", image)
        self.page.locator("#box textarea").fill(text)
        self.press(button)

    def shoot(self, path: Path) -> None:
        """Take a screenshot, without the mouse over a button."""
        self.page.mouse.move(0, 0)
        self.page.wait_for_timeout(700)  # transitions of colors
        self.page.screenshot(path=path)


def distances(frames: list[Image.Image]) -> list[float]:
    """The mean absolute difference of each image from the last."""
    arrays = [np.asarray(frame, dtype=np.float32) for frame in frames]
    return [float(np.abs(array - arrays[-1]).mean()) for array in arrays]


def main() -> None:
    """Take the docs' pictures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("address", help="of a page with the quickstart's model, or one that edits")
    parser.add_argument("--image", type=Path, help="an image to describe, edit and chat about")
    parser.add_argument(
        "--edits", action="store_true", help="edit and chat, in place of drawing and describing"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    with visit(given.address) as visitor:
        if given.edits:
            visitor.edit(given.image, "make it flat style:")
            visitor.shoot(given.out / "page-edit.png")
            visitor.open("Chat")
            visitor.send("ghost, flat style")
            visitor.wait_for_status("Done")
            visitor.send("make it flat style:", given.image)
            visitor.wait_for_status("Done")
            visitor.shoot(given.out / "page-chat.png")
            return
        frames = visitor.draw("octopus, 3d style")
        make_image_grid([("", frame) for frame in frames], columns=len(frames), side=128).crop(
            (0, 0, 12 + 144 * len(frames), 144)
        ).save(given.out / "page-sharpening.png")
        print("mean difference from the last:", *(f"{each:.1f}" for each in distances(frames)))
        visitor.shoot(given.out / "page-draw.png")
        print("caption:", visitor.describe(given.image))
        visitor.shoot(given.out / "page-describe.png")


if __name__ == "__main__":
    main()
