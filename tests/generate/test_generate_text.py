"""Sampling of tokens against transformers and against the softmax; text that is streamed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megafusion.generate.text import TextStream, choose_tokens, cut_at_stop, process_logits, uniform_source
from megafusion.objective.config import SamplingConfig
from megafusion.sequence.tokenizer import Tokenizer
from tests.support.tokenizers import make_gpt2, make_llama2

NUM_DRAWS = 20_000


@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 60),
    st.sampled_from([0.01, 0.3, 1.0, 2.5]),
    st.integers(0, 70),
    st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from([0.5, 1.0, 1.3]),
)
def test_logits_are_processed_exactly_as_by_transformers(
    seed, vocabulary, temperature, top_k, top_p, min_p, penalty
):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(3, vocabulary, generator=generator)).round(decimals=1)  # with equal ones
    logits[:, torch.rand(vocabulary, generator=generator) < 0.2] = -torch.inf
    logits[:, 0] = 1.0
    ids = torch.randint(vocabulary, (3, 7), generator=generator)
    sampling = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    found = process_logits(logits, sampling, seen)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    expected = TemperatureLogitsWarper(temperature)(ids, expected)
    if top_k:
        expected = TopKLogitsWarper(top_k)(ids, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(ids, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(ids, expected)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1, "temperature": 2.0}]
)
def test_draws_have_the_distribution_of_the_softmax(options):
    """20,000 tokens of one row, one after another as in generation; chi-squared, p > 0.001."""
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(5))
    sampling = SamplingConfig(**{"temperature": 1.0, **options})
    processed = process_logits(logits, sampling)
    source = uniform_source(11)
    uniform = [source.random() for _ in range(NUM_DRAWS)]
    drawn = choose_tokens(processed.expand(NUM_DRAWS, -1), sampling.temperature, uniform)
    counts = np.bincount(drawn.numpy(), minlength=40)
    expected = processed[0].double().softmax(-1).numpy() * NUM_DRAWS
    assert counts[expected == 0].sum() == 0
    likely = expected >= 5
    seldom = ~likely & (expected > 0)
    bins = [
        *zip(counts[likely], expected[likely], strict=True),
        (counts[seldom].sum(), expected[seldom].sum()),
    ]
    bins = [(count, mean) for count, mean in bins if mean]
    statistic = sum((count - mean) ** 2 / mean for count, mean in bins)
    assert chi2.sf(statistic, len(bins) - 1) > 0.001


def test_temperature_0_is_greedy_whatever_else_is_set():
    logits = torch.randn(4, 30)
    sampling = SamplingConfig(top_k=3, top_p=0.5, min_p=0.5)
    assert (
        choose_tokens(process_logits(logits, sampling), 0, [0.99] * 4).tolist() == logits.argmax(-1).tolist()
    )


def test_the_ends_of_the_unit_interval_choose_tokens_with_probability():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    assert [choose_tokens(logits, 1, [u]).item() for u in (0.0, math.nextafter(1, 0))] == [1, 2]


@pytest.fixture(scope="module", params=[None, make_gpt2, make_llama2])
def any_tokenizer(request, tokenizer, tmp_path_factory) -> Tokenizer:
    """SentencePiece's, bytes as GPT-2's, and words with bytes for other characters."""
    make = request.param
    return Tokenizer.from_pretrained(make(tmp_path_factory.mktemp("made"))) if make else tokenizer


TEXTS = st.text(st.sampled_from("ab é€漢😀👩‍👩 \n.,"), max_size=20)


@given(TEXTS, st.lists(TEXTS.filter(bool), max_size=3))
def test_streamed_text_is_the_decoded_text_up_to_the_first_stop(any_tokenizer, text, stop):
    ids = any_tokenizer.encode(text)
    stream, sent = TextStream(any_tokenizer, stop), []
    for number, token in enumerate(ids):
        sent.append(stream.push(token))
        assert not sent[-1].endswith("\ufffd")
        assert cut_at_stop("".join(sent), stop) == "".join(sent)
        if stream.is_stopped:
            ids = ids[: number + 1]
            break
    sent.append(stream.flush())
    assert "".join(sent) == cut_at_stop(any_tokenizer.decode(ids), stop)


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_pretrained(make_gpt2(tmp_path_factory.mktemp("made")))


@given(st.lists(st.integers(0, 255), max_size=30))
def test_bytes_that_are_no_text_are_streamed_as_they_decode(byte_tokenizer, ids):
    stream = TextStream(byte_tokenizer)
    assert "".join([*map(stream.push, ids), stream.flush()]) == byte_tokenizer.decode(ids)


def test_text_is_streamed_as_soon_as_it_is_known(tokenizer):
    stream = TextStream(tokenizer, ["STOP"])
    sent = [stream.push(token) for token in tokenizer.encode("red apple")]
    assert all(sent)
    assert "".join(sent) == "red apple"
    for text, known in (("aS", "a"), ("aST", "a"), ("aSTa", "aSTa")):
        stream = TextStream(tokenizer, ["STOP"])
        assert "".join(map(stream.push, tokenizer.encode(text))) == known
