"""RUN/metrics.jsonl: a line of figures every few steps."""

import json
from pathlib import Path

from megafusion.errors import UserError
from megafusion.storage import write_file

METRICS = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run, oldest first, without any that a killed process left incomplete."""
    path = folder / METRICS
    if not path.is_file():
        raise UserError(f"{path}: no metrics found; give the folder of a run that has trained")
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def truncate_metrics(folder: Path, step: int) -> None:
    """Remove the lines after a step: these steps are about to be run again."""
    if (folder / METRICS).is_file():
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        write_file(folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
