"""Every stored variant with head_dim 64 and 128 compiles for sm_80 and sm_90 without spills."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.compile_check import CUOBJDUMP, SHARED_LIMIT

pytestmark = pytest.mark.skipif(
    not CUOBJDUMP.exists(), reason=f"this Triton has no {CUOBJDUMP.name} to read spills with"
)


def compiled(*arguments: str) -> list[dict]:
    """The rows of compile_check, in a separate process because tests run under the interpreter."""
    command = [sys.executable, "-m", "tests.kernels.compile_check", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    usages = json.loads(done.stdout or "[]")
    assert usages, done.stderr[-2000:]
    # A tile chosen for its descriptors may spill a little through pointers.
    assert done.returncode == any(u["spilled_bytes"] for u in usages), done.stderr[-2000:] or done.stdout
    return usages


def check(usage: dict) -> None:
    """A loop does not spill, copies ahead (two steps on sm_90), divides no integers, and on sm_90 masks in
    branches only."""
    assert usage["spilled_bytes"] == 0, usage
    assert usage["shared_bytes"] <= SHARED_LIMIT[usage["architecture"]], usage
    if usage["kernel"] == "delta":
        return
    assert usage["divisions"] == 0, usage
    assert (usage["edges"] > 0) == (usage["architecture"] == 90), usage
    assert usage["steps_ahead"] == usage["tile"]["stages"] - 1 >= 1 + (usage["architecture"] == 90), usage
    if usage["architecture"] == 90 and usage["kernel"] != "decode":
        assert usage["products"] == warp_group_products(usage["kernel"], usage["head_dim"], usage["tile"]), (
            usage
        )


def warp_group_products(kernel: str, head_dim: int, tile: dict) -> int:
    """HGMMA instructions a step, each of 64 rows and a depth of 16: two products of depth head_dim in the
    backward kernels and one forward, and two or one over the step's positions."""
    side, step = (tile["keys"], tile["rows"]) if kernel == "dkdv" else (tile["rows"], tile["keys"])
    depths = {
        "forward": head_dim + step,
        "dkdv": 2 * (head_dim + step),
        "dq": 2 * head_dim + step,
    }
    return depths[kernel] // 16 * (side // 64) // (tile["warps"] // 4)


STEPS = {
    (80, 64): {"forward": 359, "decode": 214, "dkdv": 280, "dq": 369, "delta": 0},
    (80, 128): {"forward": 328, "decode": 253, "dkdv": 449, "dq": 326, "delta": 0},
    (90, 64): {"forward": 306, "decode": 237, "dkdv": 242, "dq": 260, "delta": 0},
    (90, 128): {"forward": 343, "decode": 326, "dkdv": 280, "dq": 291, "delta": 0},
}
"""Instructions of a step between edges by (architecture, head_dim), of kernels whose mask was an interval of
keys for each row: before it was by keys, and could have holes."""


# The kernels of one head_dim and architecture below stand for all variants.
@pytest.mark.full
def test_stored_variants():
    """Which rows with holes cost nothing."""
    usages = compiled("--head-dims", "64", "128")
    assert {(u["architecture"], u["head_dim"]) for u in usages} == STEPS.keys()
    assert {u["kernel"] for u in usages} == {"forward", "decode", "delta", "dkdv", "dq"}
    for usage in usages:
        check(usage)
        limit = STEPS[usage["architecture"], usage["head_dim"]][usage["kernel"]]
        assert usage["step"] <= 1.02 * limit, usage


@pytest.mark.full
def test_variants_of_rows_with_holes():
    usages = compiled("--head-dims", "64", "128", "--holes")
    assert {u["kernel"] for u in usages} == {"forward", "dq"}
    for usage in usages:
        check(usage)


@pytest.mark.full
def test_loops_with_tma_descriptors_use_fewer_registers():
    tma, pointers = (
        {u["kernel"]: u for u in compiled("--architectures", "90", "--head-dims", "128", loads)}
        for loads in ("--tma", "--no-tma")
    )
    assert set(tma) == {"forward", "dkdv", "dq"}
    assert set(pointers) == {"forward", "decode", "delta", "dkdv", "dq"}
    for usage in tma.values():
        check(usage)
    for kernel, usage in tma.items():
        assert usage["tile"]["tma"]
        assert usage["registers"] < pointers[kernel]["registers"], usage
