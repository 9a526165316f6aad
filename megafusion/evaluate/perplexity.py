"""The perplexity suite: nats and bits of held-out texts, by token and by byte."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megafusion.errors import UserError
from megafusion.evaluate.annotations import ALL, spread
from megafusion.evaluate.config import EvaluateConfig
from megafusion.evaluate.suite import Metrics
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.model.transformer import block_context
from megafusion.model.transfusion import Transfusion
from megafusion.sequence.document import IGNORED_LABEL, FlatDocument, Segment, cut_document, flatten
from megafusion.sequence.intervals import Intervals
from megafusion.sequence.text import clean_text
from megafusion.storage import file_sha256, read_lines


class Perplexity:
    """Next-token losses of documents that are laid out as in training: bos, the text, eos.

    A document longer than the model's rows is cut, as in training: each piece sees nothing before it.
    """

    name = "perplexity"

    def __init__(self, config: EvaluateConfig):
        if wrong := [path for path in config.texts if path.suffix != ".txt"]:
            raise UserError(f"texts: {wrong[0]} is not a .txt file; write one document per line")
        texts = [text for path in config.texts for line in read_lines(path) if (text := clean_text(line))]
        self.items: Sequence[str] = spread(texts, config.max_items)
        self.recipe: dict[str, Any] = {
            "texts": list(map(file_sha256, config.texts)),
            "items": len(self.items),
        }

    def measure(self, pipeline: TransfusionPipeline, first: int, items: Sequence[str]) -> list[dict]:
        """Nats, targets and bytes of each text."""
        model, length = pipeline.config.model, pipeline.config.sequence_length or 2**31
        documents = [
            flatten([Segment("tokens", pipeline.tokenizer.encode(text))], pipeline.tokenizer, model.patches)
            for text in items
        ]
        pieces = [
            (number, cut_document(document, start, min(start + length, len(document))))
            for number, document in enumerate(documents)
            for start in range(0, len(document), length)
        ]
        nats, targets = [0.0] * len(items), [0] * len(items)
        for start in range(0, len(pieces), len(items)):
            chosen = pieces[start : start + len(items)]
            nats_BS, has_target_BS = text_nats(pipeline.model, [piece for _, piece in chosen])
            for (number, _), piece_nats, has_target in zip(chosen, nats_BS, has_target_BS, strict=True):
                nats[number] += float(piece_nats.sum())
                targets[number] += int(has_target.sum())
        sizes = (len(text.encode()) for text in items)
        return [
            {"nats": nat, "tokens": num, "bytes": size}
            for nat, num, size in zip(nats, targets, sizes, strict=True)
        ]

    def summarize(self, records: list[dict], device: Any = None) -> dict[str, Metrics]:
        """Metrics over all texts. `tokens` counts the end of each text, which is predicted too."""
        nats, tokens, size = (math.fsum(r[name] for r in records) for name in ("nats", "tokens", "bytes"))
        return {
            ALL: {
                "texts": len(records),
                "tokens": int(tokens),
                "bytes": int(size),
                "nats_per_token": nats / tokens,
                "bits_per_token": nats / tokens / math.log(2),
                "perplexity": math.exp(nats / tokens) if nats / tokens < 700 else math.inf,
                "nats_per_byte": nats / size,
                "bits_per_byte": nats / size / math.log(2),
            }
        }


@torch.no_grad()
def text_nats(model: Transfusion, documents: Sequence[FlatDocument]) -> tuple[Tensor, Tensor]:
    """Float64 nats [B, S] of each position's next token, 0 where there is none, and where there is one.

    Documents of texts alone, one a row.
    """
    hidden_BSD = text_hidden(model, [document.tokens for document in documents])
    labels_BS = torch.full(hidden_BSD.shape[:2], IGNORED_LABEL)
    for row, document in enumerate(documents):
        labels_BS[row, : len(document)] = torch.from_numpy(document.labels)
    labels_BS = labels_BS.to(hidden_BSD.device)
    # A row at a time, because logits are the largest tensor.
    nats_BS = torch.stack(
        [
            F.cross_entropy(
                model.tail.head(hidden_SD).float(), labels_S, ignore_index=IGNORED_LABEL, reduction="none"
            )
            for hidden_SD, labels_S in zip(hidden_BSD, labels_BS, strict=True)
        ]
    )
    return nats_BS.double().cpu(), (labels_BS != IGNORED_LABEL).cpu()


@torch.no_grad()
def text_hidden(model: Transfusion, rows: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
    """Hidden states [B, S, D] of rows of token ids, padded to the longest; those of padding mean nothing."""
    device, length = model.tail.head.weight.device, max(map(len, rows))
    num = torch.tensor([len(row) for row in rows])[:, None]
    positions_BS = torch.arange(length).expand(len(rows), length)
    tokens_BS = torch.zeros(len(rows), length, dtype=torch.int64)
    for tokens_S, row in zip(tokens_BS, rows, strict=True):
        tokens_S[: len(row)] = torch.as_tensor(row)
    # Padding sees itself alone.
    last_query = torch.where(positions_BS < num, num, positions_BS + 1).int().to(device)
    intervals = Intervals((positions_BS + 1).int().to(device), last_query, length)
    x_BSD = model.stem.embedding(tokens_BS.to(device))
    is_patch = torch.zeros(x_BSD.shape[:2], dtype=torch.bool, device=device)
    context = block_context(model.config, intervals, positions_BS.int().to(device), x_BSD.dtype, is_patch)
    for block in model.blocks:
        x_BSD = block(x_BSD, context)
    return model.tail(x_BSD)
