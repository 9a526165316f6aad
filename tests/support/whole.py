"""What tests of generation hold the cache against: the model over whole rows, and each row alone."""

import torch

from megafusion.generate.generation import Generation
from megafusion.generate.pipeline import PipelineConfig, TransfusionPipeline
from megafusion.model.initialize import initialize
from megafusion.model.transformer import block_context
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import SamplingConfig
from megafusion.sequence.packing import SequenceShape, collate, pack_row
from tests.support.segments import flat_document

CAPTIONS = ["apple", "red apple, 3d style", "x", "a much longer caption than the others", "pizza", "cat face"]


def make_pipeline(run_config, tokenizer, codec, num_steps: int, **changes) -> TransfusionPipeline:
    """A pipeline with a random model; `changes` are of ModelConfig."""
    torch.manual_seed(0)
    model_config = run_config.model.model_copy(update=changes)
    model = Transfusion(model_config, run_config.objective)
    initialize(model, model_config.num_layers, seed=1)
    with torch.no_grad():  # larger weights, so that what is seen matters
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    config = PipelineConfig(
        model=model_config,
        objective=run_config.objective,
        sampling=SamplingConfig(sampler="ddim", num_inference_steps=num_steps, max_new_tokens=5),
    )
    return TransfusionPipeline(model, tokenizer, codec, config)


def prompt_batch(pipeline, segments_of_rows):
    """A batch of a document a row, and their lengths without eos."""
    model = pipeline.config.model
    documents = [flat_document(s, pipeline.tokenizer, model.patches) for s in segments_of_rows]
    length = max(map(len, documents))
    shape = SequenceShape(length, 3, model.patches, model.latent_channels, model.latent_sizes)
    return collate([pack_row([d], shape) for d in documents]), torch.tensor([len(d) - 1 for d in documents])


@torch.no_grad()
def full_hidden(model, batch):
    """Hidden states of whole rows, and the skips."""
    timesteps = model.objective.noise_process.timesteps(batch.t)
    x, skips = model.stem(batch.tokens, batch.patch_index, batch.latents, timesteps, batch.image_size)
    context = block_context(model.config, batch.intervals(), batch.positions, x.dtype)
    for block in model.blocks:
        x = block(x, context)
    return model.tail(x), skips


def free_answers(pipeline, captions, sampling, seed: int, max_images: int) -> list[list]:
    """What is said to each caption, as tokens and as what `pipeline.pictures` makes of latents."""
    generation = Generation(pipeline, [[c] for c in captions], sampling, seed, max_images, None)
    generation.run("free")
    return generation.answers


def assert_as_if_alone(pipeline, answers, sampling, seed: int, max_images: int) -> None:
    """Each caption's answer among the others is the one that it gets alone."""
    for row, (caption, answer) in enumerate(zip(CAPTIONS, answers, strict=True)):
        (alone,) = free_answers(pipeline, [caption], sampling, seed + row, max_images)
        assert len(alone) == len(answer)
        for a, b in zip(alone, answer, strict=True):
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-3, atol=1e-3)
