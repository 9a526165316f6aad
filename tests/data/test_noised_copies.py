"""Streams with clean context: rows hold every image twice, and lose, split and repeat none."""

from collections import Counter

import numpy as np
import pytest

from megafusion.config import parse_config
from megafusion.data.config import DataConfig
from megafusion.errors import UserError
from megafusion.train.config import RunConfig
from tests.support.quantized import QUANTIZED_MODEL
from tests.support.rows import (
    MANY_IDS,
    NUM_PATCHES,
    arrays,
    digest,
    stream_of,
    write_documents,
    write_pairs,
    write_texts,
)


def sources(folder):
    documents = [[3, 0, 0, 5], [0, 2, 0, 40, 0, 0], [90], [0], [0, 0, 0, 0, 0, 0, 7]]
    return {
        "web": (write_documents(folder / "web", documents), 1.0),
        "pairs": (write_pairs(folder / "pairs", 12), 1.0),
        "text": (write_texts(folder / "text", 12), 1.0),
    }


def loader(folder, **changes):
    return stream_of(
        sources(folder), range(2), 2, length=48, slots=3, clean_context=True, ids=MANY_IDS, **changes
    )


def test_rows_hold_each_image_clean_in_its_place_and_noised_behind_its_document(tmp_path):
    stream, found, filled = loader(tmp_path), Counter(), []
    for row in (arrays(row) for _ in range(60) for row in stream.next()):
        is_patch = row["patch_index"] >= 0
        used = np.flatnonzero(row["image_start"] >= 0)
        assert is_patch.sum() == 2 * NUM_PATCHES * len(used)
        for slot in used:
            first = slot * NUM_PATCHES + np.arange(NUM_PATCHES)
            noised, clean = (
                np.flatnonzero(np.isin(row["patch_index"], first + offset)) for offset in (0, 3 * NUM_PATCHES)
            )
            assert noised[0] == row["image_start"][slot]
            assert (row["positions"][noised] == row["positions"][clean]).all()
            assert clean[-1] < noised[0]
            assert (row["labels"][noised] == -100).all()
            assert (row["last_query"][noised] == noised[-1] + 1).all()
            found[round(float(row["latents"][slot].mean()), 2)] += 1
        filled.append(((row["tokens"] > 0) | is_patch).mean())
    assert len(found) >= 13
    assert np.mean(filled) > 0.85


def test_a_stream_resumes_where_it_was(tmp_path):
    stream = loader(tmp_path)
    for _ in range(7):
        stream.next()
    state = stream.state_dict()
    expected = [digest(stream.next()) for _ in range(5)]
    resumed = loader(tmp_path)
    resumed.load_state_dict(state)
    assert [digest(resumed.next()) for _ in range(5)] == expected


def test_a_limit_of_noise_is_refused_and_by_default_there_is_none(run_values):
    data = run_values["data"] | {"clean_context": True}
    assert parse_config(DataConfig, data, "test").image_first_max_t == 1
    again = parse_config(DataConfig, data, "test").model_dump(mode="json")
    assert parse_config(DataConfig, again, "test").image_first_max_t == 1
    with pytest.raises(
        UserError, match=r"image_first_max_t 0\.5 .*clean_context true .*leave .* out, or set"
    ):
        parse_config(DataConfig, data | {"image_first_max_t": 0.5}, "test")


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("data", {"sequence_length": 35}, r"an image takes 36 positions with data\.clean_context true.* 35"),
        ("model", {"image_attention": "causal"}, r"data\.clean_context true .*model\.image_attention causal"),
        ("model", QUANTIZED_MODEL, r"data\.clean_context true .*model\.codebook_size \d+"),
    ],
)
def test_what_does_not_go_with_it_is_refused(run_values, section, changes, message):
    run_values["data"]["clean_context"] = True
    run_values[section] |= changes
    with pytest.raises(UserError, match=message):
        parse_config(RunConfig, run_values, "test")
