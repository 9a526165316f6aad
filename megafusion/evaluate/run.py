"""An evaluation: suites of one model, measured into a folder, and the report."""

import os
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from megafusion.device import default_device

import torch

from megafusion.evaluate.captions import Captions
from megafusion.evaluate.config import EvaluateConfig
from megafusion.evaluate.geneval import GenEval
from megafusion.evaluate.images import Images
from megafusion.evaluate.language_tasks import LanguageTasks
from megafusion.evaluate.perplexity import Perplexity
from megafusion.evaluate.reconstruction import Reconstruction
from megafusion.evaluate.report import check_finite, write_report, write_suite
from megafusion.evaluate.suite import (
    Metrics,
    Suite,
    claim_folder,
    model_sha256,
    refuse_other_model,
    run_batches,
)
from megafusion.generate.pipeline import TransfusionPipeline

SUITES: dict[str, Callable[[EvaluateConfig, Path], Suite]] = {
    "perplexity": lambda config, _: Perplexity(config),
    "captions": lambda config, _: Captions(config),
    "images": Images,
    "reconstruction": Reconstruction,
    "geneval": GenEval,
    "lm": lambda config, _: LanguageTasks(config),
}
OPTIONS: dict[str, set[str]] = {
    "captions": {"words"},
    "images": {"kid_subset_size", "kid_subsets"},
}
"""Options of a suite's summary, for its metrics file; those of its records are in its recipe."""
JUDGES = {"images": ("judge", "inception", "clip")}
"""Files and folders of models that a suite's figures depend on: figures are comparable for the same alone."""


def evaluate(
    checkpoint: Path, names: Sequence[str], config: EvaluateConfig, out: Path
) -> dict[str, Any] | None:
    """Measure suites of a model into `out`; the report, or None while other processes are not done.

    Every input is checked before the first image is drawn. A second call measures what is missing.
    """
    config.check_suites(names)
    suites = {name: SUITES[name](config, out / name) for name in dict.fromkeys(names)}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
    pipeline = TransfusionPipeline.from_pretrained(checkpoint)
    model = describe_model(pipeline)
    pipeline = pipeline.to(default_device())
    refuse_other_model(out, model)
    for name, suite in suites.items():
        claim_folder(out / name, {"model": model, "batch_size": config.batch_size} | suite.recipe)

    def measured(suite: Suite) -> bool:
        records = run_batches(suite, pipeline, config.batch_size, out / suite.name)
        if records is not None:
            metrics = suite.summarize(records, pipeline.device)
            check_finite(suite.name, metrics)
            write_suite(out / suite.name, _result(suite, metrics, config))
        return records is not None

    waiting = [suite for suite in suites.values() if not measured(suite)]
    # Others may have ended these since: the last process to end a batch finds all of them.
    waiting = [suite for suite in waiting if not measured(suite)]
    if waiting:
        return None
    # Beside the hashes, because records do not depend on it.
    return write_report(out, model | {"training_flops": pipeline.config.training_flops})


def _result(suite: Suite, metrics: dict[str, Metrics], config: EvaluateConfig) -> dict[str, Any]:
    """Content of a suite's metrics file."""
    options = config.model_dump(mode="json", include=OPTIONS.get(suite.name, set()))
    for judge in JUDGES.get(suite.name, ()):
        path: Path | None = getattr(config, judge)
        options[judge] = path and model_sha256(path)
    result = {"metrics": metrics, "recipe": suite.recipe, "options": options}
    proof = getattr(suite, "proof", None)
    return result | {"judge": proof} if proof else result


def describe_model(pipeline: TransfusionPipeline) -> dict[str, Any]:
    """Hashes that identify a model, with its configuration, tokenizer and autoencoder, and its size."""
    digest = sha256()
    weights = pipeline.model.weights()
    config = pipeline.config.model_dump_json(exclude={"training_flops"})
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {
        "weights": digest.hexdigest(),
        "config": sha256(config.encode()).hexdigest(),
        "tokenizer": pipeline.tokenizer.hash,
        "autoencoder": pipeline.codec.hash,
        "parameters": sum(weight.numel() for weight in weights.values()),
    }
