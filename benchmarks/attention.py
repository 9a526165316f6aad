"""Measure the speed and accuracy of each attention backend under the mask of packed text and images.

    python benchmarks/attention.py [--json [FILE]] [--plot FILE] [--write-choices]
    python benchmarks/attention.py --tiles           measure candidate tiles and store the best
    python benchmarks/attention.py --tiny ...        on a CPU: tests this script, measures nothing

Needs a GPU, except with --tiny. Times are medians of CUDA events around one warm call; backends alternate.
TFLOP/s count 4 x head_dim operations per pair and head forward, and 10 backward, once for the visible pairs
and once for the pairs in the tiles that a backend computes.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# The interpreter must be chosen before the kernels are imported.
if not torch.cuda.is_available():
    import os

    os.environ["TRITON_INTERPRET"] = "1"

from attention_cases import (
    BACKENDS,
    LAYOUTS,
    Inputs,
    NotServed,
    compiled,
    computed_pairs,
    layout,
    make_block_mask,
    sees_of,
    visible_pairs,
)
from attention_report import draw, print_table, summarize
from attention_tables import measure_tiles, write_choices
from torch.nn.attention.flex_attention import create_block_mask

from interval_attention import prepare
from interval_attention.flash import flash_package, flash_prepare
from interval_attention.reference import reference_attention

DIRECTIONS = {"forward": 4, "backward": 10, "both": 14}
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Plan:
    """The sizes to measure: a call has width / head_dim heads and positions / seq rows."""

    device: str
    dtype: torch.dtype
    seqs: tuple[int, ...]
    head_dims: tuple[int, ...]
    long_seqs: tuple[int, ...]
    prepare_size: tuple[int, int]
    exact_seq: int
    width: int = 2048
    positions: int = 32_768
    rounds: int = 20
    shrink: int = 1
    layouts: tuple[str, ...] = LAYOUTS
    backends: tuple[str, ...] = tuple(BACKENDS)


FULL = Plan("cuda", torch.bfloat16, (4096, 8192, 32_768), (64, 128), (65_536, 131_072), (8, 8192), 2048)
TINY = Plan("cpu", torch.float32, (48,), (16,), (64,), (2, 128), 40, 16, 64, 1, 16)


def milliseconds(call: Callable, device: str, before: Callable = lambda: ()) -> float:
    """Time of one call on the device, with the results of an untimed `before` as arguments."""
    inputs = before()
    if device == "cpu":
        begin = time.perf_counter()
        call(*inputs)
        return 1e3 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(
        1_000_000
    )  # half a millisecond in which the host gets ahead: its launches are not timed
    begin.record()
    call(*inputs)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_bytes(call: Callable, device: str) -> int:
    """Peak memory of a call beyond what was allocated before; 0 on a CPU, where it is not counted."""
    call()  # exclude the memory of compiling
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def directions(attend: Callable, inputs: Inputs) -> dict[str, tuple[Callable, Callable]]:
    """For each direction the timed call, and the untimed call before it."""
    qkv = (inputs.q, inputs.k, inputs.v)
    detached = [x.detach() for x in qkv]

    def forward():
        return attend(*detached)

    def backward(o):
        return torch.autograd.grad(o, qkv, inputs.do)

    return {
        "forward": (forward, lambda: ()),
        "backward": (backward, lambda: (attend(*qkv),)),
        "both": (lambda: backward(attend(*qkv)), lambda: ()),
    }


def reason_of(error: Exception) -> str:
    """The reason in one line why a case was not measured."""
    if isinstance(error, NotServed):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def measure_case(
    plan: Plan, name: str, seq: int, head_dim: int, backends: Iterable[str]
) -> tuple[list, list]:
    """Rows of every backend and direction, and the skipped ones with their reasons."""
    batch, heads = max(1, plan.positions // seq), plan.width // head_dim
    inputs = Inputs.random(layout(name, seq, plan.shrink), batch, heads, head_dim, plan.device, plan.dtype)
    case = {"layout": name, "seq": seq, "head_dim": head_dim}
    calls, peaks, skipped = {}, {}, []
    for backend in backends:
        try:
            attend = BACKENDS[backend](inputs)
        except Exception as error:  # other packages may raise anything; continue with the next
            skipped.append(case | {"backend": backend, "reason": reason_of(error)})
            continue
        for direction, (call, before) in directions(attend, inputs).items():
            try:
                peaks[backend, direction] = peak_bytes(lambda c=call, b=before: c(*b()), plan.device)
                calls[backend, direction] = call, before
            except Exception as error:
                reason = reason_of(error)
                skipped.append(case | {"backend": backend, "direction": direction, "reason": reason})
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for number in range(plan.rounds + 2):  # two for warm-up
        for key, (call, before) in calls.items():
            spent = milliseconds(call, plan.device, before)
            if number >= 2 or plan.rounds == 1:
                times[key].append(spent)
    visible = visible_pairs(inputs.row_end, inputs.last_query)
    rows = []
    for (backend, direction), spent in times.items():
        ms = statistics.median(spent)
        flops = DIRECTIONS[direction] * head_dim * heads / (ms * 1e9)  # tera, per pair
        rows.append(
            case
            | {
                "direction": direction,
                "backend": backend,
                "tflops_visible": flops * visible,
                "tflops_tiles": flops * computed_pairs(backend, inputs, direction),
                "milliseconds": ms,
                "peak_bytes": peaks[backend, direction],
                "batch": batch,
                "heads": heads,
                "visible_pairs": visible,
            }
        )
    return rows, skipped


def measure_prepare(plan: Plan) -> list[dict]:
    """Time and memory of preparing the mask for each backend, once a batch."""
    batch, seq = plan.prepare_size
    mask = tuple(x.to(plan.device).repeat(batch, 1) for x in layout("interleaved-256", seq, plan.shrink))
    sees = sees_of(*mask)
    ways = {
        "interval": lambda: prepare(*mask),
        "create_block_mask": partial(make_block_mask, sees, mask[0]),
        "create_block_mask compiled": partial(make_block_mask, sees, mask[0], compiled(create_block_mask)),
    }
    try:
        package = flash_package(mask[0].device)
        ways["flash"] = lambda: flash_prepare(*mask, seq, package)
    except ValueError:
        if plan.device == "cpu":  # the lists can be made on a CPU, where no kernel reads them
            ways["flash"] = lambda: flash_prepare(*mask, seq, "flash-attn-4")
    rows = []
    for way, call in ways.items():
        peak = peak_bytes(call, plan.device)
        spent = [milliseconds(call, plan.device) for _ in range(plan.rounds)]
        rows.append({"what": way, "batch": batch, "seq": seq, "milliseconds": statistics.median(spent)})
        rows[-1]["peak_bytes"] = peak
    return rows


def measure_errors(plan: Plan) -> list[dict]:
    """Largest error of output and gradients against dense attention in float64, and its ratio to SDPA's."""
    bounds = layout("interleaved-256", plan.exact_seq, plan.shrink)
    rows = []
    for head_dim in plan.head_dims:
        inputs = Inputs.random(bounds, 1, 2, head_dim, plan.device, plan.dtype)

        def found(attend, dtype, inputs=inputs):
            qkv = [x.detach().to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
            o = attend(*qkv)
            return {
                "o": o,
                **dict(
                    zip(("dq", "dk", "dv"), torch.autograd.grad(o, qkv, inputs.do.to(dtype)), strict=True)
                ),
            }

        exact = found(
            lambda q, k, v, i=inputs: reference_attention(q, k, v, i.row_end, i.last_query)[0], torch.float64
        )
        errors = {}
        for backend in [name for name in ("sdpa", "interval", "flash", "flex") if name in plan.backends]:
            try:
                results = found(BACKENDS[backend](inputs), plan.dtype)
            except Exception as error:
                print(f"no accuracy of {backend}: {reason_of(error)}", file=sys.stderr)
                continue
            errors[backend] = {n: float((results[n].double() - exact[n]).abs().max().detach()) for n in exact}
            for name, error in errors[backend].items():
                row = {"backend": backend, "head_dim": head_dim, "tensor": name, "error": error}
                rows.append(row | {"ratio_to_sdpa": error / errors["sdpa"][name]})
    return rows


def describe(plan: Plan) -> dict:
    """The device, versions and date of a measurement."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "flash-attn-4", "flash-attn", "nvidia-cutlass-dsl"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    device = "CPU (not a GPU measurement)" if plan.device == "cpu" else torch.cuda.get_device_name()
    return {
        "device": device,
        "gpu_measurement": plan.device != "cpu",
        "versions": versions | {"cuda": torch.version.cuda},
        "dtype": str(plan.dtype),
        "date": time.strftime("%Y-%m-%d"),
    }


def measure(plan: Plan, save: Callable[[dict], object] = lambda report: None) -> dict:
    """The whole report, saved after each part."""
    report: dict = describe(plan) | {"rows": [], "skipped": []}
    cases = [(name, seq, dim) for name in plan.layouts for seq in plan.seqs for dim in plan.head_dims]
    whole = [(*case, plan.backends) for case in cases]
    long = [("interleaved-256", seq, plan.head_dims[-1], ("interval", "flash")) for seq in plan.long_seqs]
    for name, seq, head_dim, backends in whole + long:
        print(f"{name}, {seq} positions, head_dim {head_dim}", file=sys.stderr, flush=True)
        rows, skipped = measure_case(plan, name, seq, head_dim, backends)
        report["rows"] += rows
        report["skipped"] += skipped
        save(report)
    report["prepare"] = measure_prepare(plan)
    save(report)
    report["accuracy"] = measure_errors(plan) if "sdpa" in plan.backends else []
    seqs = [seq for seq in plan.seqs if seq >= 8192] or plan.seqs
    report["summary"] = summarize(report, seqs, plan.head_dims[-1])
    save(report)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a bar chart of TFLOP/s")
    parser.add_argument("--write-choices", action="store_true", help="store the choices of `attention: auto`")
    parser.add_argument("--tiles", action="store_true", help="measure tiles and store the best, and stop")
    parser.add_argument("--tiles-file", type=Path, metavar="FILE", help="where --tiles stores them")
    parser.add_argument("--seqs", type=int, nargs="+", metavar="S", help="only these lengths")
    parser.add_argument("--head-dims", type=int, nargs="+", metavar="K", help="only these values of head_dim")
    parser.add_argument("--layouts", choices=LAYOUTS, nargs="+", help="only these layouts")
    parser.add_argument("--backends", choices=BACKENDS, nargs="+", help="only these; accuracy needs sdpa")
    parser.add_argument("--rounds", type=int, help="rounds that are timed; 1 is for filling caches")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to test this script")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device, and times of anything else would mislead; --tiny tests the script")
    outputs = [Path(x) for x in (options.json, options.plot) if x not in (None, "-")]
    if options.tiny and (options.write_choices or any(RESULTS in x.resolve().parents for x in outputs)):
        parser.error("--tiny is not a measurement: it writes no choices and nothing to benchmarks/results")
    if options.tiny and options.tiles and options.tiles_file is None:
        parser.error("--tiny --tiles is not a measurement: name a --tiles-file of your own")
    plan = TINY if options.tiny else FULL
    chosen = {name: vars(options)[name] for name in ("seqs", "head_dims", "layouts", "backends")}
    plan = replace(plan, **{name: tuple(part) for name, part in chosen.items() if part})
    long_seqs = tuple(seq for seq in plan.long_seqs if seq in (options.seqs or plan.long_seqs))
    plan = replace(plan, rounds=options.rounds or plan.rounds, long_seqs=long_seqs)
    if options.tiles:
        measure_tiles(plan, describe(plan), options.tiles_file, directions, milliseconds)
        return 0
    path = Path(options.json) if options.json not in (None, "-") else None
    report = measure(plan, lambda report: path and path.write_text(json.dumps(report, indent=1) + "\n"))
    print_table(report)
    if options.plot:
        draw(report, options.plot)
    if options.write_choices:
        write_choices(report)
    if options.json == "-":
        print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
