"""Prompts: cleaned as captions are, and no longer than the rows of training."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.generate.cache import KEYS_MULTIPLE
from megafusion.generate.decoder import Decoder
from megafusion.generate.generation import Generation
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.generate.row import Request
from megafusion.sequence.document import flatten
from megafusion.sequence.text import clean_text
from megafusion.train.build import make_pipeline as make_run_pipeline
from megafusion.train.config import RunConfig
from tests.support.generation import make_pipeline
from tests.support.small import small_run

POSITIONS = 18
"""Of an image: 4 x 4 patches, boi and eoi."""


@pytest.fixture(scope="module")
def pipeline(shards, vae_folder, tokenizer, codec, tmp_path_factory) -> TransfusionPipeline:
    values = small_run(shards, vae_folder, tmp_path_factory.mktemp("run"))
    return make_pipeline(parse_config(RunConfig, values, "test"), tokenizer, codec, num_steps=2)


def documents_of(pipeline, monkeypatch, call) -> list[list[int]]:
    """Token ids of the prompts that a call gives to the model."""
    found, read = [], Decoder.read_prompts

    def note(decoder, cache, batch, lengths):
        found.extend(row[: length + 1].tolist() for row, length in zip(batch.tokens, lengths, strict=True))
        return read(decoder, cache, batch, lengths)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "read_prompts", note)
        call()
    return found


AROUND = st.text(alphabet=" \n\r\t\u00a0\u200b\ufeff\u2028", max_size=4)


@settings(max_examples=20)
@given(AROUND, AROUND, st.sampled_from(["red apple, 3d style", "a\u200bb", "x  y", ""]))
def test_a_prompt_reads_as_the_caption_that_it_is_cleaned_to(pipeline, before, after, text):
    """The tokens are those of the caption in training, whatever is around it."""
    with pytest.MonkeyPatch.context() as patch:
        found = documents_of(pipeline, patch, lambda: pipeline.generate([[before + text + after]]))
    bos, eos = pipeline.tokenizer.bos, pipeline.tokenizer.eos
    assert found == [[bos, *pipeline.tokenizer.encode(clean_text(text)), eos]]


def test_every_call_cleans_its_prompts(pipeline, monkeypatch):
    clean, image = pipeline.draw(["red apple"])[0], pipeline.draw(["x"])[0]
    assert np.array_equal(np.asarray(pipeline.draw([" \ufeffred apple\n"])[0]), np.asarray(clean))
    mixed = [
        documents_of(pipeline, monkeypatch, lambda p=p: pipeline.generate([p]))
        for p in (["a ", image, "\nb"], ["a", image, "b"])
    ]
    assert mixed[0] == mixed[1]


def limited(pipeline, length: int | None) -> TransfusionPipeline:
    config = pipeline.config.model_copy(update={"sequence_length": length})
    return TransfusionPipeline(pipeline.model, pipeline.tokenizer, pipeline.codec, config)


def test_a_prompt_longer_than_the_rows_of_training_is_refused_with_the_limit(pipeline):
    words = "apple " * 30
    positions = len(pipeline.tokenizer.encode(words.strip())) + 2
    for call, needed in (
        (lambda p: p.generate([["x"], [words]]), positions + 1),
        (lambda p: p.draw(["x", words]), positions + POSITIONS),
    ):
        assert call(limited(pipeline, needed))[1] != []
        call(limited(pipeline, None))
        with pytest.raises(
            UserError, match=rf"prompt 1 takes {positions} .*sequences of {needed - 1}; shorten"
        ):
            call(limited(pipeline, needed - 1))


@pytest.mark.parametrize("begin", ["free", "text", "image"])
@pytest.mark.parametrize("preferred", ["boi", "text"])
def test_a_row_ends_where_the_rows_of_training_end(pipeline, begin, preferred):
    """Whatever max_images and max_new_tokens allow; each row by its own length."""
    token = pipeline.tokenizer.boi if preferred == "boi" else 100
    hook = pipeline.model.tail.head.register_forward_hook(
        lambda _head, _inputs, logits: prefer(logits, token)
    )
    sampling = pipeline.config.sampling.model_copy(update={"max_new_tokens": 500})
    prompts = [[caption] for caption in ("x", "red apple, 3d style", "a much longer caption than the others")]
    length = 60
    try:
        parts = pipeline.model, pipeline.tokenizer, pipeline.codec
        requests = [Request(prompt, sampling, row, begin, 10**6) for row, prompt in enumerate(prompts)]
        generation = Generation(*parts, requests, length)
        assert length <= generation.cache.capacity < length + KEYS_MULTIPLE
        generation.run()
        alone = Generation(*parts, requests[:1], length)
        alone.run()
    finally:
        hook.remove()
    for row in generation.rows:
        document = flatten(row.segments, pipeline.tokenizer, pipeline.config.model.patches)
        assert len(document) == length  # with eos
    kinds = [
        [isinstance(part, int) for part in output] for output in (generation.outputs[0], alone.outputs[0])
    ]
    assert kinds[0] == kinds[1]


def prefer(logits, token: int):
    logits[..., token] += 1e4
    logits[..., 101] += 1e3  # where that token is not allowed
    return logits


def test_a_published_pipeline_knows_the_length_of_training(run_config, tokenizer, codec, tmp_path):
    make_run_pipeline(run_config, tokenizer, codec).save_pretrained(tmp_path / "saved")
    pipeline = TransfusionPipeline.from_pretrained(tmp_path / "saved")
    assert pipeline.config.sequence_length == 96
    with pytest.raises(UserError, match="trained on sequences of 96"):
        pipeline.draw(["apple " * 2000])
