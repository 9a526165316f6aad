"""TransfusionPipeline: captions to pictures, pictures to captions, and both in any order."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megafusion.config import Config, parse_config
from megafusion.errors import UserError
from megafusion.generate.decoder import Report
from megafusion.generate.generation import Generation, Part
from megafusion.images.codec import ImageCodec
from megafusion.images.processor import to_pil, to_rgb, to_tensor
from megafusion.images.sizes import Size, nearest_size, say_sizes
from megafusion.model.config import ModelConfig
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig, SamplingConfig
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import new_folder

WEIGHTS = "model.safetensors"


class PipelineConfig(Config):
    """What a pipeline folder's config.json holds."""

    format: Literal["megafusion-pipeline/1"] = "megafusion-pipeline/1"
    """Version of the folder's layout."""
    model: ModelConfig
    objective: ObjectiveConfig
    sampling: SamplingConfig
    """Defaults for drawing."""


class TransfusionPipeline:
    """A trained model with its tokenizer and autoencoder: PIL pictures and strings in and out.

    >>> pipeline = TransfusionPipeline.from_pretrained("runs/quickstart/pipeline")
    >>> picture, = pipeline.draw(["red apple, 3d style"])
    >>> caption, = pipeline.describe([picture])
    """

    def __init__(self, model: Transfusion, tokenizer: Tokenizer, codec: ImageCodec, config: PipelineConfig):
        self.model, self.tokenizer, self.codec, self.config = model.eval(), tokenizer, codec, config
        check_parts(config.model, tokenizer, codec)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
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
                f"{folder}: no config.json, so no pipeline folder; train writes one as RUN/pipeline"
            )
        try:
            config = parse_config(PipelineConfig, json.loads(path.read_text()), str(path))
            weights = load_file(folder / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder}: not a readable pipeline folder ({error})") from error
        model = Transfusion(config.model, config.objective)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        found = {name: tensor.shape for name, tensor in weights.items()}
        if wrong := sorted(name for name in shapes | found if shapes.get(name) != found.get(name)):
            raise UserError(f"{folder / WEIGHTS}: does not fit config.json, first at {wrong[0]}")
        model.load_state_dict(weights)
        tokenizer = Tokenizer.from_pretrained(folder)
        return cls(model, tokenizer, ImageCodec.from_pretrained(folder / "vae"), config)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json, model.safetensors, tokenizer.model and vae/; the folder appears whole.

        Raises UserError where it holds anything but an older pipeline, or when the disk is full.
        """
        with new_folder(Path(folder), WEIGHTS) as partial:
            (partial / "config.json").write_text(self.config.model_dump_json(indent=1) + "\n")
            save_file(self.model.state_dict(), partial / WEIGHTS)
            self.tokenizer.save_pretrained(partial)
            self.codec.model.save_pretrained(partial / "vae")

    def draw(
        self,
        captions: Sequence[str],
        *,
        seed: int = 0,
        size: Size | None = None,
        sampling: SamplingConfig | None = None,
        report: Report | None = None,
    ) -> list[Image.Image]:
        """A picture for each caption; the r-th starts from the noise of seed + r. size: as `__call__`'s."""
        _refuse_others(captions, (str,), 'draw(["a caption", ...])')
        silent = (sampling or self.config.sampling).model_copy(update={"max_new_tokens": 0})
        prompts = [[caption] for caption in captions]
        answers = self(prompts, begin="image", seed=seed, size=size, sampling=silent, report=report)
        return [picture for (picture,) in answers]

    def describe(
        self, pictures: Sequence[Image.Image], *, sampling: SamplingConfig | None = None
    ) -> list[str]:
        """A caption of at least one token for each picture, decoded greedily."""
        _refuse_others(pictures, (Image.Image,), "describe([PIL picture, ...])")
        prompts = [[picture] for picture in pictures]
        answers = self(prompts, begin="text", max_images=0, sampling=sampling)
        return [" ".join(answer).strip() for answer in answers]

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
        report: Report | None = None,
    ) -> list[list[Part]]:
        """Continue prompts of texts and pictures in any order with texts and pictures.

        begin: "image" draws at once; "text" writes at least one token (many pairs were trained without
        their caption, after which nothing follows); "free" lets the model end, write or draw as it likes.
        max_images: pictures a row may hold beyond its prompt; boi is not chosen after that.
        size: height and width in pixels of what is drawn, one of `sizes`; None lets the model choose by the
        token that begins an image.
        """
        _refuse_others(prompts, (list, tuple), 'pipeline([["text", picture, ...], ...])')
        for prompt in prompts:
            _refuse_others(prompt, (str, Image.Image), 'pipeline([["text", picture, ...], ...])')
        if not prompts:
            return []
        if begin == "image" and max_images < 1:
            raise UserError('begin="image" needs max_images of at least 1')
        sampling = sampling or self.config.sampling
        number = None if size is None else self.size_number(size)
        return Generation(self, prompts, sampling, seed, max_images, report, number).run(begin)

    @property
    def sizes(self) -> list[Size]:
        """Heights and widths, in pixels, of the pictures that the model knows."""
        return list(self.config.model.image_sizes)

    def size_number(self, size: Size) -> int:
        """Index of a size in pixels. UserError, with those that there are, for another."""
        if tuple(size) not in self.sizes:
            raise UserError(
                f"size {say_sizes([size])}: the model was made for {say_sizes(self.sizes)} (height x width, "
                "in pixels); choose one of these"
            )
        return self.sizes.index(tuple(size))

    def size_of(self, picture: Image.Image) -> int:
        """Index of the size that is nearest to a picture's aspect."""
        width, height = to_rgb(picture).size if len(self.sizes) > 1 else picture.size
        return nearest_size(height, width, self.sizes)

    def latents(self, pictures: Sequence[Image.Image], size: int = 0) -> Tensor:
        """Normalised latents [N, C, H, W] of pictures at one size, the mean of each posterior."""
        mean, _ = self.codec.encode(to_tensor(pictures, self.sizes[size]).to(self.device))
        return self.codec.normalize(mean)

    def pictures(self, latents_NCHW: Tensor) -> list[Image.Image]:
        """PIL pictures of normalised latents."""
        return to_pil(self.codec.decode(self.codec.denormalize(latents_NCHW.to(self.device))))


def _refuse_others(given: Sequence, kinds: tuple[type, ...], call: str) -> None:
    """UserError where a bare string or other parts are given, which would be read letter by letter."""
    if isinstance(given, str) or not all(isinstance(part, kinds) for part in given):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"expected a list of {names}, got {given!r:.80}; call it as {call}")


def check_parts(model: ModelConfig, tokenizer: Tokenizer, codec: ImageCodec) -> None:
    """UserError where tokenizer or autoencoder are not the size that the model was made for."""
    num_more = len(model.image_sizes) - 1
    num_ids = tokenizer.num_ids(len(model.image_sizes))
    if num_ids != model.vocab_size:
        beside = f", and a boi for each of the {num_more} further model.image_sizes"
        raise UserError(
            f"model.vocab_size {model.vocab_size}, but {tokenizer.path} has {num_ids} ids (its pieces, boi "
            f"and eoi{beside if num_more else ''}); set model.vocab_size to that or give the "
            "tokenizer of the model"
        )
    for key, found in (("channels", codec.latent_channels), ("downsampling", codec.downsampling)):
        if (wanted := getattr(model, f"latent_{key}")) != found:
            raise UserError(f"model.latent_{key} is {wanted}, but the autoencoder's is {found}; set that")
