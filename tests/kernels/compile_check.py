"""Compile every stored variant for a GPU, without needing one, and print the resources that each uses.

python -m tests.kernels.compile_check [--architectures 80 90] [--head-dims 64 128] [--tma] [--json]

Registers and spills are ptxas's own figures, read with the cuobjdump that comes with Triton. They show
whether a variant fits on the chip, not its speed.
"""

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from interval_attention.backward import delta_kernel, dkdv_kernel, dq_kernel
from interval_attention.blocks import block_lists_kernel
from interval_attention.configs import ARCHITECTURES, HEAD_DIMS, Tile, read_stored
from interval_attention.forward import forward_kernel
from interval_attention.intervals import RUN

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Maximum shared memory of a program in bytes; for 80 that of 8.6, 8.9 and 12.x, which also use its tiles.
SHARED_LIMIT = {80: 101_376, 90: 232_448}
KERNELS = {
    "forward": forward_kernel,
    "decode": forward_kernel,
    "delta": delta_kernel,
    "dkdv": dkdv_kernel,
    "dq": dq_kernel,
}
FLOAT32 = {"lse", "dlse", "delta", "lse2"}
# The tensors that each kernel's loop loads, through descriptors if its tile says so.
IN_LOOP = {"forward_kernel": "k v", "dkdv_kernel": "q do", "dq_kernel": "k v"}
INT32 = {
    "row_start",
    "row_end",
    "first_row",
    "last_row",
    "order",
    "start",
    "end",
    "clamped_start",
    "clamped_end",
}
INT32 |= {"mask_count", "mask_index", "full_count", "full_index"}


@dataclass(frozen=True)
class Usage:
    """Resources of one compiled variant: registers and spilled bytes per thread, shared bytes per program."""

    kernel: str
    architecture: int
    dtype: str
    head_dim: int
    tile: Tile
    registers: int
    spilled_bytes: int
    shared_bytes: int


def variants(architecture: int, head_dim: int) -> Iterator[tuple[str, triton.JITFunction, Tile]]:
    """The kernels of one architecture and head_dim with each of their stored tiles."""
    for name, kernel in KERNELS.items():
        stored = read_stored()[architecture, head_dim].values()
        for tile in dict.fromkeys(getattr(tiles, name) for tiles in stored):
            yield name, kernel, tile
    yield "blocks", block_lists_kernel, Tile(128, 128, 4, 1)


def measure(
    name: str, kernel: triton.JITFunction, tile: Tile, architecture: int, dtype: str, head_dim: int
) -> Usage:
    """Compile one variant as a launch with aligned, contiguous tensors would."""
    source = _source(kernel, tile, dtype, head_dim)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    # Local memory of a thread: STACK includes spills, LOCAL is what the source asked for.
    registers, stack, local = (int(re.findall(rf"{key}:(\d+)", text)[0]) for key in ("REG", "STACK", "LOCAL"))
    return Usage(
        name, architecture, dtype, head_dim, tile, registers, stack + local, compiled.metadata.shared
    )


def _source(kernel: triton.JITFunction, tile: Tile, dtype: str, head_dim: int) -> ASTSource:
    constants = {
        "RUN": RUN, "TMA": tile.tma, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "HEAD_DIM": head_dim,
        "BLOCK": tile.rows, "OTHER": tile.keys, "CHUNK": 64,
    }  # fmt: skip
    described = set(IN_LOOP[kernel.__name__].split()) if tile.tma else set()
    block = tile.rows if kernel is dkdv_kernel else tile.keys
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in constants or re.fullmatch(r"s_.d", name):
            # A last stride of 1 is a constant to Triton's launcher too.
            signature[name], constexprs[name] = "constexpr", constants.get(name, 1)
        elif name.startswith("s_") or name.startswith("num_") or name == "group":
            signature[name] = "i32"
            if name.startswith("s_"):
                attributes[index,] = [["tt.divisibility", 16]]
        elif name == "scale":
            signature[name] = "fp32"
        elif name in described:
            signature[name] = f"tensordesc<{dtype}[1, {block}, 1, {head_dim}]>"
        else:
            signature[name] = "*fp32" if name in FLOAT32 else "*i32" if name in INT32 else f"*{dtype}"
            attributes[index,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; exit status 1 if a variant spills or does not fit its chip."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS, choices=HEAD_DIMS)
    parser.add_argument("--tma", action="store_true", help="sm_90 only, each loop through TMA descriptors")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(arguments)
    usages = []
    for architecture in (90,) if options.tma else options.architectures:
        for head_dim in options.head_dims:
            for name, kernel, tile in variants(architecture, head_dim):
                if options.tma:
                    if name in ("delta", "decode", "blocks"):
                        continue
                    tile = tile._replace(tma=True)
                usages.append(measure(name, kernel, tile, architecture, options.dtype, head_dim))
                if not options.json:
                    print(_line(usages[-1]), flush=True)
    if options.json:
        print(json.dumps([asdict(usage) | {"tile": usage.tile._asdict()} for usage in usages], indent=1))
    return int(any(u.spilled_bytes or u.shared_bytes > SHARED_LIMIT[u.architecture] for u in usages))


def _line(usage: Usage) -> str:
    tile = usage.tile
    return (
        f"sm_{usage.architecture} {usage.dtype} K={usage.head_dim:<3} {usage.kernel:<8}"
        f"{tile.rows:>4} x {tile.keys:<4}{tile.warps} warps {tile.stages} stages "
        f"{'TMA' if tile.tma else '   '}"
        f"{usage.registers:>4} registers {usage.spilled_bytes:>5} spilled {usage.shared_bytes:>7} shared"
    )


if __name__ == "__main__":
    sys.exit(main())
