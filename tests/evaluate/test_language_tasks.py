"""lm-evaluation-harness's tasks: scores of a small Llama equal those of lm-eval's `hf`; what is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from megafusion.errors import UserError
from megafusion.evaluate.config import EvaluateConfig
from megafusion.evaluate.run import evaluate
from megafusion.generate.pipeline import TransfusionPipeline
from tests.hub.test_export import pipeline_from
from tests.support.hub import make_folder

pytest.importorskip("lm_eval")

LENGTH = 96
WORDS = "apple ghost water cat house red green old small round tree moon river stone fish bird".split()
CHOICE = {
    "task": "choose",
    "output_type": "multiple_choice",
    "doc_to_text": "Which word is {{word}}?\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "num_fewshot": 2,
    "fewshot_split": "train",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
NEXT = {
    "task": "next_word",
    "output_type": "loglikelihood",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{' ' + word}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}
ROLLING = {
    "task": "whole_text",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
WRITE = {
    "task": "write",
    "output_type": "generate_until",
    "doc_to_text": "{{text}}\nQ: {{word}} ",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["er"], "max_gen_toks": 12},
    "metric_list": [{"metric": "exact_match"}],
}
GROUP = {
    "group": "both",
    "task": ["choose", "next_word"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}


def documents(number: int) -> list[dict]:
    """Texts of 3 to 150 words: some are longer than the model's rows."""
    return [
        {
            "text": " ".join(
                WORDS[(i * 7 + j * 5 + j * j) % 16] for j in range(150 if i == 2 else 3 + i % 9)
            ),
            "word": WORDS[i % 16],
            "choices": [WORDS[(i + k) % 16] for k in range(4)],
            "label": i % 4,
            "answer": "",
        }
        for i in range(number)
    ]


@pytest.fixture
def task_folder(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for split, number in (("train", 6), ("test", 12)):
        lines = (json.dumps(document) + "\n" for document in documents(number))
        (folder / f"{split}.jsonl").write_text("".join(lines))
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
    }
    for task in (CHOICE, NEXT, ROLLING, WRITE):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(data | task))
    (folder / "group.yaml").write_text(yaml.safe_dump(GROUP))
    return folder


@pytest.fixture
def llama(tmp_path, tokenizer, codec):
    """A Llama of transformers, and the same with an image path as a pipeline folder."""
    theirs = make_folder(tmp_path / "hub", "llama2")
    names = tokenizer.transformers_config()
    (tmp_path / "hub/tokenizer_config.json").write_text(json.dumps(names))
    pipeline = pipeline_from(tmp_path / "hub", tokenizer, codec)
    pipeline.config = pipeline.config.model_copy(update={"sequence_length": LENGTH})
    pipeline.save_pretrained(tmp_path / "pipeline")
    return theirs, tmp_path / "hub", tmp_path / "pipeline"


def by_hf(model, folder: Path, task_folder: Path, names: list[str], **options) -> dict:
    """Results of lm-eval's own loop with its own model of transformers."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=4, **options)
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    found = simple_evaluate(
        theirs, tasks=names, task_manager=manager, bootstrap_iters=1000, log_samples=False
    )
    return {
        name: {
            key.removesuffix(",none"): value
            for key, value in values.items()
            if isinstance(value, float) and "," in key
        }
        for name, values in found["results"].items()
    }


def test_scores_equal_those_of_hf(llama, task_folder, tmp_path, monkeypatch):
    """Few-shot choices, next words after texts longer than the model's rows, whole texts, and answers."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    theirs, hub, pipeline = llama
    # Whole texts without the probability of bos, which `hf` counts where the tokenizer writes one.
    expected = by_hf(theirs, hub, task_folder, ["whole_text"], add_bos_token=False)
    expected |= by_hf(theirs, hub, task_folder, ["both", "write"])
    config = EvaluateConfig(task_folder=task_folder, tasks=("both", "write", "whole_text"), batch_size=5)
    found = evaluate(pipeline, ["lm"], config, tmp_path / "out")["suites"]["lm"]["metrics"]
    assert found.keys() == expected.keys() == {"both", "choose", "next_word", "write", "whole_text"}
    for name, figures in found.items():
        assert figures.pop("documents") == (24 if name == "both" else 12)
        assert figures == pytest.approx(expected[name], rel=1e-5), name
    assert 0 < found["choose"]["acc"] < 1
    assert 0 < found["write"]["exact_match"] < 1
    assert found["next_word"]["perplexity"] > 100
    assert "| acc ↑ |" in (tmp_path / "out/report.md").read_text()
