"""The kernels against dense attention; on a CPU under Triton's interpreter (see tests/conftest.py)."""

import json
import random
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import interval_attention as package
from interval_attention import api, configs, interval_attention, prepare, prepared_attention
from interval_attention.configs import INTERPRETED, Tile, Tiles, using
from interval_attention.intervals import RUN
from interval_attention.reference import dense_mask, reference_attention
from tests.support.layouts import (
    DEVICE,
    Case,
    attention_with_holes,
    last_queries,
    packed_row,
    packed_rows,
    rows_with_holes,
)
from tests.support.marks import full


def int32(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def with_lse(q, k, v, row_end, last_query):
    return interval_attention(q, k, v, row_end, last_query, return_lse=True)


def causal(num_rows: int, length: int):
    end = torch.arange(1, length + 1, dtype=torch.int32, device=DEVICE).repeat(num_rows, 1)
    return end, torch.full_like(end, length)


# 32 of the layouts stand for all.
@pytest.mark.parametrize("seed", [*range(4), *full(*range(4, 20))])
def test_160_random_layouts_equal_dense_attention(seed):
    rng = random.Random(seed)
    heads = rng.choice([(1, 1), (2, 1), (2, 2), (3, 1)])
    Case.random(*packed_rows(seed, 8, rng.randint(16, 44)), *heads, seed=seed).check()


@pytest.mark.parametrize("heads", [(2, 1), (1, 1)])
def test_three_loops_as_on_sm_80(monkeypatch, heads):
    monkeypatch.setattr(api, "_branches", lambda device: False)
    Case.random(*packed_rows(9, 6, 44), *heads).check()
    Case.random(*causal(1, 140), *heads).check()


@pytest.mark.parametrize("seed", [*range(3), *full(*range(3, 20))])
def test_random_layouts_with_holes_equal_dense_attention(seed):
    rng = random.Random(seed)
    heads = rng.choice([(1, 1), (2, 1), (2, 2), (3, 1)])
    Case.random(*rows_with_holes(seed, 8, rng.randint(16, 60)), *heads, seed=seed).check(attention_with_holes)


@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize(("text", "patches", "after"), [(40, 1, 0), (33, 2, 3), (70, 20, 60), (0, 5, 70)])
def test_a_hole_smaller_or_larger_than_a_step(monkeypatch, branches, text, patches, after):
    """A text, an image, a text, and the image's noised copy; steps of 16 keys and 16 rows."""
    monkeypatch.setattr(api, "_branches", lambda device: branches)
    main = text + patches + after
    whole = main + patches
    end = [*range(1, text + 1), *[text + patches] * patches, *range(text + patches + 1, main + 1)]
    last = [*[whole] * text, *[main] * (patches + after), *[whole] * patches]
    mask = int32([end + [whole] * patches]), int32([last])
    Case.random(*mask).check(attention_with_holes)


def test_holes_in_three_loops_as_on_sm_80(monkeypatch):
    monkeypatch.setattr(api, "_branches", lambda device: False)
    Case.random(*rows_with_holes(4, 4, 90), 2, 1).check(attention_with_holes)


def test_holes_in_rows_longer_than_a_run_of_the_schedule():
    Case.random(*rows_with_holes(5, 2, 200), 1, 1).check(attention_with_holes)


def test_holes_do_not_change_a_row_without_them():
    case = Case.random(*packed_rows(6, 4, 60))
    found, plain = (case.results(each, torch.float32) for each in (attention_with_holes, with_lse))
    for name, value in plain.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("seed", "length"), [(100, 131), (101, 160), (102, 128)])
def test_rows_longer_than_a_run_of_the_schedule(seed, length):
    Case.random(*packed_rows(seed, 3, length), 1, 1, seed=seed).check()


def test_grouped_queries():
    Case.random(*packed_rows(7, 8, 30), num_heads=6, num_kv_heads=2).check()


def test_heads_in_sections_that_fit_in_the_cache(monkeypatch):
    """4 key heads: 2 sections of 2 where a section reads keys, 4 of 1 where it reads two heads' queries."""
    monkeypatch.setattr(api, "L2_BYTES", 2 * (2 * 60 * 16 * 4))
    case = Case.random(*packed_rows(8, 2, 60), num_heads=8, num_kv_heads=4)
    assert api._section(case.k) == 2
    assert api._section(case.q, group=2) == 1
    case.check()


def test_one_document_over_everything():
    """Full steps for each head of each group, as in plain causal attention and in a single image."""
    size = 96
    Case.random(int32([list(range(1, size + 1)), [size] * size]), int32([[size] * size] * 2), 4, 2).check()


