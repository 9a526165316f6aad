"""Checkpoints of parameters sharded over tensor and pipeline ranks: any topology loads any other."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import Tensor, nn

from megafusion.checkpoint.config import CheckpointConfig
from megafusion.checkpoint.folder import KINDS
from megafusion.checkpoint.manager import CheckpointManager
from megafusion.checkpoint.reader import CheckpointReader
from megafusion.engine.optimizer_state import OptimizerShard
from megafusion.parallel.sharding import ShardSpan, ShardSpec, set_shard_spec
from tests.support.checkpoints import load_full_tensors
from tests.support.engines import Run, Topology, make_engine, step_counts
from tests.support.workers import run_workers

SHAPES = {
    "fused": (12, 5),  # three blocks of four rows, each sharded
    "columns": (6, 8),
    "channels": (2, 4, 3, 3),
    "vector": (9,),
    "table": (7, 6),  # this and `norm` are replicated on every tensor rank
    "norm": (11,),
}
STAGES = (("fused", "table", "norm"), ("columns", "channels", "vector"))
"""Parameters of each of two pipeline stages."""
SHARDED = {"fused": (0, 3), "columns": (1, 1), "channels": (1, 1), "vector": (0, 1)}
"""Sharded dimension, and the number of equal blocks along it that are each sharded."""

# Pipeline stages, data ranks, tensor ranks, ZeRO stage. With 2 data and 2 tensor ranks, ZeRO splits each
# replica of a parameter at other elements.
LAYOUTS = [(1, 1, 1, 1), (1, 2, 2, 1), (2, 2, 1, 1), (2, 1, 2, 0), (1, 4, 1, 3), (1, 2, 2, 2)]


def full_tensors(kind: str) -> dict[str, Tensor]:
    """The tensors that all ranks together should hold."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    return {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}


def shard_spec(name: str, rank: int) -> ShardSpec:
    """The first of two tensor ranks has a quarter of each block, the second the rest, so sizes differ."""
    dim, num_blocks = SHARDED[name]
    size = SHAPES[name][dim] // num_blocks
    first = -(-size // 4)
    begin, length = ((0, first), (first, size - first))[rank]
    runs = tuple(ShardSpan(block * length, block * size + begin, length) for block in range(num_blocks))
    return ShardSpec(torch.Size(SHAPES[name]), dim, runs)


def make_run(layout: tuple[int, int, int, int]) -> tuple[Run, dict[str, ShardSpec]]:
    """This rank's engine over its stage's parameters, sharded for its tensor rank, all of them zero."""
    num_stages, num_data, num_tensor, zero = layout
    grid_topology = PipeModelDataParallelTopology(num_pp=num_stages, num_mp=num_tensor, num_dp=num_data)
    grid = PipelineParallelGrid(topology=grid_topology)
    coordinates = grid_topology.get_coord(dist.get_rank())
    names = STAGES[coordinates.pipe] if num_stages == 2 else SHAPES
    model, specs = nn.Module(), {}
    for name in names:
        specs[name] = ShardSpec(torch.Size(SHAPES[name]), 0, (ShardSpan(0, 0, SHAPES[name][0]),))
        is_sharded = num_tensor == 2 and name in SHARDED
        if is_sharded:
            specs[name] = shard_spec(name, coordinates.model)
        parameter = nn.Parameter(specs[name].shard(torch.zeros(SHAPES[name])))
        if is_sharded:
            set_shard_spec(parameter, specs[name])
            parameter.tensor_model_parallel = True
        model.register_parameter(name, parameter)
    topology = Topology(num_data, zero)
    engine = make_engine(model, topology, None if num_data == dist.get_world_size() else grid)
    return Run(engine, topology), specs


def fragments(shard: OptimizerShard, average: Tensor) -> dict[str, Tensor]:
    return dict(zip(KINDS, (shard.weight, average, shard.exp_avg, shard.exp_avg_sq), strict=True))


def save(layout: tuple, folder: Path) -> None:
    run, specs = make_run(layout)
    for shard, average in zip(run.state.shards, run.ema.fragments, strict=True):
        for kind, fragment in fragments(shard, average).items():
            local = specs[shard.name].shard(full_tensors(kind)[shard.name]).flatten()
            fragment.copy_(local[shard.start : shard.start + len(fragment)])
    with CheckpointManager(folder, run.state, run.ema, CheckpointConfig()) as manager:
        manager.save({"step": 3}, {"streams": {}})


def load(layout: tuple, folders: list[Path]) -> int:
    """Returns the number of elements of this rank that were compared."""
    run, specs = make_run(layout)
    for folder in folders:
        with CheckpointManager(folder, run.state, run.ema, CheckpointConfig()) as manager:
            manager.load(folder / "step-00000003")
        for shard, average in zip(run.state.shards, run.ema.fragments, strict=True):
            for kind, fragment in fragments(shard, average).items():
                local = specs[shard.name].shard(full_tensors(kind)[shard.name]).flatten()
                assert torch.equal(fragment, local[shard.start : shard.start + len(fragment)]), shard.name
                fragment.zero_()
        if layout[-1] < 3:
            for name, parameter in run.engine.module.named_parameters():
                local = specs[name].shard(full_tensors("model")[name])
                assert torch.equal(parameter, local) or layout[-1] == 0, name  # whose weights were zeroed
        assert step_counts(run) == {3.0}
    return sum(len(shard.weight) for shard in run.state.shards)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A checkpoint of each layout."""
    found = []
    for layout in LAYOUTS:
        found.append(tmp_path_factory.mktemp("x".join(map(str, layout))))
        run_workers(save, layout[0] * layout[1] * layout[2], layout, found[-1])
    return found


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=map(str, LAYOUTS))
def test_a_checkpoint_of_any_layout_is_complete(folders, number):
    for kind in KINDS:
        found = load_full_tensors(folders[number] / "step-00000003", SHAPES, kind)
        assert all(torch.equal(found[name], whole) for name, whole in full_tensors(kind).items())


def test_replicas_that_zero_splits_differently_overlap(folders):
    """The tests above and below rely on it."""
    checkpoint = folders[LAYOUTS.index((1, 2, 2, 1))] / "step-00000003"
    stored = CheckpointReader(checkpoint).read_metadata().state_dict_metadata
    written = {name: sum(c.sizes.numel() for c in stored[f"model.{name}"].chunks) for name in SHAPES}
    whole = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    assert {name for name in SHAPES if written[name] > whole[name]} <= {"table", "norm"}
    assert written != whole


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_loads_every_other_bit_for_bit(folders, layout):
    numel = sum(whole.numel() for whole in full_tensors("model").values())
    by_rank = run_workers(load, layout[0] * layout[1] * layout[2], layout, folders)
    assert sum(by_rank) >= numel
