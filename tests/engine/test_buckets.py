"""Gradients in buckets: each rank gets its share of the mean, whatever the layout and what is missing."""

import random
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megafusion.engine.buckets as module
import megafusion.objective.alignment as alignment_module
from megafusion.config import parse_config
from megafusion.engine.buckets import Bucket, Buckets, Group
from megafusion.engine.process_group import start_process_group
from megafusion.parallel.mesh import make_mesh
from megafusion.train.build import build_components, build_engine
from megafusion.train.config import RunConfig
from tests.support.marks import full
from tests.support.rows import latents_as_features
from tests.support.workers import run_workers


def make_group(rng: random.Random, num_ranks: int, dtype: torch.dtype) -> Group:
    """Parameters of random shapes in one flat tensor, which ranks divide and whose end is padding."""
    shapes = [[rng.randint(1, 5) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(1, 5))]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    size = sum(sizes) + rng.randint(0, 3)
    flat = torch.zeros(-(-size // num_ranks) * num_ranks, dtype=dtype)
    parts = flat[: sum(sizes)].split(sizes)
    return Group(flat, [nn.Parameter(part.view(shape)) for part, shape in zip(parts, shapes, strict=True)])


def differences(cases: list[tuple[int, bool, torch.dtype, bool]]) -> list[float]:
    """Largest difference of this rank's shares from the mean gradients. Called by every rank."""
    start_process_group()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    module.BUCKET_SIZE = 7
    worst = []
    for seed, keeps_whole, dtype, has_all in cases:
        module.SMALL_SHARE = seed % 2 * 1000
        rng = random.Random(seed)
        groups = [make_group(rng, num_ranks, dtype) for _ in range(rng.randint(1, 3))]
        parameters = [parameter for group in groups for parameter in group.parameters]
        whole = [torch.full_like(g.flat, torch.nan, dtype=torch.float32) for g in groups]
        num_micro_batches, order = rng.randint(1, 3), rng.sample(parameters, len(parameters))
        buckets = Buckets(groups, order, dist.group.WORLD, num_micro_batches, whole if keeps_whole else None)
        found = [0.0]
        for _ in range(3):
            expected = [torch.zeros(group.flat.numel()) for group in groups]
            for micro_batch in range(num_micro_batches):
                for other in range(num_ranks):
                    factors = make_factors(rng, parameters, has_all)
                    add(expected, groups, factors)
                    if other == rank:
                        own = factors
                loss = sum(
                    (p.float() * f).sum() for p, f in zip(parameters, own, strict=True) if f is not None
                )
                loss.backward()
                if has_all and (micro_batch == num_micro_batches - 1 or not keeps_whole):
                    assert buckets._num_reduced == len(buckets._buckets), "reduced while backward computes"
                buckets.end_micro_batch()
            shares = buckets.finish()
            for group, share, mean in zip(groups, shares, expected, strict=True):
                end = sum(p.numel() for p in group.parameters)
                own = (mean / num_ranks)[:end].split(len(share))
                if rank < len(own):
                    found.append((share[: len(own[rank])] - own[rank]).abs().max().item())
            assert all(parameter.grad is None for parameter in parameters)
        buckets.close()
        worst.append(max(found) if all(x == x for x in found) else float("nan"))
    return worst


def make_factors(rng: random.Random, parameters: list, has_all: bool) -> list[Tensor | None]:
    """A micro-batch's gradients; None for a parameter that it does not use. Small whole numbers: exact."""
    factors = [torch.tensor([float(rng.randint(-9, 9)) for _ in range(p.numel())]) for p in parameters]
    used = [has_all or rng.random() < 0.7 for _ in parameters]
    used[rng.randrange(len(used))] = True
    pairs = zip(parameters, factors, used, strict=True)
    return [factor.view(parameter.shape) if is_used else None for parameter, factor, is_used in pairs]


def add(sums: list[Tensor], groups: list[Group], factors: list[Tensor | None]) -> None:
    numbers = iter(factors)
    for total, group in zip(sums, groups, strict=True):
        offset = 0
        for parameter in group.parameters:
            if (factor := next(numbers)) is not None:
                total[offset : offset + parameter.numel()] += factor.flatten()
            offset += parameter.numel()


@pytest.mark.parametrize("num_ranks", [2, *full(1, 3)])
def test_each_rank_gets_its_share_of_the_mean(num_ranks):
    keeps_whole = [True] if num_ranks == 1 else [True, False]
    kinds = list(product(range(4), keeps_whole, [torch.float32, torch.bfloat16], [True, False]))
    for found in run_workers(differences, num_ranks, kinds):
        assert found == pytest.approx([0.0] * len(kinds), abs=4e-6)


def peaks(values: dict, objectives: list[dict]) -> list[tuple[int, int]]:
    """For each objective: float32 numbers in memory at once, at most, in the buckets of a step's passes; and
    those of the largest parameter, whose gradient comes at once."""
    module.BUCKET_SIZE, module.SMALL_SHARE, alignment_module.PROJECTION_SIZE = 2**10, 2**10, 64
    plain, found = parse_config(RunConfig, values, "test"), []
    mesh = make_mesh(plain.parallel)
    batches = build_components(plain, mesh).loader.next()
    for batch in batches:
        batch.features = latents_as_features(batch)
    for objective in objectives:
        engine = build_engine(parse_config(RunConfig, values | {"objective": objective}, "test"), mesh)
        seen: list[int] = []
        buckets = engine._update._gradients.buckets
        buckets._memory = partial(noted, buckets, buckets._memory, seen)
        engine.forward_backward(batches)
        found.append((max(seen), max(p.numel() for p in engine.stage.parameters())))
    return found


def noted(buckets: Buckets, make: Callable[[Bucket], Tensor], seen: list[int], bucket: Bucket) -> Tensor:
    """Memory of a bucket; notes how many numbers all have then."""
    sums = make(bucket)
    filled = [b.sums for b in buckets._buckets if b.sums is not None]
    seen.append(sum(len(s) for s in filled + [in_flight for _, in_flight, _ in buckets._in_flight]))
    return sums


def test_few_buckets_are_in_memory_at_once(run_values):
    """In a model of many blocks, also where a projection's gradients come when backward is half done."""
    run_values["model"] |= {"num_layers": 8}
    run_values["parallel"] = {"zero_stage": 2}
    alignment = {"model": "m", "feature_size": 16, "layer": 3}
    for found in run_workers(peaks, 2, run_values, [{}, {"alignment": alignment}]):
        for peak, largest in found:
            assert peak < largest + 8 * 2**10
