"""Coordinates of ranks; degrees that do not fit are refused at start, with the arithmetic."""

import pytest
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid

from megafusion.config import parse_config
from megafusion.engine.engine import make_topology
from megafusion.errors import UserError
from megafusion.parallel.config import ParallelConfig
from megafusion.parallel.mesh import AXES, make_mesh
from megafusion.train.build import build_components
from megafusion.train.config import RunConfig
from tests.support.workers import run_workers


def coordinates() -> tuple[tuple[int, ...], list[int], list[int], int, int]:
    """This rank's coordinates, its tensor and tensor-context groups, and DeepSpeed's stage and data rank."""
    mesh = make_mesh(ParallelConfig(pipeline=2, ulysses=2, tensor=2))
    groups = (mesh.group("tensor"), mesh.tensor_context_group)
    tensor, tensor_context = (dist.get_process_group_ranks(group) for group in groups)
    grid = PipelineParallelGrid(make_topology(mesh))
    own = tuple(mesh.rank(axis) for axis in AXES)
    return own, tensor, tensor_context, grid.get_stage_id(), grid.get_data_parallel_id()


def test_coordinates_are_those_of_deepspeed():
    ranks = run_workers(coordinates, 8)
    for rank, ((pipeline, data, ulysses, own), tensor, tensor_context, stage, replica) in enumerate(ranks):
        assert rank == ((pipeline * 1 + data) * 2 + ulysses) * 2 + own
        assert tensor == [rank - own, rank - own + 1]
        assert tensor_context == list(range(pipeline * 4, pipeline * 4 + 4))
        assert (stage, replica) == (pipeline, ulysses)


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({"parallel": {"tensor": 3}}, 4, r"pipeline 1 x ulysses 1 x tensor 3 = 3 ranks .* world has 4 ranks"),
        ({"parallel": {"tensor": 2, "pipeline": 2}}, 2, r"= 4 ranks a copy of the model, .* world has 2"),
        (
            {"parallel": {"tensor": 8}},
            8,
            r"model\.num_heads 4 is not a multiple of parallel\.tensor 8 x .* = 8",
        ),
        (
            {"parallel": {"tensor": 2, "ulysses": 2}},
            4,
            r"num_kv_heads 2 is not a multiple of .* = 4; .* not replicated",
        ),
        (
            {"parallel": {"tensor": 2}, "model": {"ffn_hidden_size": 63}},
            2,
            r"ffn_hidden_size 63 is not a multiple of",
        ),
        (
            {"parallel": {"ulysses": 2}, "data": {"sequence_length": 95}},
            2,
            r"sequence_length 95 is not a mul",
        ),
        (
            {"parallel": {"pipeline": 4}},
            4,
            r"model\.num_layers 2 is less than the stages of parallel\.pipeline 4",
        ),
        (
            {},
            8,
            r"global_batch_size 4 is not a multiple of train\.micro_batch_size 2 x 8 data-parallel ranks",
        ),
        ({"parallel": {"tensor": 2}, "model": {"vocab_size": 60}}, 2, r"vocab_size 60 is too small"),
        (
            {"parallel": {"pipeline": 2}, "model": {"tie_embeddings": True}},
            2,
            r"model\.tie_embeddings: .* different stages of parallel\.pipeline 2; set it to false",
        ),
        (
            {"parallel": {"pipeline": 2, "virtual_stages": 2}},
            2,
            r"num_layers 2 is less than the 4 virtual stages of .* set virtual_stages to 1 or less",
        ),
        (
            {
                "parallel": {"pipeline": 2, "virtual_stages": 2},
                "model": {"num_layers": 4},
                "train": {"global_batch_size": 6},
            },
            2,
            r"global_batch_size 6 / .* = 3 micro-batches, not a multiple of parallel\.pipeline 2: .* to 1",
        ),
        (
            {"parallel": {"virtual_stages": 2}},
            2,
            r"virtual_stages 2 interleaves .* set pipeline to 2 or more",
        ),
        ({"parallel": {"sequence": True}}, 2, r"sequence is a form of tensor parallelism"),
        ({"parallel": {"pipeline": 2, "zero_stage": 3}}, 2, r"zero_stage 3 does not work with pipeline 2"),
        (
            {"parallel": {"zero_stage": 0}, "train": {"precision": "bf16"}},
            1,
            r"bf16 needs float32 master weights",
        ),
        (
            {"parallel": {"zero_stage": 0, "offload_optimizer": True}},
            1,
            r"offload_optimizer needs zero_stage",
        ),
        ({"parallel": {"zero_stage": 4}}, 1, r"parallel\.zero_stage.*Input should be 0, 1, 2 or 3"),
    ],
)
def test_what_cannot_be_is_refused(run_values, changes, world, message):
    for room, values in changes.items():
        run_values[room] = {**run_values.get(room, {}), **values}
    with pytest.raises(UserError, match=message):
        check(run_values, world)


def check(values: dict, world: int) -> None:
    parse_config(RunConfig, values, "test").check_degrees(world)


def refuse(values: dict) -> str:
    """The message with which this rank refuses a run."""
    config = parse_config(RunConfig, values, "test")
    try:
        build_components(config, make_mesh(config.parallel))
    except UserError as error:
        return str(error)
    return "nothing"


def test_every_rank_refuses_the_same(run_values):
    run_values["parallel"] = {"tensor": 2, "ulysses": 2}
    first, *others = run_workers(refuse, 4, run_values)
    assert "num_kv_heads 2" in first
    assert set(others) == {first}


def test_fp8_is_refused_without_its_chip(run_values):
    run_values["train"]["precision"] = "fp8"
    (message,) = run_workers(refuse, 1, run_values)
    assert "fp8 needs an NVIDIA GPU of compute capability 8.9" in message
