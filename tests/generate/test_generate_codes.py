"""Images as codes: sampled one after another, guided on logits, and nothing but codes inside an image."""

import numpy as np
import pytest
import torch

from megafusion.errors import UserError
from megafusion.generate.events import ImageStep
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.generate.row import text_segments
from megafusion.images.codec import ImageCodec
from megafusion.objective.config import SamplingConfig
from megafusion.sequence.document import ImageSegment, Segment
from tests.support.generation import CAPTIONS, full_hidden, make_pipeline, prompt_batch
from tests.support.quantized import CODEBOOK_SIZE
from tests.support.runs import parsed

FIRST, NUM_CODES = 2048, 16


@pytest.fixture
def pipeline(quantized_values, tokenizer, vq_folder) -> TransfusionPipeline:
    """With a padded vocabulary, whose last rows are neither texts nor codes."""
    codec, padded = ImageCodec.from_pretrained(vq_folder), FIRST + CODEBOOK_SIZE + 8
    return make_pipeline(parsed(quantized_values), tokenizer, codec, 4, vocab_size=padded)


def sampling(**changes) -> SamplingConfig:
    return SamplingConfig(max_new_tokens=5, **changes)


def code_logits(pipeline, contexts: list[list[Segment]], codes) -> torch.Tensor:
    """Logits [B, 16, K] of an image's codes behind some contexts, by one pass over whole rows."""
    images = [ImageSegment("codes", own.numpy().astype(np.int32)) for own in codes]
    batch, _ = prompt_batch(pipeline, [[*c, image] for c, image in zip(contexts, images, strict=True)])
    logits = pipeline.model.tail.head(full_hidden(pipeline.model, batch)[0])
    is_boi = batch.tokens == pipeline.tokenizer.boi
    starts = is_boi.int().argmax(1).tolist()
    ids = slice(FIRST, FIRST + CODEBOOK_SIZE)
    return torch.stack([row[s : s + NUM_CODES, ids] for row, s in zip(logits, starts, strict=True)])


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_greedy_codes_are_the_largest_guided_logits(pipeline, scale):
    """Against passes over whole rows without a cache; rows of unlike lengths, guided away from no text."""
    options = sampling(image_temperature=0.0, guidance_scale=scale)
    codes = pipeline(CAPTIONS, output_type="latent", sampling=options).images
    assert codes.shape == (len(CAPTIONS), 4, 4)
    contexts = [text_segments(caption, pipeline.tokenizer) for caption in CAPTIONS]
    own, without = (code_logits(pipeline, c, codes) for c in (contexts, [[] for _ in CAPTIONS]))
    expected = (without + scale * (own - without)).argmax(-1)
    torch.testing.assert_close(codes.flatten(1), expected)
    assert len(codes.unique()) > 3


def test_sampled_codes_depend_on_their_own_seed_alone(pipeline):
    options = sampling(guidance_scale=1.5, image_temperature=0.7, image_top_p=0.9)
    together = pipeline.draw(CAPTIONS, seed=3, sampling=options)
    again = pipeline.draw(CAPTIONS[2:3], seed=5, sampling=options)[0]
    assert np.array_equal(np.asarray(together[2]), np.asarray(again))
    other = pipeline.draw(CAPTIONS[2:3], seed=6, sampling=options)[0]
    assert not np.array_equal(np.asarray(other), np.asarray(again))
    assert together[0].size == (32, 32)


