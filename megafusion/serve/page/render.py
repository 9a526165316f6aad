"""HTML that the page shows: images with their progress, messages of a chat, a line of status."""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from megafusion.generate.row import Part
from megafusion.serve.page.answer import Answer, png_address

MAX_PREVIEW_SIDE = 256
"""Pixels of the longer side of previews, which are sent many times."""


def header(about: str) -> str:
    """The top of the page. about: the model."""
    return f'<header class="mf-header"><h1>MegaFusion</h1><span>{escape(about)}</span></header>'


def grid(answers: Sequence[Answer], labels: Sequence[str], names: Sequence[str]) -> str:
    """The image of each answer as far as it is, with a link to download it under a file name."""
    cells = [
        f"<figure>{_image_of(answer, name)}<figcaption>{escape(label)}</figcaption></figure>"
        for answer, label, name in zip(answers, labels, names, strict=True)
    ]
    return f'<div class="mf-grid mf-columns-{min(len(cells), 4)}">{"".join(cells)}</div>'


def message(parts: Sequence[Part], name: str | None = None, addresses: Sequence[str] | None = None) -> str:
    """Texts and images of a turn of a chat, in order. name: of files to download; None for no link.

    addresses: of the images, if they are encoded already.
    """
    if addresses is None:
        addresses = [png_address(part) for part in parts if not isinstance(part, str)]
    images = iter(addresses)
    return "".join(
        f'<div class="mf-text">{escape(part)}</div>'.replace("\n", "<br>")
        if isinstance(part, str)
        else f'<div class="mf-part">{_done(next(images), name)}</div>'
        for part in parts
    )


def turn(answer: Answer, name: str) -> str:
    """The model's turn of a chat, as far as it is."""
    shown = message(answer.parts, name, answer.addresses)
    if answer.preview is not None:
        shown += f'<div class="mf-part">{_live(answer)}</div>'
    return shown or '<div class="mf-wait" role="status" aria-label="waiting"></div>'


def status(text: str, is_error: bool = False) -> str:
    """A line that says how far it is, or why something was refused."""
    return f'<div class="mf-status" role="{"alert" if is_error else "status"}">{escape(text)}</div>'


def _image_of(answer: Answer, name: str) -> str:
    return _done(answer.addresses[0], name) if answer.addresses else _live(answer)


def _done(address: str, name: str | None) -> str:
    link = ""
    if name is not None:
        label = escape(f"Download {name}")
        link = (
            f'<a href="{address}" download="{escape(name)}" title="{label}" aria-label="{label}">&darr;</a>'
        )
    return f'<div class="mf-frame"><img src="{address}" alt="{escape(name or "image")}">{link}</div>'


def _live(answer: Answer) -> str:
    """An image that is being denoised, with a bar of its progress; a blank one before the first preview."""
    done = 100 * answer.step / max(answer.num_steps, 1)
    image = '<div class="mf-blank"></div>'
    if answer.preview is not None:
        address = f"data:image/jpeg;base64,{base64.b64encode(_encode_preview(answer.preview)).decode()}"
        image = f'<img src="{address}" alt="step {answer.step} of {answer.num_steps}">'
    return f'<div class="mf-frame mf-live">{image}<div class="mf-bar" style="width:{done:.0f}%"></div></div>'


def _encode_preview(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((MAX_PREVIEW_SIDE, MAX_PREVIEW_SIDE))
    buffer = io.BytesIO()
    # Images are small and shown large: at half resolution their colors would bleed.
    small.convert("RGB").save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
