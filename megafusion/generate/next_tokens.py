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

    boi_ids: the begin-of-image token of each size. max_length: positions of a row that has room for an image.
    """

    def __init__(self, tokenizer: Tokenizer, boi_ids: Sequence[int], max_length: int):
        self.tokenizer, self.boi_ids, self.max_length = tokenizer, list(boi_ids), max_length
        self._bans: tuple[list[tuple[int, ...]], Tensor | None] = [], None

    def choose(self, rows: Sequence[Row], logits_BV: Tensor, lengths: Sequence[int]) -> list[int]:
        """A token for each row. lengths: positions that the rows have so far."""
        added_BV = self._added(rows, logits_BV, lengths)
        logits_BV, given_BV = logits_BV.float() + added_BV, logits_BV
        groups: dict[SamplingConfig, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row.request.sampling, []).append(index)
            if row.request.size is not None:  # a boi of any size counts as one of this size
                boi = self.boi_ids[row.request.size]
                logits_BV[index, boi] = given_BV[index, self.boi_ids].amax() + added_BV[index, boi]
        tokens = [0] * len(rows)
        for sampling, group in groups.items():
            alike = [rows[index] for index in group]
            own = logits_BV if len(groups) == 1 else logits_BV[group]
            uniform = [row.uniform.random() for row in alike]
            processed = process_logits(own, sampling, _seen(alike, own, sampling))
            chosen = choose_tokens(processed, sampling.temperature, uniform)
            for index, token in zip(group, chosen.tolist(), strict=True):
                tokens[index] = token
        return tokens

    def banned(self, row: Row, length: int) -> tuple[int, ...]:
        """Of eos and the boi tokens, those that a row of so many positions cannot have next."""
        eos = (self.tokenizer.eos,) if row.request.begin == "text" and not row.output else ()
        has_room = row.images_left > 0 and length <= self.max_length
        size = row.request.size
        return eos + tuple(
            token
            for index, token in enumerate(self.boi_ids)
            if not has_room or (size is not None and index != size)
        )

    def _added(self, rows: Sequence[Row], logits_BV: Tensor, lengths: Sequence[int]) -> Tensor:
        """float32 [B, V]: -inf for tokens that a row cannot have next, else 0; made where a row changes."""
        bans = [self.banned(row, length) for row, length in zip(rows, lengths, strict=True)]
        known, added_BV = self._bans
        if added_BV is None or bans != known:
            added_BV = torch.zeros_like(logits_BV, dtype=torch.float32)
            added_BV[:, self.tokenizer.eoi] = -torch.inf
            added_BV[:, self.tokenizer.num_ids(len(self.boi_ids)) :] = -torch.inf  # of a padded vocabulary
            for index, own in enumerate(bans):
                added_BV[index, list(own)] = -torch.inf
            self._bans = bans, added_BV
        return added_BV


def _seen(rows: Sequence[Row], logits_BV: Tensor, sampling: SamplingConfig) -> Tensor | None:
    """bool [B, V], the tokens that a repetition penalty is for; None without one."""
    if sampling.repetition_penalty == 1:
        return None
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for index, row in enumerate(rows):
        seen_BV[index, [token for text in row.texts for token in text.data]] = True
    return seen_BV
