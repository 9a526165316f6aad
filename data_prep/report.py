"""The report of a folder of shards: report.json, and a sheet of its images."""

import json
from collections import Counter
from pathlib import Path

from data_prep.plan import Plan, describe_estimate, format_counts
from megafusion.data.inspect import inspect_shards
from megafusion.data.latent_statistics import latent_statistics, spread_documents
from megafusion.data.manifest import Manifest
from megafusion.data.reader import ShardFolder
from megafusion.images.sizes import format_sizes
from megafusion.storage import write_file

REPORT, SHEET = "report.json", "sheet.png"
NUM_IMAGES_SHOWN = 32


def write_report(folder: Path, plan: Plan, ignored: dict[str, int], manifest: Manifest) -> None:
    """Write report.json: counts of kept, dropped and bad records by reason, and of ignored files by kind."""
    values = {
        "inputs": plan.num_records,
        "kept": len(plan.rows),
        "dropped": plan.dropped,
        "bad": plan.skipped,
        "bad_by_estimate": plan.estimated,
        "ignored": dict(sorted(ignored.items())),
        "examples": plan.examples,
        "documents": manifest.num_documents,
        "tokens": manifest.num_tokens,
        "images": manifest.num_images,
        "images_by_size_of_latents": {format_sizes([size]): n for size, n in manifest.count_by_size.items()},
        "images_by_shorter_side": plan.shorter_sides,
    }
    if found := latent_statistics(spread_documents(ShardFolder(folder)), manifest):
        values["normalized_latents"] = {
            "mean": round(found.mean, 4),
            "standard_deviation": round(found.deviation, 4),
            "warning": found.warning,
        }
    write_file(folder / REPORT, json.dumps(values, indent=1) + "\n")


def write_sheet(folder: Path, manifest: Manifest, vae: Path) -> None:
    """Write a sheet of images, decoded from latents, unless it exists or there are no images."""
    if manifest.num_images and not (folder / SHEET).is_file():
        inspect_shards(folder, vae, folder / SHEET, NUM_IMAGES_SHOWN)


def describe_unused(plan: Plan) -> str:
    """The inputs that are not kept, by reason, with an example of each."""
    counts = Counter(plan.skipped) + Counter(plan.dropped)
    reasons = [f"{n} x {reason} (one is {plan.examples[reason][0]})" for reason, n in counts.most_common()]
    return f"of {plan.num_records} inputs {', '.join(reasons) or 'none'}"


def summary_line(folder: Path, plan: Plan, ignored: dict[str, int], manifest: Manifest) -> str:
    """The report in one line."""
    num_shards = f"{len(manifest.shards)} shard{'s' * (len(manifest.shards) != 1)}"
    bad, dropped, others = map(format_counts, (plan.skipped, plan.dropped, ignored))
    return (
        f"{folder}: {manifest.num_documents} documents, {manifest.num_tokens} tokens, {manifest.num_images} "
        f"images in {num_shards}; bad: {bad}{describe_estimate(plan.estimated)}; dropped: {dropped}; "
        f"files ignored: {others}"
    )
