"""TransfusionPipeline: captions to images, images to captions, and texts and images in any order."""

import json
from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from PIL import Image
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from megafusion.config import Config, parse_config
from megafusion.errors import UserError
from megafusion.generate.decoder import ProgressCallback
from megafusion.generate.generation import Generation, Part
from megafusion.generate.lora import LoraPipeline
from megafusion.generate.openers import openers
from megafusion.images.codec import ImageCodec
from megafusion.images.sizes import Size, format_sizes
from megafusion.model.config import ModelConfig
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig, SamplingConfig
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import expand_path, new_folder

CONFIG, WEIGHTS = "config.json", "model.safetensors"
Begin = Literal["free", "text", "image"]
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
    sequence_length: int | None = Field(None, gt=0)
    """Positions of a row in training: the longest prompt with its answer. Not known of older pipelines."""


class TransfusionPipeline(LoraPipeline):
    """A trained model with its tokenizer and autoencoder; takes and returns PIL images and strings.

    >>> pipeline = TransfusionPipeline.from_pretrained("runs/quickstart")
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

    def to(self, *args: Any, **kwargs: Any) -> "TransfusionPipeline":
        """Move model and autoencoder to a device, a dtype or both, in place; arguments as of nn.Module.to."""
        for module in (self.model, self.codec.model):
            nn.Module.to(module, *args, **kwargs)  # diffusers' own warns of an empty list of layers
        return self

    @classmethod
    def from_pretrained(cls, path: Path | str) -> "TransfusionPipeline":
        """Open a pipeline folder, a run (its pipeline, else its newest checkpoint) or a checkpoint.

        Nothing that a file names is run. Raises UserError for any other path.
        """
        path = Path(expand_path(path))
        if (path / CONFIG).is_file():
            return cls._load(path)
        if (path / "pipeline" / CONFIG).is_file():
            return cls._load(path / "pipeline")
        for opener in openers:
            if pipeline := opener(path):
                return pipeline
        raise UserError(f"{path}: neither a pipeline folder, a run folder nor a checkpoint (step-*)")

    @classmethod
    def _load(cls, folder: Path) -> "TransfusionPipeline":
        """Load a folder that `save_pretrained` wrote, of safetensors alone."""
        config = read_pipeline_config(folder)
        try:
            weights = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: not a readable pipeline folder ({error})") from error
        model = build_model(config)
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
            (partial / CONFIG).write_text(self.config.model_dump_json(indent=1) + "\n")
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
        prompts = [[caption] for caption in _checked(captions, (str,), 'draw(["a caption", ...])')]
        image_only = self._sampling(sampling).model_copy(update={"max_new_tokens": 0})
        outputs: list[list[Any]] = self(
            prompts, begin="image", seed=seed, size=size, sampling=image_only, progress=progress
        )
        return [image for (image,) in outputs]

    def describe(self, images: Sequence[Image.Image], *, sampling: SamplingConfig | None = None) -> list[str]:
        """Caption each image greedily, with at least one token."""
        prompts = [[image] for image in _checked(images, (Image.Image,), "describe([PIL image, ...])")]
        outputs: list[list[Any]] = self(prompts, begin="text", max_images=0, sampling=sampling)
        return [" ".join(output).strip() for output in outputs]

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Sequence[Part]],
        *,
        begin: Begin = "free",
        max_images: int = 1,
        seed: int = 0,
        size: Size | None = None,
        sampling: SamplingConfig | None = None,
        progress: ProgressCallback | None = None,
    ) -> list[list[Part]]:
        """Continue prompts of texts and images in any order with texts and images.

        Texts are cleaned as captions were. A prompt and its answer end at the model's sequence_length.
        begin: "image" draws first; "text" writes at least one token (without it the model may end at once,
        because captions were dropped in training); "free" leaves the first token to the model.
        max_images: limit of images per output. seed: the r-th prompt uses the noise of seed + r.
        size: height and width in pixels of drawn images, one of `sizes`; None lets the model choose by its
        begin-of-image token.
        Raises UserError for a prompt that is too long, or an argument that is not one of these.
        """
        usage = 'pipeline([["text", image, ...], ...])'
        rows = [
            _checked(prompt, (str, Image.Image), usage) for prompt in _checked(prompts, (list, tuple), usage)
        ]
        if begin not in get_args(Begin):
            raise UserError(f"begin={begin!r}: give one of {', '.join(map(repr, get_args(Begin)))}")
        seed = _integer("seed", seed, 0, 2**63 - 1)
        max_images = _integer("max_images", max_images, 1 if begin == "image" else 0, 2**31 - 1)
        size_index, sampling = None if size is None else self.size_index(size), self._sampling(sampling)
        if not rows:
            return []
        generation = Generation(
            self.model,
            self.tokenizer,
            self.codec,
            rows,
            sampling,
            seed,
            max_images,
            begin,
            size_index,
            self.config.sequence_length,
            progress,
        )
        return generation.run()

    @property
    def sizes(self) -> list[Size]:
        """Heights and widths of the model's images, in pixels."""
        return list(self.config.model.image_sizes)

    def size_index(self, size: Size) -> int:
        """Index of a size in pixels. Raises UserError for a size that the model does not have."""
        if not isinstance(size, tuple | list) or tuple(size) not in self.sizes:
            raise UserError(
                f"size {size!r:.80}: the model has {format_sizes(self.sizes)} (height x width, in pixels); "
                "choose one of these"
            )
        return self.sizes.index((size[0], size[1]))

    def _sampling(self, sampling: SamplingConfig | None) -> SamplingConfig:
        """The options of a call, by default the model's. Raises UserError for those that cannot be used."""
        sampling = self.config.sampling if sampling is None else sampling
        if not isinstance(sampling, SamplingConfig):
            raise UserError(f"sampling={sampling!r:.80}: give a SamplingConfig, as pipeline.config.sampling")
        if reason := self.model.objective.noise_process.unsupported_reason(sampling):
            raise UserError(reason)
        return sampling


