"""Assignment of blocks to pipeline stages so that the slowest is as fast as possible. Imports no torch."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from math import inf


def stage_blocks(flops: Sequence[int], num_stages: int) -> list[range]:
    """Indices of each stage's blocks, at least one, from the costs of stem, blocks and tail."""
    stem, *costs, tail = flops
    costs[0] += stem
    costs[-1] += tail
    return partition(costs, num_stages)


def virtual_stage_blocks(flops: Sequence[int], num_stages: int, num_virtual: int) -> list[list[range]]:
    """Indices of the blocks of each stage's virtual stages, which take turns: stage r has the r-th of every
    `num_stages`.

    The slowest virtual stage is as fast as possible. A stage may then be slower than with one virtual stage,
    where a part that cannot be divided takes longer than others.
    """
    blocks = stage_blocks(flops, num_stages * num_virtual)
    return [blocks[stage::num_stages] for stage in range(num_stages)]


def partition(costs: Sequence[int], num_parts: int) -> list[range]:
    """Consecutive non-empty ranges with the smallest possible largest cost, then the largest smallest cost.

    The linear partition problem, solved exactly by dynamic programming.
    """
    return list(_partition(tuple(costs), num_parts))


@cache  # a plan's layouts have few
def _partition(costs: tuple[int, ...], num_parts: int) -> list[range]:
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
