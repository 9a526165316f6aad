"""The next token of each row: what a row may have, and its sampling."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megafusion.generate.row import Row
from megafusion.generate.text import choose_tokens, process_logits
from megafusion.objective.config import SamplingConfig
from megafusion.sequence.tokenizer import Tokenizer


class NextTokens:
    """Chooses the next tokens of rows.

    boi_ids: the begin-of-image token of each size. last_image_start: positions before an image that still
    fits, at most.
    """

    def __init__(self, tokenizer: Tokenizer, boi_ids: Sequence[int], last_image_start: int):
        self.tokenizer, self.boi_ids, self.last_image_start = tokenizer, list(boi_ids), last_image_start
        self._known: tuple[list[tuple[int, ...]], Tensor | None] = [], None
        """Bans, and their mask."""

    def choose(self, rows: Sequence[Row], logits_BV: Tensor, lengths: Sequence[int]) -> list[int]:
        """A token for each row. lengths: positions that the rows have so far."""
        bans = [self.banned(row, length) for row, length in zip(rows, lengths, strict=True)]
        allowed_BV = torch.where(self._mask(bans, logits_BV), -torch.inf, logits_BV.float())
        groups: dict[SamplingConfig, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row.request.sampling, []).append(index)
            boi = None if row.request.size is None else self.boi_ids[row.request.size]
            if boi is not None and boi not in bans[index]:  # a boi of any size counts as one of this size
                allowed_BV[index, boi] = logits_BV[index, self.boi_ids].amax()
        tokens = [0] * len(rows)
        for sampling, group in groups.items():
            alike = [rows[index] for index in group]
            own = allowed_BV if len(groups) == 1 else allowed_BV[group]
            uniform = [row.uniform.random() for row in alike]
            processed = process_logits(own, sampling, _seen(alike, own, sampling))
            chosen = choose_tokens(processed, sampling.temperature, uniform)
            for index, token in zip(group, chosen.tolist(), strict=True):
                tokens[index] = token
        return tokens

    def banned(self, row: Row, length: int) -> tuple[int, ...]:
        """Of eos and the boi tokens, those that a row of so many positions cannot have next."""
        eos = (self.tokenizer.eos,) if row.request.begin == "text" and not row.output else ()
        has_room = row.images_left > 0 and length <= self.last_image_start
        size = row.request.size
        return eos + tuple(
            token
            for index, token in enumerate(self.boi_ids)
            if not has_room or (size is not None and index != size)
        )

    def _mask(self, bans: list[tuple[int, ...]], logits_BV: Tensor) -> Tensor:
        """bool [B, V], the tokens that rows cannot have next; remade where the bans are not the last ones."""
        known, mask_BV = self._known
        if mask_BV is None or bans != known:
            mask_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
            mask_BV[:, self.tokenizer.eoi] = True
            mask_BV[:, self.tokenizer.num_ids(len(self.boi_ids)) :] = True  # rows of a padded vocabulary
            for index, own in enumerate(bans):
                mask_BV[index, list(own)] = True
            self._known = bans, mask_BV
        return mask_BV


def _seen(rows: Sequence[Row], logits_BV: Tensor, sampling: SamplingConfig) -> Tensor | None:
    """bool [B, V], the tokens that a repetition penalty is for; None without one."""
    if sampling.repetition_penalty == 1:
        return None
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for index, row in enumerate(rows):
        seen_BV[index, [token for text in row.texts for token in text.data]] = True
    return seen_BV
