"""Which blocks stand on which pipeline stage, so that the slowest stage is as fast as can be."""

from itertools import pairwise

import megafusion.device  # noqa: F401 - before deepspeed

import torch
from deepspeed.runtime.utils import partition_balanced
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megafusion.model.config import ModelConfig
from megafusion.model.transformer import block_context
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig
from megafusion.sequence.intervals import Intervals
from megafusion.sequence.packing import SequenceShape


def layer_flops(config: ModelConfig, shape: SequenceShape) -> list[int]:
    """Forward operations of the stem, of each block and of the tail for one row, counted by PyTorch.

    Counted on tensors without storage, with dense attention: every pair of positions counts, seen or not.
    The U-Net and the vocabulary are in the stem's and the tail's figures. Every image slot counts as one of
    the first size.
    """
    with torch.device("meta"):
        one_block = config.model_copy(
            update={"num_layers": 1, "attention": "sdpa", "image_sizes": config.image_sizes[:1]}
        )
        model = Transfusion(one_block, ObjectiveConfig())
        tokens = torch.zeros(1, shape.length, dtype=torch.int64)
        bounds = torch.zeros(1, shape.length, dtype=torch.int32)
        latents = torch.zeros(1, shape.num_images, shape.latent_channels, *shape.sizes[0])
        timesteps = torch.zeros(1, shape.num_images, dtype=torch.int64)
    (x, skips), stem = _counted(model.stem, tokens, bounds, latents, timesteps)
    context = block_context(one_block, Intervals(bounds, bounds, shape.length), bounds, x.dtype)
    hidden, block = _counted(model.blocks[0], x, context)
    _, head = _counted(model.tail.head, hidden)
    _, images = _counted(model.tail.images, hidden, timesteps, timesteps, skips)
    return [stem, *[block] * config.num_layers, head + images]


def stage_blocks(flops: list[int], num_stages: int) -> list[range]:
    """Numbers of each stage's blocks, at least one, from the costs of stem, blocks and tail."""
    stem, *blocks, tail = flops
    costs = list(blocks)
    costs[0] += stem
    costs[-1] += tail
    bounds = partition_balanced(costs, num_stages)
    return [range(first, last) for first, last in pairwise(bounds)]


def _counted(function, *arguments) -> tuple[Tensor, int]:
    with FlopCounterMode(display=False) as counter:
        result = function(*arguments)
    return result, counter.get_total_flops()
