"""The one function that applies parallelism to the plain model."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from megafusion.model.config import ModelConfig
from megafusion.model.transfusion import Transfusion, tie_embeddings
from megafusion.model.weights import Weight, initial_value, named_weights
from megafusion.model.wrapper import Wrapper
from megafusion.objective.config import ObjectiveConfig
from megafusion.objective.losses import Objective
from megafusion.parallel.activation_checkpointing import checkpointed
from megafusion.parallel.balance import layer_flops
from megafusion.parallel.config import Recompute
from megafusion.parallel.fp8 import Fp8Block
from megafusion.parallel.image_parallel import (
    ImageParallelAlignment,
    ImageParallelDown,
    ImageParallelUp,
    ImageShard,
)
from megafusion.parallel.mesh import Mesh
from megafusion.parallel.partition import virtual_stage_blocks
from megafusion.parallel.pipeline import Stage
from megafusion.parallel.sharding import shard_spec_of
from megafusion.parallel.tensor import overlap_collectives, shard_weights, sum_partial_gradients
from megafusion.parallel.ulysses import SequenceParallelObjective, ulysses_attention
from megafusion.sequence.packing import SequenceShape


def parallelize(
    model: Transfusion,
    mesh: Mesh,
    *,
    shape: SequenceShape,
    micro_batch_size: int,
    precision: str,
    recompute: Recompute,
    compile: bool,
    seed: int,
    device: torch.device,
    trains: Callable[[str], bool] = lambda name: True,
    is_read: Callable[[str], bool] = lambda name: False,
) -> Stage:
    """This rank's shard of a model that is on the meta device, ready for DeepSpeed.

    The order matters:

    1. pipeline: a stage of consecutive blocks, or virtual stages of them, balanced by counted FLOPs;
    2. tensor: column-, row- and vocabulary-parallel layers replace the layers that declare so;
    3. Ulysses: all-to-alls around attention;
    4. fp8: transformer-engine's layers replace the sharded ones;
    5. image parallelism: the adapters run on this rank's image slots;
    6. materialization: each parameter gets storage and its shard of the random start, or zeros where
       `is_read` says of its canonical name that its values will be read from files; it is trained where
       `trains` says so; a tied head gets the embedding's;
    7. gradient hooks, before DeepSpeed's: all-reduce partial gradients over the tensor group;
    8. activation checkpointing of each block, then torch.compile of that; and of the passes over logits.

    DeepSpeed then adds ZeRO, mixed precision and data parallelism (engine/engine.py).
    """
    image_shard = ImageShard(mesh.tensor_context_group)
    stages = virtual_stage_blocks(
        layer_flops(model.config, shape), mesh.size("pipeline"), mesh.config.virtual_stages
    )
    num_local = image_shard.num_local(micro_batch_size * shape.num_images)
    skips = model.tail.adapter.skip_shapes(num_local) if model.tail.adapter else ()
    stage = Stage(model, stages[mesh.rank("pipeline")], mesh, shape, micro_batch_size, skips)
    if image_shard.num_ranks > 1:
        shard_weights(stage, mesh)
    for name, block in stage.blocks.items():
        if mesh.size("ulysses") > 1:
            attention = block.attention
            attention.attend = ulysses_attention(attention.attend, mesh.group("ulysses"))
        if precision == "fp8":
            stage.blocks[name] = Fp8Block(block, mesh.group("tensor"))
    if image_shard.num_ranks > 1:
        if stage.stem and stage.stem.adapter:
            stage.stem.adapter = ImageParallelDown(stage.stem.adapter, image_shard)
        if stage.tail and stage.tail.adapter:
            stage.tail.adapter = ImageParallelUp(stage.tail.adapter, image_shard)
        if stage.alignment:
            stage.alignment = ImageParallelAlignment(stage.alignment, image_shard)
    materialize(stage, mesh, seed, device, trains, is_read)
    if model.config.tie_embeddings and stage.stem and stage.tail:
        tie_embeddings(stage.stem, stage.tail)
    if mesh.size("tensor") > 1:
        sum_partial_gradients(stage, mesh)
    if mesh.config.async_tensor:
        overlap_collectives(mesh.group("tensor"))
    for name, block in stage.blocks.items():
        if recompute != "none":
            stage.blocks[name] = checkpointed(block, recompute)
        if compile:
            stage.blocks[name] = CompiledBlock(stage.blocks[name])
    if stage.tail:
        stage.tail.head.is_compiled = compile
    return stage


class CompiledBlock(Wrapper):
    """A block that torch.compile makes one graph of; hooks of this module run outside the graph."""

    def __init__(self, block: nn.Module):
        super().__init__(block)
        block.compile()

    def forward(self, *arguments: object) -> Tensor:
        return self._wrapped_module(*arguments)


def materialize(
    stage: Stage,
    mesh: Mesh,
    seed: int,
    device: torch.device,
    trains: Callable[[str], bool],
    is_read: Callable[[str], bool],
) -> None:
    """Give every parameter storage and its shard of the random start that its name and the seed define.

    Marks tell DeepSpeed which parameters are sharded, and which count in this rank's gradient norm.
    """

    def start(weight: Weight) -> Tensor:
        empty = getattr(weight.owner, weight.key)
        if is_read(weight.name):
            return torch.zeros(empty.shape, device=device)
        spec = shard_spec_of(empty)
        return spec.shard(initial_value(weight, spec.shape, stage.config.num_layers, seed)).to(device)

    weights = list(named_weights(stage))
    # Sampling takes one thread a tensor, whose generator is its own; and minutes for billions of weights.
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for weight, value in zip(weights, threads.map(start, weights), strict=True):
            empty = getattr(weight.owner, weight.key)
            parameter = nn.Parameter(value, requires_grad=trains(weight.name))
            is_sharded, is_first = hasattr(empty, "shard_spec"), mesh.rank("tensor") == 0
            marks = {"tensor_model_parallel": is_sharded, "model_parallel": is_sharded or is_first}
            parameter.__dict__.update(empty.__dict__ | marks)
            setattr(weight.owner, weight.key, parameter)


def shard_objective(config: ObjectiveConfig, model: ModelConfig, mesh: Mesh) -> Objective:
    """The losses, equal on all ranks of a row."""
    if mesh.size("ulysses") > 1:
        return SequenceParallelObjective(config, model.latent_sizes, mesh.group("ulysses"))
    return Objective(config, model.latent_sizes)
