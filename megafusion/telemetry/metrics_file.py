"""The lines of metrics that a run has written."""

import json
from pathlib import Path

from megafusion.errors import UserError

METRICS = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict]:
    """The recorded lines of a run, oldest first; one that a killed process left unfinished is no line."""
    path = folder / METRICS
    if not path.is_file():
        raise UserError(f"{path}: no metrics there; give the folder of a run that has trained")
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
