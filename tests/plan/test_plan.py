"""Plans of every layout: products of degrees, memory that falls with each, and what is refused."""

import json
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megafusion.commands.launch import _planned
from megafusion.errors import UserError
from megafusion.plan.chip import chip_names, chip_of_device, load_chip, with_ceilings
from megafusion.plan.fit import does_not_fit
from megafusion.plan.goodput import goodput
from megafusion.plan.memory import memory, stage_memory
from megafusion.plan.runs import plan_run
from megafusion.plan.search import check_job, layouts, plan_job
from megafusion.plan.software import of_run
from megafusion.telemetry.throughput import _BF16_PEAKS
from tests.plan.test_counts import configuration

H100 = load_chip("h100")
CONFIG = configuration("1.4b.yaml", "train.precision=bf16", "model.attention=interval", "train.compile=true")


def job(world: int = 8, **changes):
    """The 1.4B run on some ranks; changes are of its train and parallel sections."""
    base = CONFIG.job(world)
    train = {k: v for k, v in changes.items() if k in type(base.train).model_fields}
    parallel = {k: v for k, v in changes.items() if k in type(base.parallel).model_fields}
    return replace(
        base,
        train=base.train.model_copy(update=train),
        parallel=base.parallel.model_copy(update=parallel),
    )


def bytes_of(job):
    return memory(job, of_run(job.train, job.model.attention)).total


