"""Attention backends: each equals sdpa where it serves, and says so where it does not."""

import json

import pytest
import torch

from megafusion.errors import UserError
from megafusion.model import attention as module
from megafusion.model.attention import BACKENDS, auto, check_backend, flex, prepare_mask, sdpa, stored_choices
from megafusion.model.config import ModelConfig
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig
from megafusion.sequence.intervals import Intervals

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
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
eager_flex = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def mixed_rows(num_rows: int) -> Intervals:
    """Text, an image of 40 patches, text; then a second document of text; a last row that sees nothing."""
    row = torch.arange(num_rows, dtype=torch.int32)
    end = torch.where((row >= 10) & (row < 50), 50, row + 1)
    start = torch.where(row < 70, 0, 70)
    end[-1] = 0
    return Intervals(start.int()[None], end.int()[None], num_rows, may_be_empty=True)


def inputs(num_queries: int, num_keys: int, dtype=torch.float32, head_dim=16) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((1, num_queries, 4, head_dim), (1, num_keys, 2, head_dim), (1, num_keys, 2, head_dim))
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


@eager_flex
def test_flex_equals_sdpa():
    intervals = mixed_rows(150)
    found, expected = (attend(*inputs(150, 150), intervals) for attend in (flex, sdpa))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found[:, -1] == 0).all()


@eager_flex
def test_flex_with_fewer_queries_than_keys():
    whole = mixed_rows(150)
    part = Intervals(whole.row_start[:, 60:75], whole.row_end[:, 60:75], 150)
    found, expected = (attend(*inputs(15, 150), part) for attend in (flex, sdpa))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@without_gpu
def test_flex_refuses_to_train_on_a_cpu():
    q, k, v = inputs(20, 20)
    with pytest.raises(UserError, match=r"model\.attention: flex cannot train on a CPU.*use sdpa"):
        flex(q.requires_grad_(), k, v, mixed_rows(20))


@without_gpu
@pytest.mark.parametrize("backend", ["interval", "flash"])
def test_kernels_are_refused_at_start_up_without_a_gpu(backend):
    with pytest.raises(UserError, match=rf"model\.attention: {backend} .*no CUDA device.*use auto or sdpa"):
        Transfusion(ModelConfig(**SMALL, attention=backend), ObjectiveConfig())
    for backend in ("auto", "sdpa", "flex"):
        check_backend(backend, 16)


@without_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_is_sdpa_on_a_cpu(dtype):
    intervals = mixed_rows(30)
    assert torch.equal(auto(*inputs(30, 30, dtype), intervals), sdpa(*inputs(30, 30, dtype), intervals))


def test_head_sizes_that_the_kernels_lack_are_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UserError, match=r"head_dim 24 is not served; served are 16, .*use auto or sdpa"):
        check_backend("interval", 24)


@without_gpu
def test_interval_equals_sdpa_under_the_interpreter():
    intervals, found = mixed_rows(90), []
    intervals.row_end[0, -1] = 90  # non-decreasing, as the backward pass needs
    for attend in (BACKENDS["interval"], sdpa):
        q, k, v = (x.requires_grad_() for x in inputs(90, 90))
        o = attend(q, k, v, intervals)
        found.append([o, *torch.autograd.grad((o * torch.arange(16)).sum(), (q, k, v))])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert intervals.prepared is intervals.prepared


