"""GenEval's protocol: ideal detections give 1, permuted ones 0; its rules of position, count and color."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from megafusion.errors import UserError
from megafusion.evaluate.config import EvaluateConfig
from megafusion.evaluate.detector import Found, load_detector
from megafusion.evaluate.geneval import GenEval, relations

BIRD, CUP = {"class": "bird", "count": 1}, {"class": "cup", "count": 2}
PROMPTS = [
    {"tag": "single_object", "prompt": "a photo of a bird", "include": [BIRD]},
    {"tag": "counting", "prompt": "two cups", "include": [CUP], "exclude": [{"class": "cup", "count": 3}]},
    {"tag": "colors", "prompt": "a red cup", "include": [{"class": "cup", "count": 1, "color": "red"}]},
    {
        "tag": "position",
        "prompt": "a bird left of a dog",
        "include": [{"class": "dog", "count": 1}, BIRD | {"position": ["left of", 0]}],
    },
]
IDEAL = [
    [Found("bird", 0.9, (0, 0, 5, 5))],
    [Found("cup", score, (0, 0, 5, 5), "blue") for score in (0.95, 0.99, 0.8)],
    [Found("cup", 0.5, (0, 0, 5, 5), "red")],
    [Found("bird", 0.9, (0, 0, 5, 5)), Found("dog", 0.9, (20, 0, 30, 5))],
]
DETECTOR = """
import json, pathlib
FOUND = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())
def detect(image):
    return FOUND.get(str(image.width), [])
def wrong(image):
    return [{"label": "bird", "box": [0, 0, 1]}]
number = 3
"""


@pytest.fixture
def suite(tmp_path, monkeypatch) -> GenEval:
    """Prompt n is drawn n + 1 pixels wide, by which the detector knows it."""
    found = {str(n + 1): [each._asdict() for each in objects] for n, objects in enumerate(IDEAL)}
    (tmp_path / "my_detector.py").write_text(DETECTOR)
    (tmp_path / "my_detector.json").write_text(json.dumps(found))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_detector", raising=False)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return GenEval(config_of(path, "my_detector:detect"), tmp_path)


def config_of(prompts: Path, detector: str) -> EvaluateConfig:
    return EvaluateConfig(prompts=prompts, detector=detector, images_per_prompt=1)


@pytest.mark.parametrize(("shift", "score"), [(0, 1.0), (1, 0.0), (2, 0.0), (3, 0.0)])
def test_ideal_detections_give_1_and_permuted_ones_0(suite, shift, score):
    """The detector's answers are those of the prompt, or of another."""
    records = []
    for number, prompt in enumerate(PROMPTS):
        image = Image.new("RGB", ((number + shift) % len(PROMPTS) + 1, 8))
        reason = suite.fault(image, prompt)
        records.append({"tag": prompt["tag"], "right": not reason, "reason": reason})
    # A bird left of a dog is a bird, too: GenEval's single objects exclude none.
    records = [r for r in records if not (shift == 3 and r["tag"] == "single_object")]
    metrics = suite.summarize(records)
    assert metrics["all"]["geneval"] == score, records
    assert all(figures["geneval"] == score for figures in metrics.values())


def test_positions_are_those_of_centers_less_an_overlap():
    at = {
        "left": (0, 40, 10, 50),
        "right": (90, 40, 100, 50),
        "top": (45, 0, 55, 10),
        "inside": (44, 40, 54, 50),
    }
    found = {name: Found("a", 1.0, box) for name, box in at.items()}
    assert relations(found["left"], found["right"]) == {"left of"}
    assert relations(found["right"], found["left"]) == {"right of"}
    assert relations(found["top"], found["inside"]) == {"above"}
    assert relations(found["inside"], found["top"]) == {"below"}
    assert relations(found["inside"], Found("a", 1.0, (45, 40, 55, 50))) == set()
    assert relations(found["left"], found["top"]) == {"left of", "below"}


def test_the_mean_is_of_tasks_not_of_images(suite):
    records = [{"tag": "a", "right": True}] * 3 + [{"tag": "b", "right": False}]
    assert suite.summarize(records)["all"] == {"images": 4, "geneval": 0.5}


@pytest.mark.parametrize(
    ("detector", "fault"),
    [
        ("no/folder", r"no/folder: neither a folder nor MODULE:FUNCTION; give detector=FOLDER"),
        ("no_such_module:detect", r"cannot be imported \(No module named 'no_such_module'\); give"),
        ("my_detector:detects", r"cannot be imported \(module 'my_detector' has no attribute 'detects'\)"),
        ("my_detector:number", "is not a function"),
        ("os;x:y", "neither a folder nor"),
    ],
)
def test_a_detector_that_is_not_there_is_refused(suite, tmp_path, detector, fault):
    with pytest.raises(UserError, match=fault):
        GenEval(config_of(tmp_path / "prompts.jsonl", detector), tmp_path)


def test_what_a_detector_returns_is_checked(suite):
    with pytest.raises(UserError, match=r"my_detector:wrong: returned .*which is no object; give"):
        load_detector("my_detector:wrong")(Image.new("RGB", (8, 8)))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "prompt 1: JSONDecodeError"),
        ('{"tag": "a", "prompt": "", "include": []}', "tag or prompt is empty"),
        ('{"tag": "a", "prompt": "b", "include": [{"class": "c", "count": 0}]}', "class or count"),
        ('{"tag": "a", "prompt": "b", "include": [{"class": "c", "count": 1, "color": "x"}]}', "color x"),
        (
            '{"tag": "a", "prompt": "b", "include": [{"class": "c", "count": 1, "position": ["above", 0]}]}',
            "position",
        ),
    ],
)
def test_a_bad_line_of_prompts_is_named(tmp_path, line, fault):
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=fault):
        GenEval(config_of(tmp_path / "bad.jsonl", "a:b"), tmp_path)


def test_colors_need_a_detector_or_a_clip_that_names_them(suite):
    colorless = Found("cup", 0.5, (0, 0, 5, 5))
    with pytest.raises(UserError, match="the detector names no color, and prompts ask for some; give clip="):
        suite._fault(Image.new("RGB", (8, 8)), {"cup": [colorless]}, PROMPTS[2])


def test_each_prompt_is_drawn_and_searched(suite, pipeline, tmp_path):
    pipeline.config = pipeline.config.model_copy(
        update={"sampling": pipeline.config.sampling.model_copy(update={"num_inference_steps": 2})}
    )
    records = suite.measure(pipeline, 2, suite.items[2:])
    assert [each["file"] for each in records] == ["drawn/000002.png", "drawn/000003.png"]
    assert [each["reason"] for each in records] == ["cup: 0 of 1", "dog: 0 of 1"], (
        "no detection at this width"
    )
    for each in records:
        assert Image.open(tmp_path / each["file"]).size == tuple(reversed(pipeline.sizes[0]))
