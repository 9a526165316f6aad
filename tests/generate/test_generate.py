"""Generation: cached equals uncached, rows are independent of their batch, a seed fixes the image."""

import numpy as np
import pytest
import torch
from PIL import Image

from megafusion.generate.decoder import Decoder
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.processor import postprocess_images, preprocess_images
from megafusion.model.transformer import block_context
from megafusion.objective.config import SamplingConfig
from megafusion.objective.ddpm import DDPMConfig, scheduler
from megafusion.objective.sampler import apply_guidance
from megafusion.sequence.document import IGNORED_LABEL, ImageSegment
from tests.support.generation import (
    CAPTIONS,
    assert_batch_invariant,
    assert_near,
    draw_latents,
    full_hidden,
    make_pipeline,
    prompt_batch,
    run_generation,
)
from tests.support.segments import image_of

PIPELINES = {
    "linear": {"adapter": "linear"},
    "unet": {"adapter": "unet", "unet_channels": 4},
    "modality": {"modality_weights": "all", "attention_bias": True},
    "causal": {"image_attention": "causal"},
}


@pytest.fixture(params=PIPELINES.values(), ids=PIPELINES)
def pipeline(request, run_config, tokenizer, codec) -> TransfusionPipeline:
    return make_pipeline(run_config, tokenizer, codec, num_steps=5, **request.param)


def pil_image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def noised_image(seed: int, t: float = 0.0) -> ImageSegment:
    latents = np.random.default_rng(seed).standard_normal((4, 8, 8), dtype=np.float32)
    return image_of(latents, t=t)


def test_cached_reading_equals_one_pass_without_a_cache(pipeline):
    """Rows of unequal length with texts and images in them, then token after token."""
    model, decoder = pipeline.model, Decoder(pipeline.model)
    text, more = np.array([5, 6, 7, 8]), np.array([9, 10, 11])
    rows = [[text, noised_image(0), more], [text[:2], more], [noised_image(1), noised_image(2), text[:1]]]
    extra = torch.tensor([[20, 21, 22], [23, 24, 25], [26, 27, 28]])
    whole = [[*row, extra[i].numpy()] for i, row in enumerate(rows)]
    batch, lengths = prompt_batch(pipeline, rows)
    cache = decoder.new_cache(3, int(lengths.max()) + 5)
    found = [decoder.read_prompts(cache, batch, lengths)]
    found += [decoder.read_tokens(cache, extra[:, i]) for i in range(3)]
    full, full_lengths = prompt_batch(pipeline, whole)
    hidden, _ = full_hidden(model, full)
    for row in range(3):
        for step in range(4):
            expected = model.tail.head(hidden[row, full_lengths[row] - 4 + step])
            torch.testing.assert_close(found[step][row], expected, rtol=1e-4, atol=1e-4)