@without_gpu
@pytest.mark.filterwarnings("error:Dynamo detected a call")
def test_auto_compiles_in_one_graph_at_any_length():
    compiled = torch.compile(auto, fullgraph=True, backend="eager")
    for length in (70, 80, 90):
        intervals = mixed_rows(length)
        prepare_mask("auto", intervals, torch.zeros(1), 16)
        assert "additive_mask" in vars(intervals)
        q, k, v = inputs(length, length)
        assert torch.equal(compiled(q, k, v, intervals), auto(q, k, v, intervals))


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """As if on sm_90 with flash-attn-4 4.0.0b36; a function that writes choices and asks what auto takes."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A chip")
    serves = {"interval", "flash"}
    monkeypatch.setattr(module, "_refusal", lambda backend, *case: "" if backend in serves else "not here")
    monkeypatch.setattr(module, "CHOICES", tmp_path / "choices.json")

    def chosen(choices: list[dict], num_rows: int, num_keys: int, head_dim: int = 128, serving=serves):
        serves.intersection_update(serving)
        module.CHOICES.write_text(json.dumps({"choices": choices}))
        stored_choices.cache_clear()
        module._find_serving.cache_clear()
        bounds = torch.zeros(1, num_rows, dtype=torch.int32)
        x = torch.empty(1, dtype=torch.bfloat16, device="meta")
        monkeypatch.setattr(module, "_serving", _as_on_cuda(module._serving))
        return module._chosen(x, head_dim, num_rows, Intervals(bounds, bounds, num_keys))

    yield chosen
    stored_choices.cache_clear()
    module._find_serving.cache_clear()


def _as_on_cuda(serving):
    """The same function, told of a GPU; no tensor can be put on one here."""

    def told(device, dtype, head_dim):
        return serving(torch.device("cuda"), dtype, head_dim)

    return told


CHOICES = [
    {"architecture": 90, "head_dim": 128, "least_rows": 8192, "backends": ["flash", "interval"]},
    {"architecture": 90, "head_dim": 128, "least_rows": 0, "backends": ["interval", "flex"]},
    {"architecture": 80, "head_dim": 128, "least_rows": 0, "backends": ["flex"]},
]


@pytest.mark.parametrize(
    ("num_rows", "num_keys", "head_dim", "serving", "expected"),
    [
        (4096, 4096, 128, {"interval", "flash"}, "interval"),
        (8192, 8192, 128, {"interval", "flash"}, "flash"),
        (32768, 32768, 128, {"interval"}, "interval"),
        (1, 32768, 128, {"interval", "flash"}, "interval"),
        (8192, 8192, 64, {"interval", "flash"}, "interval"),
        (8192, 8192, 64, set(), "sdpa"),
    ],
)
def test_auto_takes_the_fastest_measured_that_serves(hopper, num_rows, num_keys, head_dim, serving, expected):
    assert hopper(CHOICES, num_rows, num_keys, head_dim, serving) == expected


def test_without_measurements_auto_takes_interval(hopper):
    assert hopper([], 8192, 8192) == "interval"


def test_the_stored_choices_name_backends_and_where_they_were_measured():
    """An entry without a measurement behind it would be an invention."""
    stored = json.loads(module.CHOICES.read_text())
    measured = {record["architecture"] for record in stored["measured"]}
    for choice in stored["choices"]:
        assert choice["architecture"] in measured
        assert set(choice["backends"]) <= set(BACKENDS) - {"auto"}
    assert len(stored_choices()) == len(stored["choices"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")
@pytest.mark.parametrize("name", ["interval", "flex", "auto", "flash"])
def test_backends_equal_sdpa_on_a_gpu(name):
    whole = mixed_rows(150)
    end = whole.row_end.clone()
    end[0, -1] = 150
    head_dim = 64 if name == "flash" else 16  # the smallest that each serves
    if name == "flash" and (refusal := module._refusal("flash", torch.device("cuda"), torch.bfloat16, 64)):
        pytest.skip(refusal)
    found = []
    for attend in (BACKENDS[name], sdpa):
        intervals = Intervals(whole.row_start.cuda(), end.cuda(), 150)
        q, k, v = (x.cuda().requires_grad_() for x in inputs(150, 150, torch.bfloat16, head_dim))
        o = attend(q, k, v, intervals)
        found.append([o, *torch.autograd.grad(o.float().square().sum(), (q, k, v))])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=3e-2, rtol=3e-2)
