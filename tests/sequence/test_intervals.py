"""The mask: two integers per position against its definition."""

import random
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interval_attention import prepare
from megafusion.sequence.intervals import Intervals
from megafusion.sequence.packing import SequenceShape, collate, pack_row
from megafusion.sequence.tokenizer import Tokenizer
from tests.support.segments import flat_document, image_of

LATENTS = (1, 1, 1)


IDS = Tokenizer(Path(), "", 3, bos=1, eos=2)


def lay_out(documents: list[list[int]], num_patches: int, padding: int, causal: bool):
    """A packed row from documents given as segment lengths: 0 for an image, n > 0 for n text tokens."""
    image = image_of(np.zeros(LATENTS, np.float32))
    flat = [
        flat_document([np.full(n, 9) if n else image for n in document], IDS, (num_patches,), causal)
        for document in documents
    ]
    num_images = max(1, sum(len(document.images) for document in flat))
    length = sum(len(document) for document in flat) + padding
    return collate(
        [pack_row(flat, SequenceShape(length, num_images, (num_patches,), 1, (LATENTS[1:],)))]
    ), length


def mask_by_definition(
    documents: list[list[int]], num_patches: int, padding: int, causal: bool
) -> torch.Tensor:
    """Visible if in the same document, and not later or, unless images are causal, in the same image."""
    members = []  # document and image of each position
    image_number = 0
    for number, document in enumerate(documents):
        members.append((number, None))
        for n in document:
            if n:
                members += [(number, None)] * n
            else:
                members += [(number, None), *[(number, image_number)] * num_patches, (number, None)]
                image_number += 1
        members.append((number, None))
    members += [(f"padding {i}", None) for i in range(padding)]
    size = len(members)
    visible = torch.zeros(size, size, dtype=torch.bool)
    for i, (document, image) in enumerate(members):
        for j, (other, other_image) in enumerate(members):
            same_image = image is not None and image == other_image and not causal
            visible[i, j] = document == other and (j <= i or same_image)
    return visible


def check(documents, num_patches, padding, causal):
    batch, length = lay_out(documents, num_patches, padding, causal)
    intervals = batch.intervals()
    expected = mask_by_definition(documents, num_patches, padding, causal)
    assert torch.equal(intervals.dense_mask[0, 0], expected)
    prepared = prepare(intervals.row_end, intervals.last_query, check=True)
    at = torch.arange(length)
    by_keys = (at[:, None] >= prepared.first_query[0]) & (at[:, None] < prepared.last_query[0])
    by_rows = (at >= prepared.row_start[0, :, None]) & (at < prepared.row_end[0, :, None])
    assert torch.equal(by_keys, expected)
    assert torch.equal(by_rows, expected)
    assert batch.work()[1] == expected.sum()


def test_dense_mask_equals_the_definition_on_1000_random_layouts():
    """Adjacent images, one-patch images, images first and last, and padding all occur."""
    random.seed(0)
    for _ in range(1000):
        documents = [
            [random.choice([0, 0, 1, 2, 5]) for _ in range(random.randint(1, 4))]
            for _ in range(random.randint(1, 3))
        ]
        check(documents, random.choice([1, 1, 2, 4]), random.choice([0, 0, 1, 3]), random.random() < 0.2)


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=0, max_size=4), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(0, 3),
    st.booleans(),
)
@settings(max_examples=60)
def test_dense_mask_equals_the_definition(documents, num_patches, padding, causal):
    check(documents, num_patches, padding, causal)


def test_fully_masked_queries_are_marked():
    intervals = Intervals(torch.tensor([[1, 0, 3]], dtype=torch.int32), None, 3)
    assert intervals.not_empty.tolist() == [[True, False, True]]
    assert not intervals.dense_mask[0, 0, 1].any()
