"""Guidance: on text and images, away from a negative prompt, in an interval, rescaled; written out."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image

from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.objective.sampler import rescale_guidance
from tests.support.generation import assert_near, full_hidden, make_pipeline, prompt_batch
from tests.support.segments import image_of


@pytest.fixture(params=["linear", "unet"])
def pipeline(request, run_config, tokenizer, codec, monkeypatch) -> TransfusionPipeline:
    made = make_pipeline(run_config, tokenizer, codec, num_steps=4, adapter=request.param, unet_channels=4)
    monkeypatch.setattr(codec, "decode_images", list)  # images are latents
    return made


def pil_image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def predictions(pipeline, contexts, latents, timestep, t) -> list[torch.Tensor]:
    """The model's predictions of an image after each context, in one pass without a cache."""
    process, found = pipeline.model.objective.noise_process, []
    for segments in contexts:
        batch, _ = prompt_batch(pipeline, [[*segments, image_of(latents.numpy(), t=t)]])
        hidden, skips = full_hidden(pipeline.model, batch)
        timesteps = process.timesteps(batch.t)
        with torch.no_grad():
            images = pipeline.model.tail.images(hidden, batch.image_start, timesteps, skips, batch.image_size)
        found.append(images[0, sum(not isinstance(s, np.ndarray) for s in segments)])
    return found


def denoise(pipeline, sampling, contexts, combine, seed=3) -> torch.Tensor:
    sampler = pipeline.model.objective.noise_process.sampler(sampling)
    latents = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed))
    for timestep, t in zip(sampler.timesteps, sampler.times.tolist(), strict=True):
        prediction = combine(predictions(pipeline, contexts, latents, timestep, t), t)
        latents = sampler.step(prediction, timestep, latents).prev_sample
    return latents


def encode(pipeline, text: str) -> np.ndarray:
    return np.array(pipeline.tokenizer.encode(text))


@pytest.mark.parametrize("negative", ["", "grey sky", "grey sky" * 20])
def test_an_edit_is_guided_by_its_text_and_by_its_image(pipeline, codec, negative):
    """BAGEL's two scales: from no text to all, then from no image to that."""
    changes = {"guidance_scale": 2.5, "image_guidance_scale": 1.5, "negative_prompt": negative}
    sampling, shown = pipeline.config.sampling.model_copy(update=changes), pil_image(0)
    found = pipeline.edit(shown, "make it blue", seed=3, sampling=sampling)
    given = image_of(codec.encode_images([shown], (32, 32))[0].numpy())
    text = encode(pipeline, "make it blue")
    without_text = [given, encode(pipeline, negative)] if negative else [given]

    def combine(each, _t):
        whole, no_text, no_image = each
        by_text = no_text + 2.5 * (whole - no_text)
        return no_image + 1.5 * (by_text - no_image)

    expected = denoise(pipeline, sampling, [[given, text], without_text, [text]], combine)
    assert_near(found, expected)


@pytest.mark.parametrize(("text_scale", "image_scale"), [(1.0, 1.7), (2.0, 1.0)])
def test_a_scale_of_one_turns_its_guidance_off(pipeline, codec, text_scale, image_scale):
    changes = {"guidance_scale": text_scale, "image_guidance_scale": image_scale}
    sampling, shown = pipeline.config.sampling.model_copy(update=changes), pil_image(0)
    found = pipeline.edit(shown, "make it blue", seed=3, sampling=sampling)
    given = image_of(codec.encode_images([shown], (32, 32))[0].numpy())
    text = encode(pipeline, "make it blue")
    other = [text] if text_scale == 1 else [given]
    scale = max(text_scale, image_scale)
    expected = denoise(
        pipeline, sampling, [[given, text], other], lambda each, _: each[1] + scale * (each[0] - each[1])
    )
    assert_near(found, expected)


def test_guidance_leads_away_from_a_negative_prompt_within_its_interval(pipeline):
    changes = {"negative_prompt": "blue", "guidance_interval": [0.3, 0.8]}
    sampling = pipeline.config.sampling.model_copy(update=changes)
    (found,) = pipeline.draw(["red apple"], seed=3, sampling=sampling)
    scale, guided = sampling.guidance_scale, []

    def combine(each, t):
        guided.append(0.3 <= t <= 0.8)
        return each[1] + scale * (each[0] - each[1]) if guided[-1] else each[0]

    contexts = [[encode(pipeline, "red apple")], [encode(pipeline, "blue")]]
    expected = denoise(pipeline, sampling, contexts, combine)
    assert set(guided) == {True, False}
    assert_near(found, expected)


def test_guidance_is_rescaled_as_by_diffusers(pipeline):
    a, b = torch.randn(2, 3, 4, 8, 8)
    torch.testing.assert_close(rescale_guidance(5 * a + 1, b, 0.7), rescale_noise_cfg(5 * a + 1, b, 0.7))
    sampling = pipeline.config.sampling.model_copy(update={"guidance_rescale": 0.7})
    (found,) = pipeline.draw(["red apple"], seed=3, sampling=sampling)

    def combine(each, _t):
        guided = each[1] + sampling.guidance_scale * (each[0] - each[1])
        return rescale_noise_cfg(guided[None], each[0][None], 0.7)[0]

    expected = denoise(pipeline, sampling, [[encode(pipeline, "red apple")], []], combine)
    assert_near(found, expected)