@pytest.mark.parametrize(
    "segments",
    [
        [("image", 16), ("image", 16), ("image", 3)],
        [("image", 1), ("image", 1), ("text", 1), ("image", 1)] * 5,
        [("text", 31), ("image", 2), ("text", 31)],
        [("text", 16), ("new", 0), ("image", 16), ("new", 0), ("image", 17), ("text", 4)],
        [("new", 0), ("text", 1)] * 20,
    ],
    ids=[
        "adjacent images",
        "one-patch images",
        "image over a tile's edge",
        "edges on tiles",
        "one token each",
    ],
)
def test_named_layouts(segments):
    start, end, document = [], [], 0
    for kind, size in segments:
        here = len(start)
        document = here if kind == "new" else document
        end += [here + size] * size if kind == "image" else range(here + 1, here + size + 1)
        start += [document] * size
    Case.random(int32([end]), last_queries(int32([start]), len(start))).check()


def some_rows(bounds, rng: random.Random, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds of some of the queries, in their order, and of all keys."""
    row_end, last_query = bounds
    chosen = [sorted(rng.sample(range(row_end.shape[1]), num_rows)) for _ in row_end]
    chosen = torch.tensor(chosen, dtype=torch.int32, device=DEVICE)
    # The first of the chosen queries that a key's last does not reach.
    return row_end.gather(1, chosen.long()), torch.searchsorted(chosen, last_query, out_int32=True)


@pytest.mark.parametrize("num_rows", [1, 17, *full(7, 16, 40)])
def test_fewer_queries_than_keys(num_rows):
    """Decoding with a cache: some rows of packed layouts of 70 keys, in their order."""
    rng = random.Random(num_rows)
    Case.random(*some_rows(packed_rows(num_rows, 8, 70), rng, num_rows)).check()


def test_the_forward_pass_allows_ends_in_any_order():
    """Generation needs this: its padding after a row's last position is fully masked."""
    rng = random.Random(0)
    end = int32([rng.choices(range(51), k=40) for _ in range(8)])
    end[:, ::7] = 0
    Case.random(end, end.new_full((8, 50), 40)).check(backward=False)
    case = Case.random(end, end.new_full((8, 50), 40))
    found, whole = (package.prepare(end, last, 50) for last in (None, case.last_query))
    for one, other in zip(found[:4] + found[5:], whole[:4] + whole[5:], strict=True):  # without holes
        assert torch.equal(one, other)


@pytest.mark.parametrize("branches", [True, False])
def test_fully_masked_rows_give_zeros_and_no_gradient(monkeypatch, branches):
    """Also where no position of a tile sees a key: its bounds are those of no interval."""
    monkeypatch.setattr(api, "_branches", lambda device: branches)
    found = Case.random(int32([[0] * 20, [20] * 20]), int32([[20] * 20, [0] * 20])).results(
        with_lse, torch.float32
    )
    assert (found["lse"] == -torch.inf).all()
    for name in ("o", "dq", "dk", "dv"):
        assert (found[name] == 0).all(), name


def test_intervals_beyond_the_keys_are_clamped():
    case = Case.random(*packed_rows(3, 2, 40))
    found = case.results(
        lambda q, k, v, e, last: with_lse(q, k, v, e.where(e < 40, 99), last.where(last < 40, 99)),
        torch.float32,
        backward=False,
    )
    expected = case.results(with_lse, torch.float32, backward=False)
    assert torch.equal(found["o"], expected["o"])


def reverse_strides(x):
    return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_second(x):
    return torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("view", [reverse_strides, heads_first, every_second])
def test_inputs_and_gradients_of_any_strides(view):
    def attention(q, k, v, row_end, last_query):
        q, k, v = view(q), view(k), view(v)
        assert not any(x.is_contiguous() for x in (q, k, v))
        o, lse = interval_attention(q, k, v, row_end, last_query, return_lse=True)
        return view(o), lse

    # Two heads each, so that no order of dimensions is contiguous by chance.
    Case.random(*packed_rows(11, 4, 37), 2, 2).check(attention)


def test_a_broadcast_gradient_and_views_of_one_projection():
    mask = packed_rows(12, 2, 33)
    qkv = torch.randn(2, 33, 4, 16, device=DEVICE, requires_grad=True)
    q, k, v = qkv.split([2, 1, 1], dim=2)
    (found,) = torch.autograd.grad(interval_attention(q, k, v, *mask).sum(), qkv)
    (expected,) = torch.autograd.grad(reference_attention(q, k, v, *mask)[0].sum(), qkv)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_other_head_dims(head_dim):
    Case.random(*packed_rows(head_dim, 2, 35), 1, 1, head_dim).check()


def test_half_precision():
    Case.random(*packed_rows(21, 8, 40)).check(dtype=torch.float16, forward_error=3e-3, gradient_error=3e-2)


@pytest.mark.skipif(DEVICE == "cpu", reason="bfloat16 products are wrong under Triton's interpreter")
def test_bfloat16_is_as_accurate_as_pytorch():
    case = Case.random(*packed_rows(22, 8, 300), 4, 2, 128)
    case = Case(*(x.bfloat16() for x in list(vars(case).values())[:3]), *list(vars(case).values())[3:])

    def pytorch(q, k, v, row_end, last_query):
        seen = dense_mask(row_end, last_query)
        o = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen, enable_gqa=True
        )
        return o.transpose(1, 2), torch.zeros(1, device=DEVICE)

    exact = case.results(reference_attention, torch.float64, backward=False)["o"]
    some = dense_mask(case.row_end, case.last_query)[:, 0].any(-1)[..., None, None]
    ours = case.results(with_lse, torch.bfloat16, backward=False)["o"]
    theirs = case.results(pytorch, torch.bfloat16, backward=False)["o"]
    error, their_error = (((o - exact) * some).abs().max() for o in (ours, theirs))
    assert error <= 1.5 * their_error


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bounds", [partial(packed_rows, 1), partial(packed_rows, 2), causal])
def test_the_stored_tiles_forward_and_backward(bounds, head_dim):
    """On a GPU those of its architecture in bfloat16; under the interpreter those of sm_90 in float32."""
    dtype, bound = (torch.float32, 1e-5) if DEVICE == "cpu" else (torch.bfloat16, 1e-2)
    case = Case.random(*bounds(2, 300 if DEVICE == "cpu" else 1000), 2, 1, head_dim)
    case = replace(case, **{name: getattr(case, name).to(dtype) for name in ("q", "k", "v", "weight")})
    chosen = using(configs.lookup(90, head_dim, 0)) if DEVICE == "cpu" else nullcontext()
    with chosen:
        found = case.results(with_lse, dtype)
    for name, value in case.results(reference_attention, torch.float64).items():
        some = value.isfinite()
        error = (found[name].double() - value)[some].norm() / value[some].norm()
        assert error < bound, (name, float(error))


