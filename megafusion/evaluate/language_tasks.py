"""The lm suite: text tasks of lm-evaluation-harness, from task files of a folder."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from megafusion.errors import UserError
from megafusion.evaluate.annotations import spread
from megafusion.evaluate.config import EvaluateConfig
from megafusion.evaluate.suite import Metrics
from megafusion.evaluate.task_files import load_tasks, seed_tasks
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.storage import folder_sha256

BOOTSTRAP = 1000
"""Samples of a standard error that has no closed form."""
NO_FIGURES = ("name", "alias", "sample_len", "sample_count")


class LanguageTasks:
    """Likelihoods and answers that tasks ask for, a record each; lm-eval's own loop scores the records."""

    name = "lm"

    def __init__(self, config: EvaluateConfig):
        assert config.task_folder
        self._config = config
        self._loaded = load_tasks(config.task_folder, config.tasks)
        self._chosen = {name: self._documents(name) for name in self._loaded["tasks"]}
        self.items: Sequence[Any] = list(self._requests())
        asked = [(item.task_name, item.request_type, item.args) for item in self.items]
        self.recipe: dict[str, Any] = {
            "lm_eval": version("lm-eval"),
            "tasks": {name: task.VERSION for name, task in self._loaded["tasks"].items()},
            "task_files": folder_sha256(config.task_folder),
            "requests": sha256(json.dumps(asked, default=str).encode()).hexdigest(),
            "items": len(self.items),
            "seed": config.seed,
        }

    def measure(self, pipeline: TransfusionPipeline, first: int, items: Sequence[Any]) -> list[dict]:
        """The answer of the model to each request: nats and whether it is greedy, nats, or a text."""
        from megafusion.evaluate.lm_eval_model import LMEvalModel

        model = LMEvalModel(pipeline)
        answers: list[Any] = [None] * len(items)
        for kind in dict.fromkeys(item.request_type for item in items):
            numbers = [number for number, item in enumerate(items) if item.request_type == kind]
            model.seeds = [self._config.seed + first + number for number in numbers]
            chosen = [items[number] for number in numbers]
            found = getattr(model, kind)(chosen, disable_tqdm=True)
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer
        return [
            {"task": item.task_name, "document": item.doc_id, "answer": answer}
            for item, answer in zip(items, answers, strict=True)
        ]

    def summarize(self, records: list[dict], device: Any = None) -> dict[str, Metrics]:
        """Metrics of each task, and of each group that has some, as lm-eval computes them."""
        from lm_eval.evaluator import evaluate

        from megafusion.evaluate.lm_eval_model import RecordedAnswers

        answers: dict[str, list] = defaultdict(list)
        for item, record in zip(self.items, records, strict=True):
            answer = record["answer"]
            nats = answer[0] if isinstance(answer, list) else answer
            if isinstance(nats, float) and not math.isfinite(nats):
                raise UserError(
                    f"lm: a likelihood of {item.task_name} is {nats}: the weights hold NaN or Inf; evaluate "
                    "another checkpoint"
                )
            answers[item.request_type].append((item.args, answer))
        seed_tasks(self._loaded["tasks"].values())
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # of lm-eval: no process for each core
        found = evaluate(
            lm=RecordedAnswers(answers),
            task_dict=self._loaded,
            samples=self._chosen if self._config.max_items else None,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
        return {name: _figures(name, values) for name, values in found["results"].items()}

    def _documents(self, name: str) -> list[int]:
        """Indices of a task's documents that are asked about."""
        return spread(range(len(self._loaded["tasks"][name].eval_docs)), self._config.max_items)

    def _requests(self) -> Iterator[Any]:
        """Every request in the order in which lm-eval's loop makes them."""
        seed_tasks(self._loaded["tasks"].values())
        for name, task in self._loaded["tasks"].items():
            task.build_all_requests(samples=self._chosen[name] if self._config.max_items else None)
            for request in task.instances:
                yield from [request] * request.repeats


def _figures(name: str, values: dict[str, Any]) -> Metrics:
    """Numbers of a task by metric, with its filter where it has one that is named."""
    figures: Metrics = {"documents": int(values["sample_len"])} if "sample_len" in values else {}
    for key, value in values.items():
        if key in NO_FIGURES or value == "N/A":  # a standard error that has no formula
            continue
        metric, _, chosen = key.partition(",")
        try:
            figures[metric if chosen in ("", "none") else f"{metric} ({chosen})"] = float(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"lm: {metric} of {name} is {value!r:.80}, no number; leave it out of metric_list"
            ) from error
    return figures