def test_a_cached_denoising_pass_equals_the_training_layout(pipeline):
    model, decoder = pipeline.model, Decoder(pipeline.model)
    text = np.array([5, 6, 7])
    noised = noised_image(3, t=0.4)
    batch, _ = prompt_batch(pipeline, [[text, noised]])
    hidden, skips = full_hidden(model, batch)
    timesteps = model.objective.noise_process.timesteps(batch.t)
    with torch.no_grad():
        expected = model.tail.images(hidden, batch.image_start, timesteps, skips, batch.image_size)[0, 0]
    prefix, lengths = prompt_batch(pipeline, [[text]])
    cache = decoder.new_cache(1, 40)
    decoder.read_prompts(cache, prefix, lengths)
    decoder.read_tokens(cache, torch.tensor([pipeline.tokenizer.boi]))
    latents = torch.from_numpy(noised.latents)[None]
    context = decoder._image_context(cache, latents)
    for _ in range(2):  # a second pass does not attend to the first
        with torch.no_grad():
            found = decoder._predict(cache, context, latents, torch.tensor(400))[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_tokens_after_a_drawn_image_attend_to_the_clean_image(pipeline):
    """After drawing, the cache equals one that read the final latents from a prompt."""
    decoder, tokenizer = Decoder(pipeline.model), pipeline.tokenizer
    text = np.array([5, 6])
    prefix, lengths = prompt_batch(pipeline, [[text]])
    cache = decoder.new_cache(1, 40)
    decoder.read_prompts(cache, prefix, lengths)
    decoder.read_tokens(cache, torch.tensor([tokenizer.boi]))
    empty = decoder.new_cache(1, 40)
    for token in (tokenizer.bos, tokenizer.boi):
        decoder.read_tokens(empty, torch.tensor([token]))
    latents = draw_latents(decoder, cache, empty, torch.randn(1, 4, 8, 8), pipeline.config.sampling)
    logits = decoder.read_tokens(cache, torch.tensor([tokenizer.eoi]))
    clean = image_of(latents[0].numpy())
    batch, lengths = prompt_batch(pipeline, [[text, clean]])
    expected = decoder.read_prompts(decoder.new_cache(1, 40), batch, lengths)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_rows_are_independent_of_their_batch(pipeline):
    captions = ["red apple, 3d style", "x", "a much longer caption than the others, flat style"]
    together = pipeline.draw(captions, seed=3)
    for row, caption in enumerate(captions):
        (alone,) = pipeline.draw([caption], seed=3 + row)
        difference = np.abs(np.asarray(alone, int) - np.asarray(together[row], int))
        assert difference.max() <= 2
    images = [pil_image(0), pil_image(1)]
    assert pipeline.describe(images) == [pipeline.describe([p])[0] for p in images]


def prefer_by_state(pipeline) -> None:
    """Make logits of boi and eos depend on the hidden state, so that rows draw and end at different steps."""

    def hook(_head, inputs, logits):
        hidden = inputs[0]
        logits[..., pipeline.tokenizer.boi] += 1e3 * (hidden[..., 0] > 0.5)
        logits[..., pipeline.tokenizer.eos] += 1e4 * (hidden[..., 1] > 1)
        return logits

    pipeline.model.tail.head.register_forward_hook(hook)


def test_rows_that_end_and_draw_at_different_steps_equal_a_batch_of_one(pipeline, monkeypatch):
    prefer_by_state(pipeline)
    monkeypatch.setattr(pipeline.codec, "decode_images", list)  # outputs hold latents
    sampling = pipeline.config.sampling.model_copy(update={"max_new_tokens": 12})

    together = run_generation(pipeline, CAPTIONS, sampling, 5, 1)
    assert len({len(output) for output in together}) >= 3  # they end at different steps
    drawn = [next((i for i, p in enumerate(output) if not isinstance(p, int)), None) for output in together]
    assert len({*drawn} - {None}) >= 2  # and draw at different steps
    assert_batch_invariant(pipeline, together, sampling, 5, 1)


def test_tokens_are_the_argmax_of_one_pass_without_a_cache(pipeline, monkeypatch):
    """Also for text after an image, and in rows that end early."""
    prefer_by_state(pipeline)
    monkeypatch.setattr(pipeline.codec, "decode_images", list)
    tokenizer, budget = pipeline.tokenizer, 12
    sampling = pipeline.config.sampling.model_copy(update={"max_new_tokens": budget})
    after_an_image = 0
    outputs = run_generation(pipeline, CAPTIONS, sampling, 5, 1)
    for caption, output in zip(CAPTIONS, outputs, strict=True):
        prompt = np.array(tokenizer.encode(caption))
        segments = [np.array([part]) if isinstance(part, int) else image_of(part.numpy()) for part in output]
        batch, lengths = prompt_batch(pipeline, [[prompt, *segments]])
        with torch.no_grad():
            logits = pipeline.model.tail.head(full_hidden(pipeline.model, batch)[0])[0]
        logits[:, tokenizer.eoi] = -torch.inf
        logits[batch.tokens[0].eq(tokenizer.boi).cumsum(0) > 0, tokenizer.boi] = -torch.inf  # max_images is 1
        asked = batch.labels[0] != IGNORED_LABEL
        asked[: len(prompt)] = False
        if len(output) == budget:  # the end was not chosen
            asked[lengths[0] - 1] = False
        assert logits.argmax(-1)[asked].tolist() == batch.labels[0][asked].tolist()
        assert asked.sum() == min(len(output) + 1, budget)
        after_an_image += any(not isinstance(part, int) for part in output[:-1])
    assert after_an_image >= 2


def test_guidance_uses_the_prediction_of_a_document_without_text(pipeline, monkeypatch):
    """The same denoising written out without a cache: (bos, caption, boi) and (bos, boi)."""
    model, sampling = pipeline.model, pipeline.config.sampling
    monkeypatch.setattr(pipeline.codec, "decode_images", list)
    (found,) = pipeline.draw(["red apple"], seed=3)
    caption = np.array(pipeline.tokenizer.encode("red apple"))
    process = model.objective.noise_process
    sampler = process.sampler(sampling)
    latents = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(3))
    for timestep in sampler.timesteps:
        noised = image_of(latents.numpy(), t=int(timestep) / 1000)
        batch, _ = prompt_batch(pipeline, [[caption, noised], [noised]])
        hidden, skips = full_hidden(model, batch)
        timesteps = process.timesteps(batch.t)
        with torch.no_grad():
            both = model.tail.images(hidden, batch.image_start, timesteps, skips, batch.image_size)[:, 0]
        prediction = both[1] + sampling.guidance_scale * (both[0] - both[1])
        latents = sampler.step(prediction, timestep, latents).prev_sample
    assert_near(found, latents)


