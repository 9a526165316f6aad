"""Rows of random text, and a model's logits of them."""

import numpy as np
import torch
from torch import Tensor

from megafusion.model.transfusion import Transfusion
from megafusion.sequence.document import FlatDocument
from megafusion.sequence.packing import PackedBatch, SequenceShape, collate, pack_row
from tests.support.generation import full_hidden
from tests.support.hub import PIECES


def documents(lengths: list[int], seed: int) -> list[FlatDocument]:
    generator = np.random.default_rng(seed)
    nothing = np.zeros(0, np.int32)
    return [
        FlatDocument(
            tokens := generator.integers(3, PIECES, length),
            labels=np.full_like(tokens, -100),
            patch=np.full(length, -1, np.int32),
            row_end=np.arange(1, length + 1, dtype=np.int32),
            image_start=nothing,
            image_end=nothing,
            images=(),
        )
        for length in lengths
    ]


def pack(rows: list[list[FlatDocument]]) -> PackedBatch:
    length = max(sum(map(len, row)) for row in rows)
    shape = SequenceShape(length, 1, (16,), 4, ((8, 8),))
    return collate([pack_row(row, shape) for row in rows])


@torch.no_grad()
def text_logits(model: Transfusion) -> Tensor:
    """Logits [B, S, V] of rows of documents of unlike lengths."""
    rows = [documents(lengths, seed) for seed, lengths in enumerate([[7, 21, 4], [32], [1, 31]])]
    hidden_BSD, _ = full_hidden(model, pack(rows))
    return model.tail.head(hidden_BSD)
