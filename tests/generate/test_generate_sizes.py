"""Generation of several sizes: cached equals uncached at each, and how a size is chosen."""

import numpy as np
import pytest
import torch
from PIL import Image

from megafusion.errors import UserError
from megafusion.generate.decoder import Decoder
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.generate.row import read_image
from megafusion.images.sizes import parse_size
from megafusion.sequence.document import IGNORED_LABEL, ImageSegment
from tests.support.generation import (
    CAPTIONS,
    assert_batch_invariant,
    draw_latents,
    full_hidden,
    make_pipeline,
    prompt_batch,
    run_generation,
)
from tests.support.raw import drawing
from tests.support.segments import image_of
from tests.support.sizes import PIXELS, SIZES

PATCHES = (16, 15, 12)


@pytest.fixture(params=["linear", "unet", "linear-2d"])
def pipeline(request, run_config, tokenizer, codec) -> TransfusionPipeline:
    adapter, _, rope = request.param.partition("-")
    changes = {"adapter": adapter, "unet_channels": 4, "image_sizes": PIXELS, "vocab_size": 2050}
    changes |= {"image_rope": rope or "1d"}
    return make_pipeline(run_config, tokenizer, codec, num_steps=4, **changes)


def noised_image(size: int, seed: int, t: float = 0.0) -> ImageSegment:
    latents = np.random.default_rng(seed).standard_normal((4, *SIZES[size]), dtype=np.float32)
    return image_of(latents, t=t, size=size)


