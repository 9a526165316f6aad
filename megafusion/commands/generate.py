"""What `megafusion generate` does: find the model, draw, describe or continue, write files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megafusion.device import default_device

from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError

from megafusion.errors import UserError
from megafusion.generate.pipeline import Part, TransfusionPipeline
from megafusion.images.codec import ImageCodec
from megafusion.images.grid import encode_png
from megafusion.objective.config import SamplingConfig
from megafusion.progress import progress_bar
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import write_file


@dataclass(frozen=True)
class GenerateRequest:
    """Prompts to draw, pictures to describe, and the parts of one mixed prompt to continue."""

    prompts: Sequence[str]
    images: Sequence[Path]
    parts: Sequence[str]
    seed: int = 0
    size: str | None = None
    """Height x width in pixels of what is drawn, as 256x320."""


def run(checkpoint: Path, request: GenerateRequest, out: Path, overrides: dict[str, object]) -> None:
    """Answer a request into a folder: PNG files, and captions.txt for what was written."""
    if not (request.prompts or request.images or request.parts):
        raise UserError("nothing to generate: give --prompt, --image or --interleave")
    pictures = [open_picture(path) for path in request.images]
    mixed: list[Part] = [open_picture(Path(p[1:])) if p.startswith("@") else p for p in request.parts]
    if request.size and not (request.prompts or request.parts):
        raise UserError("--size is that of drawn pictures, and none is drawn: give --prompt or --interleave")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give --out a folder")
    pipeline = open_pipeline(checkpoint).to(default_device())
    sampling = _sampling(pipeline.config.sampling, overrides)
    size = parse_size(request.size) if request.size else None
    if size:
        pipeline.size_index(size)
    lines = []
    with progress_bar() as progress:
        task = progress.add_task("denoising", total=sampling.num_inference_steps, losses="", visible=False)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        given = {"seed": request.seed, "size": size, "sampling": sampling, "progress": report}
        drawn = pipeline.draw(request.prompts, **given)
        for number, (prompt, picture) in enumerate(zip(request.prompts, drawn, strict=True)):
            path = out / f"{number}-{_slug(prompt)}.png"
            write_file(path, encode_png(picture))
            lines.append(f"{path}: drawn from {prompt!r}")
        for path, caption in zip(request.images, pipeline.describe(pictures, sampling=sampling), strict=True):
            lines.append(f"{path}: {caption}")
        if mixed:
            (answer,) = pipeline([mixed], **given)
            lines += _write_answer(answer, out)
    write_file(out / "captions.txt", "\n".join(lines) + "\n")
    print("\n".join(lines))


def parse_size(text: str) -> tuple[int, int]:
    """HxW in pixels. UserError for anything else."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise UserError(f"--size {text}: is not HEIGHTxWIDTH in pixels, as 256x320")
    return int(height), int(width)


def open_pipeline(path: Path) -> TransfusionPipeline:
    """The model of a pipeline folder, a run folder (published or its newest checkpoint), or a checkpoint."""
    from megafusion.checkpoint.folder import latest_checkpoint

    if (path / "config.json").is_file():
        return TransfusionPipeline.from_pretrained(path)
    if (path / "pipeline").is_dir():
        return TransfusionPipeline.from_pretrained(path / "pipeline")
    if (path / "config.yaml").is_file():
        path = latest_checkpoint(path)
    if not path.name.startswith("step-"):
        raise UserError(f"{path}: neither a pipeline folder, a run folder nor a checkpoint (step-*)")
    return open_checkpoint(path, "ema")


def open_checkpoint(path: Path, kind: Literal["ema", "model"]) -> TransfusionPipeline:
    """The model of a run's checkpoint, with the averaged weights or the raw ones."""
    from megafusion.checkpoint.reader import load_full_tensors
    from megafusion.train.build import make_pipeline
    from megafusion.train.run_folder import load_run_config

    config = load_run_config(path.parent.parent)
    tokenizer = Tokenizer.from_pretrained(config.data.tokenizer)
    codec = ImageCodec.from_pretrained(config.data.vae)
    pipeline = make_pipeline(config, tokenizer, codec)
    shapes = {name: p.shape for name, p in pipeline.model.named_parameters()}
    pipeline.model.load_state_dict(load_full_tensors(path, shapes, kind))
    return pipeline


def open_picture(path: Path) -> Image.Image:
    """Decode a picture. UserError naming the file when that cannot be done."""
    try:
        picture = Image.open(path)
        picture.load()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such picture") from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a picture that can be decoded ({error})") from error
    return picture


def _sampling(defaults: SamplingConfig, overrides: dict[str, object]) -> SamplingConfig:
    try:
        return SamplingConfig.model_validate({**defaults.model_dump(), **overrides})
    except ValidationError as error:
        detail = error.errors()[0]
        raise UserError(
            f"--{str(detail['loc'][0]).replace('_', '-')}: {detail['msg']} (got {detail['input']!r})"
        ) from error


def _write_answer(answer: Sequence[Part], out: Path) -> list[str]:
    lines = []
    for number, part in enumerate(answer):
        if isinstance(part, str):
            lines.append(f"answer {number}: {part}")
        else:
            write_file(out / f"answer-{number}.png", encode_png(part))
            lines.append(f"answer {number}: {out / f'answer-{number}.png'}")
    return lines or ["answer: nothing (the model ended at once)"]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "prompt"
