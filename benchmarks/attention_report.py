"""The table, the summary and the chart of benchmarks/attention.py."""

import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

CAUSAL = ("sdpa-flash-causal", "sdpa-cudnn-causal")


def summarize(report: dict, seqs: Iterable[int], head_dim: int) -> dict:
    """Ratios of speed, forward and backward together, each the minimum over layouts and lengths; or None.

    vs_flex: `interval` against FlexAttention on mixed layouts; best_vs_flex: the faster of `interval` and
    `flash`; vs_best_causal: `interval` against the best plain causal kernel on causal text;
    best_vs_causal: mixed layouts against that kernel, per visible pair; packed_vs_causal: `interval` on mixed
    layouts against itself on causal text, per computed tile; prepare_vs_...: of `prepare`.
    """
    rows = [r for r in report["rows"] if r["direction"] == "both" and r["head_dim"] == head_dim]
    found = {(r["layout"], r["seq"], r["backend"]): r for r in rows if r["seq"] in seqs}
    mixed = sorted({key[:2] for key in found if key[0] != "causal"})

    def lowest(values: Iterable) -> float | None:
        """None unless all values were measured."""
        listed = list(values)
        return min(listed) if listed and None not in listed else None

    def rate(layout: str, seq: int, backends: Iterable[str], kind: str = "tflops_visible") -> float | None:
        rates = [found[layout, seq, b][kind] for b in backends if (layout, seq, b) in found]
        return max(rates) if rates else None

    def ratio(ours: float | None, theirs: float | None) -> float | None:
        return None if ours is None or theirs is None else ours / theirs

    ours, best = ["interval"], ["interval", "flash"]
    spent = {row["what"]: row["milliseconds"] for row in report["prepare"]}
    return {
        "vs_flex": lowest(ratio(rate(*case, ours), rate(*case, ["flex"])) for case in mixed),
        "best_vs_flex": lowest(ratio(rate(*case, best), rate(*case, ["flex"])) for case in mixed),
        "vs_best_causal": lowest(
            ratio(rate("causal", seq, ours), rate("causal", seq, CAUSAL)) for seq in seqs
        ),
        "best_vs_causal": lowest(ratio(rate(*case, best), rate("causal", case[1], CAUSAL)) for case in mixed),
        "packed_vs_causal": lowest(
            ratio(rate(*case, ours, "tflops_tiles"), rate("causal", case[1], ours, "tflops_tiles"))
            for case in mixed
        ),
        "prepare_vs_create_block_mask": spent["create_block_mask"] / spent["interval"],
        "prepare_vs_compiled": spent["create_block_mask compiled"] / spent["interval"],
    }


def print_table(report: dict) -> None:
    """Print to standard error, because standard output may be JSON."""
    console = Console(stderr=True, width=150)
    table = Table(title=f"{report['device']}, {report['dtype']}, torch {report['versions']['torch']}")
    for name in ("layout", "seq", "head_dim", "direction", "backend"):
        table.add_column(name)
    for name in ("TFLOP/s visible", "TFLOP/s tiles", "ms", "peak MiB"):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        words = (str(row[name]) for name in ("layout", "seq", "head_dim", "direction", "backend"))
        rates = (f"{row[name]:.1f}" for name in ("tflops_visible", "tflops_tiles"))
        table.add_row(*words, *rates, f"{row['milliseconds']:.3f}", f"{row['peak_bytes'] / 2**20:.0f}")
    console.print(table)
    for row in report["prepare"]:
        size = f"batch {row['batch']}, {row['seq']} positions"
        console.print(f"{row['what']}: {row['milliseconds']:.3f} ms, {row['peak_bytes']:,} bytes ({size})")
    for row in report["accuracy"]:
        where = f"{row['backend']} head_dim {row['head_dim']} {row['tensor']}"
        console.print(f"{where}: error {row['error']:.2e}, {row['ratio_to_sdpa']:.2f} of SDPA's")
    for row in report["skipped"]:
        print(f"skipped: {', '.join(map(str, row.values()))}", file=sys.stderr)
    console.print(report["summary"])


def draw(report: dict, path: Path) -> None:
    """Draw bars of TFLOP/s on visible pairs, forward and backward, one panel per layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    head_dim = max(row["head_dim"] for row in report["rows"])
    rows = [r for r in report["rows"] if r["direction"] == "both" and r["head_dim"] == head_dim]
    layouts, backends = (list(dict.fromkeys(r[name] for r in rows)) for name in ("layout", "backend"))
    figure, panels = pyplot.subplots(
        1, len(layouts), figsize=(4 * len(layouts), 4), sharey=True, squeeze=False
    )
    for panel, layout in zip(panels[0], layouts, strict=True):
        seqs = sorted({r["seq"] for r in rows if r["layout"] == layout})
        for index, backend in enumerate(backends):
            mine = [r for r in rows if (r["layout"], r["backend"]) == (layout, backend)]
            at = [seqs.index(r["seq"]) + (index - len(backends) / 2) / (len(backends) + 1) for r in mine]
            heights = [r["tflops_visible"] for r in mine]
            panel.bar(at, heights, 1 / (len(backends) + 1), label=backend, color=f"C{index}")
        panel.set_xticks(range(len(seqs)), [f"{seq:,}" for seq in seqs])
        panel.set_title(layout)
        panel.set_xlabel("positions a row")
    panels[0, 0].set_ylabel("TFLOP/s on visible pairs, forward + backward")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(backends))
    figure.suptitle(f"{report['device']}, head_dim {head_dim}, {report['dtype']}, {report['date']}")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