def test_scale_and_the_shape_of_the_result():
    case = Case.random(*packed_rows(5, 2, 24))
    inputs = (case.q, case.k, case.v, case.row_end, case.last_query)
    o, _ = reference_attention(*inputs, scale=0.3)
    found = interval_attention(*inputs, scale=0.3)
    torch.testing.assert_close(found, o, atol=1e-5, rtol=0)
    assert found.shape == case.q.shape
    assert found.is_contiguous()


def test_the_backward_pass_repeats_bit_for_bit():
    case = Case.random(*packed_rows(31, 2, 90), 2, 1)
    first, second = (case.results(with_lse, torch.float32) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_the_reference_has_correct_gradients():
    end, last = int32([[1, 2, 4, 4, 4]]), last_queries(int32([[0, 0, 2, 2, 4]]), 5)
    q, k, v = (
        torch.randn(1, 5, heads, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for heads in (2, 1, 1)
    )
    assert torch.autograd.gradcheck(lambda *x: reference_attention(*x, end, last)[0], (q, k, v))


# Integration with PyTorch


def gradients(attention, case: Case) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    o = attention(*inputs, case.row_end, case.last_query)
    return [o.detach(), *torch.autograd.grad((o * case.weight).sum(), inputs)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_keeps_it_in_one_graph(backend):
    case = Case.random(*packed_rows(41, 2, 24))

    def layer(q, k, v, row_end, last_query):
        return torch.tanh(interval_attention(torch.sin(q), k, v, row_end, last_query) + q)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for found, expected in zip(gradients(compiled, case), gradients(layer, case), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_operators_are_registered_correctly():
    case = Case.random(*packed_rows(42, 2, 20))
    prepared = prepare(case.row_end, case.last_query)
    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    torch.library.opcheck(torch.ops.interval_attention.forward.default, (*inputs, *prepared, 0.25))
    o, lse = torch.ops.interval_attention.forward(case.q, case.k, case.v, *prepared, 0.25)
    torch.library.opcheck(
        torch.ops.interval_attention.backward.default,
        (case.weight, case.lse_weight, case.q, case.k, case.v, o, lse, *prepared, 0.25),
    )


def test_fake_tensors_have_the_shapes_and_strides_of_real_ones():
    case = Case.random(*packed_rows(43, 2, 20), 2, 1)
    q = heads_first(case.q)
    real = with_lse(q, case.k, case.v, case.row_end, case.last_query)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = with_lse(*(mode.from_tensor(x) for x in (q, case.k, case.v, case.row_end, case.last_query)))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_activation_checkpointing_gives_the_same_gradients():
    case = Case.random(*packed_rows(44, 2, 24))

    def checkpointed(*inputs):
        return checkpoint(interval_attention, *inputs, use_reentrant=False)

    plain, again = gradients(interval_attention, case), gradients(checkpointed, case)
    for found, expected in zip(again, plain, strict=True):
        assert torch.equal(found, expected)


def test_one_preparation_serves_many_layers():
    case = Case.random(*packed_rows(45, 2, 30))
    prepared = prepare(case.row_end, case.last_query, 30)
    found = gradients(lambda q, k, v, *_: prepared_attention(q, k, v, prepared), case)
    for a, b in zip(found, gradients(interval_attention, case), strict=True):
        assert torch.equal(a, b)


def test_an_empty_batch():
    for value in (
        Case.random(*(x[:0] for x in packed_rows(0, 2, 8))).results(with_lse, torch.float32).values()
    ):
        assert value.numel() == 0


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": torch.zeros(1, 8, 2, 48)},
            r"head_dim 48 is not supported; supported: 16, 32, 64, 128, 256",
        ),
        ({"q": torch.zeros(1, 8, 32)}, r"q must be of shape .*\[1, 8, 32\]"),
        ({"k": torch.zeros(1, 8, 2, 16, dtype=torch.float16)}, "k is torch.float16.*q is torch.float32"),
        ({"k": torch.zeros(1, 9, 2, 16)}, r"k \[1, 9, 2, 16\] and v \[1, 8, 2, 16\]"),
        ({"row_end": torch.zeros(1, 7, dtype=torch.int32)}, r"intervals for \[1, 7\] queries"),
        ({"last_query": torch.zeros(2, 8, dtype=torch.int32)}, r"row_end \[1, 8\] .*last_query \[2, 8\]"),
        ({"row_end": torch.zeros(1, 8, dtype=torch.int64)}, "row_end must be int32.*int64"),
        ({"scale": -1.0}, "scale must be greater than 0, got -1.0"),
        ({"q": torch.zeros(1, 8, 3, 16)}, r"groups dividing its heads"),
    ],
)
def test_bad_input_is_named(change, message):
    head_dim = change["q"].shape[-1] if "q" in change and change["q"].ndim == 4 else 16
    inputs = {name: torch.zeros(1, 8, 2, head_dim) for name in ("q", "k", "v")}
    inputs |= {name: torch.zeros(1, 8, dtype=torch.int32) for name in ("row_end", "last_query")}
    inputs = {n: x.to(DEVICE) if torch.is_tensor(x) else x for n, x in (inputs | change).items()}
    with pytest.raises(ValueError, match=message):
        interval_attention(**inputs)


def test_devices_and_dtypes_are_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match=r"torch\.float64 is not supported; supported: .*bfloat16"):
        package.check_supported(torch.device(DEVICE), torch.float64, 64)
    monkeypatch.setattr("interval_attention.api.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"tensors on cpu: the kernels run on CUDA devices"):
        package.check_supported(torch.device("cpu"), torch.float32, 64)


def test_the_random_layouts_cover_all_cases():
    """Non-decreasing bounds, with empty rows, text and images among them."""
    kinds = set()
    for seed in range(20):
        start, end = packed_row(random.Random(seed), 60)
        assert start == sorted(start)
        assert end == sorted(end)
        kinds |= {
            "empty" if s == e else "text" if e == i + 1 else "image"
            for i, (s, e) in enumerate(zip(start, end, strict=True))
        }
    assert kinds == {"empty", "text", "image"}


# TMA descriptors: same results as pointers


@pytest.fixture
def with_tma(monkeypatch):
    """Every loop loads through descriptors; yields the list of shapes that were described."""
    described = []

    def describing(x, block):
        described.append(tuple(x.shape))
        return api.TensorDescriptor(x, list(x.shape), list(x.stride()), block)

    monkeypatch.setattr(api.TensorDescriptor, "from_tensor", staticmethod(describing))
    tiles = Tiles(*(tile._replace(tma=True) for tile in INTERPRETED))
    with using(tiles):
        yield described


@pytest.mark.skipif(DEVICE != "cpu" and torch.cuda.get_device_capability() < (9, 0), reason="needs sm_90")
class TestTma:
    @pytest.mark.parametrize("seed", range(2))
    def test_random_layouts(self, with_tma, seed):
        rng = random.Random(seed)
        Case.random(*packed_rows(seed, 4, rng.randint(16, 44)), 2, 1, seed=seed).check()
        assert len(with_tma) == 7  # two tensors in each of three kernels, and the statistics

    def test_holes(self, with_tma):
        Case.random(*rows_with_holes(7, 2, 60), 2, 1).check(attention_with_holes)

    def test_rows_longer_than_a_run(self, with_tma):
        Case.random(*packed_rows(100, 1, 131), 1, 1).check()

    @pytest.mark.parametrize("num_rows", [7, 40])
    def test_fewer_queries_than_keys(self, with_tma, num_rows):
        rng = random.Random(num_rows)
        Case.random(*some_rows(packed_rows(num_rows, 4, 70), rng, num_rows)).check()

    def test_views_of_one_projection_are_described(self, with_tma):
        mask = packed_rows(12, 2, 33)
        qkv = torch.randn(2, 33, 4, 16, device=DEVICE, requires_grad=True)
        q, k, v = qkv.split([2, 1, 1], dim=2)
        weight = torch.randn(q.shape, device=DEVICE)
        (found,) = torch.autograd.grad((interval_attention(q, k, v, *mask) * weight).sum(), qkv)
        (expected,) = torch.autograd.grad((reference_attention(q, k, v, *mask)[0] * weight).sum(), qkv)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert len(with_tma) == 7

    @pytest.mark.parametrize("view", [reverse_strides, every_second])
    def test_unsupported_tensors_are_read_through_pointers(self, with_tma, view):
        def attention(q, k, v, row_end, last_query):
            o, lse = interval_attention(view(q), view(k), view(v), row_end, last_query, return_lse=True)
            return view(o), lse

        Case.random(*packed_rows(11, 4, 37), 2, 2).check(attention)
        assert not with_tma


@pytest.mark.parametrize(
    ("x", "supported"),
    [
        (torch.zeros(2, 8, 2, 16), True),
        (torch.zeros(2, 8, 2, 16).transpose(1, 2), True),
        (torch.zeros(2, 8, 2, 16).mT, False),
        (torch.zeros(2, 8, 2, 32)[..., ::2], False),
        (torch.zeros(2, 8, 2, 18)[..., :16], False),  # strides of 72 bytes
        (torch.zeros(2, 8, 2, 18, dtype=torch.bfloat16)[..., :16], False),
        (torch.zeros(2, 8, 2, 20)[..., 1:17], False),  # begins at 4 bytes
        (torch.zeros(1).expand(2, 8, 2, 16), False),
    ],
)
def test_which_tensors_support_a_descriptor(x, supported):
    assert api.describable(x) == supported


# Stored tiles


def test_stored_tiles_are_chosen_by_the_number_of_rows(monkeypatch, tmp_path):
    stored = json.loads(configs.STORED.read_text())
    first = next(e for e in stored["tiles"] if (e["architecture"], e["head_dim"]) == (90, 128))
    longer = first | {"min_rows": 8192, "dq": [64, 32, 4, 2, True]}
    (tmp_path / "tiles.json").write_text(json.dumps(stored | {"tiles": [*stored["tiles"], longer]}))
    monkeypatch.setattr(configs, "STORED", tmp_path / "tiles.json")
    configs.read_stored.cache_clear()
    try:
        assert configs.lookup(90, 128, 8191).dq == Tile(*first["dq"])
        for num_rows in (8192, 131_072):
            assert configs.lookup(90, 128, num_rows).dq == Tile(64, 32, 4, 2, True)
    finally:
        configs.read_stored.cache_clear()


def test_the_stored_tiles_serve_every_head_dim_and_fit_the_schedule():
    stored = configs.read_stored()
    assert set(stored) == {(a, d) for a in configs.ARCHITECTURES for d in configs.HEAD_DIMS}
    for (architecture, _), entries in stored.items():
        assert 0 in entries
        for tiles in entries.values():
            assert RUN % tiles.forward.rows == RUN % tiles.decode.rows == RUN % tiles.dq.rows == 0
            assert RUN % tiles.dkdv.keys == 0
            assert architecture >= 90 or not any(tile.tma for tile in tiles)
