"""COCO's annotation files: read, and refused by name where they are wrong."""

import json
import os
from pathlib import Path

import pytest

from megafusion.errors import UserError
from megafusion.evaluate.annotations import read_annotations, spread


def write(folder: Path, **changes: object) -> Path:
    """A file of two images, a.png and b.png, of which the first has two captions."""
    for name in ("a.png", "b.png"):
        (folder / name).touch()
    values = {
        "images": [{"id": 1, "file_name": "a.png", "key": "A-3d"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [
            {"id": 5, "image_id": 1, "caption": " an apple\n"},
            {"id": 6, "image_id": 2, "caption": "a bell"},
            {"id": 7, "image_id": 1, "caption": "an apple, red"},
        ],
    }
    path = folder / "captions.json"
    path.write_text(json.dumps(values | changes))
    return path


def test_an_image_has_its_captions_cleaned_and_in_order(tmp_path):
    first, second = read_annotations(write(tmp_path))
    assert first.captions == ("an apple", "an apple, red")
    assert (first.path, first.key, first.group) == (tmp_path / "a.png", "A-3d", "all")
    assert (second.captions, second.key) == (("a bell",), None)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("a.png", "b.png"):
        os.rename(tmp_path / name, elsewhere / name)  # noqa: PTH104
    assert read_annotations(tmp_path / "captions.json", elsewhere)[0].path == elsewhere / "a.png"


IMAGE, CAPTION = {"id": 1, "file_name": "a.png"}, {"id": 5, "image_id": 1, "caption": "an apple"}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"images": [IMAGE, {"id": 3, "file_name": "no.png"}, {"id": 4, "file_name": "none.png"}]},
            "no.png and",
        ),
        ({"images": []}, "'images' is empty"),
        ({"annotations": "none"}, "no list 'annotations'"),
        (
            {"annotations": [CAPTION, {"id": 9, "image_id": 1, "caption": " \u200b"}]},
            "annotation 9 has an empty",
        ),
        ({"annotations": [CAPTION, {"id": 9, "image_id": 1}]}, "'caption' is missing"),
        ({"annotations": [CAPTION, {"id": 9, "image_id": 8, "caption": "x"}]}, "captions of image 8"),
        ({"images": [IMAGE, IMAGE]}, "two images have one id"),
        ({"images": [IMAGE | {"group": "/../../x"}], "annotations": [CAPTION]}, "group '/../../x'"),
        ({"images": [IMAGE | {"group": "a"}, IMAGE | {"id": 2}]}, "some images have a group, others none"),
        (
            {"images": [IMAGE, {"id": 2, "file_name": "b.png"}], "annotations": [CAPTION]},
            "b.png without a caption",
        ),
        ({"images": [IMAGE | {"file_name": None}]}, "'file_name' is missing"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(tmp_path, changes, fault):
    captions = [CAPTION, *({"id": n, "image_id": n, "caption": "x"} for n in (3, 4))]
    changes = {"images": [IMAGE], "annotations": [CAPTION]} | changes
    if "no.png" in str(changes):
        changes["annotations"] = captions
    with pytest.raises(UserError, match=fault) as error:
        read_annotations(write(tmp_path, **changes))
    assert "captions.json" in str(error.value)


def test_missing_images_are_counted_and_the_way_out_named(tmp_path):
    path = write(tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").unlink()
    with pytest.raises(UserError, match=r"a\.png and 1 more that is not there; set image_folder"):
        read_annotations(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="is not a JSON object; give COCO's"):
        read_annotations(path)


def test_few_items_are_spread_over_all():
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread(range(3), 4) == spread(range(3), None) == [0, 1, 2]
