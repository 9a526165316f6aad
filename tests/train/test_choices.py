"""Each choice of the recipe: a packed row is its documents, cached is uncached, resumed is uninterrupted.

`tests/sequence/test_clean_context.py` has the first two for clean context, which generation has no part in.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from megafusion.generate.decoder import Decoder
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.model.transfusion import Transfusion
from megafusion.sequence.document import FlatDocument, ImageSegment
from megafusion.sequence.packing import PackedBatch, SequenceShape, collate, pack_row, with_counts
from megafusion.train.config import RunConfig
from tests.data.test_pixels import write_pixels
from tests.support.generation import full_hidden, make_pipeline, prompt_batch
from tests.support.marks import full
from tests.support.rows import latents_as_features
from tests.support.runs import assert_resumes, parsed
from tests.support.segments import flat_document, image_of
from tests.support.weights import initialize
from tests.train.test_alignment import save_model

ALONE: dict[str, dict] = {
    "flow": {"objective": {"noise_process": {"kind": "flow", "prediction_type": "sample"}}},
    "modality-all": {"model": {"modality_weights": "all", "qk_norm": True, "attention_bias": True}},
    "modality-feed-forward": {"model": {"modality_weights": "feed_forward"}},
    "rope-2d": {"model": {"image_rope": "2d"}},
    "time-per-document": {"data": {"t_per": "document"}},
    "clean-context": {"data": {"clean_context": True, "sequence_length": 128}},
    "alignment": {"objective": {"alignment": {"model": "vision", "feature_size": 24, "layer": 1}}},
}
TOGETHER = ["flow", "modality-all", "rope-2d", "time-per-document", "clean-context"]
CHOICES = {name: [name] for name in ALONE}
CHOICES |= {"together": TOGETHER, "together-aligned": [*TOGETHER, "alignment"]}
OF_MODEL = ["together-aligned", *(name for name in ALONE if "data" not in ALONE[name])]
"""With clean context left out."""


def with_choices(values: dict, names: list[str]) -> dict:
    for section, options in (item for name in names for item in ALONE[name].items()):
        values = values | {section: values.get(section, {}) | options}
    return values


@pytest.mark.parametrize("name", ["together", *full("together-aligned", *ALONE)])
def test_a_run_resumes_bit_for_bit_and_draws(run_values, tokenizer, tmp_path, name):
    values = with_choices(run_values, CHOICES[name])
    if "alignment" in CHOICES[name]:
        vision = save_model(tmp_path / "vision", Dinov2Config, Dinov2Model)
        alignment = values["objective"]["alignment"] | {"model": str(vision)}
        values["objective"] = values["objective"] | {"alignment": alignment}
        pixels = write_pixels(tmp_path / "pixels", 40, tokenizer.hash)
        values["data"]["sources"]["pairs"]["path"] = str(pixels)
    run = assert_resumes(values, tmp_path / "again")
    (image,) = TransfusionPipeline.from_pretrained(run)("apple", num_inference_steps=2).images
    assert image.size == (32, 32)


LAYOUT = [[3, 0, 2, 0], [0, 4], [5], [0]]
"""Documents as lengths of texts, 0 for an image."""


def noised_image(random: np.random.Generator) -> ImageSegment:
    latents, noise = random.standard_normal((2, 4, 8, 8), dtype=np.float32)
    return image_of(latents, noise, t=int(random.integers(100, 900)) / 1000)


def model_config(values: dict, name: str) -> RunConfig:
    return parsed(with_choices(values, [each for each in CHOICES[name] if each != "clean-context"]))


def row_of(documents: list[FlatDocument], config: RunConfig) -> PackedBatch:
    """A packed row; where there is alignment, with latents as features."""
    slots = max(1, sum(len(each.images) for each in documents))
    of_model = config.model.patches, config.model.latent_channels, config.model.latent_sizes
    batch = collate([pack_row(documents, SequenceShape(sum(map(len, documents)), slots, *of_model))])
    if config.objective.alignment:
        batch.features = F.pad(latents_as_features(batch), (0, 8))
    return batch


def losses_and_gradients(model: Transfusion, batch: PackedBatch) -> list[Tensor]:
    model.zero_grad()
    losses = model(batch)
    losses.total.backward()
    gradients = (torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())
    return [torch.stack(losses).detach(), *gradients]


@pytest.mark.parametrize("name", OF_MODEL)
def test_a_packed_row_is_its_documents(run_values, tokenizer, name):
    config, random = model_config(run_values, name), np.random.default_rng(0)
    model = Transfusion(config.model, config.objective)
    initialize(model, config.model.num_layers, seed=1)
    documents = [
        flat_document(
            [random.integers(3, 60, n) if n else noised_image(random) for n in lengths],
            tokenizer,
            config.model.patches,
        )
        for lengths in LAYOUT
    ]
    row = row_of(documents, config)
    whole = losses_and_gradients(model, row)
    alone = [with_counts(row_of([each], config), row.counts()) for each in documents]
    parts = zip(*(losses_and_gradients(model, each) for each in alone), strict=True)
    torch.testing.assert_close(whole, [sum(part) for part in parts], rtol=1e-5, atol=1e-5)
    assert (whole[0][2] > 0) == ("alignment" in CHOICES[name])


@pytest.mark.parametrize("name", OF_MODEL)
def test_cached_is_uncached(run_values, tokenizer, codec, name):
    """A text, an image and a text read at once; then a token; then the prediction of a noised image."""
    config, random = model_config(run_values, name), np.random.default_rng(0)
    pipeline = make_pipeline(config, tokenizer, codec, num_steps=2)
    model, decoder, process = pipeline.model, Decoder(pipeline.model), pipeline.model.objective.noise_process
    before = [random.integers(3, 60, 4), noised_image(random), random.integers(3, 60, 3)]
    drawn = noised_image(random)
    batch, _ = prompt_batch(pipeline, [[*before, drawn]])
    hidden, skips = full_hidden(model, batch)
    prompt, length = prompt_batch(pipeline, [before])
    cache, begins = decoder.new_cache(1, 64), int(length)
    found = [decoder.read_prompts(cache, prompt, length)]
    found.append(decoder.read_tokens(cache, torch.tensor([tokenizer.boi])))
    latents = torch.from_numpy(drawn.latents)[None]
    with torch.no_grad():
        expected = model.tail.head(hidden[0, begins - 1 : begins + 1])
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-4)
        timesteps = process.timesteps(batch.t)
        images = model.tail.images(hidden, batch.image_start, timesteps, skips, batch.image_size)
        image = decoder._predict(cache, decoder._image_context(cache, latents), latents, timesteps[0, 1])
    torch.testing.assert_close(image[0], images[0, 1], rtol=1e-4, atol=1e-4)
