"""The order of a pipeline's passes: idle time by a simulated clock, and the order in which ranks work."""

from collections import Counter
from types import SimpleNamespace

import pytest
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

from megafusion.config import load_config, parse_config
from megafusion.parallel.balance import layer_flops
from megafusion.parallel.mesh import make_mesh
from megafusion.parallel.partition import virtual_stage_blocks
from megafusion.parallel.schedule import (
    Timeline,
    bubble,
    evaluation_timeline,
    in_flight,
    num_warmup,
    training_passes,
    training_timeline,
)
from megafusion.train.build import build_engine
from megafusion.train.config import RunConfig
from megafusion.train.loop import train_step
from tests.parallel.cases import Batches
from tests.parallel.matrix import VIRTUAL, Case
from tests.support.small import ROOT
from tests.support.workers import run_workers

ranks, virtual, groups = st.integers(2, 6), st.integers(1, 4), st.integers(1, 4)


@settings(max_examples=60, deadline=None)
@given(num_ranks=ranks, num_virtual=virtual, num_groups=groups)
def test_idle_time_is_divided_by_the_virtual_stages(num_ranks, num_virtual, num_groups):
    """A bubble of (P - 1) / (V M), on every rank."""
    sizes = num_ranks, num_virtual, num_groups * num_ranks
    timeline = training_timeline(*sizes)
    busy = 3.0 * sizes[2]  # forward 1, backward 2
    for idle in timeline.idle:
        assert idle == pytest.approx(3 * bubble(num_ranks, num_virtual))
        assert idle / busy == pytest.approx((num_ranks - 1) / (num_virtual * sizes[2]))
    check_timeline(timeline, *sizes)


@settings(max_examples=60, deadline=None)
@given(num_ranks=ranks, num_virtual=virtual, num_micro_batches=st.integers(1, 13))
def test_an_evaluation_takes_any_number_of_micro_batches(num_ranks, num_virtual, num_micro_batches):
    timeline = evaluation_timeline(num_ranks, num_virtual, num_micro_batches)
    check_timeline(timeline, num_ranks, num_virtual, num_micro_batches)


def check_timeline(timeline: Timeline, num_ranks: int, num_virtual: int, num_micro_batches: int) -> None:
    """Each pass runs once, after its input was received; two ranks have their transfers in one order."""
    transfers = {}
    for rank, instructions in enumerate(timeline.instructions):
        received, ran = set(), Counter()
        for action, work in instructions:
            step = 1 if work.direction == "forward" else -1
            if action == "run":
                ran[work] += 1
                stage = work.virtual_stage * num_ranks + rank
                has_source = stage > 0 if step == 1 else stage < num_ranks * num_virtual - 1
                assert (work in received) == has_source
                if step == -1:
                    assert ran[work._replace(direction="forward")]
                continue
            peer = (rank + (step if action == "send" else -step)) % num_ranks
            received |= {work} if action == "receive" else set()
            ends = (rank, peer) if action == "send" else (peer, rank)
            transfers.setdefault((rank, peer), []).append((ends, work.direction, work.micro_batch))
        assert set(ran.values()) == {1}
        directions = len({work.direction for work in ran})
        assert len(ran) == directions * num_virtual * num_micro_batches
    for (rank, peer), order in transfers.items():
        assert order == transfers[peer, rank]


