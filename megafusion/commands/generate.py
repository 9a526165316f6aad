"""`megafusion generate`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from megafusion.errors import UserError
from megafusion.storage import write_file

if TYPE_CHECKING:
    from PIL import Image

    from megafusion.generate.pipeline import Part
    from megafusion.objective.config import SamplingConfig


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Pipeline folder, run folder, or one checkpoint of a run.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to draw; repeat for several prompts.", metavar="TEXT")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image to describe; repeat for several.", metavar="PATH")
    ] = None,
    interleave: Annotated[
        list[str] | None,
        typer.Option(
            help="Part of one interleaved prompt, in order: a text, or @PATH for an image. "
            "The model answers with text, images or both.",
            metavar="PART",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images and captions.txt.")] = Path("generated"),
    seed: Annotated[int, typer.Option(help="Seed of the noise; the n-th prompt uses SEED + n.", min=0)] = 0,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 turns it off.", min=0)
    ] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, dpm++, euler or heun.")] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Height and width in pixels of drawn images, one of the model's image_sizes; "
            "by default the model chooses.",
            metavar="HxW",
        ),
    ] = None,
) -> None:
    """Draw prompts, describe images, or continue an interleaved prompt of both.

    Examples:

    megafusion generate runs/quickstart --prompt "red apple, 3d style" --out apples

    megafusion generate runs/quickstart --image apples/0-red-apple-3d-style.png

    megafusion generate runs/quickstart --interleave "pizza, 3d style"
    """
    prompts, paths, parts = prompt or [], image or [], interleave or []
    if not (prompts or paths or parts):
        raise UserError("nothing to generate: give --prompt, --image or --interleave")
    if size and not (prompts or parts):
        raise UserError("--size is for drawn images, and none is drawn: give --prompt or --interleave")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give --out a folder")
    images = [open_image(path) for path in paths]
    mixed: list[Part] = [open_image(Path(part[1:])) if part.startswith("@") else part for part in parts]

    from megafusion.device import default_device

    from megafusion.progress import progress_bar
    from megafusion.train.open_model import open_pipeline

    pipeline = open_pipeline(checkpoint).to(default_device())
    overrides = {
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps,
        "sampler": sampler,
    }
    sampling = _sampling(pipeline.config.sampling, overrides)
    height_and_width = parse_size(size) if size else None
    if height_and_width:
        pipeline.size_index(height_and_width)
    lines = []
    with progress_bar() as progress:
        task = progress.add_task("denoising", total=sampling.num_inference_steps, losses="", visible=False)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        options: Any = {"seed": seed, "size": height_and_width, "sampling": sampling, "progress": report}
        for number, drawn in enumerate(pipeline.draw(prompts, **options)):
            path = _save(drawn, out / f"{number}-{_slug(prompts[number])}.png")
            lines.append(f"{path}: drawn from {prompts[number]!r}")
        for path, caption in zip(paths, pipeline.describe(images, sampling=sampling), strict=True):
            lines.append(f"{path}: {caption}")
        if mixed:
            (answer,) = pipeline([mixed], **options)
            lines += _write_answer(answer, out)
    write_file(out / "captions.txt", "\n".join(lines) + "\n")
    print("\n".join(lines))


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """Height and width of HxW in pixels. UserError for anything else."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise UserError(f"{option} {text}: is not HEIGHTxWIDTH in pixels, as 256x320")
    return int(height), int(width)


def open_image(path: Path) -> "Image.Image":
    """Decode an image as preprocessing does. UserError naming the file if that fails."""
    from megafusion.images.reader import BadImage, read_image

    try:
        return read_image(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such image") from error
    except (OSError, BadImage) as error:
        raise UserError(f"{path}: not an image that can be used ({error})") from error


def _sampling(defaults: "SamplingConfig", overrides: dict[str, Any]) -> "SamplingConfig":
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        return type(defaults).model_validate({**defaults.model_dump(), **given})
    except ValidationError as error:
        detail = error.errors()[0]
        option = str(detail["loc"][0]).replace("_", "-")
        raise UserError(f"--{option}: {detail['msg']} (got {detail['input']!r})") from error


def _write_answer(answer: "Sequence[Part]", out: Path) -> list[str]:
    lines = []
    for number, part in enumerate(answer):
        text = part if isinstance(part, str) else _save(part, out / f"answer-{number}.png")
        lines.append(f"answer {number}: {text}")
    return lines or ["answer: nothing (the model ended at once)"]


def _save(image: "Image.Image", path: Path) -> Path:
    from megafusion.images.grid import encode_png

    write_file(path, encode_png(image))
    return path


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "prompt"
