"""report.json and report.md: the metrics of every suite of a folder."""

import json
import math
from pathlib import Path
from typing import Any

from megafusion.errors import UserError
from megafusion.evaluate.suite import Metrics
from megafusion.storage import read_json, write_file

METRICS = "metrics.json"
HIGHER = {
    "exact_match",
    "cider",
    "concept_accuracy",
    "style_accuracy",
    "both_accuracy",
    "psnr",
    "psnr_of_mean",
    "clip_score",
    "geneval",
}
LOWER = {"perplexity", "nats_per_token", "bits_per_token", "nats_per_byte", "bits_per_byte", "l1"}
LOWER |= {"fid", "kid", "judge_frechet_distance"}
"""Metrics by the better direction; the others say what was measured on."""
NOTES = {
    "judge_frechet_distance": "in the judge's features; not FID, and comparable for one judge alone",
    "cider": "0 to 10, by pycocoevalcap",
    "clip_score": "100 x cosine, comparable for one CLIP model alone",
    "geneval": "comparable for one detector alone; all is the mean of the tasks",
}


def check_finite(suite: str, metrics: dict[str, Metrics]) -> None:
    """Raise UserError naming a metric that is NaN or infinite."""
    for group, figures in metrics.items():
        for name, value in figures.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{suite}: {name} of {group} is {value}: the weights or an input hold NaN or Inf, or "
                    "there are too few items; look at the suite's files, and train or evaluate with more"
                )


def write_suite(folder: Path, result: dict[str, Any]) -> None:
    """Write a suite's metrics, with what they depend on, into its folder."""
    write_file(folder / METRICS, json.dumps(result, indent=1, allow_nan=False) + "\n")


def write_report(out: Path, model: dict[str, Any]) -> dict[str, Any]:
    """Write report.json and report.md of the suites whose metrics are in the folder; returns the report."""
    suites = {path.parent.name: read_json(path, "delete it") for path in sorted(out.glob(f"*/{METRICS}"))}
    report = {"model": model, "suites": suites}
    write_file(out / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_file(out / "report.md", markdown(report))
    return report


def markdown(report: dict[str, Any]) -> str:
    """A table for each suite: a line for each metric, a column for each group."""
    model = report["model"]
    flops = model.get("training_flops")
    compute = "" if flops is None else f", trained with {flops:.4g} FLOPs"
    weights = f"Weights {model['weights'][:12]}, {model['parameters']:,} parameters{compute}."
    lines = ["# Evaluation", "", weights]
    for name, result in report["suites"].items():
        groups = result["metrics"]
        rows = list(dict.fromkeys(metric for each in groups.values() for metric in each))
        lines += ["", f"## {name}", "", f"| metric | {' | '.join(groups)} |"]
        lines.append("|---" * (1 + len(groups)) + "|")
        for metric in rows:
            arrow = " ↑" if metric in HIGHER else " ↓" if metric in LOWER else ""
            cells = " | ".join(_cell(figures.get(metric)) for figures in groups.values())
            lines.append(f"| {metric}{arrow} | {cells} |")
        lines += [f"\n{metric}: {note}." for metric, note in NOTES.items() if metric in rows]
        if proof := result.get("judge"):
            lines += ["", "The judge on the real images, by distortion:", ""]
            lines += ["| distortion | share found |", "|---|---|"]
            lines += [f"| {case} | {share:.4f} |" for case, share in proof.items()]
    return "\n".join(lines) + "\n"


def _cell(value: float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
