"""Sample sheets of captions that are longer than a row of training."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megafusion.train.build import Components
from megafusion.train.samples import Sampler

WORDS = st.lists(
    st.sampled_from(["apple", "réd", "3d", "x", "🍎", "Donaudampfschiff", "红苹果"]), max_size=150
)


@pytest.fixture
def sampler(run_config, tokenizer, codec) -> Sampler:
    return Sampler(
        run_config,
        Components(tokenizer, codec, sources={}, loader=None, validation_loader=None, started_from=None),
        torch.device("cpu"),
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(WORDS, st.sampled_from([" ", ""]))
def test_a_caption_is_cut_to_what_a_row_holds_beside_an_image(sampler, tokenizer, words, separator):
    caption = separator.join(words)
    cut, room = sampler._cut(caption), 96 - 16 - 4
    assert len(tokenizer.encode(cut)) <= room
    if len(tokenizer.encode(caption)) <= room:
        assert cut == caption
    else:
        assert len(tokenizer.encode(cut)) > room - 20


def test_a_caption_of_thousands_of_words_is_drawn(sampler):
    caption = sampler._cut("red apple " * 5000)
    assert len(sampler._pipeline.draw([caption], sampling=sampler._pipeline.config.sampling)) == 1
