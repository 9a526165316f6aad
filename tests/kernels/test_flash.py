"""The intervals in flash-attention's formats: block lists, document starts, calls of the real package."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from interval_attention.blocks import block_lists
from interval_attention.flash import check_flash, document_starts, flash_prepare
from interval_attention.reference import dense_mask, reference_attention
from tests.support.layouts import DEVICE, Case, last_queries, packed_rows, rows_with_holes

has_flash_4 = find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None
needs_flash_4 = pytest.mark.skipif(not has_flash_4, reason="flash-attn-4 is not installed")


def int32(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def blocks_of(seen: torch.Tensor, block: int, other_block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [B, N, M]: blocks of a mask [B, S, T] with a visible pair, and blocks of visible pairs only."""
    num_rows, num_keys = seen.shape[1:]
    padded = F.pad(seen, (0, -num_keys % other_block, 0, -num_rows % block))
    tiles = padded.unflatten(2, (-1, other_block)).unflatten(1, (-1, block)).movedim(3, 2)
    return tiles.flatten(3).any(-1), tiles.flatten(3).all(-1)


def listed(count: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """bool [B, N, M] from a list, whose entries must ascend."""
    chosen = torch.zeros(index.shape[0], *index.shape[2:], dtype=torch.bool, device=index.device)
    for b, n in [(b, n) for b in range(chosen.shape[0]) for n in range(chosen.shape[1])]:
        entries = index[b, 0, n, : count[b, 0, n]].tolist()
        assert entries == sorted(set(entries))
        assert len(entries) == count[b, 0, n]
        chosen[b, n, entries] = True
    return chosen


def check_lists(lists, seen: torch.Tensor, block: int, other_block: int) -> None:
    some, every = blocks_of(seen, block, other_block)
    masked, full = listed(*lists[:2]), listed(*lists[2:])
    assert torch.equal(full, every)
    assert torch.equal(masked, some & ~every)


@st.composite
def layouts(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of documents of texts and images, each position seeing at least itself."""
    length = draw(st.integers(1, 90))
    start, end = [], []
    while len(start) < length:
        first = len(start)
        for size, image in draw(
            st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=4)
        ):
            here = len(start)
            end += [here + size] * size if image else range(here + 1, here + size + 1)
            start += [first] * size
    return int32([[min(e, length) for e in end[:length]]]), last_queries(int32([start[:length]]), length)


@settings(max_examples=40, deadline=None)
@given(layouts(), st.sampled_from([(16, 16), (32, 16), (16, 32)]))
def test_block_lists_equal_brute_force_over_all_pairs(layout, sizes):
    seen = dense_mask(*layout)[:, 0]
    by_rows, by_keys = block_lists(*layout, *sizes)
    check_lists(by_rows, seen, *sizes)
    check_lists(by_keys, seen.mT, *reversed(sizes))


@pytest.mark.parametrize("length", [100, 128, 384, 1000])
def test_lists_by_rows_and_by_keys_agree(length):
    mask = packed_rows(length, 3, length)
    prepared = flash_prepare(*mask, length, "flash-attn-4")
    seen = dense_mask(*mask)[:, 0]
    check_lists(prepared.by_rows, seen, 128, 128)
    check_lists(prepared.by_keys, seen.mT, 128, 128)
    padded = dense_mask(prepared.row_end, prepared.last_query)[:, 0]
    assert torch.equal(padded[:, :length, :length], seen)
    assert padded.sum() == seen.sum()


@pytest.mark.parametrize("sizes", [(16, 16), (32, 16), (16, 32)])
def test_block_lists_of_rows_with_holes_equal_brute_force(sizes):
    mask = rows_with_holes(11, 12, 300)
    seen = dense_mask(*mask)[:, 0]
    by_rows, by_keys = block_lists(*mask, *sizes)
    check_lists(by_rows, seen, *sizes)
    check_lists(by_keys, seen.mT, *reversed(sizes))


def test_flash_attention_2_refuses_holes():
    with pytest.raises(ValueError, match="images need flash-attn-4 or another backend"):
        flash_prepare(*rows_with_holes(12, 1, 60), 60, "flash-attn")


def test_one_long_document_has_full_blocks():
    length = 640
    end = int32([list(range(1, length + 1)), [length] * length])
    prepared = flash_prepare(end, None, length, "flash-attn-4")
    assert prepared.by_rows.full_count[:, 0].tolist() == [[0, 1, 2, 3, 4], [5] * 5]
    assert prepared.by_keys.full_count[:, 0].tolist() == [[4, 3, 2, 1, 0], [5] * 5]
    assert prepared.by_rows.mask_count[:, 0].tolist() == [[1] * 5, [0] * 5]


def test_blocks_past_the_end_are_not_full():
    end = int32([[300] * 300])
    prepared = flash_prepare(end, None, 300, "flash-attn-4")
    assert not prepared.row_end[:, 300:].any()
    assert not prepared.last_query[:, 300:].any()
    for lists in (prepared.by_rows, prepared.by_keys):
        assert lists.full_count[:, 0].tolist() == [[2, 2, 0]]
        assert lists.mask_count[:, 0].tolist() == [[1, 1, 3]]
        assert lists.mask_index[0, 0, :2, 0].tolist() == [2, 2]


def test_fewer_queries_than_keys_have_no_lists_by_keys():
    prepared = flash_prepare(int32([[301, 302, 303, 0]]), None, 500, "flash-attn-4")
    assert prepared.by_keys is None
    assert prepared.by_rows.mask_index[0, 0, 0, : prepared.by_rows.mask_count[0, 0, 0]].tolist() == [0, 1, 2]
    assert prepared.row_end.shape == (1, 128)
    assert prepared.last_query.shape == (1, 512)
    assert prepared.row_end[0, 3] == 1  # so that no row sees nothing


# flash-attention 2


def test_documents_of_text_are_causal_attention_of_each():
    starts = [[0] * 5 + [5] + [6] * 14, [0] * 20]
    end = torch.arange(1, 21, dtype=torch.int32, device=DEVICE).repeat(2, 1)
    last = last_queries(int32(starts), 20)
    bounds = document_starts(end, last)
    assert bounds.tolist() == [0, 5, 6, 20, 40]
    assert bounds.dtype == torch.int32
    case = Case.random(end, last, 2, 2)
    q, k, v = (x.flatten(0, 1).movedim(1, 0) for x in (case.q, case.k, case.v))
    found = torch.cat(
        [
            F.scaled_dot_product_attention(q[:, a:b], k[:, a:b], v[:, a:b], is_causal=True)
            for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ],
        dim=1,
    )
    expected, _ = reference_attention(case.q, case.k, case.v, end, last)
    torch.testing.assert_close(found.movedim(0, 1).unflatten(0, (2, 20)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("start", "end", "num_keys", "message"),
    [
        (
            [[0, 0, 0], [0, 0, 0]],
            [[1, 2, 3], [1, 3, 3]],
            3,
            r"query 1 of row 1 sees the keys 0 \.\. 3: images",
        ),
        ([[0, 0, 1]], [[1, 2, 3]], 3, r"query 2 of row 0 sees the keys 1 \.\. 3"),
        ([[0, 1, 1]], [[1, 2, 2]], 3, r"query 2 of row 0 sees the keys 1 \.\. 2"),
        ([[0]], [[5]], 5, "as many queries as keys, not 1 and 5"),
    ],
)
def test_rows_that_are_not_text_only_are_refused(start, end, num_keys, message):
    with pytest.raises(ValueError, match=message):
        flash_prepare(int32(end), last_queries(int32(start), num_keys), num_keys, "flash-attn")


# Refusals, and the real package


def on_chip(monkeypatch, capability: tuple[int, int], versions: dict[str, str]) -> None:
    """Pretend that this machine has that chip and those packages."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A chip")
    monkeypatch.setattr("interval_attention.flash._version", versions.get)


@pytest.mark.parametrize(
    ("capability", "versions", "head_dim", "message"),
    [
        ((9, 0), {}, 128, r"A chip, sm_90: flash-attn-4 is not installed; flash-attn is not installed"),
        (
            (8, 0),
            {"flash-attn-4": "4.0.0b36"},
            128,
            r"sm_80: flash-attn-4 4\.0\.0b36 supports Hopper and Black",
        ),
        (
            (12, 0),
            {"flash-attn-4": "4.0.0b36"},
            64,
            r"sm_120: flash-attn-4 4\.0\.0b36 supports Hopper an",
        ),
        (
            (9, 0),
            {"flash-attn-4": "4.0.0b36"},
            256,
            r"A chip, sm_90: flash-attn-4 4\.0\.0b36 does not support head_dim 256 by.*64, 96, 128",
        ),
        (
            (7, 5),
            {"flash-attn": "2.8.3"},
            64,
            r"sm_75: flash-attn-4 is not installed; flash-attn 2\.8\.3 supports sm_80",
        ),
        (
            (8, 0),
            {"flash-attn": "2.8.3"},
            260,
            r"sm_80: flash-attn 2\.8\.3 does not support head_dim 260; supported",
        ),
    ],
)
def test_reasons_name_package_version_and_chip(monkeypatch, capability, versions, head_dim, message):
    on_chip(monkeypatch, capability, versions)
    with pytest.raises(ValueError, match=message):
        check_flash(torch.device("cuda"), torch.bfloat16, head_dim)


def test_cpus_and_float32_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="CUDA devices, not on cpu"):
        check_flash(torch.device("cpu"), torch.bfloat16, 64)
    on_chip(monkeypatch, (9, 0), {"flash-attn-4": "4.0.0b36"})
    with pytest.raises(ValueError, match=r"4\.0\.0b36 supports bfloat16 and float16, not torch\.float32"):
        check_flash(torch.device("cuda"), torch.float32, 64)