def test_images_are_normalised_when_encoded_and_denormalised_when_decoded(pipeline, codec, monkeypatch):
    """The fixture's autoencoder has scaling_factor 1.5 and shift_factor 0.1."""
    shown = pil_image(0)
    mean, _ = codec.encode(preprocess_images([shown], 32, 32))
    latents = codec.encode_images([shown], (32, 32))
    torch.testing.assert_close(latents, (mean - 0.1) * 1.5)
    (restored,), (expected,) = codec.decode_images(latents), postprocess_images(codec.decode(mean))
    assert np.abs(np.asarray(restored, int) - np.asarray(expected, int)).max() <= 1

    read, decoded = [], []
    read_prompts, decode = Decoder.read_prompts, codec.decode
    monkeypatch.setattr(Decoder, "read_prompts", lambda *a: read.append(a[2].latents) or read_prompts(*a))
    monkeypatch.setattr(codec, "decode", lambda raw: decoded.append(raw) or decode(raw))
    drawn = []
    denoise = Decoder.denoise

    def note(*arguments):
        for state in denoise(*arguments):
            drawn[:] = [state.latents]
            yield state

    monkeypatch.setattr(Decoder, "denoise", note)
    pipeline.generate([[shown, "apple"]], begin="image")
    torch.testing.assert_close(read[0][0, 0], (mean[0] - 0.1) * 1.5)
    torch.testing.assert_close(decoded[0], drawn[0] / 1.5 + 0.1)


def test_the_seed_and_the_caption_fix_the_image(pipeline):
    def draw(caption, seed):
        return np.asarray(pipeline.draw([caption], seed=seed)[0])

    assert np.array_equal(draw("apple", 1), draw("apple", 1))
    assert not np.array_equal(draw("apple", 1), draw("apple", 2))
    assert not np.array_equal(draw("apple", 1), draw("pizza", 1))


def test_the_mask_of_an_image_is_made_once_for_all_steps(pipeline, monkeypatch):
    """And with it the rotary angles: no step makes the host wait to see whether the cache must grow."""
    made = []
    monkeypatch.setattr(
        "megafusion.generate.decoder.block_context", lambda *a: made.append(a) or block_context(*a)
    )
    counts = []
    for num_steps in (2, 5):
        sampling = SamplingConfig(num_inference_steps=num_steps, guidance_scale=2.0, max_new_tokens=0)
        pipeline.draw(["apple", "x"], sampling=sampling)
        counts.append(len(made))
        made.clear()
    assert counts[0] == counts[1] > 2


def test_no_pass_follows_a_rows_last_token_or_an_image_that_ends_it(pipeline, monkeypatch):
    passes = []
    run = Decoder._run
    monkeypatch.setattr(Decoder, "_run", lambda *given: passes.append(1) or run(*given))

    always_prefer(pipeline, 100)
    prompt = 1 + len(pipeline.tokenizer.encode("red"))
    for sequence_length, max_new_tokens, num_tokens in ((None, 4, 4), (12, 50, 11 - prompt)):
        sampling = SamplingConfig(max_new_tokens=max_new_tokens)
        pipeline.config = pipeline.config.model_copy(update={"sequence_length": sequence_length})
        passes.clear()
        (output,) = pipeline.generate([["red"]], begin="text", max_images=0, sampling=sampling)
        assert len(passes) == num_tokens
        assert output == [pipeline.tokenizer.decode([100] * num_tokens)]
    pipeline.config = pipeline.config.model_copy(update={"sequence_length": None})
    passes.clear()
    sampling = SamplingConfig(num_inference_steps=3, guidance_scale=1.0, max_new_tokens=0)
    pipeline.draw(["red"], sampling=sampling)
    assert len(passes) == 2 + 3  # prompt, boi, steps