def test_cached_reading_equals_one_pass_without_a_cache(pipeline):
    """Rows with images of unequal sizes in them, then token after token."""
    model, decoder = pipeline.model, Decoder(pipeline.model)
    text, more = np.array([5, 6, 7, 8]), np.array([9, 10])
    rows = [
        [text, noised_image(1, 0), more],
        [noised_image(2, 1), noised_image(0, 2)],
        [noised_image(0, 3), text, noised_image(1, 4), noised_image(2, 5)],
    ]
    extra = torch.tensor([[20, 21], [23, 24], [26, 27]])
    batch, lengths = prompt_batch(pipeline, rows)
    cache = decoder.new_cache(3, int(lengths.max()) + 4)
    found = [decoder.read_prompts(cache, batch, lengths)]
    found += [decoder.read_tokens(cache, extra[:, i]) for i in range(2)]
    full, full_lengths = prompt_batch(pipeline, [[*row, extra[i].numpy()] for i, row in enumerate(rows)])
    hidden, _ = full_hidden(model, full)
    for row in range(3):
        for step in range(3):
            expected = model.tail.head(hidden[row, full_lengths[row] - 3 + step])
            torch.testing.assert_close(found[step][row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_a_cached_denoising_pass_and_what_follows_it_equal_the_training_layout(pipeline, size):
    model, decoder, text = pipeline.model, Decoder(pipeline.model), np.array([5, 6, 7])
    noised = noised_image(size, 3, t=0.4)
    batch, _ = prompt_batch(pipeline, [[text, noised]])
    hidden, skips = full_hidden(model, batch)
    timesteps = model.objective.noise_process.timesteps(batch.t)
    height, width = SIZES[size]
    with torch.no_grad():
        expected = model.tail.images(hidden, batch.image_start, timesteps, skips, batch.image_size)
    prefix, lengths = prompt_batch(pipeline, [[text]])
    cache, empty = decoder.new_cache(1, 40), decoder.new_cache(1, 40)
    begin = torch.tensor([pipeline.tokenizer.boi_of_size(size)])
    decoder.read_prompts(cache, prefix, lengths)
    decoder.read_tokens(cache, begin)
    with torch.no_grad():
        latents = torch.from_numpy(noised.latents)[None]
        context = decoder._image_context(cache, latents)
        found = decoder._predict(cache, context, latents, torch.tensor(400))[0]
    torch.testing.assert_close(found, expected[0, 0, :, :height, :width], rtol=1e-4, atol=1e-4)
    for token in (torch.tensor([pipeline.tokenizer.bos]), begin):
        decoder.read_tokens(empty, token)
    noise = torch.randn(1, 4, height, width)
    latents = draw_latents(decoder, cache, empty, noise, pipeline.config.sampling)
    logits = decoder.read_tokens(cache, torch.tensor([pipeline.tokenizer.eoi]))
    clean = image_of(latents[0].numpy(), size=size)
    batch, lengths = prompt_batch(pipeline, [[text, clean]])
    after = decoder.read_prompts(decoder.new_cache(1, 40), batch, lengths)
    torch.testing.assert_close(logits, after, rtol=1e-4, atol=1e-4)


def prefer_by_state(pipeline) -> None:
    """Make logits of eos and of each size's boi depend on the hidden state."""

    def hook(_head, inputs, logits):
        hidden = inputs[0]
        for size in range(3):
            wish = (hidden[..., 0] > 0.3) * (2 + hidden[..., 1 + size])
            logits[..., pipeline.tokenizer.boi_of_size(size)] += 1e3 * wish
        logits[..., pipeline.tokenizer.eos] += 1e4 * (hidden[..., 5] > 1.2)
        return logits

    pipeline.model.tail.head.register_forward_hook(hook)


def test_tokens_and_sizes_are_the_argmax_of_one_pass_without_a_cache(pipeline, monkeypatch):
    """With images of several sizes and rows that end early; and rows are independent of their batch."""
    prefer_by_state(pipeline)
    monkeypatch.setattr(pipeline.codec, "decode_images", list)  # outputs hold latents
    tokenizer, budget = pipeline.tokenizer, 10
    begins = [tokenizer.boi_of_size(size) for size in range(3)]
    sampling = pipeline.config.sampling.model_copy(update={"max_new_tokens": budget})

    together, drawn = run_generation(pipeline, CAPTIONS, sampling, 5, 2), set()
    assert_batch_invariant(pipeline, together, sampling, 5, 2)
    for caption, output in zip(CAPTIONS, together, strict=True):
        segments = [np.array(tokenizer.encode(caption))]
        for part in output:
            if isinstance(part, int):
                segments.append(np.array([part]))
                continue
            size = SIZES.index(tuple(part.shape[1:]))
            drawn.add(size)
            segments.append(image_of(part.numpy(), size=size))
        batch, lengths = prompt_batch(pipeline, [segments])
        with torch.no_grad():
            logits = pipeline.model.tail.head(full_hidden(pipeline.model, batch)[0])[0]
        logits[:, tokenizer.eoi] = -torch.inf
        spent = torch.isin(batch.tokens[0], torch.tensor(begins)).cumsum(0) >= 2
        logits[spent[:, None] & torch.isin(torch.arange(2050), torch.tensor(begins))] = -torch.inf
        asked = batch.labels[0] != IGNORED_LABEL
        asked[: len(segments[0])] = False
        if len(output) == budget:  # the end was not chosen
            asked[lengths[0] - 1] = False
        assert logits.argmax(-1)[asked].tolist() == batch.labels[0][asked].tolist()
    assert len(drawn) >= 2


def test_a_size_can_be_requested(pipeline):
    for height, width in PIXELS:
        images = pipeline.draw(["red apple", "x"], size=(height, width))
        assert [image.size for image in images] == [(width, height)] * 2
    # Also where the model prefers another size, or text first.
    prefer_by_state(pipeline)
    sampling = pipeline.config.sampling.model_copy(update={"max_new_tokens": 12})
    free = pipeline.generate([[c] for c in CAPTIONS], max_images=2, sampling=sampling)
    sizes = {part.size for output in free for part in output if not isinstance(part, str)}
    assert sizes - {(16, 48)}
    forced = pipeline.generate([[c] for c in CAPTIONS], max_images=2, size=(48, 16), sampling=sampling)
    images = [[part for part in output if not isinstance(part, str)] for output in forced]
    assert {image.size for own in images for image in own} == {(16, 48)}
    assert max(map(len, images)) <= 2


def test_a_boi_of_another_size_draws_at_the_requested_size(pipeline):
    def hook(_head, _inputs, logits):
        logits[..., pipeline.tokenizer.boi_of_size(0)] += 1e4
        return logits

    pipeline.model.tail.head.register_forward_hook(hook)
    (output,) = pipeline.generate([["x"]], max_images=1, size=(48, 16))
    assert [part.size for part in output if not isinstance(part, str)] == [(16, 48)]


@pytest.mark.parametrize("size", [0, 1, 2])
def test_guidance_uses_a_document_without_text_of_the_same_size(pipeline, monkeypatch, size):
    monkeypatch.setattr(pipeline.codec, "decode_images", list)
    (drawn,) = pipeline.draw(["x"], seed=4, size=PIXELS[size])
    decoder, caches = Decoder(pipeline.model), []
    begin = torch.tensor([pipeline.tokenizer.boi_of_size(size)])
    for segments in ([np.array(pipeline.tokenizer.encode("x"))], []):
        caches.append(decoder.new_cache(1, 40))
        decoder.read_prompts(caches[-1], *prompt_batch(pipeline, [segments]))
        decoder.read_tokens(caches[-1], begin)
    noise = torch.randn(1, 4, *SIZES[size], generator=torch.Generator().manual_seed(4))
    expected = draw_latents(decoder, *caches, noise, pipeline.config.sampling)[0]
    torch.testing.assert_close(drawn, expected, rtol=2e-3, atol=2e-3)


def test_the_model_chooses_a_size_by_its_boi(pipeline):
    captions = ["red apple", "x", "cat"]

    def hook(_head, inputs, logits):
        logits[..., 2049] += 1e3
        return logits

    pipeline.model.tail.head.register_forward_hook(hook)
    chosen = pipeline.draw(captions, seed=3)
    assert {image.size for image in chosen} == {(16, 48)}
    asked = pipeline.draw(captions, seed=3, size=(48, 16))
    assert [np.asarray(p).tolist() for p in asked] == [np.asarray(p).tolist() for p in chosen]


def test_images_are_read_at_the_nearest_size(pipeline):
    images = [drawing(0, (40, 40)), drawing(1, (100, 60)), drawing(2, (10, 33)), drawing(3, (60, 100))]
    turned = Image.new("RGB", (60, 20))
    turned.getexif()[0x0112] = 6  # a quarter turn: shown, it is upright
    rubbish = drawing(3, (60, 100))
    rubbish.info["exif"] = b"Exif\0\0rubbish"
    shown = [*images, turned, rubbish]
    sizes = [read_image(image, pipeline.codec, PIXELS).size for image in shown]
    assert sizes == [0, 1, 2, 0, 2, 0]
    assert pipeline.codec.encode_images(images[1:2], PIXELS[1]).shape == (1, 4, 6, 10)
    assert pipeline.describe(images) == [pipeline.describe([image])[0] for image in images]


def test_a_pipeline_folder_keeps_its_sizes(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    again = TransfusionPipeline.from_pretrained(tmp_path / "saved")
    assert again.sizes == list(PIXELS)
    first, second = (p.draw(["x"], size=(24, 40))[0] for p in (pipeline, again))
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_an_unknown_size_is_refused_with_the_sizes_of_the_model(pipeline):
    with pytest.raises(UserError, match=r"size \(40, 24\): the model has 32x32, 24x40, 48x16 \(height"):
        pipeline.draw(["x"], size=(40, 24))


@pytest.mark.parametrize("text", ["32", "32x", "x32", "32*32", "32x32x32", "-32x32", "a"])
def test_an_invalid_size_is_refused(text):
    with pytest.raises(UserError, match="is not HEIGHTxWIDTH in pixels"):
        parse_size(text)
