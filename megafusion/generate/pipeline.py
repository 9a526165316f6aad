"""TransfusionPipeline: captions to pictures, pictures to captions, and both in any order."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megafusion.autoencoder.codec import ImageCodec, to_pil, to_tensor
from megafusion.config import Config, parse_config
from megafusion.errors import UserError
from megafusion.generate.decoder import Decoder, Report
from megafusion.generate.sampling import SamplingConfig
from megafusion.model.transfusion import ModelConfig, Transfusion
from megafusion.objective.losses import ObjectiveConfig
from megafusion.sequence.document import NoisedImage, flatten
from megafusion.sequence.packing import RowShape, collate, pack_row
from megafusion.sequence.tokenizer import Tokenizer

Part = str | Image.Image
FORMAT = "megafusion-pipeline/1"


class PipelineConfig(Config):
    """What a pipeline folder's config.json holds."""

    format: str = FORMAT
    """Version of the folder's layout."""
    image_size: tuple[int, int]
    """Height and width of pictures, in pixels."""
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
        check_parts(config.model, tokenizer, codec, config.image_size)
        self._decoder = Decoder(model)

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
            weights = load_file(folder / "model.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder}: not a readable pipeline folder ({error})") from error
        model = Transfusion(config.model, config.objective)
        missing = model.state_dict().keys() ^ weights.keys()
        if missing:
            raise UserError(
                f"{folder}/model.safetensors: weights do not fit config.json: {sorted(missing)[:3]}"
            )
        model.load_state_dict(weights)
        tokenizer = Tokenizer(folder / "tokenizer.model")
        return cls(model, tokenizer, ImageCodec.from_pretrained(folder / "vae"), config)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json, model.safetensors, tokenizer.model and vae/; the folder appears whole."""
        folder = Path(folder)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            (partial / "config.json").write_text(self.config.model_dump_json(indent=1) + "\n")
            save_file(self.model.state_dict(), partial / "model.safetensors")
            shutil.copyfile(self.tokenizer.path, partial / "tokenizer.model")
            self.codec.model.save_pretrained(partial / "vae")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot write the pipeline ({error.strerror or error})") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def draw(
        self,
        captions: Sequence[str],
        *,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        report: Report | None = None,
    ) -> list[Image.Image]:
        """A picture for each caption; the r-th starts from the noise of seed + r."""
        silent = (sampling or self.config.sampling).model_copy(update={"max_new_tokens": 0})
        prompts = [[caption] for caption in captions]
        answers = self(prompts, begin="image", seed=seed, sampling=silent, report=report)
        return [picture for (picture,) in answers]

    def describe(
        self, pictures: Sequence[Image.Image], *, sampling: SamplingConfig | None = None
    ) -> list[str]:
        """A caption for each picture, decoded greedily."""
        answers = self([[picture] for picture in pictures], max_images=0, sampling=sampling)
        return [" ".join(answer).strip() for answer in answers]

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Sequence[Part]],
        *,
        begin: Literal["free", "image"] = "free",
        max_images: int = 1,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        report: Report | None = None,
    ) -> list[list[Part]]:
        """Continue prompts of texts and pictures in any order with texts and pictures.

        begin: "image" draws at once; "free" lets the model write first and draw when it emits boi.
        max_images: pictures a row may hold beyond its prompt; boi is not chosen after that.
        """
        if not prompts:
            return []
        sampling = sampling or self.config.sampling
        return _Generation(self, prompts, sampling, seed, max_images, report).run(begin)

    def latents(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Normalised latents [N, C, H, W] of pictures, the mean of each posterior."""
        mean, _ = self.codec.encode(to_tensor(pictures, self.config.image_size))
        return self.codec.normalize(mean)

    def pictures(self, latents_NCHW: Tensor) -> list[Image.Image]:
        """PIL pictures of normalised latents."""
        return to_pil(self.codec.decode(self.codec.denormalize(latents_NCHW)))


