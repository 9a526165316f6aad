"""TransfusionPipeline: captions to images, images to captions, and texts and images in any order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from megafusion.errors import UserError
from megafusion.generate import arguments as given
from megafusion.generate.events import Event, ImageStep
from megafusion.generate.folder import (
    CONFIG,
    WEIGHTS,
    PipelineConfig,
    check_components,
    load_model,
    read_pipeline_config,
)
from megafusion.generate.generation import Generation, check_request
from megafusion.generate.lora import LoraPipeline
from megafusion.generate.openers import openers
from megafusion.generate.row import Begin, Part, Request
from megafusion.images.codec import ImageCodec
from megafusion.images.sizes import Size, format_sizes
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import SamplingConfig
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import expand_path, new_folder

ImageInput = Image.Image | str | Path
OutputType = Literal["pil", "np", "pt", "latent"]
MAX_IMAGES_PER_PROMPT = 1024


@dataclass(frozen=True)
class TransfusionPipelineOutput:
    """images: a list of PIL images; or, by output_type: np, float32 [N, H, W, 3] in [0, 1]; pt, the same as a
    tensor [N, 3, H, W]; latent, normalized latents [N, C, h, w]. Those need images of one size."""

    images: Any


class TransfusionPipeline(LoraPipeline):
    """A trained model with its tokenizer and autoencoder; takes and returns PIL images and strings.

    >>> pipeline = TransfusionPipeline.from_pretrained("runs/quickstart")
    >>> image = pipeline("red apple, 3d style").images[0]
    >>> caption, = pipeline.describe([image])
    """

    def __init__(self, model: Transfusion, tokenizer: Tokenizer, codec: ImageCodec, config: PipelineConfig):
        self.model, self.tokenizer, self.codec, self.config = model.eval(), tokenizer, codec, config
        check_components(config.model, tokenizer, codec)

    @property
    def device(self) -> torch.device:
        """Device of the model's weights."""
        return self.model.tail.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model's weights."""
        return self.model.tail.head.weight.dtype

    def to(self, *args: Any, **kwargs: Any) -> "TransfusionPipeline":
        """Move model and autoencoder to a device, a dtype or both, in place; arguments as of nn.Module.to."""
        for module in (self.model, self.codec.model):
            nn.Module.to(module, *args, **kwargs)  # diffusers' own warns of an empty list of layers
        return self

    def enable_vae_slicing(self) -> None:
        """Decode images one by one from now on: as much memory as one image takes, whatever the batch."""
        self.codec.use_slicing = True

    def disable_vae_slicing(self) -> None:
        """Decode the images of a batch together, as by default."""
        self.codec.use_slicing = False

    @classmethod
    def from_pretrained(
        cls, path: Path | str, *, torch_dtype: torch.dtype | str | None = None
    ) -> "TransfusionPipeline":
        """Open a pipeline folder, a run (its pipeline, else its newest checkpoint) or a checkpoint.

        torch_dtype: of all weights; by default as saved. Nothing that a file names is run. Raises UserError
        for any other path or dtype.
        """
        path = Path(expand_path(path))
        dtype = None if torch_dtype is None else given.as_dtype(torch_dtype)
        pipeline = cls._open(path)
        return pipeline if dtype is None else pipeline.to(dtype)

    @classmethod
    def _open(cls, path: Path) -> "TransfusionPipeline":
        for folder in (path, path / "pipeline"):
            if (folder / CONFIG).is_file():
                config = read_pipeline_config(folder)
                model, tokenizer = load_model(folder, config), Tokenizer.from_pretrained(folder)
                return cls(model, tokenizer, ImageCodec.from_pretrained(folder / "vae"), config)
        for opener in openers:
            if pipeline := opener(path):
                return pipeline
        raise UserError(f"{path}: neither a pipeline folder, a run folder nor a checkpoint (step-*)")

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json, model.safetensors, vae/ and the tokenizer, then rename the folder into place.

        Raises UserError if the folder holds anything but an older pipeline, or the disk is full.
        """
        with new_folder(Path(expand_path(folder)), WEIGHTS) as partial:
            (partial / CONFIG).write_text(self.config.model_dump_json(indent=1) + "\n")
            weights = {name: weight.contiguous() for name, weight in self.model.weights().items()}
            save_file(weights, partial / WEIGHTS)
            self.tokenizer.save_pretrained(partial)
            self.codec.model.save_pretrained(partial / "vae")

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: ImageInput | Sequence[ImageInput] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callable[..., dict | None] | None = None,
        *,
        image_guidance_scale: float | None = None,
        sampling: SamplingConfig | None = None,
    ) -> TransfusionPipelineOutput:
        """Draw images as a diffusers pipeline does: one prompt or several, each with a number of images.

        image: one for each prompt, or one for all, that the prompt tells how to edit. height, width: one of
        `sizes`, in pixels; by default the model chooses. generator: of the noise, one, which the images take
        in order, or one for each image; by default seeds from PyTorch's global generator.
        callback_on_step_end(pipeline, step, timestep, {"latents": ...}) may return other latents in the same
        form.
        The other options replace those of `sampling`. Raises UserError for a value that cannot be used.
        """
        call = 'pipeline("a prompt"), or pipeline.generate([["text", image, ...]]) for answers of any kind'
        prompts = given.as_list([prompt] if isinstance(prompt, str) else prompt, (str,), call)
        if empty := [number for number, text in enumerate(prompts) if not text.strip()]:
            raise UserError(f"prompt {empty[0]} is empty; give a text, or call draw to draw without one")
        if output_type not in get_args(OutputType):
            raise UserError(f"output_type={output_type!r}: give one of {', '.join(get_args(OutputType))}")
        if (height is None) != (width is None):
            raise UserError(f"height={height!r} and width={width!r}: give both or neither")
        copies = given.as_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES_PER_PROMPT)
        images = (
            given.one_or_each("image", image, (Image.Image, str, Path), len(prompts))
            if image is not None
            else ()
        )
        documents: list[list[Part]] = [[text] for text in prompts]
        for document, each in zip(documents, images, strict=False):
            document.insert(0, given.as_image(each))
        changes = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "image_guidance_scale": image_guidance_scale,
        }
        sampling = self._sampling(sampling, max_new_tokens=0, **changes)
        samplings = [sampling] * len(prompts)
        if negative_prompt is not None:
            texts = given.one_or_each("negative_prompt", negative_prompt, str, len(prompts))
            samplings = [sampling.model_copy(update={"negative_prompt": text}) for text in texts]
        num = len(prompts) * copies
        noise: Sequence[Any] = [None] * num
        if generator is not None:
            noise = given.one_or_each("generator", generator, torch.Generator, num)
        seeds = torch.randint(given.MAX_SEED, (num,)).tolist() if generator is None else [0] * num
        size = None if height is None else self.size_index((height, width))
        requests = [
            Request(documents[i // copies], samplings[i // copies], seeds[i], "image", 1, size, noise[i])
            for i in range(num)
        ]
        if not requests:
            return TransfusionPipelineOutput([])
        generation = self.generation(requests, streams_text=False)
        latents: dict[int, Tensor] = {}
        for event in generation:
            if isinstance(event, ImageStep):
                if callback_on_step_end:
                    now = {"latents": event.state.latents}
                    changed = callback_on_step_end(self, event.state.step - 1, event.state.timestep, now)
                    event.state.latents = given.as_latents(changed, now["latents"])
                latents.update(zip(event.rows, event.state.latents, strict=True))
        if output_type == "pil":
            return TransfusionPipelineOutput([image for (image,) in generation.outputs])
        return TransfusionPipelineOutput(self._tensors([latents[row] for row in range(num)], output_type))

    def _tensors(self, latents: list[Tensor], output_type: OutputType) -> Tensor | np.ndarray:
        if len({each.shape for each in latents}) > 1:
            raise UserError(
                f"output_type={output_type}: the images have several sizes; give height and width"
            )
        stacked = torch.stack(latents)
        if output_type == "latent":
            return stacked
        pixels = self.codec.decode(self.codec.denormalize(stacked)).float() / 2 + 0.5
        return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).cpu().numpy()

    def draw(
        self,
        captions: Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        size: Size | None = None,
        sampling: SamplingConfig | None = None,
        callback: Callable[[Event], Any] | None = None,
    ) -> list[Image.Image]:
        """Draw one image per caption; the r-th starts from the noise of seed + r. Others: see `generate`."""
        prompts = [[caption] for caption in given.as_list(captions, (str,), 'draw(["a caption", ...])')]
        return self._draw(prompts, seed, size, sampling, callback)

    def edit(
        self,
        image: ImageInput,
        instruction: str,
        *,
        seed: int = 0,
        size: Size | None = None,
        sampling: SamplingConfig | None = None,
        callback: Callable[[Event], Any] | None = None,
    ) -> Image.Image:
        """Draw an image anew as an instruction tells, from the document that edits are trained on.

        Guidance on the given image: `sampling.image_guidance_scale`. Others: see `generate`.
        """
        if not isinstance(instruction, str) or not instruction.strip():
            raise UserError(f"instruction={instruction!r:.80}: give a text, as edit(image, 'make it blue')")
        return self._draw([[given.as_image(image), instruction]], seed, size, sampling, callback)[0]

    def _draw(
        self, prompts: Sequence, seed: Any, size: Any, sampling: Any, callback: Any
    ) -> list[Image.Image]:
        options = {"begin": "image", "seed": seed, "size": size, "callback": callback}
        image_only = self._sampling(sampling, max_new_tokens=0)
        outputs: list[list[Any]] = self.generate(prompts, sampling=image_only, **options)
        return [image for (image,) in outputs]

    def describe(
        self,
        images: Sequence[ImageInput],
        *,
        seed: int | Sequence[int] = 0,
        sampling: SamplingConfig | None = None,
    ) -> list[str]:
        """Caption each image (PIL or the path of one) with at least one token; greedily by default."""
        kinds = (Image.Image, str, Path)
        checked = given.as_list(images, kinds, "describe([image, ...])")
        prompts = [[given.as_image(image)] for image in checked]
        outputs: list[list[Any]] = self.generate(
            prompts, begin="text", max_images=0, seed=seed, sampling=sampling
        )
        return [" ".join(output).strip() for output in outputs]

    def chat(self, document: str | Sequence[Part | Path], **options: Any) -> list[Part]:
        """Answer one document of texts and images (a Path is an image's); options: of `generate`."""
        (answer,) = self.generate([[document] if isinstance(document, str) else document], **options)
        return answer

    def generate(
        self,
        prompts: Sequence[Sequence[Part | Path]],
        *,
        begin: Begin = "free",
        max_images: int = 1,
        seed: int | Sequence[int] = 0,
        size: Size | None = None,
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        callback: Callable[[Event], Any] | None = None,
    ) -> list[list[Part]]:
        """Continue prompts of texts and images in any order with texts and images.

        Texts are cleaned as captions were. A prompt and its answer end at the model's sequence_length.
        begin: "image" draws first; "text" writes at least one token (without it the model may end at once,
        because captions were dropped in training); "free" leaves the first token to the model.
        max_images: limit of images per output. seed: of each prompt; an integer is that of the first, and the
        r-th has seed + r. A prompt's answer depends on its own seed alone, whatever is beside it.
        size: height and width in pixels of drawn images, one of `sizes`; None lets the model choose by its
        begin-of-image token. sampling: of all, or one for each prompt. callback: takes each event.
        Raises UserError for a prompt that is too long, or an argument that is not one of these.
        """
        requests = self.requests(
            prompts, begin=begin, max_images=max_images, seed=seed, size=size, sampling=sampling
        )
        if not requests:
            return []
        generation = self.generation(requests, streams_text=callback is not None)
        for event in generation:
            if callback:
                callback(event)
        return generation.answers()

    def stream(
        self,
        prompts: Sequence[Sequence[Part | Path]],
        *,
        preview_every: int = 0,
        begin: Begin = "free",
        max_images: int = 1,
        seed: int | Sequence[int] = 0,
        size: Size | None = None,
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
    ) -> Generation:
        """Generate as `generate` does, event by event: iterate to go on, stop iterating to cancel.

        preview_every: denoising steps between previews of images; 0 for none. Its `cancel(row)` ends one row,
        and `answers()` has what there is so far.
        """
        requests = self.requests(
            prompts,
            begin=begin,
            max_images=max_images,
            seed=seed,
            size=size,
            sampling=sampling,
            preview_every=preview_every,
        )
        if not requests:
            raise UserError("prompts is empty; give at least one")
        return self.generation(requests)

    def requests(
        self,
        prompts: Any,
        *,
        begin: Any = "free",
        max_images: Any = 1,
        seed: Any = 0,
        size: Any = None,
        sampling: Any = None,
        preview_every: Any = 0,
    ) -> list[Request]:
        """A request for each prompt, with the arguments of `stream`, validated. Raises UserError."""
        every = given.as_integer("preview_every", preview_every, 0, 2**31 - 1)
        rows = given.as_documents(prompts, 'generate([["text", image, ...], ...])')
        begin, seeds = given.as_begin(begin), given.as_seeds(seed, len(rows))
        max_images = given.as_integer("max_images", max_images, 1 if begin == "image" else 0, 2**31 - 1)
        index = None if size is None else self.size_index(size)
        if not isinstance(sampling, list | tuple):
            samplings = [self._sampling(sampling)] * len(rows) if rows else []
        elif len(sampling) == len(rows):
            samplings = [self._sampling(each) for each in sampling]
        else:
            raise UserError(f"sampling has {len(sampling)} values for {len(rows)} prompts; give one each")
        return [
            Request(row, own, row_seed, begin, max_images, index, preview_every=every)
            for row, own, row_seed in zip(rows, samplings, seeds, strict=True)
        ]

    def check(self, request: Request, name: str = "prompt") -> int:
        """Positions of a request's prompt. Raises UserError where it leaves no room for an answer."""
        return check_request(request, name, self.tokenizer, self.config.model, self.config.sequence_length)

    def generation(self, requests: Sequence[Request], *, streams_text: bool = True) -> Generation:
        """Generate for requests that may differ in everything, together; see `stream`."""
        parts = self.model, self.tokenizer, self.codec
        return Generation(*parts, requests, self.config.sequence_length, streams_text)

    @property
    def sizes(self) -> list[Size]:
        """Heights and widths of the model's images, in pixels."""
        return list(self.config.model.image_sizes)

    def size_index(self, size: Any) -> int:
        """Index of a size in pixels. Raises UserError for a size that the model does not have."""
        if not isinstance(size, tuple | list) or tuple(size) not in self.sizes:
            raise UserError(
                f"size {size!r:.80}: the model has {format_sizes(self.sizes)} (height x width, in pixels); "
                "choose one of these"
            )
        return self.sizes.index((size[0], size[1]))

    def _sampling(self, sampling: SamplingConfig | None, **changes: Any) -> SamplingConfig:
        """The options of a call, by default the model's, with changes that are not None, validated.

        Raises UserError for those that cannot be used.
        """
        sampling = self.config.sampling if sampling is None else sampling
        if not isinstance(sampling, SamplingConfig):
            raise UserError(f"sampling={sampling!r:.80}: give a SamplingConfig, as pipeline.config.sampling")
        sampling = sampling.model_copy(update={k: v for k, v in changes.items() if v is not None})
        if reason := self.model.objective.noise_process.unsupported_reason(sampling):
            raise UserError(reason)
        return sampling
