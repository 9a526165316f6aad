"""Attention backends: each equals sdpa, or is refused with a reason."""

import json
import sys
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from megafusion.config import parse_config
from megafusion.engine.process_group import start_process_group
from megafusion.errors import UserError
from megafusion.generate.decoder import Decoder
from megafusion.generate.folder import PipelineConfig, build_model
from megafusion.model.attention import BackendName, attention_backend, auto, check_backend, unsupported_reason
from megafusion.model.config import ModelConfig
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig, SamplingConfig
from megafusion.parallel.mesh import make_mesh
from megafusion.sequence.intervals import Intervals
from megafusion.train.build import build_components
from megafusion.train.config import RunConfig
from tests.support.layouts import rows_with_holes
from tests.support.marks import without_gpu

SMALL = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "vocab_size": 40,
    "latent_channels": 2,
    "latent_downsampling": 1,
    "image_sizes": ((8, 8),),
    "patch_size": 4,
}
eager_flex = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def mixed_rows(num_rows: int) -> Intervals:
    """Text, an image of 40 patches, text; then a second document; the last query is fully masked."""
    row = torch.arange(num_rows, dtype=torch.int32)
    end = torch.where((row >= 10) & (row < 50), 50, row + 1)
    last = torch.where(row < 70, min(70, num_rows), num_rows)
    end[-1] = 0
    return Intervals(end.int()[None], last.int()[None], num_rows, may_be_empty=True)


def inputs(num_queries: int, num_keys: int, dtype=torch.float32, head_dim=16) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((1, num_queries, 4, head_dim), (1, num_keys, 2, head_dim), (1, num_keys, 2, head_dim))
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def run(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: Intervals) -> torch.Tensor:
    backend = attention_backend(name)
    return backend.attend(q, k, v, backend.prepare(intervals, q.dtype, q.shape[3]))