@pytest.mark.parametrize("favoured", ["codes", "texts"])
def test_codes_are_inside_images_and_texts_outside(pipeline, favoured):
    """Whatever the logits: an image has codes alone, as many as its grid, and a text has none."""
    seen: list[int] = []
    pipeline.model.stem.embedding.register_forward_pre_hook(
        lambda _, inputs: seen.extend(inputs[0].flatten())
    )
    head = pipeline.model.tail.head
    sign = 1 if favoured == "codes" else -1
    head.register_forward_hook(
        lambda _, inputs, logits: logits + sign * 100 * (torch.arange(logits.shape[-1]) >= FIRST)
    )
    (answer,) = pipeline.generate(
        [["apple"]], begin="image", max_images=1, sampling=sampling(guidance_scale=1.0, temperature=1.0)
    )
    tokens = [int(token) for token in seen]
    boi = tokens.index(pipeline.tokenizer.boi)
    inside, rest = tokens[boi + 1 : boi + 1 + NUM_CODES], tokens[boi + 1 + NUM_CODES :]
    assert all(FIRST <= token < FIRST + CODEBOOK_SIZE for token in inside)
    assert rest[0] == pipeline.tokenizer.eoi
    assert all(token < FIRST for token in [*tokens[:boi], *rest])
    assert answer[0].size == (32, 32)


def test_text_continues_behind_a_guided_image(pipeline):
    """From the row's own context: what guided the image leaves no trace."""
    options = sampling(image_temperature=0.0, guidance_scale=2.5)
    generation = pipeline.generation(
        pipeline.requests([[c] for c in CAPTIONS], begin="image", sampling=options)
    )
    generation.run()
    batch, lengths = prompt_batch(pipeline, [row.segments[:2] for row in generation.rows])
    logits = pipeline.model.tail.head(full_hidden(pipeline.model, batch)[0])
    last = logits[torch.arange(len(CAPTIONS)), lengths - 1]
    last[:, [pipeline.tokenizer.boi, pipeline.tokenizer.eoi, *range(FIRST, last.shape[1])]] = -torch.inf
    expected = last.argmax(-1).tolist()
    found = [output[1] if len(output) > 1 else pipeline.tokenizer.eos for output in generation.outputs]
    assert found == expected
    assert len(set(found)) > 1


def test_an_image_of_a_prompt_is_read_as_its_codes(pipeline):
    """Describing an image continues the document that training would make of its codes."""
    (image,) = pipeline.draw(["apple"], sampling=sampling(guidance_scale=1.0))
    codes = pipeline.codec.encode_images([image], (32, 32))
    segment = ImageSegment("codes", codes[0].numpy().astype(np.int32))
    batch, lengths = prompt_batch(pipeline, [[segment]])
    logits = pipeline.model.tail.head(full_hidden(pipeline.model, batch)[0])[0, int(lengths[0]) - 1]
    logits[FIRST:], logits[pipeline.tokenizer.eoi], logits[pipeline.tokenizer.eos] = (-torch.inf,) * 3
    logits[pipeline.tokenizer.boi] = -torch.inf
    (answer,) = pipeline.generate([[image]], begin="text", max_images=0, sampling=sampling())
    first = pipeline.tokenizer.decode([int(logits.argmax())])
    assert "".join(answer).startswith(first)


def test_steps_show_the_codes_so_far_and_take_changes(pipeline):
    def change(_, step, timestep, given):
        given["latents"].view(1, -1)[0, step] = 7
        return given

    options = sampling(guidance_scale=2.0)
    codes = pipeline(["apple"], output_type="latent", sampling=options, callback_on_step_end=change).images
    assert (codes == 7).all()
    steps = []
    pipeline.draw(["apple"], sampling=options, callback=steps.append)
    states = [event.state for event in steps if isinstance(event, ImageStep)]
    assert [(s.step, s.num_steps) for s in states] == [(n + 1, NUM_CODES) for n in range(NUM_CODES)]
    assert (states[3].latents.flatten()[4:] == 0).all()
    pixels = pipeline(["apple"], output_type="np", sampling=options).images
    assert pixels.shape == (1, 32, 32, 3)


def test_a_changed_code_beyond_the_codebook_is_refused(pipeline):
    def change(_, step, timestep, given):
        return {"latents": torch.full_like(given["latents"], CODEBOOK_SIZE)}

    with pytest.raises(UserError, match="callback_on_step_end: a code outside of 0 to 39"):
        pipeline(["apple"], sampling=sampling(guidance_scale=1.0), callback_on_step_end=change)
