"""Every stored variant of the usual head sizes compiles for sm_80 and sm_90 and stays in registers."""

import json
import os
import subprocess
import sys

import pytest

from interval_attention.compile_check import CUOBJDUMP, SHARED_LIMIT


@pytest.mark.skipif(
    not CUOBJDUMP.exists(), reason=f"this Triton brings no {CUOBJDUMP.name} to read spills with"
)
def test_stored_variants_do_not_spill():
    # A process of its own: these tests run under the interpreter, which compiles nothing.
    command = [sys.executable, "-m", "interval_attention.compile_check", "--json", "--head-dims", "64", "128"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-2000:] or done.stdout
    usages = json.loads(done.stdout)
    assert {(u["architecture"], u["head_dim"]) for u in usages} == {
        (a, d) for a in (80, 90) for d in (64, 128)
    }
    assert {u["kernel"] for u in usages} == {"forward", "decode", "delta", "dkdv", "dq"}
    for usage in usages:
        assert usage["spilled_bytes"] == 0, usage
        assert usage["shared_bytes"] <= SHARED_LIMIT[usage["architecture"]], usage
