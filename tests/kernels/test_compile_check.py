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
    assert done.returncode == 0, done.stderr[-2000:] or done.stdout
    return json.loads(done.stdout)


# The kernels of one head_dim and architecture below stand for all variants.
@pytest.mark.full
def test_stored_variants_do_not_spill():
    usages = compiled("--head-dims", "64", "128")
    assert {(u["architecture"], u["head_dim"]) for u in usages} == {
        (a, d) for a in (80, 90) for d in (64, 128)
    }
    assert {u["kernel"] for u in usages} == {"forward", "decode", "delta", "dkdv", "dq", "blocks"}
    for usage in usages:
        assert usage["spilled_bytes"] == 0, usage
        assert usage["shared_bytes"] <= SHARED_LIMIT[usage["architecture"]], usage


def test_loops_with_tma_descriptors_use_fewer_registers():
    tma, pointers = (
        {u["kernel"]: u for u in compiled("--architectures", "90", "--head-dims", "128", *more)}
        for more in (["--tma"], [])
    )
    assert set(tma) == {"forward", "dkdv", "dq"}
    assert set(pointers) == {"forward", "decode", "delta", "dkdv", "dq", "blocks"}
    for kernel, usage in pointers.items():
        assert usage["spilled_bytes"] == 0, (kernel, usage)
    for kernel, usage in tma.items():
        assert usage["tile"]["tma"]
        assert usage["spilled_bytes"] == 0, usage
        assert usage["shared_bytes"] <= SHARED_LIMIT[90], usage
        assert usage["registers"] < pointers[kernel]["registers"], usage
