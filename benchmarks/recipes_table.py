"""The table of docs/recipe.md: what each choice gives against the plain recipe, and what it costs.

    python benchmarks/recipes_table.py [--write]

Of benchmarks/results/recipes/: concepts-64.json is runs/recipes/concepts-64/sweep.json, and recipes.py writes
cost.json. Figures are means over seeds, each with its difference to the plain recipe's, paired by seed, and
the half width of that difference's 95 % interval (Student's t), in bold where 0 is outside of it.
"""

import argparse
from pathlib import Path
from statistics import fmean

from claims_list import CAPTIONS, HELD_OUT, SEEN
from claims_rows import Measured, Row, Side, load_runs, measure
from pages import DOCS, write_table

from megafusion.errors import exit_on_user_error
from megafusion.storage import read_json

RESULTS = Path(__file__).parent / "results" / "recipes"
COMMAND = "python benchmarks/recipes_table.py --write"
FIGURES = (SEEN, HELD_OUT, *CAPTIONS[:2])
PLAIN = "plain"


def table(results: Path = RESULTS) -> str:
    """Markdown rows of the arms that are measured, the plain one first."""
    runs = load_runs("concepts-64", results)
    path = results / "cost.json"
    costs = read_json(path, "recipes.py --json writes it")["arms"] if path.is_file() else {}
    head = ["choice", "seeds", *(name for name, *_ in FIGURES), "time of a step", "memory"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in dict.fromkeys(run["arm"] for run in runs.values()):
        rows = [Row(name, Side(arm, arm, key), Side(PLAIN, PLAIN, key), sign) for name, key, sign in FIGURES]
        found = [measure(row, runs) for row in rows]
        cost = costs.get(arm, {})
        ends = [f"{cost[key]:.2f}" if cost else "" for key in ("over_first", "peak_bytes_over_first")]
        cells = [_cell(each, arm) if each else "" for each in found]
        seeds = str(max(len(each.pairs) if each else 0 for each in found))
        lines.append(f"| {' | '.join([arm, seeds, *cells, *ends])} |")
    return "\n".join(lines) + "\n"


def _cell(found: Measured, arm: str) -> str:
    """A mean; of another arm than the plain one with its difference, and the interval's half width."""
    mean = f"{fmean(first for _, first, _ in found.pairs):.2f}"
    if arm == PLAIN:
        return mean
    difference = fmean(found.differences)
    shown = f"{difference:+.2f}" + ("" if found.interval is None else f" ± {found.interval:.2f}")
    is_outside = found.interval is not None and abs(difference) > found.interval
    return f"{mean} (**{shown}**)" if is_outside else f"{mean} ({shown})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/recipe.md; printed by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = table(arguments.results)
    if arguments.write:
        write_table(DOCS / "recipe.md", COMMAND, rows)
    else:
        print(rows, end="")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
