"""All faults that a run must survive, injected into real runs: `make test-faults`.

    python -m tests.faults.table [NAME ...]

Prints a table at the end; runs/faults.json has the results so far. Mounts a small tmpfs, so it needs root.
"""

import json
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.faults import cases
from tests.support.cases import chosen_cases
from tests.support.small import make_shards, make_vae

ALL = {
    "kills": partial(cases.kills, number=30),
    "preemptions": partial(cases.preemptions, number=12),
    "full-stop": partial(cases.refusing_disk, kind="full", policy="stop"),
    "full-continue": partial(cases.refusing_disk, kind="full", policy="continue"),
    "full-run-stop": partial(cases.full_run_folder, policy="stop"),
    "full-run-continue": partial(cases.full_run_folder, policy="continue"),
    "read-only-stop": partial(cases.refusing_disk, kind="read-only", policy="stop"),
    "read-only-continue": partial(cases.refusing_disk, kind="read-only", policy="continue"),
    "slow-stop": partial(cases.slow_saves, policy="stop"),
    "slow-continue": partial(cases.slow_saves, policy="continue"),
    "nans": cases.nans,
    "rollback": cases.rollback,
    "stopped-rank": cases.stopped_rank,
    "flipped-bits": partial(cases.flipped_bits, each=4),
    "endurance": partial(cases.endurance, num_steps=20_000),
}


def main(names: list[str]) -> int:
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    bench = cases.Bench(folder, make_shards(folder, make_vae(folder / "vae")), folder / "vae")
    rows = []
    for name in track(names, "faults", console=Console(stderr=True)):
        began = time.monotonic()
        done = ALL[name](bench)
        rows.append({"case": name, "seconds": round(time.monotonic() - began, 1), "done": done})
        _write(rows)
    table = Table(title="Faults that a run survives")
    for column in ("fault", "tried", "survived", "lost", "seconds", "figures"):
        table.add_column(column)
    for row in rows:
        done = row["done"]
        figures = ", ".join(f"{name}: {value}" for name, value in done.figures.items())
        table.add_row(
            done.name, str(done.tried), str(done.survived), str(done.lost), str(row["seconds"]), figures
        )
    Console(width=150).print(table)
    failures = [f"{row['done'].name}: {failure}" for row in rows for failure in row["done"].failures]
    print("\n".join(failures))
    if not failures:
        shutil.rmtree(folder)
    return int(bool(failures))


def _write(rows: list[dict]) -> None:
    fields = ("name", "tried", "survived", "lost", "failures", "figures")
    found = [{**{f: getattr(row["done"], f) for f in fields}, "seconds": row["seconds"]} for row in rows]
    out = Path("runs/faults.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(chosen_cases(__doc__, ALL)))
