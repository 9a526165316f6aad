"""Compile every stored variant for a GPU, without needing one, and print the resources that each uses.

python -m tests.kernels.compile_check [--architectures 80 90] [--head-dims 64 128] [--tma | --no-tma]
    [--holes] [--json]

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

from interval_attention.backward import dkdv_kernel, dq_kernel, statistics_kernel
from interval_attention.configs import ARCHITECTURES, HEAD_DIMS, Tile, read_stored
from interval_attention.forward import forward_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Maximum shared memory of a program in bytes; for 80 that of 8.6, 8.9 and 12.x, which also use its tiles.
SHARED_LIMIT = {80: 101_376, 90: 232_448}
KERNELS = {
    "forward": forward_kernel,
    "decode": forward_kernel,
    "delta": statistics_kernel,
    "dkdv": dkdv_kernel,
    "dq": dq_kernel,
}
# The tensors that each kernel's loop loads, through descriptors if its tile says so.
IN_LOOP = {"forward_kernel": "k v", "dkdv_kernel": "q do statistics", "dq_kernel": "k v"}
_INT32 = "row_start row_end holes first_query last_query schedule"
TYPES = dict.fromkeys(_INT32.split(), "i32") | {"lse": "fp32", "dlse": "fp32", "statistics": "i64"}


@dataclass(frozen=True)
class Usage:
    """Resources of one compiled variant: registers and spilled bytes per thread, shared bytes per program.

    Of its loop, in machine instructions of a warp: a step between the edges, what a step over both edges
    adds, tensor-core products, conversions and reciprocals that emulate an integer division; and how many
    steps ahead of the products the copies run. Zeros for kernels without products in a loop.
    """

    kernel: str
    architecture: int
    dtype: str
    head_dim: int
    tile: Tile
    registers: int
    spilled_bytes: int
    shared_bytes: int
    step: int
    edges: int
    products: int
    divisions: int
    steps_ahead: int


def variants(architecture: int, head_dim: int) -> Iterator[tuple[str, triton.JITFunction, Tile]]:
    """The kernels of one architecture and head_dim with each of their stored tiles."""
    for name, kernel in KERNELS.items():
        stored = read_stored()[architecture, head_dim].values()
        for tile in dict.fromkeys(getattr(tiles, name) for tiles in stored):
            yield name, kernel, tile


def measure(
    name: str,
    kernel: triton.JITFunction,
    tile: Tile,
    architecture: int,
    dtype: str,
    head_dim: int,
    holes: bool = False,
) -> Usage:
    """Compile one variant as a launch with aligned, contiguous tensors would."""
    source = _source(kernel, tile, dtype, head_dim, architecture >= 90, holes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text, sass = (
            subprocess.run([CUOBJDUMP, option, cubin.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    # Local memory of a thread: STACK includes spills, LOCAL is what the source asked for.
    registers, stack, local = (int(re.findall(rf"{key}:(\d+)", text)[0]) for key in ("REG", "STACK", "LOCAL"))
    return Usage(
        name, architecture, dtype, head_dim, tile, registers, stack + local, compiled.metadata.shared,
        *loop_of(sass), steps_ahead(compiled.asm["ttgir"]),
    )  # fmt: skip


def loop_of(sass: str) -> tuple[int, int, int, int]:
    """(step, edges, products, divisions) of the loop with the most tensor-core products, as in `Usage`."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    jumps = [(at, int(to[1], 16)) for at, text in code if (to := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text))]

    def count(pattern: str, first: int, last: int) -> int:
        return sum(first <= at <= last and bool(re.search(pattern, text)) for at, text in code)

    loops = [(count("HGMMA|HMMA", to, at), to - at, to, at) for at, to in jumps if to < at]
    products, _, first, last = max(loops, default=(0, 0, 0, 0))
    if not products:
        return 0, 0, 0, 0
    # The branches of `mask_scores`: over many comparisons, which a step between the edges jumps.
    skipped = [(at + 1, to - 1) for at, to in jumps if first <= at < to <= last]
    edges = sum(count(".", *block) for block in skipped if count("ISETP", *block) >= 4)
    return count(".", first, last) - edges, edges, products, count("I2F|MUFU.RCP", first, last)


def steps_ahead(ttgir: str) -> int:
    """How many steps' copies are issued before the first loop's first wait; 0 if no loop copies."""
    before, *loops = ttgir.split("scf.for")
    ahead, inside = (part.count("copy_global_to_local") for part in (before, loops[-1] if loops else ""))
    return ahead // inside if inside else 0


def _source(
    kernel: triton.JITFunction, tile: Tile, dtype: str, head_dim: int, branch: bool, holes: bool
) -> ASTSource:
    constants = {
        "TMA": tile.tma, "BRANCH": branch, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "HEAD_DIM": head_dim,
        "HOLES": holes,
    } | ({} if holes else {"holes": None})  # fmt: skip
    types = TYPES | ({"statistics": "fp32"} if kernel is statistics_kernel else {})
    described = set(IN_LOOP[kernel.__name__].split()) if tile.tma else set()
    block = tile.rows if kernel is dkdv_kernel else tile.keys
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in constants or re.fullmatch(r"s_.d", name):
            # A last stride of 1 is a constant to Triton's launcher too.
            signature[name], constexprs[name] = "constexpr", constants.get(name, 1)
        elif name.startswith("s_") or name.startswith("num_") or name in ("group", "section"):
            signature[name] = "i32"
            if name.startswith("s_"):
                attributes[index,] = [["tt.divisibility", 16]]
        elif name == "scale":
            signature[name] = "fp32"
        elif name in described:
            shape = f"{block}" if name == "statistics" else f"1, {block}, 1, {head_dim}"
            signature[name] = f"tensordesc<{types.get(name, dtype)}[{shape}]>"
        else:
            signature[name] = f"*{types.get(name, dtype)}"
            attributes[index,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; exit status 1 if a variant spills or does not fit its chip."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS, choices=HEAD_DIMS)
    parser.add_argument(
        "--tma",
        action=argparse.BooleanOptionalAction,
        help="each loop through TMA descriptors (sm_90 only), or each through pointers; default as stored",
    )
    parser.add_argument("--holes", action="store_true", help="forward and dq of rows that may have a hole")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(arguments)
    usages = []
    for architecture in (90,) if options.tma else options.architectures:
        for head_dim in options.head_dims:
            for name, kernel, tile in variants(architecture, head_dim):
                if options.tma and name in ("delta", "decode"):
                    continue
                if options.holes and name not in ("forward", "dq"):
                    continue
                if options.tma is not None:
                    tile = tile._replace(tma=options.tma)
                case = architecture, options.dtype, head_dim, options.holes
                usages.append(measure(name, kernel, tile, *case))
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
        f"{usage.step:>5} + {usage.edges:<4}instructions a step{usage.products:>4} products"
        f"{usage.divisions:>3} divisions{usage.steps_ahead:>3} steps ahead"
    )


if __name__ == "__main__":
    sys.exit(main())
