"""`megafusion evaluate`: one process or several, killed and resumed, give one report; what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megafusion.errors import UserError
from megafusion.evaluate.classifier import ImageClassifier
from megafusion.evaluate.config import EvaluateConfig
from megafusion.evaluate.images import Images
from megafusion.evaluate.judge import prove, retrieval, split_key
from megafusion.evaluate.perplexity import Perplexity
from megafusion.evaluate.report import check_finite
from megafusion.evaluate.run import evaluate
from megafusion.images.processor import preprocess_images
from megafusion.images.reader import read_image
from tests.evaluate.conftest import KEYS
from tests.support.small import ROOT

QUICK = ("perplexity", "captions", "reconstruction")


def files(out: Path) -> dict[str, bytes]:
    """Contents by path, without the unfinished files of a killed process."""
    paths = [path for path in out.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def test_two_processes_and_one_that_resumes_give_the_report_of_one(saved, config, tmp_path, monkeypatch):
    """The same files, byte for byte; the processes share nothing but the folder, so they may run in turn."""
    report = evaluate(saved, QUICK, config, tmp_path / "one")
    assert report["suites"].keys() == set(QUICK)
    assert [list(report["suites"][name]["metrics"]) for name in QUICK] == [
        ["all"],
        ["seen", "held-out", "all"],
        ["seen", "held-out", "all"],
    ]
    for rank in (1, 0):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": 29_500}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        found = evaluate(saved, QUICK, config, tmp_path / "two")
        assert (found is None) == (rank == 1)
    assert files(tmp_path / "two") == files(tmp_path / "one")

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name)
    kept = tmp_path / "two/captions/batch-000001.json"
    before = kept.stat().st_mtime_ns
    for lost in ("captions/batch-000000.json", "report.json", "captions/metrics.json"):
        (tmp_path / "two" / lost).unlink()
    evaluate(saved, QUICK, config, tmp_path / "two")
    assert kept.stat().st_mtime_ns == before, "what was there is not measured again"
    assert files(tmp_path / "two") == files(tmp_path / "one")

    with pytest.raises(UserError, match=r"results with another batch_size.*choose another --out"):
        evaluate(saved, QUICK, config.model_copy(update={"batch_size": 2}), tmp_path / "two")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/perplexity").mkdir()
    (tmp_path / "other/perplexity/thesis.tex").touch()
    with pytest.raises(UserError, match="holds other files"):
        evaluate(saved, ["perplexity"], config, tmp_path / "other")


def test_the_last_process_writes_the_report_when_each_was_last_with_another_suite(
    saved, config, tmp_path, monkeypatch
):
    """Rank 0 ends captions first and perplexity last: rank 1 begins and ends in between."""
    measure, found = Perplexity.measure, {}

    def start(rank: int) -> dict | None:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        return evaluate(saved, ["captions", "perplexity"], config, tmp_path / "out")

    def measure_after_rank_1(*arguments):
        monkeypatch.setattr(Perplexity, "measure", measure)
        found[1] = start(1)
        return measure(*arguments)

    monkeypatch.setattr(Perplexity, "measure", measure_after_rank_1)
    found[0] = start(0)
    assert found[1] is None
    assert found[0]["suites"].keys() == {"captions", "perplexity"}
    assert (tmp_path / "out/report.md").is_file()


def test_one_report_is_of_one_model(saved, pipeline, config, tmp_path):
    """Neither other weights nor, of the same weights, other defaults of sampling."""
    evaluate(saved, ["perplexity"], config, tmp_path / "out")
    before = files(tmp_path / "out")
    settings = json.loads((saved / "config.json").read_text())
    settings["sampling"]["guidance_scale"] = 1.5
    (saved / "config.json").write_text(json.dumps(settings))
    with torch.no_grad():
        next(iter(pipeline.model.weights().values())).mul_(2)
    pipeline.save_pretrained(tmp_path / "other")
    for model in (saved, tmp_path / "other"):
        with pytest.raises(
            UserError, match=r"out/perplexity: holds results of another model .*choose another"
        ):
            evaluate(model, ["captions"], config, tmp_path / "out")
    assert files(tmp_path / "out") == before


@pytest.mark.full
def test_a_killed_evaluation_resumes_to_the_same_report(saved, config, tmp_path):
    """Real processes: one alone, and two of which both are killed at some moment, then started again."""
    values = config.model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "evaluate.yaml").write_text(json.dumps(values))

    def start(out: str, rank: int, world: int) -> subprocess.Popen:
        launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": 1}
        environment = os.environ | {name: str(value) for name, value in launcher.items()}
        command = [
            sys.executable,
            "-m",
            "megafusion.cli",
            "evaluate",
            str(saved),
            "--out",
            str(tmp_path / out),
        ]
        suites = [word for name in (*QUICK, "images") for word in ("--suite", name)]
        options = ["--config", str(tmp_path / "evaluate.yaml"), "batch_size=1"]
        environment |= {"MASTER_ADDR": "localhost"}
        return subprocess.Popen([*command, *suites, *options], env=environment, cwd=ROOT)

    assert start("one", 0, 1).wait() == 0
    processes = [start("two", rank, 2) for rank in range(2)]
    while len(list((tmp_path / "two").rglob("batch-*.json"))) < 7:
        assert any(process.poll() is None for process in processes)
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "two/report.json").exists()
    processes = [start("two", rank, 2) for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.fixture(scope="module")
def judge() -> ImageClassifier:
    return ImageClassifier.load(ROOT / "data_prep/emoji/classifier.safetensors")


@pytest.fixture
def real(annotations) -> torch.Tensor:
    images = [read_image((annotations.parent / f"{key}.webp").read_bytes()) for key in KEYS]
    return preprocess_images(images, 64, 64) / 2 + 0.5


def test_a_judge_is_proved_on_the_real_images_before_it_judges(judge, real):
    found = prove(Path("judge"), judge, real, KEYS)
    assert len(found) == 14
    assert min(found.values()) >= 0.95
    shifted = KEYS[1:] + KEYS[:1]
    assert retrieval(judge, real, shifted)["concept, clean"] == 0.5
    assert retrieval(judge, real, shifted)["style, clean"] == 0
    with pytest.raises(
        UserError, match=r"judge: weights: finds too few .* below 0\.95 \(concept, clean: 0\.500;"
    ):
        prove(Path("weights"), judge, real, shifted)
    with pytest.raises(UserError, match=r"weights: does not know FFFF-3d and 1 more; train it"):
        prove(Path("weights"), judge, real, [*KEYS[:6], "FFFF-3d", "FFFF-flat"])


@pytest.mark.full
def test_drawn_images_are_judged_by_group_with_what_chance_and_a_copy_would_have(saved, config, tmp_path):
    report = evaluate(saved, ["images"], config, tmp_path / "out")
    metrics = report["suites"]["images"]["metrics"]
    assert metrics["held-out"]["images"] == 2
    assert metrics["all"]["concept_chance"] == 1 / 4
    assert metrics["all"]["style_chance"] == 1 / 2
    for group in metrics.values():
        assert group["both_accuracy"] <= min(group["concept_accuracy"], group["style_accuracy"])
        assert group["judge_frechet_distance"] > 0
        assert "fid" not in group
        assert 0 <= group["nearest_seen_concept"] <= 1
        assert group["both_accuracy"] <= group["closed_both_accuracy"] <= group["closed_style_accuracy"]
    assert min(report["suites"]["images"]["judge"].values()) >= 0.95
    assert "judge_frechet_distance ↓" in (tmp_path / "out/report.md").read_text()
    for name in ("sheet-seen.png", "sheet-held-out.png", "drawn/000007.png"):
        assert (tmp_path / "out/images" / name).is_file()


@pytest.mark.full
def test_a_model_that_copies_the_real_images_is_judged_right_and_at_distance_zero(
    saved, config, annotations, tmp_path
):
    suite = Images(config, tmp_path)
    records = []
    for number, item in enumerate(suite.items):
        (tmp_path / f"{number}.png").write_bytes(item.path.read_bytes())
        records.append({"image_id": item.id, "file": f"{number}.png"})
    metrics = suite.summarize(records)
    assert metrics["held-out"]["both_accuracy"] == metrics["all"]["both_accuracy"] == 1
    assert metrics["all"]["closed_both_accuracy"] == 1
    assert metrics["all"]["judge_frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert metrics["seen"]["nearest_seen_concept"] == metrics["seen"]["nearest_seen_style"] == 1
    assert metrics["held-out"]["nearest_seen_concept"] == 0, "the held-out concept is not among the seen here"


def test_a_copy_of_a_seen_image_is_found_though_it_is_not_evaluated(saved, config, annotations, tmp_path):
    """max_items leaves every other seen image out: drawings are copies of these."""
    suite = Images(config.model_copy(update={"max_items": 3}), tmp_path)
    evaluated = [item.key for item in suite.items if item.group == "seen"]
    left_out = [key for key in KEYS[:6] if key not in evaluated]
    assert len(evaluated) == len(left_out) == 3
    records = []
    for number, item in enumerate(suite.items):
        copied = left_out[number % 3]
        (tmp_path / f"{number}.png").write_bytes((annotations.parent / f"{copied}.webp").read_bytes())
        records.append({"image_id": item.id, "file": f"{number}.png"})
    seen = suite.summarize(records)["seen"]
    for part, name in enumerate(("concept", "style")):
        pairs = [
            (split_key(copied)[part], split_key(key)[part])
            for copied, key in zip(left_out, evaluated, strict=True)
        ]
        assert seen[f"nearest_seen_{name}"] == pytest.approx(sum(a == b for a, b in pairs) / 3)


@pytest.mark.parametrize(
    ("suite", "changes", "fault"),
    [
        ("perplexity", {"texts": ()}, r"perplexity: give it texts=\[FILE\]"),
        ("perplexity", {"texts": (Path("a.jsonl"),)}, r"a\.jsonl is not a \.txt file"),
        ("captions", {"annotations": None}, "captions: give it annotations=FILE"),
        ("captions", {"annotations": Path("no.json")}, r"no\.json: cannot be read"),
        ("images", {"judge": None}, "images: nothing would measure"),
        ("images", {"judge": Path("no.safetensors")}, r"no\.safetensors: not classifier weights"),
        (
            "images",
            {"judge": None, "inception": Path("no.pth")},
            r"no\.pth: no such file; fetch weights-inception",
        ),
        ("images", {"inception": Path("no.pth"), "max_items": 1}, "group 'seen' has one image; FID needs 2"),
        ("images", {"clip": Path("no/clip")}, "clip: no/clip: no folder of a CLIP model; save"),
        ("lm", {}, "lm: give it task_folder=FOLDER, of lm-evaluation-harness"),
        ("geneval", {}, "geneval: give it prompts=FILE, GenEval's evaluation_metadata.jsonl, and detector"),
        (
            "images",
            {"judge": None, "inception": Path(__file__)},
            r"not readable as tensors alone \(.*fetch",
        ),
    ],
)
def test_missing_inputs_are_refused_before_the_model_is_opened(config, tmp_path, suite, changes, fault):
    with pytest.raises(UserError, match=fault):
        evaluate(tmp_path / "no-model", [suite], config.model_copy(update=changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickled_code_in_place_of_weights_is_not_run(config, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"Conv2d_1a_3x3": Evil()}, tmp_path / "evil.pth")
    changes = {"judge": None, "inception": tmp_path / "evil.pth"}
    with pytest.raises(UserError, match="not readable as tensors alone"):
        evaluate(tmp_path / "no-model", ["images"], config.model_copy(update=changes), tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_lm_eval_is_named_where_it_is_missing(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"lm: needs lm-eval; pip install 'megafusion\[eval\]'"):
        evaluate(tmp_path, ["lm"], config.model_copy(update={"task_folder": tmp_path}), tmp_path / "out")


def test_java_is_asked_for_only_by_the_words_that_need_it(config, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="words: ptb needs Java"):
        evaluate(tmp_path / "no", ["captions"], config.model_copy(update={"words": "ptb"}), tmp_path / "out")


def test_a_metric_that_is_nan_is_named_and_no_report_is_written(pipeline, config, tmp_path):
    with torch.no_grad():
        pipeline.model.tail.head.weight[5] = torch.nan
    pipeline.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="perplexity: nats_per_token of all is nan: the weights or an input"):
        evaluate(tmp_path / "nan", ["perplexity"], config, tmp_path / "out")
    assert not (tmp_path / "out/report.json").exists()
    with pytest.raises(UserError, match="images: fid of seen is inf"):
        check_finite("images", {"all": {"fid": 1.0}, "seen": {"images": 2, "fid": float("inf")}})


def test_max_items_are_of_each_group(config):
    from megafusion.evaluate.groups import annotated_images

    few, recipe = annotated_images(config.model_copy(update={"max_items": 2}))
    assert [item.group for item in few] == ["seen", "seen", "held-out", "held-out"]
    assert recipe["items"] == 4
    assert isinstance(config, EvaluateConfig)
