"""What a folder of shards tells about its making: report.json, and a sheet of its pictures."""

import json
from pathlib import Path

from data_prep.plan import Plan
from megafusion.commands.data import inspect
from megafusion.data.shards import Manifest
from megafusion.images.sizes import say_sizes
from megafusion.storage import write_file

REPORT, SHEET = "report.json", "sheet.png"
NUM_SHOWN = 32


def write_report(folder: Path, plan: Plan, made: Manifest) -> None:
    """Write report.json: what was kept, what was not and why."""
    values = {
        "inputs": plan.num_seen,
        "kept": len(plan.rows),
        "dropped": plan.dropped,
        "bad": plan.skipped,
        "examples": plan.examples,
        "documents": made.num_documents,
        "tokens": made.num_tokens,
        "images": made.num_images,
        "images_by_size_of_latents": {say_sizes([size]): n for size, n in made.count_by_size.items()},
        "pictures_by_shorter_side": plan.sides,
    }
    write_file(folder / REPORT, json.dumps(values, indent=1) + "\n")


def write_sheet(folder: Path, made: Manifest, vae: Path) -> None:
    """Draw the sheet, decoded from latents, unless it is there or there is nothing to draw."""
    if made.num_images and not (folder / SHEET).is_file():
        inspect(folder, vae, folder / SHEET, NUM_SHOWN)


def summary(folder: Path, plan: Plan, made: Manifest) -> str:
    """The report in a line."""
    num_shards = f"{len(made.shards)} shard{'s' * (len(made.shards) != 1)}"
    bad, dropped = (
        ", ".join(f"{n} x {reason}" for reason, n in counts.items()) or "none"
        for counts in (plan.skipped, plan.dropped)
    )
    return (
        f"{folder}: {made.num_documents} documents, {made.num_tokens} tokens, {made.num_images} images in "
        f"{num_shards}; bad: {bad}; dropped: {dropped}"
    )