@settings(max_examples=40, deadline=None)
@given(num_ranks=ranks, num_virtual=st.integers(2, 4), num_groups=groups)
def test_the_order_is_that_of_torch(num_ranks, num_virtual, num_groups):
    num_micro_batches = num_groups * num_ranks
    theirs = SimpleNamespace(
        n_local_stages=num_virtual,
        microbatches_per_round=num_ranks,
        pp_group_size=num_ranks,
        _n_microbatches=num_micro_batches,
    )
    for rank in range(num_ranks):
        actions = ScheduleInterleaved1F1B._calculate_single_rank_operations(theirs, rank)
        expected = [
            ("FORWARD" in a.computation_type.name, a.stage_index // num_ranks, a.microbatch_index)
            for a in actions
            if a is not None
        ]
        own = training_passes(rank, num_ranks, num_virtual, num_micro_batches)
        assert [(w.direction == "forward", w.virtual_stage, w.micro_batch) for w in own] == expected


@pytest.mark.parametrize("num_micro_batches", [1, 3, 4, 9])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_one_virtual_stage_is_the_order_of_deepspeed(num_ranks, num_micro_batches):
    for rank in range(num_ranks):
        order, done = [], Counter()
        schedule = TrainSchedule(num_micro_batches, num_ranks, rank)
        for instruction in (each for step in schedule for each in step):
            if type(instruction) in (ForwardPass, BackwardPass):
                direction = "forward" if type(instruction) is ForwardPass else "backward"
                order.append((direction, 0, done[direction]))
                done[direction] += 1
        assert training_passes(rank, num_ranks, 1, num_micro_batches) == order


@settings(max_examples=40, deadline=None)
@given(num_ranks=ranks, num_virtual=virtual, num_groups=st.integers(1, 6), data=st.data())
def test_activations_in_flight(num_ranks, num_virtual, num_groups, data):
    """Those of the warm-up and one more, however many micro-batches follow."""
    rank = data.draw(st.integers(0, num_ranks - 1))
    num_micro_batches = num_groups * num_ranks
    held, most = Counter(), set()
    for direction, number, _ in training_passes(rank, num_ranks, num_virtual, num_micro_batches):
        held[number] += 1 if direction == "forward" else -1
        most.add(tuple(held[each] for each in range(num_virtual)))
    found = in_flight(rank, num_ranks, num_virtual, num_micro_batches)
    assert {held.passes for held in found} == most
    warmup = num_warmup(rank, num_ranks, num_virtual)
    assert max(sum(held.passes) for held in found) == min(warmup + 1, num_virtual * num_micro_batches)


@pytest.mark.parametrize("name", ["7b.yaml", "1.4b.yaml", "baselines/7b-unet-8x8.yaml"])
@pytest.mark.parametrize(("num_ranks", "num_virtual"), [(2, 2), (4, 2), (2, 4)])
def test_unequal_stages_take_the_slowest_ones_time(name, num_ranks, num_virtual):
    """As the planner says: the micro-batches of the slowest rank, and the bubble in its time."""
    config = load_config(RunConfig, ROOT / "configs" / name)
    stem, *blocks, tail = layer_flops(config.model, config.sequence_shape)
    stages = virtual_stage_blocks([stem, *blocks, tail], num_ranks, num_virtual)
    blocks[0] += stem
    blocks[-1] += tail
    costs = [[sum(blocks[number] for number in part) for part in stage] for stage in stages]
    seconds = [costs[rank][number] for number in range(num_virtual) for rank in range(num_ranks)]
    num_micro_batches = 4 * num_ranks
    timeline = training_timeline(num_ranks, num_virtual, num_micro_batches, seconds)
    slowest = max(map(sum, costs))
    planned = 3 * slowest * (num_micro_batches + bubble(num_ranks, num_virtual))
    took = timeline.idle[0] + 3 * sum(costs[0]) * num_micro_batches
    assert took == pytest.approx(planned, rel=0.03)


def real_order(values: dict) -> tuple[int, list[tuple[str, int]]]:
    """This rank's stage, and the passes of its second step with their virtual stages, as they happened."""
    config = parse_config(RunConfig, values, "test")
    mesh = make_mesh(config.parallel)
    batches, engine = Batches(values, mesh), build_engine(config, mesh)
    order = []

    def ran(module, arguments, outputs) -> None:
        number = arguments[1]
        order.append(("forward", number))
        outputs[0].register_hook(lambda gradient: order.append(("backward", number)))

    train_step(engine, batches.next(), 1e-3)
    engine.stage.register_forward_hook(ran)
    train_step(engine, batches.next(), 1e-3)
    return mesh.rank("pipeline"), order


@pytest.mark.full
def test_ranks_work_in_the_order_of_the_schedule(shards, vae_folder, tmp_path):
    world, degrees = VIRTUAL["pp2-v2"]
    values = Case("pp2-v2", world, degrees).values(shards, vae_folder, tmp_path)
    train = values["train"]
    num_micro_batches = train["global_batch_size"] // train["micro_batch_size"]
    for rank, order in run_workers(real_order, world, values):
        assert order == [work[:2] for work in training_passes(rank, 2, 2, num_micro_batches)]
