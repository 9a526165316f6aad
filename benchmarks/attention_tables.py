"""The tables that benchmarks/attention.py writes: tiles of the kernels, and the choices of `auto`."""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from attention_cases import BACKENDS, Inputs, layout
from triton.runtime.errors import OutOfResources

from interval_attention.configs import (
    ARCHITECTURES,
    STORED,
    Tile,
    Tiles,
    architecture_of,
    stored_tiles,
    using,
)
from megafusion.model.attention.auto import CHOICES

LAYOUT = "interleaved-256"
# The direction that times each kernel; decode and delta keep their tiles, which hardly matter.
TUNED = {"forward": "forward", "dkdv": "backward", "dq": "backward"}
SIZES = {
    "forward": [(128, 64), (128, 128), (64, 64), (64, 128)],
    "dkdv": [(32, 128), (64, 128), (64, 64), (32, 64)],
    "dq": [(128, 32), (128, 64), (128, 128), (64, 64), (64, 128)],
}


def candidates(kernel: str, present: Tile, architecture: int, tiny: bool) -> Iterator[Tile]:
    """The current tile, then others; on sm_90 each with pointers and with TMA descriptors."""
    yield present
    if tiny:
        yield present._replace(tma=True)
        return
    for rows, keys in SIZES[kernel]:
        for warps in (4, 8):
            for stages in (2, 3):
                for tma in (False, True) if architecture >= 90 else (False,):
                    if (tile := Tile(rows, keys, warps, stages, tma)) != present:
                        yield tile


def measure_tiles(plan, where: dict, path: Path | None, directions: Callable, timer: Callable) -> None:
    """Time the candidates of one kernel after the other, and store the fastest by number of rows."""
    architecture = ARCHITECTURES[-1] if plan.device == "cpu" else architecture_of(torch.device(plan.device))
    entries = []
    for head_dim in plan.head_dims:
        for index, seq in enumerate(plan.seqs):
            batch, heads = max(1, plan.positions // seq), plan.width // head_dim
            bounds = layout(LAYOUT, seq, plan.shrink)
            inputs = Inputs.random(bounds, batch, heads, head_dim, plan.device, plan.dtype)
            calls = directions(BACKENDS["interval"](inputs), inputs)
            best = stored_tiles(inputs.q.device, head_dim, plan.dtype, seq)
            for kernel, direction in TUNED.items():
                times = {}
                for tile in candidates(kernel, getattr(best, kernel), architecture, plan.device == "cpu"):
                    spent = _time(best._replace(**{kernel: tile}), *calls[direction], plan, timer)
                    if spent is not None:
                        times[tile] = spent
                    print(
                        f"K={head_dim} S={seq} {kernel} {tuple(tile)}: {spent} ms",
                        file=sys.stderr,
                        flush=True,
                    )
                best = best._replace(**{kernel: min(times, key=times.get)})
            min_rows = seq if index else 0
            entries.append({"architecture": architecture, "head_dim": head_dim, "min_rows": min_rows})
            entries[-1] |= {name: list(tile) for name, tile in best._asdict().items()}
    write_tiles(entries, where | {"architecture": architecture}, path or STORED)


def _time(tiles: Tiles, call: Callable, before: Callable, plan, timer: Callable) -> float | None:
    """Median milliseconds; None for tiles that do not fit the chip."""
    with using(tiles):
        try:
            timer(call, plan.device, before)
        except OutOfResources:
            return None
        return statistics.median(timer(call, plan.device, before) for _ in range(plan.rounds))


def write_tiles(entries: list[dict], where: dict, path: Path) -> None:
    """Replace the entries of the same architecture and head_dim; keep all others."""
    stored = json.loads(STORED.read_text())
    replaced = {(e["architecture"], e["head_dim"]) for e in entries}
    kept = [e for e in stored["tiles"] if (e["architecture"], e["head_dim"]) not in replaced]
    lines = (f"  {json.dumps(e)}" for e in sorted(kept + entries, key=_order))
    head = {"note": stored["note"], "measured": [*_others(stored, where), where]}
    text = json.dumps(head, indent=1).removesuffix("\n}")
    path.write_text(text + ',\n "tiles": [\n' + ",\n".join(lines) + "\n ]\n}\n")


def write_choices(report: dict, path: Path = CHOICES) -> None:
    """Store which backends were fastest by architecture, head_dim and minimum number of rows.

    By forward plus backward time, summed over the mixed layouts, all of which a backend must support.
    """
    if not report["gpu_measurement"]:
        raise ValueError("choices must be measured on a GPU")
    major, minor = torch.cuda.get_device_capability()
    where = {name: report[name] for name in ("device", "versions", "date")}
    where["architecture"] = 10 * major + minor
    stored = json.loads(path.read_text())
    choices = [c for c in stored["choices"] if c["architecture"] != where["architecture"]]
    choices += chosen(report["rows"], where["architecture"])
    table = {"note": stored["note"], "measured": [*_others(stored, where), where], "choices": choices}
    path.write_text(json.dumps(table, indent=1) + "\n")


def chosen(rows: list[dict], architecture: int) -> list[dict]:
    """Entries of the table for one architecture."""
    mixed = [r for r in rows if r["direction"] == "both" and r["layout"] != "causal"]
    choices = []
    for head_dim in sorted({r["head_dim"] for r in mixed}):
        cases = [r for r in mixed if r["head_dim"] == head_dim]
        layouts = {r["layout"] for r in cases}
        seqs = [
            s
            for s in sorted({r["seq"] for r in cases})
            if {r["layout"] for r in cases if r["seq"] == s} == layouts
        ]
        for index, seq in enumerate(seqs):
            spent: dict[str, list[float]] = {}
            for row in cases:
                if row["seq"] == seq and row["backend"] in ("interval", "flash", "flex"):
                    spent.setdefault(row["backend"], []).append(row["milliseconds"])
            whole = {backend: sum(ms) for backend, ms in spent.items() if len(ms) == len(layouts)}
            entry = {"architecture": architecture, "head_dim": head_dim, "min_rows": seq if index else 0}
            choices.append(entry | {"backends": sorted(whole, key=whole.get)})
    return choices


def _others(stored: dict, where: dict) -> list[dict]:
    return [record for record in stored["measured"] if record["architecture"] != where["architecture"]]


def _order(entry: dict) -> tuple[int, int, int]:
    return entry["architecture"], entry["head_dim"], entry["min_rows"]