@settings(max_examples=30, deadline=None)
@given(world=st.integers(1, 64))
def test_each_layout_fills_its_ranks_and_divides_the_batch(world):
    found = list(layouts(job(world), H100))
    for each in found[:: max(1, len(found) // 20)]:
        parallel = each.parallel
        assert each.data * parallel.pipeline * parallel.tensor * parallel.ulysses == world
        assert each.micro_batches * each.train.micro_batch_size * each.data == each.train.global_batch_size
        check_job(each)
    is_possible = any(
        world % others == 0 and 512 % (world // others) == 0 for others in (2**n for n in range(8))
    )
    assert bool(found) == is_possible


def test_layouts_that_a_run_refuses_are_not_recommended():
    """No pipeline with alignment, nor one with a stage that trains nothing."""
    depths = {each.parallel.pipeline for each in layouts(job(), H100)}
    assert max(depths) > 1
    assert {each.parallel.pipeline for each in layouts(replace(job(), has_alignment=True), H100)} == {1}
    frozen = job(freeze=("stem.*", "blocks.*"))  # the tail alone is trained
    assert {each.parallel.pipeline for each in layouts(frozen, H100)} == {1}


degrees = st.sampled_from([1, 2, 4, 8])


@settings(max_examples=25, deadline=None)
@given(
    tensor=degrees,
    pipeline=degrees,
    virtual=st.sampled_from([1, 2]),
    zero=st.sampled_from([1, 2, 3]),
    micro=degrees,
)
def test_memory_falls_with_each_degree_and_rises_with_the_micro_batch(tensor, pipeline, virtual, zero, micro):
    zero = zero if pipeline == 1 else 1
    virtual = virtual if pipeline > 1 and 512 % (16 * micro * pipeline) == 0 else 1
    base = job(16 * tensor * pipeline, tensor=tensor, sequence=tensor > 1, pipeline=pipeline,
               virtual_stages=virtual, zero_stage=zero, micro_batch_size=micro)  # fmt: skip
    check_job(base)
    if tensor < 8:
        wider = base.parallel.model_copy(update={"tensor": 2 * tensor, "sequence": True})
        assert bytes_of(replace(base, parallel=wider, world_size=2 * base.world_size)) < bytes_of(base)
    rows = base.train.model_copy(update={"micro_batch_size": 2 * micro})
    assert bytes_of(replace(base, train=rows, world_size=base.world_size // 2)) > bytes_of(base)
    more_ranks = replace(base, world_size=2 * base.world_size)
    software = of_run(base.train, "interval")
    for stage in range(pipeline):
        few, more = (stage_memory(each, software, stage).state for each in (base, more_ranks))
        assert more < few
    saved = [
        memory(replace(base, train=base.train.model_copy(update={"recompute": kind, "compile": False})),
               of_run(base.train.model_copy(update={"compile": False}), "interval")).activations
        for kind in ("none", "selective", "full")
    ]  # fmt: skip
    # With sequence parallelism, selective recompute saves whole results before they are scattered.
    assert saved == sorted(saved, reverse=True) or (tensor > 2 and saved[2] < saved[0])
    step = plan_job(base, H100).step
    assert step.total == pytest.approx(sum(step.seconds.values()))
    assert 0 < step.mfu < 1
    assert min(step.seconds.values()) >= 0
    waits = (pipeline - 1) / virtual
    assert step.bubble == pytest.approx(waits / (base.micro_batches + waits))


def test_zero_shards_what_it_says():
    held = [memory(job(64, zero_stage=zero), of_run(CONFIG.train, "interval")) for zero in (1, 2, 3)]
    weights = job(64).num_weights(0)
    assert [round(m.weights / weights, 1) for m in held] == [2, 2, 0]
    assert [round(m.gradients / weights, 1) for m in held] == [4, 0.1, 0.1]
    assert held[0].optimizer == pytest.approx(12 * weights / 64)


def test_a_plan_names_the_best_the_next_and_what_bounds_them():
    found = plan_run(CONFIG.job(64), H100, num_steps=1000)
    assert [run.plan.fits for run in found.runs] == [True] * 3
    speeds = [run.plan.step.tokens_per_second for run in found.runs]
    assert speeds == sorted(speeds, reverse=True)
    assert "faster than the next" in found.reason
    values = json.loads(json.dumps(found.describe()))
    assert values["recommended"]["memory_bytes"]["total"] <= H100.memory_bytes
    # The overrides make the layout that was planned.
    again = configuration("1.4b.yaml", *values["recommended"]["overrides"]).job(64)
    assert plan_job(again, H100).memory == found.best.plan.memory


def test_a_run_that_fits_nowhere_is_told_by_how_much_and_what_would():
    large = configuration("7b.yaml", "model.num_layers=64", "model.hidden_size=16384", "model.num_heads=128")
    found = plan_run(large.job(8), H100, num_steps=1)
    assert not found.best.plan.fits
    over = -found.best.plan.spare / 2**30
    assert f"{over:.1f} GiB over" in found.reason
    assert "--gpus" in found.reason
    warning = does_not_fit(large.job(8), H100.memory_bytes, "a GPU")
    assert "GiB a rank" in warning[0]
    assert "`megafusion plan`" in warning[0]
    assert does_not_fit(job(64), H100.memory_bytes, "a GPU") == []


def test_launch_tells_the_plan_of_its_job_and_that_it_will_not_fit():
    fits, *warnings = _planned(CONFIG, 64, "h100")
    assert fits.startswith("plan: data 64, ZeRO 1")
    assert "tokens/s" in fits
    assert warnings == []
    _, warning = _planned(configuration("7b.yaml", "train.precision=fp32"), 64, "h100")
    assert warning.startswith("warning: the plan predicts that this run does not fit")
    assert list(_planned(CONFIG, 64, None)) == []


def test_a_number_of_gpus_that_no_degrees_divide_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="--gpus 7: no degrees divide it") as refused:
        plan_run(CONFIG.job(7), H100, num_steps=1)
    assert "global_batch_size 512" in str(refused.value)


def test_degrees_of_the_configuration_that_do_not_divide_are_told_beside_the_plan():
    found = plan_run(job(8, tensor=8, micro_batch_size=3), H100, num_steps=1)
    assert "not a multiple" in str(found.configured)
    assert found.best.plan.fits


def test_an_unknown_gpu_is_refused_with_the_nearest_and_how_to_add_one(tmp_path):
    with pytest.raises(UserError, match=r"--gpu h101: .*nearest is h100; .*To add one, copy .*h100\.json"):
        load_chip("h101")
    own = tmp_path / "own.json"
    own.write_text('{"about": "x"}')
    with pytest.raises(UserError, match="not a chip's ceilings"):
        load_chip(str(own))
    assert {load_chip(name).name for name in chip_names()} >= {"h100", "h200", "a100"}
    assert chip_of_device("NVIDIA H100 80GB HBM3").name == "h100"
    assert chip_of_device("AMD EPYC") is None


def test_measured_ceilings_replace_the_estimates_and_another_chips_are_refused(tmp_path):
    path = tmp_path / "ceilings.json"
    rates = {"8192 x 8192 x 8192": [7e14] * 3, "4096 x 6144 x 2048": [6e14, 5e14, 5.5e14]}
    measured = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.13", "date": "2026-11-26"}
    path.write_text(json.dumps(measured | {"copy_bytes_per_second": 2.9e12, "flops": rates}))
    chip = with_ceilings(H100, path)
    assert (chip.product_flops, chip.memory_bandwidth) == (5.5e14, 2.9e12)
    assert "measured" in chip.sources["product_flops"]
    with pytest.raises(UserError, match="measured on NVIDIA H100 80GB HBM3, and --gpu is a100"):
        with_ceilings(load_chip("a100"), path)
    path.write_text("[]")
    with pytest.raises(UserError, match=r"ceilings\.json: not a file of benchmarks/ceilings\.py"):
        with_ceilings(H100, path)


def test_every_figure_of_a_chip_has_a_source_and_its_peak_is_the_one_of_mfu():
    for name in chip_names():
        chip = load_chip(name)
        assert all(chip.sources.values())
        assert len(chip.sources) == 12
        assert chip.peak_flops == _BF16_PEAKS[chip.device]
        assert chip.product_flops < chip.peak_flops


@settings(deadline=None)
@given(world=st.integers(1, 20_000), step=st.floats(0.1, 100), state=st.floats(1e8, 1e11))
@example(world=257, step=100.0, state=1e8)
def test_no_other_interval_trains_more_than_the_best(world, step, state):
    best = goodput(world, step, state)
    for factor in (0.5, 0.8, 1.25, 2):
        other = goodput(world, step, state, every=max(1, round(best.every * factor)))
        assert other.share <= best.share + 0.01 * (1 - best.share) + 1e-9


def test_llama_3s_failures_come_every_three_hours_on_its_gpus():
    assert goodput(16_384, 10, 1e9).failure_seconds / 3600 == pytest.approx(54 * 24 / 419)
    never = goodput(8, 10, 1e9, failures=0)
    assert never.share == pytest.approx(1, abs=1e-3)
