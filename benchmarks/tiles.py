"""Which tiles are right, and which are fastest? A short list, compiled by many processes, then timed.

    python benchmarks/tiles.py --compile 12          compile the list in 12 processes, into Triton's cache
    python benchmarks/tiles.py --json FILE           check and time it
    python benchmarks/tiles.py --store FILE          write the best of such a FILE into stored_tiles.json

attention.py --tiles measures every candidate and stores the best; this takes a minute. Without a GPU it runs
a tiny list under Triton's interpreter, to test this script.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from attention import describe, directions, FULL, milliseconds, TINY  # noqa: E402, I001
from attention_cases import BACKENDS, Inputs, layout, visible_pairs  # noqa: E402
from attention_tables import write_tiles  # noqa: E402

from interval_attention import prepare, prepared_attention  # noqa: E402
from interval_attention.configs import (  # noqa: E402
    ARCHITECTURES,
    STORED,
    Tile,
    Tiles,
    architecture_of,
    stored_tiles,
    using,
)
from interval_attention.reference import reference_attention  # noqa: E402

PLAN = FULL if ON_GPU else TINY
MAX_ERROR = 1e-2
"""Relative error of bf16 outputs and gradients against float64."""
CASES = ("causal", "interleaved-256", "pairs")
# Rows, keys, warps, stages, TMA; the most promising first.
LISTS: dict[int, dict[str, list[tuple]]] = {
    128: {
        "forward": [
            *((64, 64, 4, 3, True), (128, 64, 8, 3, False), (64, 64, 4, 2, True), (64, 64, 4, 3, False)),
            *((128, 64, 8, 3, True), (64, 32, 4, 3, True)),
        ],
        "dkdv": [
            *((32, 64, 4, 3, True), (32, 128, 8, 3, True), (32, 128, 8, 3, False), (32, 64, 4, 2, True)),
            (32, 64, 4, 4, True),  # (64, 64, 4, 2, True) is faster on long documents, but spills 48 bytes
        ],
        "dq": [
            *((128, 64, 8, 3, True), (64, 64, 4, 2, True), (128, 32, 8, 3, True), (64, 32, 4, 3, True)),
            (64, 64, 4, 3, True),
        ],
    },
    64: {
        "forward": [(64, 64, 4, 3, True), (128, 64, 8, 3, True), (64, 64, 4, 3, False)],
        "dkdv": [(64, 64, 4, 3, True), (64, 64, 4, 2, True), (32, 64, 4, 3, True)],
        "dq": [(64, 64, 4, 3, True), (64, 64, 4, 2, True), (64, 64, 4, 3, False)],
    },
}
if not ON_GPU:
    LISTS = {16: {"forward": [(32, 16, 1, 1)], "dkdv": [(16, 32, 1, 1)], "dq": [(32, 16, 1, 1)]}}


def stored(head_dim: int) -> Tiles:
    return stored_tiles(torch.device(PLAN.device), head_dim, PLAN.dtype, PLAN.seqs[0])


def inputs_of(name: str, head_dim: int) -> Inputs:
    seq = PLAN.seqs[0]
    batch, heads = max(1, PLAN.positions // seq), PLAN.width // head_dim
    return Inputs.random(layout(name, seq, PLAN.shrink), batch, heads, head_dim, PLAN.device, PLAN.dtype)


def error_of(head_dim: int) -> float:
    """Largest relative error of o, dq, dk and dv against float64, at a length that no tile divides."""
    seq = 1000 if ON_GPU else 90
    bounds = [x.to(PLAN.device).repeat(2, 1) for x in layout("interleaved-256", seq, 4 if ON_GPU else 16)]
    shapes = [(2, seq, heads, head_dim) for heads in (4, 2, 2, 4)]  # grouped queries
    q, k, v, do = (torch.randn(shape, device=PLAN.device).to(PLAN.dtype) for shape in shapes)

    def run(attend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        o = attend(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, do.to(dtype))]

    ours = run(partial(prepared_attention, prepared=prepare(*bounds)), PLAN.dtype)
    exact = run(lambda *qkv: reference_attention(*qkv, *bounds)[0], torch.float64)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))


def jobs() -> list[tuple[int, str, Tile]]:
    return [
        (dim, name, Tile(*x)) for dim, kernels in LISTS.items() for name in kernels for x in kernels[name]
    ]


def compile_some(number: int, num_processes: int) -> None:
    """Run every num_processes-th tile once."""
    for head_dim, kernel, tile in jobs()[number::num_processes]:
        with using(stored(head_dim)._replace(**{kernel: tile})):
            try:
                inputs = inputs_of("pairs", head_dim)
                call, before = directions(BACKENDS["interval"](inputs), inputs)["both"]
                call(*before())
            except Exception as error:  # the timing run names it again
                print(f"K={head_dim} {kernel} {tuple(tile)}: {type(error).__name__}", file=sys.stderr)


def measure(head_dim: int, kernel: str, tile: Tile, best: Tiles) -> dict:
    """Error and milliseconds of one tile, the other kernels' as they are best so far."""
    row: dict = {"head_dim": head_dim, "kernel": kernel, "tile": list(tile)}
    direction = "forward" if kernel == "forward" else "backward"
    with using(best._replace(**{kernel: tile})):
        try:
            row["error"] = error_of(head_dim)
            for name in CASES:
                inputs = inputs_of(name, head_dim)
                call, before = directions(BACKENDS["interval"](inputs), inputs)[direction]
                times = sorted(milliseconds(call, PLAN.device, before) for _ in range(PLAN.rounds + 2))
                ms = times[len(times) // 2]
                pairs = visible_pairs(inputs.row_end, inputs.last_query) * inputs.q.shape[2]
                flops = (4 if kernel == "forward" else 10) * head_dim * pairs
                row[name] = {"milliseconds": ms, "tflops_visible": flops / ms / 1e9}
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return row


def store(report: dict, path: Path = STORED) -> None:
    """Write a report's best tiles into the table, for all numbers of rows, with where they were measured."""
    if not report["gpu_measurement"]:
        raise SystemExit(f"measured on {report['device']}: tiles must be measured on a GPU")
    where = {name: report[name] for name in ("device", "gpu_measurement", "versions", "dtype", "date")}
    architecture = {"architecture": report["architecture"]}
    where |= architecture | {"head_dims": [int(head_dim) for head_dim in report["best"]]}
    entries = [
        architecture | {"head_dim": int(head_dim), "min_rows": 0} | best
        for head_dim, best in report["best"].items()
    ]
    write_tiles(entries, where, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", type=int, metavar="PROCESSES")
    parser.add_argument("--compile-part", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="written anew after every tile")
    parser.add_argument("--store", type=Path, metavar="FILE", help="a file that --json wrote on a GPU")
    options = parser.parse_args()
    if options.store:
        return store(json.loads(options.store.read_text()))
    if options.compile_part:
        return compile_some(*options.compile_part)
    if options.compile:
        parts = [[str(i), str(options.compile)] for i in range(options.compile)]
        started = [subprocess.Popen([sys.executable, __file__, "--compile-part", *part]) for part in parts]
        sys.exit(max(process.wait() for process in started))
    architecture = architecture_of(torch.device(PLAN.device)) if ON_GPU else ARCHITECTURES[-1]
    report: dict = describe(PLAN) | {"architecture": architecture, "rows": [], "best": {}}
    for head_dim, kernels in LISTS.items():
        best = stored(head_dim)
        for kernel, tiles in kernels.items():
            times = {}
            for tile in (Tile(*each) for each in tiles):
                row = measure(head_dim, kernel, tile, best)
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
                if "failed" not in row and row["error"] < MAX_ERROR:
                    times[tile] = row["interleaved-256"]["milliseconds"] + row["pairs"]["milliseconds"]
                if options.json:
                    options.json.write_text(json.dumps(report, indent=1) + "\n")
            if times:
                best = best._replace(**{kernel: min(times, key=times.__getitem__)})
            report["best"][head_dim] = {name: list(tile) for name, tile in best._asdict().items()}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["best"]))
    return None


if __name__ == "__main__":
    main()