@pytest.mark.skipif(has_flash_4, reason="for machines without the package")
def test_a_package_that_cannot_be_imported_is_named(monkeypatch):
    on_chip(monkeypatch, (9, 0), {"flash-attn-4": "4.0.0b36"})
    with pytest.raises(ValueError, match=r"flash-attn-4 4\.0\.0b36 cannot be imported \(No module named"):
        check_flash(torch.device("cuda"), torch.bfloat16, 64)


@needs_flash_4
def test_the_installed_flash_attention_4_is_supported(monkeypatch):
    on_chip(monkeypatch, (9, 0), {"flash-attn-4": "installed"})
    assert check_flash(torch.device("cuda"), torch.bfloat16, 128) == "flash-attn-4"


@needs_flash_4
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_the_real_kernels_compile_with_our_mask_for_hopper(head_dim):
    """Forward and backward, without a GPU: the package compiles for a named chip, on fake tensors."""
    environment = os.environ | {
        "FLASH_ATTENTION_ARCH": "sm_90",
        "CUTE_DSL_ARCH": "sm_90a",
        "FLASH_ATTENTION_NUM_SMS": "132",
        "TRITON_INTERPRET": "1",
    }
    script = os.path.join(os.path.dirname(__file__), "compile_flash.py")  # noqa: PTH118, PTH120
    done = subprocess.run(
        [sys.executable, script, str(head_dim)], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {"forward": [2, 300, 4, head_dim], "dk": [2, 300, 2, head_dim]}
