"""The weights of a checkpoint under the names of the plain model, LoRA updates merged."""

from pathlib import Path
from typing import Literal

import torch

from megafusion.checkpoint.chunks import Chunks
from megafusion.checkpoint.reader import CheckpointWeights, TensorSource, read_tensors
from megafusion.model.config import LoraConfig, is_lora_weight
from megafusion.model.lora import lora_update
from megafusion.objective.alignment import ALIGNMENT


class MergedLora:
    """A TensorSource of a LoRA run's weights, each with its update."""

    def __init__(self, source: TensorSource, config: LoraConfig):
        self._source, self._config = source, config

    def __str__(self) -> str:
        return str(self._source)

    def shapes(self) -> dict[str, torch.Size]:
        return {name: shape for name, shape in self._source.shapes().items() if not is_lora_weight(name)}

    def read(self, chunks: dict[str, Chunks]) -> None:
        self._source.read(chunks)
        layers = {f"{name.removesuffix('weight')}lora_": name for name, part in chunks.items() if part.chunks}
        shapes = self._source.shapes().items()
        found = read_tensors(self._source, {n: s for n, s in shapes if n.startswith(tuple(layers))})
        for layer, name in layers.items():
            if own := [found[each] for each in sorted(found) if each.startswith(layer)]:
                update = lora_update(own[0], own[1:], self._config.scale)
                for chunk in chunks[name].chunks:
                    box = zip(chunk.offsets, chunk.values.shape, strict=True)
                    part = update[tuple(slice(start, start + size) for start, size in box)]
                    chunk.values.copy_(chunk.values.float() + part.to(chunk.values.device))


def open_weights(checkpoint: Path, kind: Literal["ema", "model"], lora: LoraConfig | None) -> TensorSource:
    """Averaged or raw weights of a checkpoint as those of the model that is published. lora: of its run."""
    weights = CheckpointWeights(checkpoint, kind, without=ALIGNMENT)
    return MergedLora(weights, lora) if lora else weights
