"""Losses on held-out documents while training."""

import torch

from megafusion.data.config import ValidationConfig
from megafusion.data.loader import DataLoader
from megafusion.engine.engine import Engine
from megafusion.objective.losses import NUM_TIME_BUCKETS
from megafusion.sequence.document import IGNORED_LABEL
from megafusion.sequence.packing import PackedBatch
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.train.image_encoder import ImageEncoder


class Validation:
    """Measures the losses of the same packed rows, with the same noise, each time.

    loader: of the held-out sources, on this rank. image_weight: of the total loss.
    """

    def __init__(
        self,
        config: ValidationConfig,
        loader: DataLoader,
        tokenizer: Tokenizer,
        engine: Engine,
        encoder: ImageEncoder,
        image_weight: float,
    ):
        self._engine, self._image_weight = engine, image_weight
        self._micro_batches: list[PackedBatch] = []
        with engine.consensus.defer_errors():
            for _ in range(config.num_batches):
                batches = encoder.encode(loader.next(), with_features=False)  # losses have no alignment
                self._micro_batches += [batch.to("cpu") for batch in batches]
        num_bytes = sum(_num_bytes(batch, tokenizer) for batch in self._micro_batches)
        num_codes = sum(_num_codes(batch, tokenizer) for batch in self._micro_batches)
        num_bytes, num_codes = engine.consensus.reduce_counts(torch.tensor([num_bytes, num_codes])).tolist()
        self._num_bytes = 0 if num_codes else num_bytes

    def measure(self) -> dict[str, float]:
        """Figures of a line of metrics. Called by every rank.

        validation_text_loss in nats a token, validation_text_loss_per_byte; validation_image_loss, the mean
        over images, and validation_image_loss_t0 to _t9, that of images with t in [0, 0.1) to [0.9, 1);
        validation_loss, the total. Without text targets, or images, theirs are absent; so is
        that of a byte where image codes are among the targets.
        """
        nats, num_targets, *images = self._engine.evaluate(self._micro_batches)
        errors, counts = images[:NUM_TIME_BUCKETS], images[NUM_TIME_BUCKETS:]
        figures = {"validation_loss": 0.0}
        if num_targets:
            figures["validation_loss"] += nats / num_targets
            figures["validation_text_loss"] = nats / num_targets
        if num_targets and self._num_bytes:
            figures["validation_text_loss_per_byte"] = nats / self._num_bytes
        if sum(counts):
            image_loss = sum(errors) / sum(counts)
            figures["validation_loss"] += self._image_weight * image_loss
            figures["validation_image_loss"] = image_loss
        for bucket, (error, count) in enumerate(zip(errors, counts, strict=True)):
            if count:
                figures[f"validation_image_loss_t{bucket}"] = error / count
        return figures


def _num_codes(batch: PackedBatch, tokenizer: Tokenizer) -> int:
    """Targets that belong to quantized images."""
    is_quantized = batch.latents.shape[2] == 0
    return int((batch.labels >= tokenizer.num_text_ids).sum()) if is_quantized else 0


def _num_bytes(batch: PackedBatch, tokenizer: Tokenizer) -> int:
    """Bytes of the text whose tokens are targets."""
    has_label = batch.labels != IGNORED_LABEL
    number = (batch.positions == 0).cumsum(1)  # of the document in its row
    texts = [
        tokenizer.decode(labels[(number == each) & is_target].numpy())
        for labels, number, is_target in zip(batch.labels, number, has_label, strict=True)
        for each in number[is_target].unique()
    ]
    return sum(len(text.encode()) for text in texts)
