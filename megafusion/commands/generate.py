"""`megafusion generate`."""

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megafusion.commands.arguments import TrainedModel, check_trained_model
from megafusion.commands.generate_files import file_name, parse_part, read_prompts, save_image, write_answer
from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.images.sizes import parse_size
from megafusion.objective.config import SamplingConfig
from megafusion.sequence.text import clean_text
from megafusion.storage import write_file
from megafusion.yaml_values import apply_overrides

if TYPE_CHECKING:
    from PIL import Image

    from megafusion.generate.events import Event

Begin = Literal["free", "text", "image"]
BATCH_SIZE = 16
"""Prompts of a file that are drawn together."""


def generate(
    checkpoint: TrainedModel,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to draw; repeat for several prompts.", metavar="TEXT")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", help="File of texts to draw, one a line.", metavar="FILE"),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Image to describe, or with --edit to change; repeat for several.", metavar="PATH"),
    ] = None,
    edit: Annotated[
        str | None,
        typer.Option(
            help="How to change each --image, by a model that was trained on edits.", metavar="INSTRUCTION"
        ),
    ] = None,
    interleave: Annotated[
        list[str] | None,
        typer.Option(
            help="Part of one interleaved prompt, in order: a text, or @PATH for an image (@@TEXT for a "
            "text that begins with @). The model answers with text, images or both.",
            metavar="PART",
        ),
    ] = None,
    begin: Annotated[
        Begin | None,
        typer.Option(
            help="What the answer to --interleave begins with; free, the default: as the model likes."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the images and captions.txt; by default a new one, generated-N, if any image is "
            "drawn."
        ),
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
            help="Any key of `megafusion keys generate`, as temperature=0.8; repeat for several.",
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
    """Draw prompts, describe or edit images, or continue an interleaved prompt of both.

    Examples:

    megafusion generate runs/quickstart --prompt "red apple, 3d style" --out apples

    megafusion generate runs/quickstart --image apples/0-red-apple-3d-style.png

    megafusion generate runs/quickstart --interleave "pizza, 3d style"

    megafusion generate runs/edits --image apples/0-red-apple-3d-style.png --edit "make it blue"
    """
    prompts, paths, parts = prompt or [], image or [], interleave or []
    prompts += read_prompts(prompts_file) if prompts_file else []
    if not all(map(clean_text, prompts)):
        raise UserError("--prompt: is empty or blank; give a text to draw")
    if not (prompts or paths or parts):
        raise UserError("nothing to generate: give --prompt, --prompts, --image or --interleave")
    if edit is not None and not (paths and clean_text(edit)):
        raise UserError("--edit: give an --image to change, and a text that tells how")
    if begin and not parts:
        raise UserError("--begin is for the answer to --interleave, which is not given")
    edited = paths if edit is not None else []
    if size and not (prompts or parts or edited):
        raise UserError(
            "--size is for drawn images, and none is drawn: give --prompt, --edit or --interleave"
        )
    given_out, out = out, out or next(path for n in count(1) if not (path := Path(f"generated-{n}")).exists())
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give --out a folder")
    captions = out / "captions.txt"
    drawn_paths = [out / f"{number}-{file_name(text)}.png" for number, text in enumerate(prompts)]
    edited_paths = [out / f"edit-{number}-{file_name(path.stem)}.png" for number, path in enumerate(edited)]
    answers = out.glob("answer-*.png") if parts else ()
    written = (captions, *drawn_paths, *edited_paths, *answers)
    if not overwrite and (old := [path for path in written if path.exists()]):
        raise UserError(
            f"{old[0]}: of an earlier call; choose another --out, or add --overwrite to replace it"
        )
    options = {
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps,
        "sampler": sampler,
    }
    options = {name: value for name, value in options.items() if value is not None}
    sampling = parse_config(SamplingConfig, apply_overrides(options, option or []), "generate")
    height_and_width = parse_size(size) if size else None
    from megafusion.images.reader import load_image

    images = [load_image(path) for path in paths]
    mixed = [parse_part(part) for part in parts]
    check_trained_model(checkpoint)

    from megafusion.device import default_device

    from megafusion import TransfusionPipeline
    from megafusion.generate.events import ImageStep
    from megafusion.progress import progress_bar

    pipeline = TransfusionPipeline.from_pretrained(checkpoint).to(default_device())
    if height_and_width:
        pipeline.size_index(height_and_width)
    progress = progress_bar()  # shown from the first step on: a refusal begins no bar
    task = progress.add_task("denoising", total=None, losses="")

    def report(event: "Event") -> None:
        if isinstance(event, ImageStep):
            progress.start()
            progress.update(task, completed=event.state.step, total=event.state.num_steps)

    call: Any = {"size": height_and_width, "sampling": sampling, "callback": report}
    drawn: list[Image.Image] = []
    described: list[str] = []
    try:
        for first in range(0, len(prompts), BATCH_SIZE):
            drawn += pipeline.draw(prompts[first : first + BATCH_SIZE], seed=seed + first, **call)
        if edit is None:
            described = pipeline.describe(images, seed=seed, sampling=sampling)
        else:
            drawn += [pipeline.edit(each, edit, seed=seed + n, **call) for n, each in enumerate(images)]
        answer = pipeline.chat(mixed, seed=seed, begin=begin or "free", **call) if mixed else []
    finally:
        progress.stop()
    lines = []
    origins = [*map(repr, prompts), *(f"{path}, edited: {edit!r}" for path in edited)]
    for path, image_drawn, origin in zip([*drawn_paths, *edited_paths], drawn, origins, strict=True):
        lines.append(f"{save_image(image_drawn, path)}: drawn from {origin}")
    lines += [f"{path}: {caption}" for path, caption in zip(paths, described, strict=edit is None)]
    if mixed:
        lines += write_answer(answer, out)
    if given_out or out.exists():
        write_file(captions, "\n".join(lines) + "\n")
    print("\n".join(lines))