def build_model(config: PipelineConfig) -> Transfusion:
    """The model of a pipeline, with weights at random, which may be moved to any device and dtype.

    So attention is sdpa or auto: another backend may support only those of training.
    """
    attention = "sdpa" if config.model.attention == "sdpa" else "auto"
    return Transfusion(config.model.model_copy(update={"attention": attention}), config.objective)


def read_pipeline_config(folder: Path) -> PipelineConfig:
    """config.json of a pipeline folder."""
    try:
        values = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a readable pipeline folder ({error})") from error
    return parse_config(PipelineConfig, values, str(folder / CONFIG))


def _checked(given: Iterable, kinds: tuple[type, ...], call: str) -> list:
    """The parts of a list. Raises UserError for others, and for a string, which is a list of letters."""
    parts = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [None]
    if not all(isinstance(part, kinds) for part in parts):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"expected a list of {names}, got {given!r:.80}; call it as {call}")
    return parts


def _integer(name: str, value: int, min_value: int, max_value: int) -> int:
    """An integer of Python or NumPy within bounds. Raises UserError for anything else."""
    try:
        if min_value <= index(value) <= max_value:
            return index(value)
    except TypeError:
        pass
    raise UserError(f"{name}={value!r:.80}: give an integer from {min_value} to {max_value}")


def check_components(model: ModelConfig, tokenizer: Tokenizer, codec: ImageCodec) -> None:
    """Raise UserError if the tokenizer or the autoencoder does not fit the model's configuration."""
    num_more = len(model.image_sizes) - 1
    num_ids = tokenizer.num_ids(len(model.image_sizes))
    max_ids = num_ids + max(MIN_PADDING, num_ids // 32)
    if not num_ids <= model.vocab_size <= max_ids:
        beside = f", and a boi for each of the {num_more} further model.image_sizes"
        raise UserError(
            f"model.vocab_size {model.vocab_size}, but {tokenizer.path} has {num_ids} ids (its tokens, boi "
            f"and eoi{beside if num_more else ''}); set model.vocab_size: {num_ids} (up to {max_ids} where "
            "the vocabulary is padded), leave it out, or give the tokenizer of the model"
        )
    for key, found in (("channels", codec.latent_channels), ("downsampling", codec.downsampling)):
        if (wanted := getattr(model, f"latent_{key}")) != found:
            raise UserError(
                f"model.latent_{key} is {wanted}, but the autoencoder's is {found}; set model.latent_{key}: "
                f"{found}, leave it out, or give the autoencoder of the model"
            )
