"""Tokens from logits, as transformers' logits processors and samplers choose them, and text from tokens."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megafusion.objective.config import SamplingConfig
from megafusion.sequence.tokenizer import Tokenizer

UNKNOWN = "\ufffd"
"""The text of bytes that are not a whole character, as yet."""


def process_logits(logits_BV: Tensor, sampling: SamplingConfig, seen_BV: Tensor | None = None) -> Tensor:
    """Logits after repetition penalty, temperature, top-k, top-p and min-p, as transformers applies them.

    seen_BV: bool, the tokens that the repetition penalty is for. With temperature 0 only that penalty is
    applied.
    """
    if seen_BV is not None and (penalty := sampling.repetition_penalty) != 1:
        penalized = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        logits_BV = torch.where(seen_BV, penalized, logits_BV)
    if sampling.temperature == 0:
        return logits_BV
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        least = logits_BV.topk(min(sampling.top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits_BV.sort()
        is_beyond = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        is_beyond[:, -1] = False
        logits_BV = logits_BV.masked_fill(is_beyond.scatter(1, order, is_beyond), -torch.inf)
    if sampling.min_p:
        probabilities = logits_BV.softmax(-1)
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(probabilities < least, -torch.inf)
    return logits_BV


def choose_tokens(logits_BV: Tensor, temperature: float, uniform_B: Sequence[float]) -> Tensor:
    """One token a row, int64 [B]: the most probable, or the one in whose share of [0, 1) a number lies.

    uniform_B: uniform in [0, 1), one for each row; a row's token depends on nothing else of the batch.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    ends_BV = logits_BV.double().softmax(-1).cumsum(-1)
    # The last end is 1 but for rounding; of tokens without probability, no end is above that before it.
    points_B1 = (
        torch.tensor(uniform_B, dtype=torch.float64, device=logits_BV.device)[:, None] * ends_BV[:, -1:]
    )
    return torch.searchsorted(ends_BV, points_B1, right=True)[:, 0]


def uniform_source(seed: int) -> np.random.Generator:
    """Random numbers of a row's tokens, apart from those of its images: counter-based, keyed by its seed."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, 1], np.uint64)))


class TextStream:
    """The text of one run of tokens, as it becomes known.

    `push` and `flush` return what can be told for certain: nothing that later tokens may change (a character
    of which bytes are missing) or that may be the beginning of a stop text. Together they return the decoded
    text, up to the first stop text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._sent = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """The text that a token makes known; sets is_stopped where it completes a stop text."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if (cut := cut_at_stop(text, self._stop)) != text:
            self.is_stopped = True
            return self._send(cut)
        text = text.rstrip(UNKNOWN)
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        return self._send(text[: len(text) - held])

    def flush(self) -> str:
        """The rest, at the end of the run."""
        return "" if self.is_stopped else self._send(self._tokenizer.decode(self._ids))

    def _send(self, text: str) -> str:
        new = text[len(self._sent) :]
        self._sent += new
        return new


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop text."""
    return text[: min((i for each in stop if (i := text.find(each)) >= 0), default=len(text))]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that begins a stop text."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
