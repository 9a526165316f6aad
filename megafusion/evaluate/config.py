"""Configuration of an evaluation: what is measured on, and by what. Imports no torch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from megafusion.config import Config, parse_config
from megafusion.errors import UserError
from megafusion.objective.config import SamplingConfig

SuiteName = Literal["perplexity", "captions", "images", "reconstruction", "geneval", "lm"]

ANNOTATIONS = "give it annotations=FILE, COCO's annotation file for captions"
GENEVAL = "give it prompts=FILE, GenEval's evaluation_metadata.jsonl, and detector=FOLDER or MODULE:FUNCTION"
JUDGED = "nothing would measure the drawn images; give judge=FILE, inception=FILE, clip=FOLDER or several"
NEEDS = (
    ("perplexity", ("texts",), "give it texts=[FILE], text files with one document per line"),
    ("captions", ("annotations",), ANNOTATIONS),
    ("images", ("annotations",), ANNOTATIONS),
    ("images", ("judge", "inception", "clip"), JUDGED),
    ("reconstruction", ("annotations",), ANNOTATIONS),
    ("geneval", ("prompts",), GENEVAL),
    ("geneval", ("detector",), GENEVAL),
    ("lm", ("task_folder",), "give it task_folder=FOLDER, of lm-evaluation-harness's task files"),
)
"""Suite, the keys of which it needs one, and the way out without."""


class EvaluateConfig(Config):
    """Inputs and options of the suites; each reads its own."""

    texts: tuple[Path, ...] = ()
    """perplexity: text files in UTF-8 with one document per line, which the model was not trained on."""
    annotations: Path | None = None
    """captions, images, reconstruction: COCO's annotation file for captions (JSON with `images` and
    `annotations`). An image may have a `group`, as seen and held-out, of which each gets figures of its own,
    and a `key` that the judge knows."""
    image_folder: Path | None = None
    """Folder of the images that the annotations name; by default the annotation file's own."""
    max_items: int | None = Field(None, gt=0)
    """Maximum number of texts, of images in each group, and of documents of each of lm's tasks, spread
    evenly over the input; all by default."""
    batch_size: int = Field(16, gt=0)
    """Texts, images or requests at a time. Which are together is fixed by it, whatever the number of
    processes."""
    seed: int = Field(0, ge=0, le=2**62)
    """Seed of drawn images and of sampled captions and answers: item n uses seed + n."""
    sampling: dict[str, Any] = Field({})
    """Keys of the model's `sampling` to replace, as guidance_scale and num_inference_steps."""
    words: Literal["simple", "ptb"] = "simple"
    """captions: how CIDEr divides texts into words. simple: lower-case runs of letters and digits. ptb:
    COCO's own, the Penn Treebank tokenizer, which needs Java."""
    judge: Path | None = None
    """images: weights of a classifier of the images' keys, as `python -m data_prep.emoji.train_classifier`
    writes them. It must find 95 % of the real images under distortions before it judges drawn ones."""
    inception: Path | None = None
    """images: weights of torch-fidelity's InceptionV3 (.pth or .safetensors), for FID and KID. Nothing is
    downloaded."""
    clip: Path | None = None
    """images: folder of a CLIP model of transformers, for CLIP score. geneval: it names the colors that the
    detector does not."""
    prompts: Path | None = None
    """geneval: GenEval's evaluation_metadata.jsonl, or lines of that form."""
    detector: str | None = None
    """geneval: folder of an object detection model of transformers, or MODULE:FUNCTION, which is run: it
    takes a PIL image and returns objects with label, score, box and perhaps color."""
    images_per_prompt: int = Field(4, gt=0)
    """geneval: images drawn of each prompt."""
    task_folder: Path | None = None
    """lm: folder of lm-evaluation-harness's task files (.yaml). They are code, and are run; nothing is
    downloaded, so their data are files."""
    tasks: tuple[str, ...] = ()
    """lm: names of tasks, groups or tags in the folder; all its tasks by default."""
    kid_subset_size: int = Field(1000, ge=2)
    """images: images in each subset of KID; fewer where there are fewer."""
    kid_subsets: int = Field(100, gt=0)
    """images: subsets that KID is averaged over."""

    @field_validator("sampling")
    @classmethod
    def _of_sampling(cls, values: dict[str, Any]) -> dict[str, Any]:
        try:
            parse_config(SamplingConfig, values, "sampling")
        except UserError as error:
            raise ValueError(str(error).removeprefix("sampling: ")) from error
        return values

    def check_suites(self, names: Iterable[str]) -> None:
        """Raise UserError for a suite without what it measures on or by."""
        wanted = set(names)
        for suite, keys, way_out in NEEDS:
            if suite in wanted and not any(getattr(self, key) for key in keys):
                raise UserError(f"{suite}: {way_out}")
