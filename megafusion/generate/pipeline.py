"""TransfusionPipeline: captions to images, images to captions, and texts and images in any order."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megafusion.config import Config, parse_config
from megafusion.errors import UserError
from megafusion.generate.decoder import ProgressCallback
from megafusion.generate.generation import Generation, Part
from megafusion.images.codec import ImageCodec
from megafusion.images.sizes import Size, format_sizes
from megafusion.model.config import ModelConfig
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig, SamplingConfig
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import new_folder

WEIGHTS = "model.safetensors"
MIN_PADDING = 1024
"""Rows of a padded vocabulary beyond its ids that are always allowed; more, if under a 32nd of the ids."""


class PipelineConfig(Config):
    """config.json of a pipeline folder."""

    renamed_keys: ClassVar[dict[str, str]] = {"image_size": "model.image_sizes"}

    format: Literal["megafusion-pipeline/2"] = "megafusion-pipeline/2"
    """Version of the folder's layout and keys."""
    model: ModelConfig
    objective: ObjectiveConfig
    sampling: SamplingConfig
    """Defaults of the sampler."""


class TransfusionPipeline:
    """A trained model with its tokenizer and autoencoder; takes and returns PIL images and strings.

    >>> pipeline = TransfusionPipeline.from_pretrained("runs/quickstart/pipeline")
    >>> image, = pipeline.draw(["red apple, 3d style"])
    >>> caption, = pipeline.describe([image])
    """

    def __init__(self, model: Transfusion, tokenizer: Tokenizer, codec: ImageCodec, config: PipelineConfig):
        self.model, self.tokenizer, self.codec, self.config = model.eval(), tokenizer, codec, config
        check_components(config.model, tokenizer, codec)

    @property
    def device(self) -> torch.device:
        """Device of the model's weights."""
        return self.model.tail.head.weight.device

    def to(self, device: torch.device | str) -> "TransfusionPipeline":
        """Move model and autoencoder to a device, in place."""
        self.model.to(device)
        self.codec.model.to(device)
        return self

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "TransfusionPipeline":
        """Load a folder that `save_pretrained` wrote. Safetensors only: nothing is unpickled."""
        folder = Path(folder)
        path = folder / "config.json"
        if not path.is_file():
            raise UserError(
                f"{folder}: no config.json, so not a pipeline folder; training writes one to RUN/pipeline"
            )
        try:
            config = parse_config(PipelineConfig, json.loads(path.read_text()), str(path))
            weights = load_file(folder / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder}: not a readable pipeline folder ({error})") from error
        model = Transfusion(config.model, config.objective)
        shapes = {name: tensor.shape for name, tensor in model.weights().items()}
        found = {name: tensor.shape for name, tensor in weights.items()}
        if wrong := sorted(name for name in shapes | found if shapes.get(name) != found.get(name)):
            raise UserError(
                f"{folder / WEIGHTS}: names or shapes differ from config.json's model, first {wrong[0]}"
            )
        for name, tensor in model.weights().items():
            tensor.copy_(weights[name])
        tokenizer = Tokenizer.from_pretrained(folder)
        return cls(model, tokenizer, ImageCodec.from_pretrained(folder / "vae"), config)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json, model.safetensors, vae/ and the tokenizer, then rename the folder into place.

        Raises UserError if the folder holds anything but an older pipeline, or the disk is full.
        """
        with new_folder(Path(folder), WEIGHTS) as partial:
            (partial / "config.json").write_text(self.config.model_dump_json(indent=1) + "\n")
            save_file(self.model.weights(), partial / WEIGHTS)
            self.tokenizer.save_pretrained(partial)
            self.codec.model.save_pretrained(partial / "vae")

    def draw(
        self,
        captions: Sequence[str],
        *,
        seed: int = 0,
        size: Size | None = None,
        sampling: SamplingConfig | None = None,
        progress: ProgressCallback | None = None,
    ) -> list[Image.Image]:
        """Draw one image per caption; the r-th starts from the noise of seed + r. size: see `__call__`."""
        _refuse_others(captions, (str,), 'draw(["a caption", ...])')
        image_only = (sampling or self.config.sampling).model_copy(update={"max_new_tokens": 0})
        prompts = [[caption] for caption in captions]
        outputs: list[list[Any]] = self(
            prompts, begin="image", seed=seed, size=size, sampling=image_only, progress=progress
        )
        return [image for (image,) in outputs]

    def describe(self, images: Sequence[Image.Image], *, sampling: SamplingConfig | None = None) -> list[str]:
        """Caption each image greedily, with at least one token."""
        _refuse_others(images, (Image.Image,), "describe([PIL image, ...])")
        outputs: list[list[Any]] = self(
            [[image] for image in images], begin="text", max_images=0, sampling=sampling
        )
        return [" ".join(output).strip() for output in outputs]

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Sequence[Part]],
        *,
        begin: Literal["free", "text", "image"] = "free",
        max_images: int = 1,
        seed: int = 0,
        size: Size | None = None,
        sampling: SamplingConfig | None = None,
        progress: ProgressCallback | None = None,
    ) -> list[list[Part]]:
        """Continue prompts of texts and images in any order with texts and images.

        begin: "image" draws first; "text" writes at least one token (without it the model may end at once,
        because captions were dropped in training); "free" leaves the first token to the model.
        max_images: limit of images per output. seed: the r-th prompt uses the noise of seed + r.
        size: height and width in pixels of drawn images, one of `sizes`; None lets the model choose by its
        begin-of-image token.
        """
        usage = 'pipeline([["text", image, ...], ...])'
        _refuse_others(prompts, (list, tuple), usage)
        for prompt in prompts:
            _refuse_others(prompt, (str, Image.Image), usage)
        if not prompts:
            return []
        if begin == "image" and max_images < 1:
            raise UserError('begin="image" needs max_images of at least 1')
        generation = Generation(
            self.model,
            self.tokenizer,
            self.codec,
            prompts,
            sampling or self.config.sampling,
            seed,
            max_images,
            None if size is None else self.size_index(size),
            progress,
        )
        return generation.run(begin)

    @property
    def sizes(self) -> list[Size]:
        """Heights and widths of the model's images, in pixels."""
        return list(self.config.model.image_sizes)

    def size_index(self, size: Size) -> int:
        """Index of a size in pixels. Raises UserError for a size that the model does not have."""
        height, width = size
        if (height, width) not in self.sizes:
            raise UserError(
                f"size {format_sizes([size])}: the model has {format_sizes(self.sizes)} (height x width, "
                "in pixels); choose one of these"
            )
        return self.sizes.index((height, width))


