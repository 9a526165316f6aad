"""Configuration of an evaluation: what is measured on, and by what. Imports no torch."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megafusion.config import Config

SuiteName = Literal["perplexity", "captions", "images", "reconstruction", "geneval"]


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
    """Maximum number of texts, and of images in each group, spread evenly over the input; all by default."""
    batch_size: int = Field(16, gt=0)
    """Texts or images at a time. Which are together is fixed by it, whatever the number of processes."""
    seed: int = Field(0, ge=0, le=2**62)
    """Seed of drawn images and sampled captions: item n uses seed + n."""
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
    kid_subset_size: int = Field(1000, ge=2)
    """images: images in each subset of KID; fewer where there are fewer."""
    kid_subsets: int = Field(100, gt=0)
    """images: subsets that KID is averaged over."""
