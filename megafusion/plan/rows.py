"""Packed rows by their lengths alone: how many keys a query sees, and which positions have a loss."""

import random
from functools import cache
from typing import Literal, NamedTuple

RowKind = Literal["mixed", "text", "pairs", "whole"]
NUM_ROWS = 64


class RowStatistics(NamedTuple):
    """Means over the positions of packed rows."""

    visible_keys: float
    """Keys that a query sees."""
    images: float
    """Images in a row."""
    targets: float
    """Share of the positions with a text target."""


@cache
def row_statistics(
    kind: RowKind,
    length: int,
    patches: int,
    slots: int,
    has_codes: bool = False,
    is_causal: bool = False,
    clean_context: bool = False,
) -> RowStatistics:
    """Rows as benchmarks/train.py packs them: texts (log-normal, about 1,100 tokens), captions of 8 to 60
    tokens with an image, or half of each; whole: one causal text a row. has_codes: images are targets, and
    causal; is_causal: within images of patches, too; clean_context: images have noised copies."""
    if kind == "whole":
        return RowStatistics((length + 1) / 2, 0, 1)
    sampled = random.Random(0)
    pairs = images = targets = 0
    for _ in range(NUM_ROWS):
        filled = in_row = 0
        while (room := length - filled) >= 3:
            wants_image = kind == "pairs" or (kind == "mixed" and filled < length // 2)
            copied = patches if clean_context else 0
            if wants_image and in_row < slots and room >= patches + copied + 12:
                caption = sampled.randint(8, min(60, room - patches - copied - 4)) + 1  # with bos
                before, image, after = caption + 1, patches, 2  # boi; eoi and eos
                # Causal, but each patch sees its whole image.
                pairs += (before + image + after) * (before + image + after + 1) // 2
                pairs += 0 if has_codes or is_causal else image * (image - 1) // 2
                pairs += copied * (before + copied)  # each sees what is before its image, and its copy
                filled, in_row = filled + before + image + after + copied, in_row + 1
                targets += before + (image + 1 if has_codes else 0)  # of latents none
            elif kind == "pairs" and in_row:
                break
            else:
                tokens = min(room, int(sampled.lognormvariate(6.6, 0.9)) + 3)
                pairs, filled = pairs + tokens * (tokens + 1) // 2, filled + tokens
                targets += tokens - 1
        pairs, images = pairs + length - filled, images + in_row  # a position left over sees itself
    num_positions = NUM_ROWS * length
    return RowStatistics(pairs / num_positions, images / NUM_ROWS, targets / num_positions)
