"""The one place where parallelism is applied to the plain model."""

import torch
from torch import nn

from megafusion.model.initialize import initial_value, named_owners
from megafusion.model.transfusion import Transfusion
from megafusion.objective.losses import Objective
from megafusion.parallel.balance import layer_flops, stage_blocks
from megafusion.parallel.collectives import sum_over
from megafusion.parallel.fp8 import use_fp8
from megafusion.parallel.images import OwnImages, divide_images
from megafusion.parallel.layout import layout_of
from megafusion.parallel.recompute import recompute
from megafusion.parallel.stage import Shapes, Stage
from megafusion.parallel.tensor import (
    VocabularyParallelCrossEntropy,
    divide_block,
    divide_stem,
    divide_tail,
    words_of_rank,
)
from megafusion.parallel.topology import Topology
from megafusion.parallel.ulysses import Slices, exchange_heads
from megafusion.sequence.packing import RowShape
from megafusion.train.config import RunConfig


def parallelize(model: Transfusion, topology: Topology, config: RunConfig, device: torch.device) -> Stage:
    """This rank's part of a model that was made without storage, ready for DeepSpeed.

    The order matters:

    1. pipeline: the consecutive blocks of this rank's stage, balanced by counted operations;
    2. tensor: matrices, embedding and head are replaced by this rank's parts, norms by ones that enter;
    3. Ulysses: attention exchanges positions for heads;
    4. fp8: transformer-engine's layers in the place of ours, with the same parts;
    5. images: the adapters run on this rank's slots;
    6. weights: each parameter that is left gets its storage and its part of the same random start;
    7. gradients that ranks compute in part are summed: hooks, before DeepSpeed's;
    8. activation checkpointing around the blocks, then torch.compile around that.

    DeepSpeed then adds ZeRO, precision and the data-parallel sums (train/engine.py).
    """
    shape = config.row_shape
    stages = stage_blocks(layer_flops(config.model, shape), topology.size("pipeline"))
    own = OwnImages(topology.rows)
    shapes = _shapes(model, shape, config.train.micro_batch_rows, own)
    stage = Stage(model, stages[topology.place("pipeline")], topology, shapes)
    if topology.size("tensor") > 1:
        for block in stage.blocks.values():
            divide_block(block, topology)
    if topology.size("ulysses") > 1:
        for block in stage.blocks.values():
            exchange_heads(block, topology)
    if config.train.precision == "fp8":
        for block in stage.blocks.values():
            use_fp8(block, topology.group("tensor"))
    if own.num_ranks > 1:
        if stage.stem:
            divide_stem(stage.stem, topology)
        if stage.tail:
            divide_tail(stage.tail, topology)
        divide_images(stage.stem, stage.tail, own)
    materialize(stage, config.model.num_layers, config.seed, device)
    _mark(stage, topology)
    if topology.size("tensor") > 1:
        _sum_partial_gradients(stage, topology)
    for block in stage.blocks.values():
        recompute(block, config.train.recompute)
        if config.train.compile:
            block.compile()
    return stage


def materialize(stage: nn.Module, num_layers: int, seed: int, device: torch.device) -> None:
    """Give every parameter its storage and its part of the random start that its name and the seed define."""
    for name, owner, key in list(named_owners(stage)):
        empty = getattr(owner, key)
        layout = layout_of(empty)
        value = layout.take(initial_value(name, owner, layout.shape, num_layers, seed))
        parameter = nn.Parameter(value.to(device))
        parameter.__dict__.update(empty.__dict__)
        setattr(owner, key, parameter)


def _mark(stage: Stage, topology: Topology) -> None:
    """Tell DeepSpeed which parameters count in the gradient's norm here, and which are shards."""
    for parameter in stage.parameters():
        is_shard = hasattr(parameter, "part")
        if is_shard:
            parameter.tensor_model_parallel = True
        parameter.model_parallel = is_shard or topology.place("tensor") == 0


def _sum_partial_gradients(stage: Stage, topology: Topology) -> None:
    """Add up over the tensor ranks what each computes from its images, and from its positions."""
    partial = [part.adapter for part in (stage.stem, stage.tail) if part]
    if topology.config.sequence:
        partial += [
            n for block in stage.blocks.values() for n in (block.attention_norm, block.feed_forward_norm)
        ]
        partial += [stage.tail.norm] if stage.tail else []
    for module in partial:
        for parameter in module.parameters():
            parameter.register_hook(sum_over(topology.group("tensor")))


def _shapes(model: Transfusion, shape: RowShape, num_rows: int, own: OwnImages) -> Shapes:
    """What a micro-batch measures."""
    skips = model.tail.skip_shapes(own.num_own(num_rows * shape.num_images))
    return Shapes(num_rows, shape.length, shape.num_images, skips)


def divided_objective(config: RunConfig, topology: Topology) -> Objective:
    """The losses of logits that are divided by words and positions; alike on all ranks of a row."""
    objective, slices = Objective(config.objective, config.model.sizes), Slices(topology)
    if topology.size("tensor") > 1:
        words = words_of_rank(config.model.vocab_size, topology.place("tensor"), topology.size("tensor"))
        objective.cross_entropy = VocabularyParallelCrossEntropy(topology.group("tensor"), words)
    if slices.num_ranks > 1:
        of_slice = objective.cross_entropy
        objective.cross_entropy = lambda logits, labels: slices.total(of_slice(logits, slices.take(labels)))
    return objective