class _Generation:
    """One call's rows: their cache, what they have said, who is still speaking."""

    def __init__(self, pipeline: TransfusionPipeline, prompts, sampling, seed, max_images, report):
        self.pipeline, self.decoder, self.sampling = pipeline, pipeline._decoder, sampling
        self.tokenizer, self.report = pipeline.tokenizer, report
        # A generator a row: what one row draws does not depend on the others of its batch.
        self.generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
        self.images_left = [max_images] * len(prompts)
        self.answers: list[list[Part | int]] = [[] for _ in prompts]
        num_patches = pipeline.config.model.num_patches
        documents = [self._document(prompt) for prompt in prompts]
        longest = max(len(document) for document in documents)
        room = max_images * (num_patches + 2) + sampling.max_new_tokens + 1
        self.cache = self.decoder.new_cache(len(prompts), longest + room)
        shape = RowShape(
            length=longest,
            num_images=max(1, *(len(document.images) for document in documents)),
            num_patches=num_patches,
            latent_shape=pipeline.config.model.latent_shape,
        )
        batch = collate([pack_row([document], shape) for document in documents])
        # A document ends in eos, which a prompt does not have.
        lengths = torch.tensor([len(document) - 1 for document in documents])
        self.logits = self.decoder.read_prompts(self.cache, batch, lengths)

    def run(self, begin: str) -> list[list[Part]]:
        if begin == "image":
            self._draw(list(range(len(self.answers))))
        budget = self.sampling.max_new_tokens
        speaking = list(range(len(self.answers)))
        while speaking and budget:
            speaking = self._write(speaking)
            budget -= 1
        return [self._finish(answer) for answer in self.answers]

    def _write(self, speaking: list[int]) -> list[int]:
        """Choose and read one token for each speaking row; returns those that go on."""
        logits = self.logits[speaking].clone()
        logits[:, self.tokenizer.eoi] = -torch.inf
        silent = [i for i, row in enumerate(speaking) if not self.images_left[row]]
        logits[silent, self.tokenizer.boi] = -torch.inf
        tokens = logits.argmax(-1).tolist()
        drawing = [row for row, t in zip(speaking, tokens, strict=True) if t == self.tokenizer.boi]
        writing = {
            row: t
            for row, t in zip(speaking, tokens, strict=True)
            if t not in (self.tokenizer.boi, self.tokenizer.eos)
        }
        for row, token in writing.items():
            self.answers[row].append(token)
        if writing:
            self._read(list(writing), list(writing.values()))
        if drawing:
            self._draw(drawing)
        return sorted([*writing, *drawing])

    def _draw(self, rows: list[int]) -> None:
        """Draw an image in some rows, between boi and eoi."""
        index = torch.tensor(rows)
        self._read(rows, [self.tokenizer.boi] * len(rows))
        unconditional = self.decoder.new_cache(1, self.cache.capacity)
        for token in (self.tokenizer.bos, self.tokenizer.boi):
            self.decoder.read_tokens(unconditional, torch.tensor([token]))
        chosen = self.cache.select(index)
        shape = self.pipeline.config.model.latent_shape
        noise = torch.stack([torch.randn(shape, generator=self.generators[row]) for row in rows])
        latents = self.decoder.draw(
            chosen, unconditional.select(torch.zeros_like(index)), noise, self.sampling, self.report
        )
        self.cache.assign(index, chosen)
        self._read(rows, [self.tokenizer.eoi] * len(rows))
        for row, picture in zip(rows, self.pipeline.pictures(latents), strict=True):
            self.answers[row].append(picture)
            self.images_left[row] -= 1

    def _read(self, rows: list[int], tokens: list[int]) -> None:
        index = torch.tensor(rows)
        whole = len(rows) == len(self.answers)
        chosen = self.cache if whole else self.cache.select(index)
        self.logits[index] = self.decoder.read_tokens(chosen, torch.tensor(tokens))
        if not whole:
            self.cache.assign(index, chosen)

    def _document(self, prompt: Sequence[Part]):
        """A prompt as a flat document; its pictures are clean."""
        segments = []
        for part in prompt:
            if isinstance(part, str):
                segments.append(np.array(self.tokenizer.encode(part), np.int64))
            else:
                latents = self.pipeline.latents([part])[0].numpy()
                segments.append(NoisedImage(latents, np.zeros_like(latents), timestep=0))
        return flatten(segments, self.tokenizer, self.pipeline.config.model.num_patches)

    def _finish(self, answer: list[Part | int]) -> list[Part]:
        """Runs of token ids become texts."""
        parts: list[Part] = []
        pending: list[int] = []
        for piece in [*answer, None]:
            if isinstance(piece, int):
                pending.append(piece)
                continue
            if pending:
                parts.append(self.tokenizer.decode(pending))
                pending = []
            if piece is not None:
                parts.append(piece)
        return parts


def check_parts(
    model: ModelConfig, tokenizer: Tokenizer, codec: ImageCodec, image_size: tuple[int, int] | None
) -> None:
    """UserError where tokenizer or autoencoder are not the size that the model was made for."""
    if tokenizer.vocab_size != model.vocab_size:
        raise UserError(
            f"model.vocab_size {model.vocab_size}, but {tokenizer.path} has {tokenizer.vocab_size} ids (its "
            "pieces, boi and eoi); set model.vocab_size to that or give the tokenizer of the model"
        )
    if image_size and codec.latent_shape(*image_size) != model.latent_shape:
        raise UserError(
            f"model.latent_shape {model.latent_shape}, but the autoencoder makes "
            f"{codec.latent_shape(*image_size)} of {image_size[0]} x {image_size[1]} pixels"
        )
