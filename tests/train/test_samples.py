"""Sample sheets of captions that are longer than a row of training, and of sources with bad documents."""

import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megafusion.config import parse_config
from megafusion.data.document_format import BadDocument
from megafusion.data.reader import ShardFolder
from megafusion.data.source import open_sources
from megafusion.train.build import Components
from megafusion.train.config import RunConfig
from megafusion.train.samples import SampleSheets
from tests.support.damage import damage

WORDS = st.lists(
    st.sampled_from(["apple", "réd", "3d", "x", "🍎", "Donaudampfschiff", "红苹果"]), max_size=150
)


@pytest.fixture
def sampler(run_config, tokenizer, codec) -> SampleSheets:
    return SampleSheets(
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


@pytest.fixture
def sampler_of(run_values, shards, tmp_path, tokenizer, codec):
    """A function: sheets of four pairs over a source in which some documents are bad."""

    def make(bad: list[int], on_error: str) -> SampleSheets:
        folder = shutil.copytree(shards / "pairs", tmp_path / "pairs")
        damage(folder, bad, per_shard=8)
        run_values["data"] |= {"on_error": on_error, "sources": {"pairs": {"path": str(folder)}}}
        config = parse_config(RunConfig, run_values | {"samples": {"every": 3, "num_pairs": 4}}, "test")
        sources = open_sources(config.data, tokenizer, codec.hash, 0)
        components = Components(tokenizer, codec, sources, *[None] * 3)
        return SampleSheets(config, components, torch.device("cpu"))

    return make


def test_bad_documents_are_replaced_in_sheets_where_they_are_skipped(sampler_of, shards):
    captions, images = sampler_of([0, 11, 12], "skip")._pairs
    folder = ShardFolder(shards / "pairs")
    assert captions == [folder.read(index).metadata["caption"] for index in (1, 5, 13, 16)]
    assert [image.size for image in images] == [(32, 32)] * 4


def test_a_bad_document_of_a_sheet_is_named(sampler_of):
    with pytest.raises(BadDocument, match=r"shard-000000\.tar, document 0: .*data\.on_error=skip"):
        sampler_of([0], "fail")._pairs  # noqa: B018
