"""The small claims: their table and plots, two arms of a sweep, and guidance tuned for an arm.

    python benchmarks/claims.py table --write       # in docs/results.md and docs/claims.md
    python benchmarks/claims.py plot                # docs/claims-*.png, of the same files
    python benchmarks/claims.py compare runs/claims/concepts-64/sweep.json transfusion quantized
    python benchmarks/claims.py guidance "runs/claims/concepts-64/transfusion,seed=0" \
        --annotations data/styles-64/fold-0/captions.json --scales 1 2 3 5

Differences are paired by seed: the same held-out combinations, order of data and noise. docs/claims.md says
how the runs are made.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev

from claims_list import CLAIMS
from claims_rows import RESULTS, main_claims, of_arm, read_runs, table
from pages import DOCS, write_table

from megafusion.errors import UserError, exit_on_user_error
from megafusion.evaluate.annotations import spread
from megafusion.evaluate.config import EvaluateConfig
from megafusion.evaluate.run import evaluate
from megafusion.storage import read_json, write_file

CLAIMED = re.compile(
    r"images/.*/(closed_)?(both|concept|style)_accuracy|images/.*/nearest_seen_.*|captions/.*/(exact_match|cider)"
    r"|perplexity/.*/bits_per_byte|validation_.*"
)
"""Figures of a run that a claim is about."""
COMMAND = "python benchmarks/claims.py table --write"
PAGES = {"results.md": main_claims(CLAIMS), "claims.md": CLAIMS}
"""By page, the claims of its table."""
NUM_EVALUATED, NUM_TUNED = 102, 128
"""Seen captions that a run is evaluated on, and others that guidance is tuned on."""


def compare(runs: dict[str, dict], first: str, second: str) -> dict[str, dict]:
    """By figure: mean of both arms, and mean and standard deviation of their difference, paired by seed.

    runs: those of a sweep.json. Losses of validation are left out where one arm predicts codes, because they
    are among its text targets.
    """
    arms = {arm: of_arm(runs, arm) for arm in (first, second)}
    seeds = sorted(arms[first].keys() & arms[second].keys(), key=int)
    if not seeds:
        raise UserError(f"no seed has finished runs of both {first} and {second}")
    found = {}
    every = [arms[arm][seed] for arm in arms for seed in seeds]
    names = [name for name in every[0] if CLAIMED.fullmatch(name) and all(name in each for each in every)]
    if any("validation_image_loss" not in figures for figures in every):
        names = [name for name in names if not name.startswith("validation_")]
    for name in names:
        pairs = [(arms[first][seed][name], arms[second][seed][name]) for seed in seeds]
        differences = [a - b for a, b in pairs]
        found[name] = {
            first: fmean(a for a, _ in pairs),
            second: fmean(b for _, b in pairs),
            "difference": fmean(differences),
            "std": stdev(differences) if len(seeds) > 1 else math.nan,
            "seeds": len(seeds),
        }
    return found


def check_signs(found: dict[str, dict], wanted: dict[str, int]) -> list[str]:
    """Figures whose difference does not have the wanted sign, 1 or -1, each with what it is."""
    absent = [f"{name}: not measured" for name in wanted if name not in found]
    wrong = [
        f"{name}: {found[name]['difference']:+.4g}, and {'above' if sign > 0 else 'below'} 0 before"
        for name, sign in wanted.items()
        if name in found and found[name]["difference"] * sign <= 0
    ]
    return absent + wrong


def difference_table(found: dict[str, dict]) -> str:
    """A Markdown table of a comparison."""
    first, second = list(next(iter(found.values())))[:2]
    lines = [f"| figure | {first} | {second} | difference | seeds |", "|---|---|---|---|---|"]
    for name, row in found.items():
        spread_of = "" if math.isnan(row["std"]) else f" ± {row['std']:.2g}"
        means = f"{row[first]:.4g} | {row[second]:.4g}"
        lines.append(f"| {name} | {means} | {row['difference']:+.4g}{spread_of} | {row['seeds']} |")
    return "\n".join(lines)


def tune_guidance(run: Path, scales: list[float], annotations: Path, judge: Path) -> dict[str, dict]:
    """Accuracies at each guidance scale, on seen captions that an evaluation of NUM_EVALUATED leaves out."""
    content = read_json(annotations, "make it again")
    seen = [image for image in content["images"] if image["group"] == "seen"]
    taken = {image["id"] for image in spread(seen, NUM_EVALUATED)}
    chosen = spread([image for image in seen if image["id"] not in taken], NUM_TUNED)
    if not chosen:
        raise UserError(f"{annotations}: the {len(seen)} seen captions are all evaluated; give a larger file")
    kept = {image["id"] for image in chosen}
    captions = [each for each in content["annotations"] if each["image_id"] in kept]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        subset = Path(folder) / "captions.json"
        write_file(subset, json.dumps({"images": chosen, "annotations": captions}))
        values = {"annotations": subset, "image_folder": annotations.parent, "judge": judge, "batch_size": 32}
        for scale in scales:
            config = EvaluateConfig(**values, sampling={"guidance_scale": scale})
            report = evaluate(run, ["images"], config, Path(folder) / f"{scale}")
            assert report  # of one process
            found[f"{scale}"] = report["suites"]["images"]["metrics"]["seen"]
    return found


def main(arguments: argparse.Namespace) -> int:
    """Run a command; the exit status."""
    if arguments.command == "table":
        for page, claims in PAGES.items():
            rows = table(claims, arguments.results)
            if arguments.write:
                write_table(DOCS / page, COMMAND, rows)
            else:
                print(rows)
        return 0
    if arguments.command == "plot":
        from claims_plot import draw_claims, draw_computes

        arguments.out.mkdir(parents=True, exist_ok=True)
        sheets = draw_claims(CLAIMS, arguments.results, arguments.out)
        print(*sheets, *draw_computes(arguments.results, arguments.out), sep="\n")
        return 0
    if arguments.command == "guidance":
        found = tune_guidance(arguments.run, arguments.scales, arguments.annotations, arguments.judge)
        print(json.dumps(found, indent=1))
        return 0
    runs = read_runs(arguments.json, "megafusion sweep writes it")
    found = compare(runs, arguments.first, arguments.second)
    print(difference_table(found))
    if not arguments.signs:
        return 0
    signs = read_json(arguments.signs, "restore it")
    if not signs:
        raise UserError(f"{arguments.signs}: names no figure; leave --signs out")
    wrong = check_signs(found, signs)
    print(f"{arguments.signs}: {len(signs)} signs are committed, {len(wrong)} differ", *wrong, sep="\n")
    return min(1, len(wrong))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    of_table, of_plot = commands.add_parser("table"), commands.add_parser("plot")
    for each in (of_table, of_plot):
        each.add_argument("--results", type=Path, default=RESULTS, help="folder of the sweeps' sweep.json")
    of_table.add_argument("--write", action="store_true", help="into docs/; printed by default")
    of_plot.add_argument("--out", type=Path, default=DOCS)
    of_arms = commands.add_parser("compare")
    of_arms.add_argument("json", type=Path, help="sweep.json")
    of_arms.add_argument("first")
    of_arms.add_argument("second")
    of_arms.add_argument("--signs", type=Path, help="JSON of figures and the sign of their difference")
    of_run = commands.add_parser("guidance")
    of_run.add_argument("run", type=Path)
    of_run.add_argument("--annotations", type=Path, required=True, help="that the run is evaluated on")
    of_run.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0, 5.0])
    of_run.add_argument(
        "--judge", type=Path, default=Path("data_prep/emoji/starter_styles/judge.safetensors")
    )
    return parser.parse_args()


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(parse()))