def test_guidance_of_one_is_the_conditional_prediction_alone(pipeline):
    one = pipeline.config.sampling.model_copy(update={"guidance_scale": 1.0})
    nearly = pipeline.config.sampling.model_copy(update={"guidance_scale": 1.0 + 1e-7})
    a, b = (np.asarray(pipeline.draw(["apple"], sampling=s)[0], int) for s in (one, nearly))
    assert np.abs(a - b).max() <= 2
    conditional, unconditional = torch.tensor([2.0]), torch.tensor([1.0])
    assert apply_guidance(conditional, unconditional, 3.0) == 4


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("sampler", "num_steps"), [("ddim", 50), ("dpm++", 20)])
def test_samplers_reach_the_clean_image_of_a_perfect_model(sampler, num_steps, prediction):
    """With a model that predicts x_0 exactly, a consistent sampler ends at x_0."""
    config = DDPMConfig(prediction_type=prediction)
    made = config.build().sampler(SamplingConfig(sampler=sampler, num_inference_steps=num_steps))
    clean, alphas = torch.randn(1, 2, 4, 4), scheduler(config).alphas_cumprod
    x = torch.randn(1, 2, 4, 4)
    for t in made.timesteps:
        a, s = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        noise = (x - a * clean) / s
        x = made.step(noise if prediction == "epsilon" else a * noise - s * clean, t, x).prev_sample
    torch.testing.assert_close(x, clean, rtol=1e-3, atol=2e-3)


def always_prefer(pipeline, token: int) -> None:
    """Make the model choose one token wherever it is allowed."""
    with torch.no_grad():
        pipeline.model.tail.head.weight.zero_()
        pipeline.model.tail.head.weight[token] = 1.0
        # Hidden states become a constant positive vector, so that the token's logit is large.
        pipeline.model.tail.norm.register_forward_hook(lambda *_: torch.ones_like(_[2]))


def kinds(output):
    return ["text" if isinstance(part, str) else "image" for part in output]


def test_a_free_prompt_draws_at_boi_up_to_max_images(pipeline):
    """Images of the prompt do not count."""
    always_prefer(pipeline, pipeline.tokenizer.boi)
    for max_images in (0, 1, 2):
        outputs = pipeline.generate([["apple", pil_image(0), "and"], ["pizza"]], max_images=max_images)
        for output in outputs:
            assert kinds(output)[:max_images] == ["image"] * max_images
            assert kinds(output)[max_images:] in ([], ["text"])


@pytest.mark.parametrize("begin", ["free", "text", "image"])
def test_eoi_is_never_chosen_as_text(pipeline, begin):
    always_prefer(pipeline, pipeline.tokenizer.eoi)
    for output in run_generation(pipeline, ["apple", "x"], pipeline.config.sampling, 0, 1, begin):
        assert output
        assert pipeline.tokenizer.eoi not in output


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("logit", [1e4, np.inf, np.nan])
def test_rows_of_a_padded_vocabulary_are_never_chosen(run_config, tokenizer, codec, logit, temperature):
    pipeline = make_pipeline(run_config, tokenizer, codec, num_steps=2, vocab_size=2100)
    pipeline.model.tail.head.register_forward_hook(
        lambda *given: given[2].index_fill(-1, torch.tensor([2099]), logit)
    )
    sampling = pipeline.config.sampling.model_copy(update={"temperature": temperature})
    for output in run_generation(pipeline, ["apple", "x"], sampling, 0, 1, "text"):
        assert output
        assert all(isinstance(part, Image.Image) or part < 2048 for part in output)


def test_begin_allows_or_defers_eos(pipeline):
    always_prefer(pipeline, pipeline.tokenizer.eos)
    assert pipeline.generate([["apple"]]) == [[]]
    assert kinds(pipeline.generate([["apple"]], begin="text")[0]) in ([], ["text"])
    assert kinds(pipeline.generate([["apple"]], begin="image")[0]) == ["image"]
    always_prefer(pipeline, 100)
    (output,) = pipeline.generate([["apple"]])
    assert output == [pipeline.tokenizer.decode([100] * 5)]
