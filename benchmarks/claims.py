"""The small claims: figures of a sweep's runs, differences between its arms, and guidance tuned for an arm.

    python benchmarks/claims.py collect runs/claims/a --json benchmarks/results/claims/a.json
    python benchmarks/claims.py compare benchmarks/results/claims/a.json transfusion quantized [--signs FILE]
    python benchmarks/claims.py guidance "runs/claims/a/transfusion,seed=0" --scales 1 2 3 5

A run is RUN/ARM,seed=N. Differences are paired by seed: the same held-out combinations, order of data, noise.
docs/claims.md says how the runs are made.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev

from megafusion.config import load_config
from megafusion.errors import UserError, exit_on_user_error
from megafusion.evaluate.annotations import spread
from megafusion.evaluate.config import EvaluateConfig
from megafusion.evaluate.run import evaluate
from megafusion.storage import read_json, write_file
from megafusion.telemetry.metrics_file import METRICS, read_metrics
from megafusion.train.config import RunConfig

RUN = re.compile(r"(?P<arm>[^,]+)(,.*)?,seed=(?P<seed>\d+)")
FIGURES = {
    "images": (
        *("both_accuracy", "concept_accuracy", "style_accuracy"),
        *("nearest_seen_concept", "nearest_seen_style"),
    ),
    "captions": ("exact_match", "cider"),
    "perplexity": ("bits_per_byte",),
}
"""Metrics of each suite that a claim is about."""
COUNTS = ("steps", "seconds")
"""Costs of a run, about which there is no claim."""
NUM_EVALUATED, NUM_TUNED = 102, 128
"""Seen captions that a run is evaluated on, and others that guidance is tuned on."""


def collect(sweep: Path) -> dict[str, dict]:
    """Figures by name of each finished run of a sweep's folder."""
    runs = {}
    for folder in sorted(path for path in sweep.iterdir() if RUN.fullmatch(path.name)):
        config = load_config(RunConfig, folder / "config.yaml")
        lines = read_metrics(folder) if (folder / METRICS).is_file() else []
        if not lines or lines[-1]["step"] < config.train.num_steps:
            print(f"{folder}: not finished", file=sys.stderr)  # it is collected when it is
            continue
        found: dict[str, float] = {"steps": config.train.num_steps, "seconds": lines[-1]["seconds"]}
        found |= {
            key: value for line in lines for key, value in line.items() if key.startswith("validation_")
        }
        report = folder / f"evaluation-{config.train.num_steps}" / "report.json"
        for suite, result in (read_json(report, "delete it")["suites"] if report.is_file() else {}).items():
            for group, figures in result["metrics"].items():
                chosen = {name: figures[name] for name in FIGURES.get(suite, ()) if name in figures}
                found |= {f"{suite}/{group}/{name}": value for name, value in chosen.items()}
        match = RUN.fullmatch(folder.name)
        assert match
        runs[folder.name] = {"arm": match["arm"], "seed": int(match["seed"]), "figures": found}
    return runs


def compare(runs: dict[str, dict], first: str, second: str) -> dict[str, dict]:
    """By figure: mean of both arms, and mean and standard deviation of their difference, paired by seed.

    Losses of validation are left out where one arm predicts codes, because they are among its text targets.
    """
    arms: dict[str, dict[int, dict]] = {first: {}, second: {}}
    for run in runs.values():
        if run["arm"] in arms:
            arms[run["arm"]][run["seed"]] = run["figures"]
    seeds = sorted(arms[first].keys() & arms[second].keys())
    if not seeds:
        raise UserError(f"no seed has finished runs of both {first} and {second}")
    found = {}
    every = [arms[arm][seed] for arm in arms for seed in seeds]
    names = [name for name in every[0] if name not in COUNTS and all(name in figures for figures in every)]
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


def table(found: dict[str, dict]) -> str:
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
    if arguments.command == "compare":
        found = compare(read_json(arguments.json, "collect it"), arguments.first, arguments.second)
        print(table(found))
        signs = read_json(arguments.signs, "restore it") if arguments.signs else {}
        wrong = check_signs(found, signs)
        if arguments.signs:
            print(
                f"{arguments.signs}: {len(signs)} signs are committed, {len(wrong)} differ", *wrong, sep="\n"
            )
        return min(1, len(wrong))
    if arguments.command == "collect":
        found = collect(arguments.sweep)
    else:
        found = tune_guidance(arguments.run, arguments.scales, arguments.annotations, arguments.judge)
    content = json.dumps(found, indent=1) + "\n"
    write_file(arguments.json, content) if arguments.json else print(content)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    of_sweep = commands.add_parser("collect")
    of_sweep.add_argument("sweep", type=Path)
    of_arms = commands.add_parser("compare")
    of_arms.add_argument("json", type=Path)
    of_arms.add_argument("first")
    of_arms.add_argument("second")
    of_arms.add_argument("--signs", type=Path, help="JSON of figures and the sign of their difference")
    of_run = commands.add_parser("guidance")
    of_run.add_argument("run", type=Path)
    of_run.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0, 5.0])
    of_run.add_argument("--annotations", type=Path, default=Path("data/styles/fold-0/captions.json"))
    of_run.add_argument(
        "--judge", type=Path, default=Path("data_prep/emoji/starter_styles/judge.safetensors")
    )
    for command in (of_sweep, of_run):
        command.add_argument("--json", type=Path, help="file to write")
    return parser.parse_args()


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(parse()))
