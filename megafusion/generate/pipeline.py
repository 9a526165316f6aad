"""TransfusionPipeline: captions to images, images to captions, and texts and images in any order."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from megafusion.errors import UserError
from megafusion.generate import arguments as given
from megafusion.generate.call import (
    CALLBACK_TENSOR_INPUTS,
    OutputType,
    TransfusionPipelineOutput,
    as_images,
    call_requests,
    check_output_type,
    check_tensor_inputs,
    run_steps,
)
from megafusion.generate.events import Event
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
from megafusion.generate.stream import Stream
from megafusion.images.codec import ImageCodec
from megafusion.images.sizes import Size, format_sizes
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import SamplingConfig
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import expand_path, new_folder

ImageInput = Image.Image | str | Path
Samplings = SamplingConfig | Sequence[SamplingConfig] | None


class TransfusionPipeline(LoraPipeline):
    """A trained model with its tokenizer and autoencoder; takes and returns PIL images and strings.

    >>> pipeline = TransfusionPipeline.from_pretrained("runs/quickstart")
    >>> image = pipeline("red apple, 3d style").images[0]
    >>> caption, = pipeline.describe([image])
    """

    def __init__(self, model: Transfusion, tokenizer: Tokenizer, codec: ImageCodec, config: PipelineConfig):
        self.model, self.tokenizer, self.codec, self.config = model.eval(), tokenizer, codec, config
        self._interrupt = False
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
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSOR_INPUTS,
        latents: Tensor | None = None,
        return_dict: bool = True,
        image_guidance_scale: float | None = None,
        sampling: Samplings = None,
    ) -> Any:
        """Draw images as a diffusers pipeline does: one prompt or several, each with a number of images.

        image: one for each prompt, or one for all, that the prompt tells how to edit. height, width: of one
        of `sizes`, in pixels, or either where that names one; by default the model chooses. generator: of the
        noise, one, which the images take in order, or one for each image; by default seeds from PyTorch's
        global generator. latents: float32 [N, C, h, w], unit normal noise to begin with in its place.
        callback_on_step_end(pipeline, step, timestep, {"latents": ...}) may return other latents in the same
        form, or set `pipeline._interrupt` to end with the images as they are.
        The other options replace those of `sampling`. Gives a TransfusionPipelineOutput, or without
        return_dict a tuple of its images.
        Raises UserError for a value that cannot be used.
        """
        self._interrupt = False
        check_output_type(output_type)
        check_tensor_inputs(callback_on_step_end_tensor_inputs)
        changes = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "image_guidance_scale": image_guidance_scale,
        }
        size, noise = (height, width), (generator, latents)
        requests = call_requests(
            self, prompt, image, size, num_images_per_prompt, *noise, negative_prompt, sampling, changes
        )
        images: Any = []
        if requests:
            generation = self.generation(requests, streams_text=False)
            last = run_steps(self, generation, callback_on_step_end, callback_on_step_end_tensor_inputs)
            drawn = [image for (image,) in generation.outputs]
            images = as_images(self, drawn, [last[row] for row in range(len(requests))], output_type)
        return TransfusionPipelineOutput(images) if return_dict else (images,)

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, as in diffusers: the call ends with that step."""
        return self._interrupt

    def draw(
        self,
        captions: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        size: Size | None = None,
        sampling: Samplings = None,
        callback: Callable[[Event], Any] | None = None,
    ) -> list[Image.Image]:
        """Draw an image a caption; the r-th starts from the noise of seed + r. Others: see `generate`."""
        prompts = [[caption] for caption in given.one_or_list(captions, (str,), 'draw(["a caption", ...])')]
        return self._draw(prompts, seed, size, sampling, callback)

    def edit(
        self,
        image: ImageInput,
        instruction: str,
        *,
        seed: int = 0,
        size: Size | None = None,
        sampling: Samplings = None,
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
        image_only = self.samplings(sampling, len(prompts), max_new_tokens=0)
        outputs: list[list[Any]] = self.generate(prompts, sampling=image_only, **options)
        return [image for (image,) in outputs]

    def describe(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        seed: int | Sequence[int] = 0,
        sampling: Samplings = None,
    ) -> list[str]:
        """Caption each image (PIL or the path of one) with at least one token; greedily by default."""
        checked = given.one_or_list(images, given.IMAGE_KINDS, "describe([image, ...])")
        prompts = [[given.as_image(image)] for image in checked]
        outputs: list[list[Any]] = self.generate(
            prompts, begin="text", max_images=0, seed=seed, sampling=sampling
        )
        return [" ".join(output).strip() for output in outputs]

    def chat(self, document: Part | Path | Sequence[Part | Path], **options: Any) -> list[Part]:
        """Answer one document of texts and images (a Path is an image's); options: of `generate`."""
        (answer,) = self.generate(
            document if isinstance(document, given.PART_KINDS) else [document], **options
        )
        return answer

    def generate(
        self,
        prompts: Part | Path | Sequence[Sequence[Part | Path]],
        *,
        begin: Begin = "free",
        max_images: int = 1,
        seed: int | Sequence[int] = 0,
        size: Size | None = None,
        sampling: Samplings = None,
        callback: Callable[[Event], Any] | None = None,
    ) -> list[list[Part]]:
        """Continue prompts of texts and images in any order with texts and images.

        prompts: several documents, each a list of texts, images and Paths of images; or a single part.
        Texts are cleaned as captions were. A prompt and its answer end at the model's sequence_length.
        begin: "image" draws first; "text" writes at least one token (without it the model may end at once,
        because captions were dropped in training); "free" leaves the first token to the model.
        max_images: limit of images per output. seed: of each prompt; an integer is that of the first, and the
        r-th has seed + r. A prompt's answer depends on its own seed alone, whatever is beside it.
        size: height and width in pixels of drawn images, one of `sizes`; None lets the model choose by its
        begin-of-image token. sampling: of all, or one for each prompt; what it does not set is as the
        pipeline's own. callback: takes each event.
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
        prompts: Part | Path | Sequence[Sequence[Part | Path]],
        *,
        preview_every: int = 0,
        begin: Begin = "free",
        max_images: int = 1,
        seed: int | Sequence[int] = 0,
        size: Size | None = None,
        sampling: Samplings = None,
    ) -> Stream:
        """Generate as `generate` does, event by event: iterate to go on, stop iterating to cancel.

        preview_every: denoising steps between previews of images; 0 for none. Its `cancel(row)` ends one row,
        `close()` all, and `answers()` has what there is so far.
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
        return Stream(self.generation(requests))

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
        samplings = self.samplings(sampling, len(rows))
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

    def samplings(self, sampling: Any, num: int, **changes: Any) -> list[SamplingConfig]:
        """The options of so many prompts: of one SamplingConfig for all, or a list of one each.

        What it does not set is as the pipeline's own; changes that are not None replace it. Raises UserError
        for options that cannot be used.
        """
        if not isinstance(sampling, list | tuple):
            return [self._sampling(sampling, changes)] * num if num else []
        if len(sampling) != num:
            raise UserError(f"sampling has {len(sampling)} values for {num} prompts; give one each")
        return [self._sampling(each, changes) for each in sampling]

    def _sampling(self, sampling: Any, changes: dict[str, Any]) -> SamplingConfig:
        if not isinstance(sampling, SamplingConfig | None):
            raise UserError(f"sampling={sampling!r:.80}: give a SamplingConfig, as pipeline.config.sampling")
        own = sampling and {name: getattr(sampling, name) for name in sampling.model_fields_set}
        changed = (own or {}) | {name: value for name, value in changes.items() if value is not None}
        merged = self.config.sampling.model_copy(update=changed)
        if reason := self.model.objective.noise_process.unsupported_reason(merged):
            raise UserError(reason)
        return merged
