"""The report of a quickstart run: samples against a classifier, captions, losses and throughput."""

import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from megafusion.device import default_device, peak_memory_bytes

import psutil
from matplotlib.figure import Figure
from PIL import Image
from rich.progress import Progress

from data_prep.images import open_rgb
from data_prep.readers.webdataset import tar_pairs
from megafusion.data.config import DataConfig
from megafusion.data.source import open_folder
from megafusion.errors import UserError
from megafusion.evaluate.classifier import IMAGE_SIZE, ImageClassifier
from megafusion.generate.events import Event, ImageStep
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.grid import encode_png, make_image_grid
from megafusion.images.processor import preprocess_images
from megafusion.progress import progress_bar
from megafusion.storage import write_file
from megafusion.telemetry.metrics_file import read_metrics
from megafusion.train.run_folder import load_run_config

NUM_DRAWN = 32
DESCRIBE_BATCH_SIZE = 34
SMOOTHED_LINES = 5
"""Lines of metrics over which losses are averaged, because one batch's loss is noisy."""


class Pair(NamedTuple):
    """A pair that the run was trained on, with its real image."""

    key: str
    caption: str
    image: Image.Image


def write_report(run_folder: Path, tar: Path, classifier_path: Path, seconds_before: float) -> dict:
    """Evaluate a finished run; writes samples.png, captions.txt, losses.png and report.json into it.

    tar: the images of the run's pairs. classifier_path: names their concept and style. seconds_before: time
    that the caller spent before this process started, for the total.
    """
    started = time.monotonic()
    metrics = read_metrics(run_folder)
    pipeline = TransfusionPipeline.from_pretrained(run_folder).to(default_device())
    classifier = ImageClassifier.load(classifier_path)
    pairs = training_pairs(load_run_config(run_folder).data, tar)
    with progress_bar() as progress:
        concept_top1 = _draw(pipeline, classifier, pairs, run_folder / "samples.png", progress)
        caption_exact = _describe(pipeline, pairs, run_folder / "captions.txt", progress)
    plot_losses(metrics, run_folder / "losses.png")
    last = metrics[-SMOOTHED_LINES:]
    seconds_train = metrics[-1]["seconds"]
    seconds_report = time.monotonic() - started
    # A second `make quickstart` finds the run trained; its time counts all the same.
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
        "classifier_on_real_images": classifier.metrics,
    }
    write_file(run_folder / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def training_pairs(config: DataConfig, tar: Path) -> list[Pair]:
    """The pairs of the run's first source of pairs, with their images from a tar, by key."""
    folders = [open_folder(config, name) for name in config.sources]
    folder = next((f for f in folders if f.manifest.kind == "pair"), None)
    if folder is None:
        raise UserError("the run has no source of pairs, so there is nothing to draw or describe")
    raw_pairs = {pair.key: pair for pair in tar_pairs(tar)}
    pairs = []
    for document in range(len(folder)):
        metadata = folder.read(document).metadata
        if metadata["key"] not in raw_pairs:
            raise UserError(f"{tar}: has no image {metadata['key']!r}, which the run was trained on")
        image = open_rgb(raw_pairs[metadata["key"]].image)
        pairs.append(Pair(metadata["key"], metadata["caption"], image))
    return pairs


def _draw(
    pipeline: TransfusionPipeline,
    classifier: ImageClassifier,
    pairs: list[Pair],
    path: Path,
    progress: Progress,
) -> float:
    """Draw evenly spaced captions; the fraction that the classifier names correctly."""
    chosen = [pairs[len(pairs) * i // NUM_DRAWN] for i in range(NUM_DRAWN)]
    task = progress.add_task("drawing", total=None, losses="")

    def show(event: Event) -> None:
        if isinstance(event, ImageStep):
            progress.update(task, completed=event.state.step, total=event.state.num_steps)

    drawn = pipeline.draw(
        [pair.caption for pair in chosen],
        callback=show,
    )
    found = classifier.classify(preprocess_images(drawn, IMAGE_SIZE, IMAGE_SIZE) / 2 + 0.5)
    correct = [key == pair.key for key, pair in zip(found, chosen, strict=True)]
    cells = [
        (f"{pair.caption}{'' if is_correct else f' (classified as {key})'}", pair.image, image)
        for pair, image, key, is_correct in zip(chosen, drawn, found, correct, strict=True)
    ]
    write_file(path, encode_png(make_image_grid(cells, ("real", "drawn"))))
    return sum(correct) / len(correct)


def _describe(pipeline: TransfusionPipeline, pairs: list[Pair], path: Path, progress: Progress) -> float:
    """Describe every image; the fraction whose text equals the caption exactly."""
    texts = []
    task = progress.add_task("describing", total=len(pairs), losses="")
    for first in range(0, len(pairs), DESCRIBE_BATCH_SIZE):
        texts += pipeline.describe([pair.image for pair in pairs[first : first + DESCRIBE_BATCH_SIZE]])
        progress.update(task, completed=len(texts))
    correct = [text == pair.caption for text, pair in zip(texts, pairs, strict=True)]
    lines = [
        f"{'=' if is_correct else 'x'} {pair.caption} -> {' '.join(text.split())}"
        for is_correct, pair, text in zip(correct, pairs, texts, strict=True)
    ]
    heading = "# caption -> the model's text for its image; = equal, x different"
    write_file(path, "\n".join([heading, *lines]) + "\n")
    return sum(correct) / len(correct)


def plot_losses(metrics: list[dict], path: Path) -> None:
    """Plot both losses over steps on logarithmic axes: each line of metrics, and a moving average."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    steps = [line["step"] for line in metrics]
    curves = (
        ("text_loss", "text: nats per token", "tab:blue"),
        ("image_loss", "image: mean squared error", "tab:orange"),
    )
    shown = [curve for curve in curves if any(line[curve[0]] for line in metrics)]  # codes have no image loss
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (name, label, color) in zip(axes, shown, strict=True):
        values = [line[name] for line in metrics]
        smoothed = [
            statistics.mean(values[max(0, i - SMOOTHED_LINES) : i + SMOOTHED_LINES + 1])
            for i in range(len(values))
        ]
        axis.plot(steps, values, color=color, alpha=0.35)
        axis.plot(steps, smoothed, color=color)
        axis.set(xlabel="step", title=label, yscale="log")
        axis.grid(alpha=0.3, which="both")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks("{x:g}")
    figure.savefig(path, dpi=110)
