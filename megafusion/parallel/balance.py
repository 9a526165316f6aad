"""Assignment of blocks to pipeline stages so that the slowest stage is as fast as possible."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import inf

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megafusion.model.config import ModelConfig
from megafusion.model.transformer import block_context
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig
from megafusion.sequence.intervals import Intervals
from megafusion.sequence.packing import SequenceShape


def layer_flops(config: ModelConfig, shape: SequenceShape) -> list[int]:
    """Forward FLOPs of the stem, of each block and of the tail for one row, counted by PyTorch.

    Counted on the meta device with dense attention: every pair of positions counts, masked or not.
    The stem and the tail include the U-Net and the vocabulary. Every image slot counts as one of the first
    size.
    """
    with torch.device("meta"):
        one_block = config.model_copy(
            update={
                "num_layers": 1,
                "attention": "sdpa",
                "image_sizes": config.image_sizes[:1],
                "modality_weights": "none",  # the same FLOPs
            }
        )
        model = Transfusion(one_block, ObjectiveConfig())
        tokens = torch.zeros(1, shape.length, dtype=torch.int64)
        bounds = torch.zeros(1, shape.length, dtype=torch.int32)
        latents = torch.zeros(1, shape.num_images, shape.latent_channels, *shape.sizes[0])
        timesteps = torch.zeros(1, shape.num_images, dtype=torch.int64)
    (x, skips), stem = _counted(model.stem, tokens, bounds, latents, timesteps, timesteps)
    context = block_context(one_block, Intervals(bounds, bounds, shape.length), bounds, x.dtype, bounds > 0)
    hidden, block = _counted(model.blocks[0], x, context)
    _, head = _counted(model.tail.head, hidden)
    _, images = _counted(model.tail.images, hidden, timesteps, timesteps, skips, timesteps)
    return [stem, *[block] * config.num_layers, head + images]


def stage_blocks(flops: Sequence[int], num_stages: int) -> list[range]:
    """Indices of each stage's blocks, at least one, from the costs of stem, blocks and tail."""
    stem, *costs, tail = flops
    costs[0] += stem
    costs[-1] += tail
    return partition(costs, num_stages)


def partition(costs: Sequence[int], num_parts: int) -> list[range]:
    """Consecutive non-empty ranges with the smallest possible largest cost, then the largest smallest cost.

    The linear partition problem, solved exactly by dynamic programming.
    """
    slowest = max(sum(costs[i] for i in part) for part in _max_min(costs, num_parts, lambda cost: -cost))
    return _max_min(costs, num_parts, lambda cost: cost if cost <= slowest else -inf)


def _max_min(costs: Sequence[int], num_parts: int, score: Callable[[int], float]) -> list[range]:
    """Ranges that maximize the lowest score of a range's cost; of ties, the latest cuts."""
    sums = [0, *accumulate(costs)]
    best: dict[int, tuple[float, list[range]]] = {0: (inf, [])}
    # number of items -> lowest score and ranges, with `part` ranges
    for part in range(1, num_parts + 1):
        best = {
            stop: max(
                (
                    (min(lowest, score(sums[stop] - sums[start])), [*ranges, range(start, stop)])
                    for start, (lowest, ranges) in best.items()
                    if start < stop
                ),
                key=lambda candidate: (candidate[0], candidate[1][-1].start),
            )
            for stop in range(part, len(costs) + 1)
        }
    return best[len(costs)][1]


def _counted(function, *arguments) -> tuple[Tensor, int]:
    with FlopCounterMode(display=False) as counter:
        result = function(*arguments)
    return result, counter.get_total_flops()
