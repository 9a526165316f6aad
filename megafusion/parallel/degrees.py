"""Degrees of parallelism against the sizes that they divide."""

from megafusion.errors import UserError
from megafusion.model.config import ModelConfig
from megafusion.parallel.config import ParallelConfig


def data_degree(parallel: ParallelConfig, world_size: int) -> int:
    """Data-parallel ranks: the world over the other degrees. UserError, with the arithmetic, if not whole."""
    others = parallel.pipeline * parallel.ulysses * parallel.tensor
    if world_size % others:
        raise UserError(
            f"parallel: pipeline {parallel.pipeline} x ulysses {parallel.ulysses} x tensor {parallel.tensor} "
            f"= {others} ranks a copy of the model, but the world has {world_size} ranks, which is not a "
            f"multiple of {others}"
        )
    return world_size // others


def check_degrees(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    sequence_length: int,
    global_batch_size: int,
    micro_batch_size: int,
    world_size: int,
) -> None:
    """UserError, with the arithmetic, for degrees that do not divide what they shard; batch sizes in rows."""
    data = data_degree(parallel, world_size)
    heads = parallel.tensor * parallel.ulysses
    slices = parallel.ulysses * (parallel.tensor if parallel.sequence else 1)
    named_heads = f"parallel.tensor {parallel.tensor} x parallel.ulysses {parallel.ulysses} = {heads}"
    broken = []
    if model.num_heads % heads:
        broken.append(f"model.num_heads {model.num_heads} is not a multiple of {named_heads}")
    if model.kv_heads % heads:
        broken.append(
            f"model.num_kv_heads {model.kv_heads} is not a multiple of {named_heads}; key and value heads "
            "are sharded, not replicated"
        )
    if model.ffn_size % parallel.tensor:
        broken.append(
            f"model.ffn_hidden_size {model.ffn_size} is not a multiple of parallel.tensor {parallel.tensor}"
        )
    if model.vocab_size <= vocab_shard_size(model.vocab_size, parallel.tensor) * (parallel.tensor - 1):
        broken.append(
            f"model.vocab_size {model.vocab_size} is too small for parallel.tensor {parallel.tensor}"
        )
    if sequence_length % slices:
        broken.append(
            f"data.sequence_length {sequence_length} is not a multiple of the {slices} slices of positions "
            "(parallel.ulysses, times parallel.tensor with parallel.sequence)"
        )
    if model.num_layers < parallel.pipeline:
        broken.append(
            f"model.num_layers {model.num_layers} is less than the stages of parallel.pipeline "
            f"{parallel.pipeline}"
        )
    elif model.num_layers < (stages := parallel.pipeline * parallel.virtual_stages):
        broken.append(
            f"model.num_layers {model.num_layers} is less than the {stages} virtual stages of "
            f"parallel.pipeline {parallel.pipeline} x parallel.virtual_stages {parallel.virtual_stages}; set "
            f"virtual_stages to {model.num_layers // parallel.pipeline} or less"
        )
    if model.tie_embeddings and parallel.pipeline > 1:
        broken.append(
            "model.tie_embeddings: the embedding and the head are in different stages of parallel.pipeline "
            f"{parallel.pipeline}; set it to false (from tied weights, both then start as copies) or "
            "parallel.pipeline to 1"
        )
    if global_batch_size % (micro_batch_size * data):
        broken.append(
            f"train.global_batch_size {global_batch_size} is not a multiple of train.micro_batch_size "
            f"{micro_batch_size} x {data} data-parallel ranks (a world of {world_size} / "
            f"{world_size // data})"
        )
    elif parallel.virtual_stages > 1:
        micro_batches = global_batch_size // (micro_batch_size * data)
        if micro_batches % parallel.pipeline:
            broken.append(
                f"train.global_batch_size {global_batch_size} / (train.micro_batch_size {micro_batch_size} x "
                f"{data} data-parallel ranks) = {micro_batches} micro-batches, not a multiple of "
                f"parallel.pipeline {parallel.pipeline}: interleaved stages (parallel.virtual_stages "
                f"{parallel.virtual_stages}) take them in groups of that size; change one of these, or set "
                "virtual_stages to 1"
            )
    if broken:
        raise UserError("\n".join(broken))


def vocab_shard_size(vocab_size: int, tensor: int) -> int:
    """Tokens of each tensor rank but the last: a multiple of 64, which matrix units are fast at."""
    share = -(-vocab_size // tensor)
    return -(-share // 64) * 64 if tensor > 1 else share
