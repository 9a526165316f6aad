"""Checkpoints of parameters that tensor and pipeline ranks share: any way of cutting loads any other."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import Tensor, nn

from megafusion.checkpoint.folder import KINDS
from megafusion.checkpoint.manager import CheckpointManager
from megafusion.checkpoint.reader import Reader, load_whole
from megafusion.engine.ema import Ema
from megafusion.engine.optimizer_state import OptimizerShard, optimizer_shards
from megafusion.parallel.sharding import ShardSpan, ShardSpec, set_shard_spec
from tests.support.engines import Mesh, make_engine, steps_taken
from tests.support.engines import Run as EngineRun
from tests.support.workers import run_workers

SHAPES = {
    "fused": (12, 5),  # three blocks of four rows, of which each rank has some
    "columns": (6, 8),
    "channels": (2, 4, 3, 3),
    "vector": (9,),
    "table": (7, 6),  # this and `norm` are whole on every tensor rank
    "norm": (11,),
}
STAGES = (("fused", "table", "norm"), ("columns", "channels", "vector"))
"""Parameters of each of two pipeline stages."""
CUTS = {"fused": (0, 3), "columns": (1, 1), "channels": (1, 1), "vector": (0, 1)}
"""Dimension that is cut, and blocks of it that are cut alike."""

# Pipeline stages, data ranks, tensor ranks, ZeRO stage. With two of both, replicas are cut at other places.
PLACES = [(1, 1, 1, 1), (1, 2, 2, 1), (2, 2, 1, 1), (2, 1, 2, 0), (1, 4, 1, 3), (1, 2, 2, 2)]


def wholes(kind: str) -> dict[str, Tensor]:
    """What all ranks together should hold."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    return {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}


def layout(name: str, rank: int) -> ShardSpec:
    """A tensor rank's of two: the first has a quarter of each block, the second the rest, so sizes differ."""
    dim, num_blocks = CUTS[name]
    size = SHAPES[name][dim] // num_blocks
    first = -(-size // 4)
    begin, length = ((0, first), (first, size - first))[rank]
    runs = tuple(ShardSpan(block * length, block * size + begin, length) for block in range(num_blocks))
    return ShardSpec(torch.Size(SHAPES[name]), dim, runs)


def make_part(place: tuple[int, int, int, int]) -> tuple[EngineRun, dict[str, ShardSpec]]:
    """This rank's engine over its stage's parameters, cut for its tensor rank, all of them zero."""
    num_stages, num_data, num_tensor, zero = place
    mesh = PipeModelDataParallelTopology(num_pp=num_stages, num_mp=num_tensor, num_dp=num_data)
    grid = PipelineParallelGrid(topology=mesh)
    here = mesh.get_coord(dist.get_rank())
    names = STAGES[here.pipe] if num_stages == 2 else SHAPES
    model, layouts = nn.Module(), {}
    for name in names:
        layouts[name] = ShardSpec(torch.Size(SHAPES[name]), 0, (ShardSpan(0, 0, SHAPES[name][0]),))
        cut = num_tensor == 2 and name in CUTS
        if cut:
            layouts[name] = layout(name, here.model)
        parameter = nn.Parameter(layouts[name].take(torch.zeros(SHAPES[name])))
        if cut:
            set_shard_spec(parameter, layouts[name])
            parameter.tensor_model_parallel = True
        model.register_parameter(name, parameter)
    engine = make_engine(model, Mesh(num_data, zero), None if num_data == dist.get_world_size() else grid)
    owned = optimizer_shards(engine, engine.module.named_parameters())
    return EngineRun(engine, Mesh(num_data, zero), owned, Ema(owned, 0.9)), layouts


def fragments(master: OptimizerShard, average: Tensor) -> dict[str, Tensor]:
    return dict(zip(KINDS, (master.weight, average, master.exp_avg, master.exp_avg_sq), strict=True))


def save_part(place: tuple, folder: Path) -> None:
    run, layouts = make_part(place)
    for master, average in zip(run.owned, run.ema.fragments, strict=True):
        for kind, fragment in fragments(master, average).items():
            local = layouts[master.name].take(wholes(kind)[master.name]).flatten()
            fragment.copy_(local[master.start : master.start + len(fragment)])
    with CheckpointManager(folder, run.engine, run.owned, run.ema, 1) as checkpointer:
        checkpointer.save({"step": 3}, {"streams": {}})


def load_part(place: tuple, folders: list[Path]) -> int:
    """Number of elements of this rank that were compared."""
    run, layouts = make_part(place)
    for folder in folders:
        with CheckpointManager(folder, run.engine, run.owned, run.ema, 1) as checkpointer:
            checkpointer.load(folder / "step-00000003")
        for master, average in zip(run.owned, run.ema.fragments, strict=True):
            for kind, fragment in fragments(master, average).items():
                local = layouts[master.name].take(wholes(kind)[master.name]).flatten()
                assert torch.equal(fragment, local[master.start : master.start + len(fragment)]), master.name
                fragment.zero_()
        if place[-1] < 3:
            for name, parameter in run.engine.module.named_parameters():
                local = layouts[name].take(wholes("model")[name])
                assert torch.equal(parameter, local) or place[-1] == 0, name  # whose masters were zeroed
        assert steps_taken(run) == {3.0}
    return sum(len(master.weight) for master in run.owned)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A checkpoint of each place."""
    found = []
    for place in PLACES:
        found.append(tmp_path_factory.mktemp("x".join(map(str, place))))
        run_workers(save_part, place[0] * place[1] * place[2], place, found[-1])
    return found


@pytest.mark.parametrize("place", range(len(PLACES)), ids=[str(place) for place in PLACES])
def test_what_any_place_saved_is_whole(folders, place):
    for kind in KINDS:
        found = load_whole(folders[place] / "step-00000003", SHAPES, kind)
        assert all(torch.equal(found[name], whole) for name, whole in wholes(kind).items())


def test_replicas_that_zero_cut_at_other_places_overlap(folders):
    """Else what is said of them above is not tried."""
    place = PLACES.index((1, 2, 2, 1))
    stored = Reader(folders[place] / "step-00000003/tensors").read_metadata().state_dict_metadata
    written = {name: sum(c.sizes.numel() for c in stored[f"model.{name}"].chunks) for name in SHAPES}
    whole = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    assert {name for name in SHAPES if written[name] > whole[name]} <= {"table", "norm"}
    assert written != whole


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_every_place_loads_every_other_bit_for_bit(folders, place):
    numel = sum(whole.numel() for whole in wholes("model").values())
    by_rank = run_workers(load_part, place[0] * place[1] * place[2], place, folders)
    assert sum(by_rank) >= numel
