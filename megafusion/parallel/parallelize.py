"""The one place where parallelism is applied to the plain model."""

import torch
from torch import nn

from megafusion.model.initialize import initial_value, named_owners
from megafusion.model.transfusion import Transfusion
from megafusion.objective.losses import Objective
from megafusion.parallel.activation_checkpointing import recompute
from megafusion.parallel.balance import layer_flops, stage_blocks
from megafusion.parallel.collectives import sum_over
from megafusion.parallel.fp8 import use_fp8
from megafusion.parallel.image_parallel import ImageShard, shard_images
from megafusion.parallel.mesh import Mesh
from megafusion.parallel.pipeline import Shapes, Stage
from megafusion.parallel.sharding import shard_spec_of
from megafusion.parallel.tensor import (
    VocabularyParallelCrossEntropy,
    shard_block,
    shard_stem,
    shard_tail,
    vocab_range,
)
from megafusion.parallel.ulysses import SequenceShard, exchange_heads
from megafusion.sequence.packing import SequenceShape
from megafusion.train.config import RunConfig


def parallelize(model: Transfusion, mesh: Mesh, config: RunConfig, device: torch.device) -> Stage:
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
    shape = config.sequence_shape
    stages = stage_blocks(layer_flops(config.model, shape), mesh.size("pipeline"))
    own = ImageShard(mesh.tensor_context_group)
    shapes = _shapes(model, shape, config.train.micro_batch_size, own)
    stage = Stage(model, stages[mesh.rank("pipeline")], mesh, shapes)
    if mesh.size("tensor") > 1:
        for block in stage.blocks.values():
            shard_block(block, mesh)
    if mesh.size("ulysses") > 1:
        for block in stage.blocks.values():
            exchange_heads(block, mesh)
    if config.train.precision == "fp8":
        for block in stage.blocks.values():
            use_fp8(block, mesh.group("tensor"))
    if own.num_ranks > 1:
        if stage.stem:
            shard_stem(stage.stem, mesh)
        if stage.tail:
            shard_tail(stage.tail, mesh)
        shard_images(stage.stem, stage.tail, own)
    materialize(stage, config.model.num_layers, config.seed, device)
    _mark(stage, mesh)
    if mesh.size("tensor") > 1:
        _sum_partial_gradients(stage, mesh)
    for block in stage.blocks.values():
        recompute(block, config.train.recompute)
        if config.train.compile:
            block.compile()
    return stage


def materialize(stage: nn.Module, num_layers: int, seed: int, device: torch.device) -> None:
    """Give every parameter its storage and its part of the random start that its name and the seed define."""
    for name, owner, key in list(named_owners(stage)):
        empty = getattr(owner, key)
        layout = shard_spec_of(empty)
        value = layout.take(initial_value(name, owner, layout.shape, num_layers, seed))
        parameter = nn.Parameter(value.to(device))
        parameter.__dict__.update(empty.__dict__)
        setattr(owner, key, parameter)


def _mark(stage: Stage, mesh: Mesh) -> None:
    """Tell DeepSpeed which parameters count in the gradient's norm here, and which are shards."""
    for parameter in stage.parameters():
        is_shard = hasattr(parameter, "part")
        if is_shard:
            parameter.tensor_model_parallel = True
        parameter.model_parallel = is_shard or mesh.rank("tensor") == 0


def _sum_partial_gradients(stage: Stage, mesh: Mesh) -> None:
    """Add up over the tensor ranks what each computes from its images, and from its positions."""
    partial = [part.adapter for part in (stage.stem, stage.tail) if part]
    if mesh.config.sequence:
        partial += [
            n for block in stage.blocks.values() for n in (block.attention_norm, block.feed_forward_norm)
        ]
        partial += [stage.tail.norm] if stage.tail else []
    for module in partial:
        for parameter in module.parameters():
            parameter.register_hook(sum_over(mesh.group("tensor")))


def _shapes(model: Transfusion, shape: SequenceShape, num_rows: int, own: ImageShard) -> Shapes:
    """What a micro-batch measures."""
    skips = model.tail.skip_shapes(own.num_own(num_rows * shape.num_images))
    return Shapes(num_rows, shape.length, shape.num_images, skips)


def shard_objective(config: RunConfig, mesh: Mesh) -> Objective:
    """The losses of logits that are divided by words and positions; alike on all ranks of a row."""
    objective, slices = Objective(config.objective, config.model.latent_sizes), SequenceShard(mesh)
    if mesh.size("tensor") > 1:
        vocab_shard = vocab_range(config.model.vocab_size, mesh.rank("tensor"), mesh.size("tensor"))
        objective.cross_entropy = VocabularyParallelCrossEntropy(mesh.group("tensor"), vocab_shard)
    if slices.num_ranks > 1:
        of_slice = objective.cross_entropy
        objective.cross_entropy = lambda logits, labels: slices.total(of_slice(logits, slices.take(labels)))
    return objective
