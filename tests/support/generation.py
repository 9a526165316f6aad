"""References for tests of generation: one pass over whole rows without a cache, and each row alone."""

import torch

from megafusion.generate.decoder import Guide
from megafusion.generate.folder import PipelineConfig
from megafusion.generate.generation import Generation
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.generate.row import Request
from megafusion.model.rope import rope_positions
from megafusion.model.transformer import block_context
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import SamplingConfig
from megafusion.sequence.packing import SequenceShape, collate, pack_row
from tests.support.segments import flat_document
from tests.support.weights import initialize

CAPTIONS = ["apple", "red apple, 3d style", "x", "a much longer caption than the others", "pizza", "cat face"]


def make_pipeline(run_config, tokenizer, codec, num_steps: int, **changes) -> TransfusionPipeline:
    """A pipeline with a random model; `changes` are of ModelConfig."""
    torch.manual_seed(0)
    model_config = run_config.model.model_copy(update=changes)
    model = Transfusion(model_config, run_config.objective)
    initialize(model, model_config.num_layers, seed=1)
    with torch.no_grad():  # larger weights, so that each visible key matters
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    config = PipelineConfig(
        model=model_config,
        objective=run_config.objective,
        sampling=SamplingConfig(sampler="ddim", num_inference_steps=num_steps, max_new_tokens=5),
    )
    return TransfusionPipeline(model, tokenizer, codec, config)


def prompt_batch(pipeline, segments_of_rows):
    """A batch of one document per row, and their lengths without eos."""
    model = pipeline.config.model
    causal = model.image_attention == "causal"
    documents = [flat_document(s, pipeline.tokenizer, model.patches, causal) for s in segments_of_rows]
    length = max(map(len, documents))
    shape = SequenceShape(length, 3, model.patches, model.latent_channels, model.latent_sizes)
    return collate([pack_row([d], shape) for d in documents]), torch.tensor([len(d) - 1 for d in documents])


@torch.no_grad()
def full_hidden(model, batch):
    """Hidden states of whole rows, and the skips."""
    timesteps = model.objective.noise_process.timesteps(batch.t)
    x, skips = model.stem(batch.tokens, batch.patch_index, batch.latents, timesteps, batch.image_size)
    positions = rope_positions(model.config, batch.positions, batch.patch_index, batch.image_size)
    context = block_context(model.config, batch.intervals(), positions, x.dtype, batch.patch_index >= 0)
    for block in model.blocks:
        x = block(x, context)
    return model.tail(x), skips


def draw_latents(decoder, cache, unconditional, noise, sampling) -> torch.Tensor:
    """Latents after the last denoising step, with guidance away from one context."""
    guides = [Guide(unconditional, sampling.guidance_scale)]
    *_, last = decoder.denoise(cache, guides, noise, sampling)
    return last.latents


def run_generation(pipeline, captions, sampling, seed: int, max_images: int, begin="free") -> list[list]:
    """Outputs of `Generation` for captions, with token ids that are not decoded to text."""
    parts = pipeline.model, pipeline.tokenizer, pipeline.codec
    generation = Generation(
        *parts, [Request([c], sampling, seed + row, begin, max_images) for row, c in enumerate(captions)]
    )
    generation.run()
    return generation.outputs


def assert_near(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for rounding, which is of the size of the largest number: guidance takes differences."""
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * float(b.abs().max()))


def assert_batch_invariant(pipeline, outputs, sampling, seed: int, max_images: int) -> None:
    """Each caption's output in a batch equals its output in a batch of one."""
    for row, (caption, output) in enumerate(zip(CAPTIONS, outputs, strict=True)):
        (alone,) = run_generation(pipeline, [caption], sampling, seed + row, max_images)
        assert len(alone) == len(output)
        for a, b in zip(alone, output, strict=True):
            assert_near(torch.as_tensor(a), torch.as_tensor(b))