@eager_flex
def test_flex_equals_sdpa():
    intervals = mixed_rows(150)
    found, expected = (run(name, *inputs(150, 150), intervals) for name in ("flex", "sdpa"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found[:, -1] == 0).all()


@eager_flex
def test_flex_with_fewer_queries_than_keys():
    whole = mixed_rows(150)
    part = Intervals(whole.row_end[:, 60:75], whole.last_query - 60, 150)
    found, expected = (run(name, *inputs(15, 150), part) for name in ("flex", "sdpa"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_sdpa_reads_a_mask_of_the_model_dtype_without_nan():
    additive, not_empty = attention_backend("sdpa").prepare(mixed_rows(90), torch.bfloat16, 16)
    assert additive.dtype == torch.bfloat16
    assert (additive[0, 0, -1] == 0).all()
    assert not_empty.flatten().tolist() == [True] * 89 + [False]


@without_gpu
@pytest.mark.parametrize(("backend", "training"), [("interval", False), ("flash", False), ("flex", True)])
def test_a_backend_that_is_unsupported_here_is_refused_at_start_up(monkeypatch, backend, training):
    monkeypatch.setattr("interval_attention.api.INTERPRETED", False)
    with pytest.raises(UserError, match=rf"model\.attention: {backend} .*(CPU|cpu).*use auto or sdpa"):
        check_backend(backend, 16, training=training)
    for backend in ("auto", "sdpa", "flex"):
        check_backend(backend, 16)


@without_gpu
def test_a_model_is_refused_with_its_backend():
    with pytest.raises(UserError, match=r"model\.attention: flash is not supported here"):
        Transfusion(ModelConfig(**SMALL, attention="flash"), ObjectiveConfig())


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_run_checks_its_backend_for_the_dtype_of_its_precision(run_values, monkeypatch, precision, dtype):
    """flash-attention supports half precision alone."""
    monkeypatch.setattr("interval_attention.flash.flash_package", lambda device: "flash-attn-4")
    monkeypatch.setattr("interval_attention.flash._unsupported_reason_4", lambda head_dim: "")
    monkeypatch.setattr("interval_attention.flash._version", lambda package: "4")
    monkeypatch.setattr("interval_attention.flash._architecture", lambda device: 90)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A chip")
    run_values["model"]["attention"], run_values["train"]["precision"] = "flash", precision
    config = parse_config(RunConfig, run_values, "test")
    start_process_group()
    if precision == "bf16":
        build_components(config, make_mesh(config.parallel))
        return
    with pytest.raises(UserError, match=r"attention: flash .*bfloat16 and float16, not torch\.float32"):
        build_components(config, make_mesh(config.parallel))


@without_gpu
@pytest.mark.parametrize("trained_with", ["flash", "interval", "flex", "auto", "sdpa"])
def test_the_model_of_a_pipeline_generates_on_any_device_in_any_dtype(monkeypatch, trained_with):
    monkeypatch.setattr("interval_attention.api.INTERPRETED", False)
    config = ModelConfig(**SMALL, attention=trained_with)
    model = build_model(PipelineConfig(model=config, objective=ObjectiveConfig(), sampling=SamplingConfig()))
    decoder, tokens = Decoder(model), torch.tensor([3])
    logits = decoder.read_tokens(decoder.new_cache(1, 4), tokens)
    expected = Transfusion(ModelConfig(**SMALL), ObjectiveConfig())
    expected.load_state_dict(model.state_dict())
    decoder = Decoder(expected)
    assert torch.equal(decoder.read_tokens(decoder.new_cache(1, 4), tokens), logits)


@without_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_is_sdpa_on_a_cpu(dtype):
    intervals = mixed_rows(30)
    found, expected = (run(name, *inputs(30, 30, dtype), intervals) for name in ("auto", "sdpa"))
    assert torch.equal(found, expected)


def test_head_dims_that_the_kernels_lack_are_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    with pytest.raises(UserError, match=r"head_dim 24 is not supported; supported: 16, .*use auto or sdpa"):
        check_backend("interval", 24)


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "megafusion.model.attention.flash", None)
    assert "flash" in unsupported_reason("flash", torch.device("cuda"), torch.bfloat16, 64, training=True)


@without_gpu
def test_interval_equals_sdpa_under_the_interpreter():
    intervals, found = mixed_rows(90), []
    intervals.row_end[0, -1] = 90  # non-decreasing, as the backward pass needs
    for name in ("interval", "sdpa"):
        q, k, v = (x.requires_grad_() for x in inputs(90, 90))
        o = run(name, q, k, v, intervals)
        found.append([o, *torch.autograd.grad((o * torch.arange(16)).sum(), (q, k, v))])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@without_gpu
@eager_flex
def test_backends_equal_sdpa_where_rows_have_holes():
    """Clean context: each row's keys are one interval or two."""
    row_end, last_query = rows_with_holes(3, 1, 90)
    intervals, found = Intervals(row_end, last_query, 90, has_holes=True), []
    for name in ("interval", "sdpa"):
        q, k, v = (x.requires_grad_() for x in inputs(90, 90))
        o = run(name, q, k, v, intervals)
        found.append([o, *torch.autograd.grad((o * torch.arange(16)).sum(), (q, k, v))])
    found.append([run("flex", *inputs(90, 90), intervals)])
    for others in (found[0], found[2]):
        for ours, expected in zip(others, found[1], strict=False):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@without_gpu
@pytest.mark.filterwarnings("error:Dynamo detected a call")
@pytest.mark.parametrize("name", ["auto", "sdpa", "interval"])
def test_a_backend_compiles_in_one_graph_at_any_length(name):
    backend = attention_backend(name)
    compiled = torch.compile(backend.attend, fullgraph=True, backend="eager")
    for length in (70, 80, 90):
        q, k, v = inputs(length, length)
        mask = backend.prepare(mixed_rows(length), q.dtype, 16)
        assert torch.equal(compiled(q, k, v, mask), backend.attend(q, k, v, mask))


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """Pretend to be on sm_90; yields a function that writes choices and returns the choice of auto."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(auto, "CHOICES", tmp_path / "choices.json")
    auto.stored_choices.cache_clear()

    def chosen(choices: list[dict], num_rows: int, num_keys: int, head_dim: int, supported: set[str]):
        monkeypatch.setattr(auto, "_unsupported_reason", lambda name, *case: name not in {"sdpa", *supported})
        auto.CHOICES.write_text(json.dumps({"choices": choices}))
        bounds = SimpleNamespace(device=torch.device("cuda"), shape=(1, num_rows))
        return auto.choose(Intervals(bounds, None, num_keys), torch.bfloat16, head_dim)

    yield chosen
    auto.stored_choices.cache_clear()


CHOICES = [
    {"architecture": 90, "head_dim": 128, "min_rows": 8192, "backends": ["flash", "interval"]},
    {"architecture": 90, "head_dim": 128, "min_rows": 0, "backends": ["interval", "flex"]},
    {"architecture": 80, "head_dim": 128, "min_rows": 0, "backends": ["flex"]},
]


@pytest.mark.parametrize(
    ("num_rows", "num_keys", "head_dim", "supported", "expected"),
    [
        (4096, 4096, 128, {"interval", "flash"}, "interval"),
        (8192, 8192, 128, {"interval", "flash"}, "flash"),
        (32768, 32768, 128, {"interval"}, "interval"),
        (1, 32768, 128, {"interval", "flash"}, "interval"),
        (8192, 8192, 64, {"interval", "flash"}, "interval"),
        (8192, 8192, 64, set(), "sdpa"),
    ],
)
def test_auto_chooses_the_fastest_supported(hopper, num_rows, num_keys, head_dim, supported, expected):
    assert hopper(CHOICES, num_rows, num_keys, head_dim, supported) == expected


def test_without_measurements_auto_chooses_interval(hopper):
    assert hopper([], 8192, 8192, 128, {"interval", "flash"}) == "interval"


def test_the_stored_choices_name_backends_and_where_they_were_measured():
    """An entry without a measurement would be an invention."""
    stored = json.loads(auto.CHOICES.read_text())
    measured = {record["architecture"] for record in stored["measured"]}
    for choice in stored["choices"]:
        assert choice["architecture"] in measured
        assert set(choice["backends"]) <= set(get_args(BackendName)) - {"auto"}
    assert len(auto.stored_choices()) == len(stored["choices"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")
@pytest.mark.parametrize("name", ["interval", "flex", "auto", "flash"])
def test_backends_equal_sdpa_on_a_gpu(name):
    whole = mixed_rows(150)
    end = whole.row_end.clone()
    end[0, -1] = 150
    head_dim = 64 if name == "flash" else 16  # the smallest that each supports
    if reason := unsupported_reason(name, torch.device("cuda"), torch.bfloat16, head_dim, training=True):
        pytest.skip(reason)
    found = []
    for backend in (name, "sdpa"):
        intervals = Intervals(end.cuda(), whole.last_query.cuda(), 150)
        q, k, v = (x.cuda().requires_grad_() for x in inputs(150, 150, torch.bfloat16, head_dim))
        o = run(backend, q, k, v, intervals)
        found.append([o, *torch.autograd.grad(o.float().square().sum(), (q, k, v))])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=3e-2, rtol=3e-2)
