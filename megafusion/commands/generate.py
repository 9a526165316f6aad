"""`megafusion generate`."""

import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megafusion.errors import UserError
from megafusion.images.sizes import parse_size
from megafusion.sequence.text import clean_text
from megafusion.storage import write_file
from megafusion.yaml_values import apply_overrides

if TYPE_CHECKING:
    from PIL import Image

    from megafusion.generate.events import Event
    from megafusion.generate.row import Part

BATCH_SIZE = 16
"""Prompts of a file that are drawn together."""


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Pipeline folder, run folder, or one checkpoint of a run.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to draw; repeat for several prompts.", metavar="TEXT")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", help="File of texts to draw, one a line.", metavar="FILE"),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image to describe; repeat for several.", metavar="PATH")
    ] = None,
    interleave: Annotated[
        list[str] | None,
        typer.Option(
            help="Part of one interleaved prompt, in order: a text, or @PATH for an image (@@TEXT for a "
            "text that begins with @). The model answers with text, images or both.",
            metavar="PART",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the images and captions.txt; by default a new one, generated-N."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an earlier call in --out.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the noise; the n-th prompt uses SEED + n.")] = 0,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 turns it off.", min=0)
    ] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Scheduler of diffusers, as EulerDiscrete; or ddim, dpm++, ...")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Any key of `sampling`, as temperature=0.8 or negative_prompt=grey; repeat for several.",
            metavar="KEY=VALUE",
        ),
    ] = None,
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
    prompts += read_prompts(prompts_file) if prompts_file else []
    if not all(map(clean_text, prompts)):
        raise UserError("--prompt: is empty or blank; give a text to draw")
    if not (prompts or paths or parts):
        raise UserError("nothing to generate: give --prompt, --image or --interleave")
    if size and not (prompts or parts):
        raise UserError("--size is for drawn images, and none is drawn: give --prompt or --interleave")
    out = out or next(path for n in count(1) if not (path := Path(f"generated-{n}")).exists())
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give --out a folder")
    captions = out / "captions.txt"
    drawn_paths = [out / f"{number}-{_slug(text)}.png" for number, text in enumerate(prompts)]
    answers = out.glob("answer-*.png") if parts else ()
    if not overwrite and (old := [path for path in (captions, *drawn_paths, *answers) if path.exists()]):
        raise UserError(
            f"{old[0]}: of an earlier call; choose another --out, or add --overwrite to replace it"
        )
    from megafusion.generate.arguments import load_image

    images = [load_image(path) for path in paths]
    mixed = [_parse_part(part) for part in parts]

    from megafusion.device import default_device

    from megafusion import TransfusionPipeline
    from megafusion.generate.events import ImageStep
    from megafusion.progress import progress_bar

    pipeline = TransfusionPipeline.from_pretrained(checkpoint).to(default_device())
    options = {
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps,
        "sampler": sampler,
    }
    given = {name: value for name, value in options.items() if value is not None}
    given = apply_overrides(given, option or [])
    sampling = pipeline.config.sampling.model_copy(update=given)
    height_and_width = parse_size(size) if size else None
    if height_and_width:
        pipeline.size_index(height_and_width)
    lines = []
    with progress_bar() as progress:
        task = progress.add_task("denoising", total=sampling.num_inference_steps, losses="", visible=False)

        def report(event: "Event") -> None:
            if isinstance(event, ImageStep):
                progress.update(task, completed=event.state.step, total=event.state.num_steps, visible=True)

        call: Any = {"size": height_and_width, "sampling": sampling, "callback": report}
        drawn: list[Image.Image] = []
        for first in range(0, len(prompts), BATCH_SIZE):
            drawn += pipeline.draw(prompts[first : first + BATCH_SIZE], seed=seed + first, **call)
        described = pipeline.describe(images, seed=seed, sampling=sampling)
        answer = pipeline.chat(mixed, seed=seed, **call) if mixed else []
    for path, image_drawn, text in zip(drawn_paths, drawn, prompts, strict=True):
        lines.append(f"{_save(image_drawn, path)}: drawn from {text!r}")
    lines += [f"{path}: {caption}" for path, caption in zip(paths, described, strict=True)]
    if mixed:
        lines += _write_answer(answer, out)
    write_file(captions, "\n".join(lines) + "\n")
    print("\n".join(lines))


def _parse_part(part: str) -> "Part":
    """A part of --interleave: a text, or an image where it begins with one @."""
    if part.startswith("@@"):
        return part[1:]
    if not part.startswith("@"):
        return part
    from megafusion.generate.arguments import load_image

    return load_image(part[1:])


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: not a readable text file ({error})") from error
    if not (prompts := [line for line in lines if line.strip()]):
        raise UserError(f"--prompts {path}: has no prompts; write one a line")
    return prompts


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
