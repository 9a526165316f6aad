"""Which weights a run trains: the patterns of the configuration against the names of its model."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch

from megafusion.errors import UserError
from megafusion.model.config import LoraConfig
from megafusion.model.lora import add_lora, lora_layers
from megafusion.model.transfusion import Transfusion
from megafusion.parallel.balance import layer_flops
from megafusion.parallel.partition import virtual_stage_blocks
from megafusion.suggestions import nearest
from megafusion.train.config import RunConfig


def weight_shapes(config: RunConfig) -> dict[str, torch.Size]:
    """Shapes of the whole model's weights by canonical name."""
    with torch.device("meta"):
        weights = Transfusion(config.model, config.objective).weights()
    return {name: tensor.shape for name, tensor in weights.items()}


def check_patterns(
    key: str, patterns: Iterable[str], names: Sequence[str], what: str = "weight of the model"
) -> None:
    """UserError for a pattern that matches no weight, with the nearest names."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"{key} {pattern!r}: no {what} has such a name; the nearest are {nearest(pattern, names)}"
            )


def check_parts(config: RunConfig) -> None:
    """UserError for a pattern that matches nothing, or a part that leaves nothing to train."""
    names, lora = list(weight_shapes(config)), config.train.lora
    check_patterns("train.freeze", config.train.freeze, names)
    if lora:
        with torch.device("meta"):
            model = Transfusion(config.model, config.objective)
        _check_targets(lora, list(lora_layers(model)))
        names = list(add_lora(model, lora).weights())
    if config.train.freeze or lora:
        _check_stages(config, names)
    _check_rates(config.optimizer.learning_rates, list(filter(config.train.trains, names)))


def _check_targets(lora: LoraConfig, layers: Sequence[str]) -> None:
    ends = list(dict.fromkeys(name.split(".", 2)[2] for name in layers))
    for target in lora.targets:
        if not any(map(lora.model_copy(update={"targets": (target,)}).adapts, layers)):
            known = layers if target.startswith("blocks.") else ends
            raise UserError(
                f"train.lora.targets {target!r}: no linear layer of the blocks has such a name; the nearest "
                f"is {nearest(target, known, 1)}"
            )


def _check_rates(rates: Iterable[str], trained: Sequence[str]) -> None:
    check_patterns("optimizer.learning_rates", rates, trained, "trained weight")
    for name in trained:
        if len(own := [pattern for pattern in rates if fnmatchcase(name, pattern)]) > 1:
            raise UserError(
                f"optimizer.learning_rates: {' and '.join(map(repr, own))} match {name}; let one match it"
            )


def _check_stages(config: RunConfig, names: Sequence[str]) -> None:
    """UserError if a pipeline stage has no trained weight: DeepSpeed needs a gradient from each."""
    train, parallel = config.train, config.parallel
    key, patterns = "train.freeze", train.freeze
    if train.lora:
        key, patterns = "train.lora.targets", train.lora.targets
    if not any(map(train.trains, names)):
        raise UserError(
            f"train.freeze {list(train.freeze)}: matches every weight of the model, so nothing is left to "
            "train; leave some out"
        )
    flops = layer_flops(config.model, config.sequence_shape)
    for number, stage in enumerate(virtual_stage_blocks(flops, parallel.pipeline, parallel.virtual_stages)):
        num_layers = config.model.num_layers
        own = [name for name in names if any(_is_in_stage(name, blocks, num_layers) for blocks in stage)]
        if not any(map(train.trains, own)):
            named = " and ".join(f"{blocks.start} to {blocks.stop - 1}" for blocks in stage)
            raise UserError(
                f"{key} {list(patterns)}: leaves nothing to train in stage {number} of parallel.pipeline "
                f"{parallel.pipeline} (blocks {named}); use fewer stages, or tensor parallelism"
            )


def _is_in_stage(name: str, blocks: range, num_layers: int) -> bool:
    part, *rest = name.split(".")
    if part == "blocks":
        return int(rest[0]) in blocks
    return blocks.start == 0 if part == "stem" else blocks.stop == num_layers
