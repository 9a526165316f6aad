"""FLOPs of training: the formula against PyTorch's counter on a real batch, and their sum over a run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megafusion.checkpoint.folder import _manifest, complete_checkpoints, read_manifest
from megafusion.config import parse_config
from megafusion.engine.process_group import start_process_group
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.model.transfusion import Transfusion
from megafusion.objective.alignment import PROJECTION_SIZE
from megafusion.objective.chunked_cross_entropy import LOGITS_ALIGNMENT
from megafusion.objective.config import AlignmentConfig
from megafusion.parallel.mesh import make_mesh
from megafusion.storage import file_sha256
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.telemetry.throughput import Work, _head_flops, _image_flops, peak_flops, step_flops
from megafusion.train.build import build_components
from megafusion.train.config import RunConfig
from tests.support.quantized import quantized_run
from tests.support.runs import start


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_a_chip_has_the_peak_of_its_own_data_sheet(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops("bf16") == peak


def assert_counted(config: RunConfig, alignment: AlignmentConfig | None = None) -> Work:
    """Compare the formula with PyTorch's counter on a batch of a run; the batch's work.

    Forward exactly: masked pairs, empty slots and the head's padding are computed, and not counted. Forward
    and backward within 3%: the formula says three times forward, but noised latents need no gradient.
    """
    start_process_group()
    batch = build_components(config, make_mesh(config.parallel)).loader.next()[0]
    shape, (rows, slots) = config.sequence_shape, batch.image_start.shape
    objective = config.objective.model_copy(update={"alignment": alignment})
    model = Transfusion(config.model, objective, shape.clean_context)
    if alignment:
        batch.features = torch.randn(rows, slots, shape.patches[0], alignment.feature_size)
    work = Work.of(batch.work().tolist())
    # The counter knows attention on a CPU as two products alone.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch)
    forward = counter.get_total_flops()
    per_pair = 4 * config.model.num_layers * config.model.num_heads * config.model.head_size
    extra = per_pair * (rows * shape.length**2 - work.visible_pairs)
    extra += _image_flops(config.model, shape, alignment)[0] * (rows * slots - work.images[0])
    columns = config.model.vocab_size + -config.model.vocab_size % LOGITS_ALIGNMENT
    extra += 2 * columns * config.model.hidden_size * batch.target_index.numel()
    extra -= _head_flops(config.model) * work.text_targets
    assert 3 * forward == step_flops(rows, config.model, shape, work, alignment) + 3 * extra
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch).total.backward()
    assert counter.get_total_flops() == pytest.approx(3 * forward, rel=0.03)
    return work


@pytest.mark.parametrize("clean_context", [False, True])
@pytest.mark.parametrize("adapter", ["linear", "unet"])
def test_the_formula_is_the_counters_less_what_nobody_needs(run_values, adapter, clean_context):
    """With clean context, the first half of the adapter runs twice."""
    run_values["model"] |= {"adapter": adapter} | ({"unet_channels": 8} if adapter == "unet" else {})
    run_values["data"]["clean_context"] = clean_context
    config = parse_config(RunConfig, run_values, "test")
    work = assert_counted(config)
    assert work.images[0] > 0
    assert work.text_targets > 0
    once = replace(config.sequence_shape, clean_context=False)
    twice = _image_flops(config.model, config.sequence_shape) > _image_flops(config.model, once)
    assert twice == clean_context


def test_the_projection_of_an_alignment_is_counted(run_values):
    aligned = AlignmentConfig(model=Path("unread"), feature_size=24, layer=1)
    config = parse_config(RunConfig, run_values, "test")
    work = assert_counted(config, aligned)
    shape, hidden = config.sequence_shape, config.model.hidden_size
    more = step_flops(1, config.model, shape, work, aligned) - step_flops(1, config.model, shape, work)
    per_patch = hidden * PROJECTION_SIZE + PROJECTION_SIZE**2 + PROJECTION_SIZE * 24
    assert more == 3 * work.images[0] * shape.patches[0] * 2 * per_patch


def test_the_quantized_baseline_is_counted_alike(quantized_shards, vq_folder, tmp_path):
    values = quantized_run(quantized_shards, vq_folder, tmp_path / "run")
    assert assert_counted(parse_config(RunConfig, values, "test")).images == (0,)


def test_the_flops_of_a_resumed_run_are_those_of_an_uninterrupted_one(run_values, tmp_path):
    """In metrics, the checkpoint's state, the published pipeline; an earlier version's run has none."""
    alone = start(run_values)
    halted = run_values | {"out": str(tmp_path / "halted")}
    start(halted, stop_after=3)
    resumed = start(halted)
    flops = [line["flops"] for line in read_metrics(alone)]
    assert flops == [line["flops"] for line in read_metrics(resumed)]
    assert flops == sorted(set(flops))
    states = [complete_checkpoints(run / "checkpoints")[-1] / "state.json" for run in (alone, resumed)]
    ends = [json.loads(path.read_text())["flops"] for path in states]
    assert ends[0] == ends[1] == flops[-1]
    assert TransfusionPipeline.from_pretrained(resumed).config.training_flops == flops[-1]

    old = run_values | {"out": str(tmp_path / "old")}
    start(old, stop_after=3)
    state = complete_checkpoints(tmp_path / "old/checkpoints")[-1] / "state.json"
    values = json.loads(state.read_text())
    del values["flops"]
    state.write_text(json.dumps(values))
    manifest = state.with_name("manifest.json")
    files = read_manifest(state.parent)
    files["state.json"] = {"bytes": state.stat().st_size, "sha256": file_sha256(state)}
    manifest.write_text(_manifest(files))
    lines = read_metrics(start(old))
    assert ["flops" in line for line in lines] == [True] * 3 + [False] * 3
