"""The quickstart's figures and pictures: what the model draws, what it writes, how its losses fell."""

import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib
import psutil

matplotlib.use("Agg")

from megafusion.device import default_device, peak_memory_bytes

from matplotlib import pyplot
from PIL import Image
from rich.progress import Progress

from data_prep.emoji.classifier import IMAGE_SIZE, ImageClassifier
from data_prep.images import decode_pair
from data_prep.readers.webdataset import tar_pairs
from megafusion.data.source import open_folder
from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.grid import encode_png, make_image_grid
from megafusion.images.processor import preprocess_images
from megafusion.progress import progress_bar
from megafusion.storage import write_file
from megafusion.telemetry.metrics import read_metrics
from megafusion.train.config import RunConfig
from megafusion.train.open_model import open_pipeline
from megafusion.train.run_folder import load_run_config

NUM_DRAWN = 32
NUM_DESCRIBED_AT_A_TIME = 34
SMOOTHED_LINES = 5
"""The last losses are means over this many lines of metrics: one batch's loss is noisy."""


class Pair(NamedTuple):
    """A pair that the run was trained on, with its real picture."""

    key: str
    caption: str
    picture: Image.Image


def write_report(run_folder: Path, tar: Path, classifier_path: Path, seconds_before: float) -> dict:
    """Measure a finished run; writes samples.png, captions.txt, losses.png and report.json into it.

    seconds_before: what the caller spent until this process began, for the total;
    tar: the pictures that the run's pairs were made from; classifier_path: names their concept and style.
    """
    started = time.monotonic()
    config = load_run_config(run_folder)
    metrics = read_metrics(run_folder)
    pipeline = open_pipeline(run_folder).to(default_device())
    classifier = ImageClassifier.load(classifier_path)
    pairs = training_pairs(config, tar)
    with progress_bar() as progress:
        concept_top1 = _draw(pipeline, classifier, pairs, run_folder / "samples.png", progress)
        caption_exact = _describe(pipeline, pairs, run_folder / "captions.txt", progress)
    plot_losses(metrics, run_folder / "losses.png")
    last = metrics[-SMOOTHED_LINES:]
    seconds_train = metrics[-1]["seconds"]
    seconds_report = time.monotonic() - started
    # A second `make quickstart` finds the run trained, and counts the training in all the same.
    elapsed = seconds_before + time.time() - psutil.Process().create_time()
    report = {
        "num_steps": metrics[-1]["step"],
        "seconds_total": round(elapsed if elapsed > seconds_train else elapsed + seconds_train, 1),
        "seconds_train": round(seconds_train, 1),
        "seconds_report": round(seconds_report, 1),
        "peak_memory_bytes": max(peak_memory_bytes(), *(line["memory_bytes"] for line in metrics)),
        "lm_loss_first": metrics[0]["text_loss"],
        "lm_loss_last": statistics.mean(line["text_loss"] for line in last),
        "diffusion_loss_first": metrics[0]["image_loss"],
        "diffusion_loss_last": statistics.mean(line["image_loss"] for line in last),
        "concept_top1": concept_top1,
        "caption_exact": caption_exact,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in metrics),
        "classifier_on_real_pictures": classifier.figures,
    }
    write_file(run_folder / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def training_pairs(config: RunConfig, tar: Path) -> list[Pair]:
    """The pairs of the run's first pair source, with their pictures from a tar, by key."""
    folders = [open_folder(config.data, name) for name in config.data.sources]
    folder = next((f for f in folders if f.manifest.kind == "pair"), None)
    if folder is None:
        raise UserError("the run has no source of pairs, so there is nothing to draw or describe")
    pictures = {picture.key: picture for picture in tar_pairs(tar)}
    pairs = []
    for shard, entry in enumerate(folder.manifest.shards):
        for position in range(entry.num_documents):
            metadata = folder.read(shard, position).metadata
            if metadata["key"] not in pictures:
                raise UserError(f"{tar}: has no picture {metadata['key']!r}, which the run was trained on")
            _, picture = decode_pair(pictures[metadata["key"]])
            pairs.append(Pair(metadata["key"], metadata["caption"], picture))
    return pairs


def _draw(
    pipeline: TransfusionPipeline,
    classifier: ImageClassifier,
    pairs: list[Pair],
    path: Path,
    progress: Progress,
) -> float:
    """Draw captions spread evenly over the pairs; the share that the classifier gives its own key."""
    chosen = [pairs[len(pairs) * i // NUM_DRAWN] for i in range(NUM_DRAWN)]
    task = progress.add_task("drawing", total=None, losses="")
    drawn = pipeline.draw(
        [pair.caption for pair in chosen],
        progress=lambda done, total: progress.update(task, completed=done, total=total),
    )
    found = classifier.classify(preprocess_images(drawn, IMAGE_SIZE, IMAGE_SIZE) / 2 + 0.5)
    marks = [key == pair.key for key, pair in zip(found, chosen, strict=True)]
    cells = [
        (f"{pair.caption}{'' if right else f' (taken for {key})'}", pair.picture.convert("RGB"), picture)
        for pair, picture, key, right in zip(chosen, drawn, found, marks, strict=True)
    ]
    write_file(path, encode_png(make_image_grid(cells, ("real", "drawn"))))
    return sum(marks) / len(marks)


def _describe(pipeline: TransfusionPipeline, pairs: list[Pair], path: Path, progress: Progress) -> float:
    """Describe every picture; the share whose words are exactly the caption's."""
    said = []
    task = progress.add_task("describing", total=len(pairs), losses="")
    for first in range(0, len(pairs), NUM_DESCRIBED_AT_A_TIME):
        said += pipeline.describe([pair.picture for pair in pairs[first : first + NUM_DESCRIBED_AT_A_TIME]])
        progress.update(task, completed=len(said))
    right = [caption == pair.caption for caption, pair in zip(said, pairs, strict=True)]
    lines = [
        f"{'=' if mark else 'x'} {pair.caption} -> {' '.join(caption.split())}"
        for mark, pair, caption in zip(right, pairs, said, strict=True)
    ]
    heading = "# caption -> what the model writes for its picture; = the same, x another"
    write_file(path, "\n".join([heading, *lines]) + "\n")
    return sum(right) / len(right)


def plot_losses(metrics: list[dict], path: Path) -> None:
    """Both losses over the steps on logarithmic axes: each line of metrics, and means of those around it."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = [line["step"] for line in metrics]
    named = (
        ("text_loss", "text: nats a token", "tab:blue"),
        ("image_loss", "image: squared error", "tab:orange"),
    )
    for axis, (name, label, colour) in zip(axes, named, strict=True):
        values = [line[name] for line in metrics]
        around = [
            statistics.mean(values[max(0, i - SMOOTHED_LINES) : i + SMOOTHED_LINES + 1])
            for i in range(len(values))
        ]
        axis.plot(steps, values, color=colour, alpha=0.35)
        axis.plot(steps, around, color=colour)
        axis.set(xlabel="step", title=label, yscale="log")
        axis.grid(alpha=0.3, which="both")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks("{x:g}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
