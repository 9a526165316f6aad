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
from tests.support.hub import make_folder, pipeline_from

pytest.importorskip("lm_eval")

LENGTH = 96
TEXT = "apple ghost water cat house red green old small round tree moon river stone fish bird"
WORDS = TEXT.split()
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
    """A Llama of transformers, its folder, and a pipeline folder of the same with an image path."""
    theirs = make_folder(tmp_path / "hub", "llama2")
    (tmp_path / "hub/tokenizer_config.json").write_text(json.dumps(tokenizer.transformers_config()))
    pipeline = pipeline_from(tmp_path / "hub", tokenizer, codec)
    pipeline.config = pipeline.config.model_copy(update={"sequence_length": LENGTH})
    pipeline.save_pretrained(tmp_path / "pipeline")
    return theirs, tmp_path / "hub", tmp_path / "pipeline"


def by_hf(model, folder: Path, task_folder: Path, names: list[str], **options) -> tuple[dict, dict]:
    """Metrics and samples of lm-eval's own loop with its own model of transformers."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=4, **options)
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    found = simple_evaluate(theirs, tasks=names, task_manager=manager, bootstrap_iters=1000)
    metrics = {
        name: {
            key.removesuffix(",none"): value
            for key, value in values.items()
            if isinstance(value, float) and "," in key
        }
        for name, values in found["results"].items()
    }
    return metrics, found["samples"]


def answers(folder: Path, task: str) -> list:
    """Recorded answers of a task, in the order of its documents."""
    paths = sorted(folder.glob("batch-*.json"))
    records = [record for path in paths for record in json.loads(path.read_text())["records"]]
    return [record["answer"] for record in records if record["task"] == task]


@pytest.mark.full
def test_scores_equal_those_of_hf(llama, task_folder, tmp_path, monkeypatch):
    """Few-shot choices, next words after texts longer than the model's rows, whole texts, and answers."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    theirs, hub, pipeline = llama
    # Whole texts without the probability of bos, which `hf` counts where the tokenizer writes one.
    expected, _ = by_hf(theirs, hub, task_folder, ["whole_text"], add_bos_token=False)
    metrics, samples = by_hf(theirs, hub, task_folder, ["both", "write"])
    expected |= metrics
    config = EvaluateConfig(task_folder=task_folder, tasks=("both", "write", "whole_text"), batch_size=5)
    found = evaluate(pipeline, ["lm"], config, tmp_path / "out")["suites"]["lm"]["metrics"]
    assert found.keys() == expected.keys() == {"both", "choose", "next_word", "write", "whole_text"}
    for name, figures in found.items():
        assert figures.pop("documents") == (24 if name == "both" else 12)
        assert figures == pytest.approx(expected[name], rel=1e-4), name
    assert 0 < found["choose"]["acc"] < 1
    assert found["next_word"]["perplexity"] > 100
    written = answers(tmp_path / "out/lm", "write")
    theirs = [sample["resps"][0][0] for sample in sorted(samples["write"], key=lambda each: each["doc_id"])]
    # The prompt of one is cut: here after its bos, there bos is lost.
    assert [text for text, ours in zip(theirs, written, strict=True) if text != ours] in ([], [theirs[2]])
    assert len(set(written)) > 6
    assert "| acc ↑ |" in (tmp_path / "out/report.md").read_text()


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_two_processes_and_a_resumed_one_give_the_files_of_one(saved, task_folder, tmp_path, monkeypatch):
    """Answers are sampled, each from its own seed; of each task, some documents."""
    path = task_folder / "write.yaml"
    values = yaml.safe_load(path.read_text())
    values["generation_kwargs"] |= {"do_sample": True, "temperature": 1.0}
    values["repeats"] = 2
    path.write_text(yaml.safe_dump(values))
    config = EvaluateConfig(task_folder=task_folder, max_items=3, batch_size=4)
    report = evaluate(saved, ["lm"], config, tmp_path / "one")
    assert {
        name: each["documents"] for name, each in report["suites"]["lm"]["metrics"].items()
    } == dict.fromkeys(("choose", "next_word", "whole_text", "write"), 3)
    assert len(set(answers(tmp_path / "one/lm", "write"))) == 6
    for name, value in {"WORLD_SIZE": "2", "MASTER_PORT": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found = evaluate(saved, ["lm"], config, tmp_path / "two")
        assert (found is None) == (rank == 1)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    for lost in ("lm/batch-000001.json", "lm/metrics.json", "report.json"):
        (tmp_path / "two" / lost).unlink()
    monkeypatch.setenv("WORLD_SIZE", "1")
    evaluate(saved, ["lm"], config, tmp_path / "two")
    assert files(tmp_path / "two") == files(tmp_path / "one")
    data = task_folder / "test.jsonl"
    data.write_text(data.read_text().replace(WORDS[1], WORDS[2]))
    with pytest.raises(UserError, match="results with another requests, task_files"):
        evaluate(saved, ["lm"], config, tmp_path / "two")


@pytest.mark.parametrize(
    ("tasks", "changes", "fault"),
    [
        (("chose",), {}, r"tasks: chose: not in .*, which has both, choose, next_word, whole_text, write"),
        ((), {"dataset_path": "glue"}, "a task cannot be loaded .*nothing is downloaded: give its data"),
        ((), {"dataset_kwargs": {"data_files": ["https://x/a.jsonl"]}}, r"dataset_kwargs: https.* fetched"),
        ((), {"metric_list": [{"metric": "no_such_metric"}]}, "a task cannot be loaded"),
        (
            (),
            {"metric_list": [{"metric": "no_such", "aggregation": "mean", "higher_is_better": True}]},
            "write: lm-eval has no metric no_such, and none is downloaded",
        ),
        ((), {"unsafe_code": True}, "tasks: write: runs what the model writes"),
    ],
)
def test_a_task_that_cannot_be_measured_is_refused(task_folder, tmp_path, tasks, changes, fault):
    path = task_folder / "write.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    config = EvaluateConfig(task_folder=task_folder, tasks=tasks)
    with pytest.raises(UserError, match=fault):
        evaluate(tmp_path / "no-model", ["lm"], config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_lm_eval_would_leave_out_is_refused(task_folder, tmp_path):
    (task_folder / "write.yaml").write_text("task: write\n  x: [")
    with pytest.raises(UserError, match=r"write\.yaml: not readable as YAML"):
        evaluate(tmp_path, ["lm"], EvaluateConfig(task_folder=task_folder), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"max_gen_toks": LENGTH}, "max_gen_toks 96 of a task leaves no room for its prompt"),
        ({"num_beams": 4}, "generation_kwargs of a task.*num_beams"),
    ],
)
def test_options_of_answers_that_are_not_there_are_refused(pipeline, options, fault):
    from lm_eval.api.instance import Instance

    from megafusion.evaluate.lm_eval_model import LMEvalModel

    pipeline.config = pipeline.config.model_copy(update={"sequence_length": LENGTH})
    request = Instance("generate_until", {}, ("apple", {"until": ["x"], "do_sample": False} | options), 0)
    with pytest.raises(UserError, match=fault):
        LMEvalModel(pipeline).generate_until([request])


def test_a_model_with_nan_is_refused_although_accuracy_is_a_number(pipeline, task_folder, tmp_path):
    with torch.no_grad():
        pipeline.model.tail.head.weight[5] = torch.nan
    pipeline.save_pretrained(tmp_path / "nan")
    config = EvaluateConfig(task_folder=task_folder, tasks=("choose",))
    with pytest.raises(UserError, match="lm: a likelihood of choose is nan: the weights"):
        evaluate(tmp_path / "nan", ["lm"], config, tmp_path / "out")
    assert not (tmp_path / "out/report.json").exists()