def _refuse_others(given: Sequence, kinds: tuple[type, ...], call: str) -> None:
    """Raise UserError for a bare string, which would be read letter by letter, and for other types."""
    if isinstance(given, str) or not all(isinstance(part, kinds) for part in given):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"expected a list of {names}, got {given!r:.80}; call it as {call}")


def check_components(model: ModelConfig, tokenizer: Tokenizer, codec: ImageCodec) -> None:
    """Raise UserError if the tokenizer or the autoencoder does not fit the model's configuration."""
    num_more = len(model.image_sizes) - 1
    num_ids = tokenizer.num_ids(len(model.image_sizes))
    max_ids = num_ids + max(MIN_PADDING, num_ids // 32)
    if not num_ids <= model.vocab_size <= max_ids:
        beside = f", and a boi for each of the {num_more} further model.image_sizes"
        raise UserError(
            f"model.vocab_size {model.vocab_size}, but {tokenizer.path} has {num_ids} ids (its tokens, boi "
            f"and eoi{beside if num_more else ''}); set model.vocab_size to that (up to {max_ids} where the "
            "vocabulary is padded) or give the tokenizer of the model"
        )
    for key, found in (("channels", codec.latent_channels), ("downsampling", codec.downsampling)):
        if (wanted := getattr(model, f"latent_{key}")) != found:
            raise UserError(f"model.latent_{key} is {wanted}, but the autoencoder's is {found}; set that")
