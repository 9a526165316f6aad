"""Generation of several sizes: cached equals uncached for each, and who chooses a size."""

import numpy as np
import pytest
import torch
from PIL import Image

from megafusion.commands.generate import parse_size
from megafusion.errors import UserError
from megafusion.generate.decoder import Decoder
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.sequence.document import IGNORED_LABEL, ImageSegment
from tests.support.raw import drawing
from tests.support.segments import image_of
from tests.support.sizes import PIXELS, SIZES
from tests.support.whole import (
    CAPTIONS,
    assert_as_if_alone,
    free_answers,
    full_hidden,
    make_pipeline,
    prompt_batch,
)

PATCHES = (16, 15, 12)


@pytest.fixture(params=["linear", "unet"])
def pipeline(request, run_config, tokenizer, codec) -> TransfusionPipeline:
    changes = {"adapter": request.param, "unet_channels": 4, "image_sizes": PIXELS, "vocab_size": 2050}
    return make_pipeline(run_config, tokenizer, codec, num_steps=4, **changes)


def image(size: int, seed: int, t: float = 0.0) -> ImageSegment:
    latents = np.random.default_rng(seed).standard_normal((4, *SIZES[size]), dtype=np.float32)
    return image_of(latents, t=t, size=size)


def test_cached_reading_equals_one_pass_without_a_cache(pipeline):
    """Rows with images of unequal sizes in them, then token after token."""
    model, decoder = pipeline.model, Decoder(pipeline.model)
    text, more = np.array([5, 6, 7, 8]), np.array([9, 10])
    rows = [
        [text, image(1, 0), more],
        [image(2, 1), image(0, 2)],
        [image(0, 3), text, image(1, 4), image(2, 5)],
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
    noised = image(size, 3, t=0.4)
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
        found = decoder._predict(cache, torch.from_numpy(noised.latents)[None], torch.tensor(400))[0]
    torch.testing.assert_close(found, expected[0, 0, :, :height, :width], rtol=1e-4, atol=1e-4)
    for token in (torch.tensor([pipeline.tokenizer.bos]), begin):
        decoder.read_tokens(empty, token)
    latents = decoder.draw(cache, empty, torch.randn(1, 4, height, width), pipeline.config.sampling)
    logits = decoder.read_tokens(cache, torch.tensor([pipeline.tokenizer.eoi]))
    clean = image_of(latents[0].numpy(), size=size)
    batch, lengths = prompt_batch(pipeline, [[text, clean]])
    after = decoder.read_prompts(decoder.new_cache(1, 40), batch, lengths)
    torch.testing.assert_close(logits, after, rtol=1e-4, atol=1e-4)


def prefer_by_state(pipeline) -> None:
    """Make the model end, or draw at one size or another, where its hidden state says so."""

    def hook(_head, inputs, logits):
        hidden = inputs[0]
        for size in range(3):
            wish = (hidden[..., 0] > 0.3) * (2 + hidden[..., 1 + size])
            logits[..., pipeline.tokenizer.boi_of_size(size)] += 1e3 * wish
        logits[..., pipeline.tokenizer.eos] += 1e4 * (hidden[..., 5] > 1.2)
        return logits

    pipeline.model.tail.head.register_forward_hook(hook)


def test_rows_that_draw_at_unlike_sizes_are_the_argmax_of_one_pass_without_a_cache(pipeline, monkeypatch):
    """Through text, pictures of several sizes, rows that end early; and each row is as if alone."""
    prefer_by_state(pipeline)
    monkeypatch.setattr(pipeline, "pictures", list)  # latents stand for the pictures made of them
    tokenizer, budget = pipeline.tokenizer, 10
    begins = [tokenizer.boi_of_size(size) for size in range(3)]
    sampling = pipeline.config.sampling.model_copy(update={"max_new_tokens": budget})

    together, drawn = free_answers(pipeline, CAPTIONS, sampling, 5, 2), set()
    assert_as_if_alone(pipeline, together, sampling, 5, 2)
    for caption, answer in zip(CAPTIONS, together, strict=True):
        segments = [np.array(tokenizer.encode(caption))]
        for part in answer:
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
        if len(answer) == budget:  # the end was not chosen
            asked[lengths[0] - 1] = False
        assert logits.argmax(-1)[asked].tolist() == batch.labels[0][asked].tolist()
    assert len(drawn) >= 2


def test_a_size_can_be_asked_for(pipeline):
    for height, width in PIXELS:
        pictures = pipeline.draw(["red apple", "x"], size=(height, width))
        assert [picture.size for picture in pictures] == [(width, height)] * 2
    # Also where the model would draw at another, or not begin with a picture.
    prefer_by_state(pipeline)
    sampling = pipeline.config.sampling.model_copy(update={"max_new_tokens": 12})
    free = pipeline([[c] for c in CAPTIONS], max_images=2, sampling=sampling)
    sizes = {part.size for answer in free for part in answer if not isinstance(part, str)}
    assert sizes - {(16, 48)}
    forced = pipeline([[c] for c in CAPTIONS], max_images=2, size=(48, 16), sampling=sampling)
    sizes = {part.size for answer in forced for part in answer if not isinstance(part, str)}
    assert sizes == {(16, 48)}


def test_a_wish_for_a_picture_of_another_size_is_one_for_the_size_asked_for(pipeline):
    def hook(_head, _inputs, logits):
        logits[..., pipeline.tokenizer.boi_of_size(0)] += 1e4
        return logits

    pipeline.model.tail.head.register_forward_hook(hook)
    ((picture, *_),) = pipeline([["x"]], max_images=1, size=(48, 16))
    assert picture.size == (16, 48)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_guidance_steers_away_from_a_document_of_a_picture_of_that_size_alone(pipeline, monkeypatch, size):
    monkeypatch.setattr(pipeline, "pictures", list)
    (drawn,) = pipeline.draw(["x"], seed=4, size=PIXELS[size])
    decoder, caches = Decoder(pipeline.model), []
    begin = torch.tensor([pipeline.tokenizer.boi_of_size(size)])
    for segments in ([np.array(pipeline.tokenizer.encode("x"))], []):
        caches.append(decoder.new_cache(1, 40))
        decoder.read_prompts(caches[-1], *prompt_batch(pipeline, [segments]))
        decoder.read_tokens(caches[-1], begin)
    noise = torch.randn(1, 4, *SIZES[size], generator=torch.Generator().manual_seed(4))
    expected = decoder.draw(*caches, noise, pipeline.config.sampling)[0]
    torch.testing.assert_close(drawn, expected, rtol=2e-3, atol=2e-3)


def test_the_model_chooses_a_size_by_the_token_that_begins_an_image(pipeline):
    captions = ["red apple", "x", "cat"]

    def hook(_head, inputs, logits):
        logits[..., 2049] += 1e3
        return logits

    pipeline.model.tail.head.register_forward_hook(hook)
    chosen = pipeline.draw(captions, seed=3)
    assert {picture.size for picture in chosen} == {(16, 48)}
    asked = pipeline.draw(captions, seed=3, size=(48, 16))
    assert [np.asarray(p).tolist() for p in asked] == [np.asarray(p).tolist() for p in chosen]


def test_pictures_are_read_at_the_size_nearest_to_them(pipeline):
    pictures = [drawing(0, (40, 40)), drawing(1, (100, 60)), drawing(2, (10, 33)), drawing(3, (60, 100))]
    assert [pipeline.size_of(picture) for picture in pictures] == [0, 1, 2, 0]
    turned = Image.new("RGB", (60, 20))
    turned.getexif()[0x0112] = 6  # a quarter turn: shown, it is upright
    assert pipeline.size_of(turned) == 2
    assert pipeline.latents(pictures[1:2], 1).shape == (1, 4, 6, 10)
    assert pipeline.describe(pictures) == [pipeline.describe([picture])[0] for picture in pictures]


def test_a_pipeline_folder_keeps_its_sizes(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    again = TransfusionPipeline.from_pretrained(tmp_path / "saved")
    assert again.sizes == list(PIXELS)
    first, second = (p.draw(["x"], size=(24, 40))[0] for p in (pipeline, again))
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_a_size_that_the_model_lacks_is_refused_with_those_it_has(pipeline):
    with pytest.raises(UserError, match=r"size 40x24: the model was made for 32x32, 24x40, 48x16 \(height"):
        pipeline.draw(["x"], size=(40, 24))


@pytest.mark.parametrize("text", ["32", "32x", "x32", "32*32", "32x32x32", "-32x32", "a"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="is not HEIGHTxWIDTH in pixels"):
        parse_size(text)
