"""Input formats: img2dataset's folders, parquet, JSON Lines, interleaved documents."""

import json
import re

import pyarrow
import pytest
from pyarrow import parquet

from data_prep.readers.interleaved import GivenImage, document_segments
from data_prep.readers.records import BadRecord
from megafusion.data.config import DataConfig
from megafusion.data.loader import DataLoader
from megafusion.data.logical_stream import LogicalStream
from megafusion.data.reader import ShardFolder
from megafusion.data.source import open_sources
from megafusion.data.stream_state import DocumentKey
from megafusion.errors import UserError
from megafusion.objective.ddpm import DDPMConfig
from megafusion.sequence.packing import SequenceShape
from tests.support.raw import png, write_members, write_tar
from tests.support.small import ROOT


def documents(folder) -> list:
    shards = ShardFolder(folder)
    return [shards.read(document) for document in range(len(shards))]


def texts(folder, tokenizer) -> list[list[str | None]]:
    """Each document's segments: its texts, and None for an image."""
    return [
        [tokenizer.decode(s.data) if s.kind == "tokens" else None for s in document.segments]
        for document in documents(folder)
    ]


def streamed(folder, tokenizer, vae, made, num_streams: int) -> tuple[DataConfig, dict]:
    """The interleaved shards as a run reads them: images before all text keep their t below 0.01."""
    config = DataConfig(
        sources={"web": {"path": str(folder / "out/interleaved")}},
        tokenizer=tokenizer.path,
        vae=vae,
        sequence_length=96,
        images_per_row=3,
        num_streams=num_streams,
        image_first_max_t=0.01,
    )
    return config, open_sources(config, tokenizer, made.vae_sha256, 0)


def test_img2dataset_output_is_read_without_its_statistics(make, tmp_path):
    folder = tmp_path / "laion"
    folder.mkdir()
    for number in range(2):
        sample = {"jpg": png(), "txt": b"a square", "json": b'{"width": 40}'}
        write_tar(folder / f"{number:05d}.tar", {f"{number:05d}0000{i}": sample for i in range(3)})
        parquet.write_table(pyarrow.table({"url": ["x"]}), folder / f"{number:05d}.parquet")
        (folder / f"{number:05d}_stats.json").write_text("{}")
    make(images=(folder,))
    keys = [document.metadata["key"] for document in documents(tmp_path / "out/pairs")]
    assert keys == [f"{number:05d}0000{i}" for number in range(2) for i in range(3)]


@pytest.mark.parametrize("form", ["bytes", "hugging face"])
def test_parquet_of_images_with_captions(make, tmp_path, form):
    images = [png("red"), png("blue"), png("green")]
    column = images if form == "bytes" else [{"bytes": p, "path": None} for p in images]
    table = pyarrow.table({"jpg": column, "alt": ["red", "blue", "green"]})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=2)
    make(images=(tmp_path / "in.parquet",), image_column="jpg", caption_column="alt")
    found = [document.metadata for document in documents(tmp_path / "out/pairs")]
    assert found == [{"key": str(i), "caption": c} for i, c in enumerate(["red", "blue", "green"])]
    message = r"in\.parquet: has no column 'caption'; set caption_column to one of its columns: jpg, alt"
    with pytest.raises(UserError, match=message):
        make(images=(tmp_path / "in.parquet",), image_column="jpg", out=tmp_path / "other")


def test_texts_of_json_lines_and_parquet(make, tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n\n{"body": "two\\nlines"}\n')
    parquet.write_table(pyarrow.table({"body": ["three", "  "]}), tmp_path / "b.parquet")
    make(texts=(tmp_path / "a.jsonl", tmp_path / "b.parquet"), text_column="body")
    assert texts(tmp_path / "out/text", tokenizer) == [["one"], ["two\nlines"], ["three"]]
    report = json.loads((tmp_path / "out/text/report.json").read_text())
    assert (report["inputs"], report["kept"], report["dropped"]) == (4, 3, {"empty text": 1})


LISTS = [
    {"texts": ["first", None, "then", None], "images": [None, "a.png", None, "deep/b.png"]},
    {"texts": [None, "only"], "images": ["a.png", None]},
    {"texts": ["no image at all"], "images": [None]},
]


@pytest.fixture(params=["folder", "tar", "parquet"])
def interleaved(request, tmp_path) -> dict:
    """Three documents, whose images are in a folder, in a tar, or bytes of parquet."""
    images = {"a": {"png": png("red")}, "deep/b": {"png": png("blue")}}
    if request.param == "parquet":
        bytes_of = {"a.png": png("red"), "deep/b.png": png("blue"), None: None}
        rows = [row | {"images": [bytes_of[name] for name in row["images"]]} for row in LISTS]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "docs.parquet")
        return {"documents": (tmp_path / "docs.parquet",)}
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, LISTS)))
    values = {"documents": (tmp_path / "docs.jsonl",), "document_images": tmp_path / "images"}
    if request.param == "tar":
        write_tar(tmp_path / "images", images)
        return values
    (tmp_path / "images/deep").mkdir(parents=True)
    for key, members in images.items():
        (tmp_path / f"images/{key}.png").write_bytes(members["png"])
    return values


def test_interleaved_documents_keep_the_order_of_their_segments(make, tmp_path, tokenizer, interleaved):
    (made,) = make(**interleaved)
    folder = tmp_path / "out/interleaved"
    expected = [["first", None, "then", None], [None, "only"], ["no image at all"]]
    assert texts(folder, tokenizer) == expected
    assert (made.kind, made.num_images, made.max_images) == ("interleaved", 3, 2)
    first, second, _ = documents(folder)
    assert (first.segments[1].data == second.segments[0].data).all()  # a.png, both times
    assert (first.segments[1].data != first.segments[3].data).any()
    assert (folder / "sheet.png").is_file()


MMC4 = {
    "url": "http://x.org/page.html",
    "text_list": ["One.", "Two.", "Three.", " ", "Five."],
    "image_info": [
        {"image_name": "late.png", "raw_url": "http://x.org/1", "matched_text_index": 4, "matched_sim": 0.2},
        {
            "image_name": "b.png",
            "raw_url": "http://x.org/2",
            "matched_text_index": 2,
            "face_detections": None,
        },
        {"image_name": "a.png", "raw_url": "http://x.org/3", "matched_text_index": 2, "matched_sim": 0.3},
    ],
    "similarity_matrix": [[0.1] * 5] * 3,
    "could_have_url_duplicate": 0,
}


@pytest.mark.parametrize("source", ["folder", "tar"])
def test_images_of_mmc4_are_placed_before_their_sentences(make, tmp_path, tokenizer, source):
    images = {"a": png("red"), "b": png("blue"), "late": png("green")}
    if source == "tar":
        write_tar(tmp_path / "images", {key: {"png": content} for key, content in images.items()})
    else:
        (tmp_path / "images").mkdir()
        for key, content in images.items():
            (tmp_path / f"images/{key}.png").write_bytes(content)
    plain = {"text_list": ["No image."], "image_info": []}
    (tmp_path / "docs_shard_0.jsonl").write_text("".join(f"{json.dumps(d)}\n" for d in (MMC4, plain)))
    make(documents=(tmp_path / "docs_shard_0.jsonl",), document_images=tmp_path / "images")
    found = texts(tmp_path / "out/interleaved", tokenizer)
    assert found == [["One. Two.", None, None, "Three.", None, "Five."], ["No image."]]
    one, two, three = (
        s.data for s in documents(tmp_path / "out/interleaved")[0].segments if s.kind == "moments"
    )
    # blue, red, green, identified by documents of one image each.
    rows = [{"texts": [None, color], "images": [f"{color}.png", None]} for color in ("b", "a", "late")]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make(
        out=tmp_path / "each",
        documents=(tmp_path / "one.jsonl",),
        document_images=tmp_path / "images",
        batch_size=3,
    )
    expected = [document.segments[0].data for document in documents(tmp_path / "each/interleaved")]
    for moments, other in zip((one, two, three), expected, strict=True):
        assert (moments == other).all()


def test_the_examples_of_the_docs_are_read_as_described():
    obelics, mmc4, edit = re.findall(r"```json\n(.*)\n```", (ROOT / "docs/data.md").read_text())
    assert document_segments(json.loads(obelics), str.encode) == ["Fold it.", b"fold.png", "Cut it."]
    assert document_segments(json.loads(mmc4), str.encode) == ["Fold it.", b"cut.png", "Cut it."]
    source, *rest = document_segments(json.loads(edit), str.encode)
    assert isinstance(source, GivenImage)
    assert [source, *rest] == [b"red.png", "Make it blue.", b"blue.png"]
    assert not isinstance(rest[1], GivenImage)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_edits_give_their_source(make, tmp_path, tokenizer, form):
    named = {"red.png": png("red"), "blue.png": png("blue")}
    edits = [("red.png", "make it blue", "blue.png"), ("blue.png", "make it red", "red.png")]
    rows = [dict(zip(("source", "instruction", "target"), edit, strict=True)) for edit in edits]
    path = tmp_path / f"edits.{form}"
    if form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
        write_members(tmp_path / "named", list(named.items()))
        make(documents=(path,), document_images=tmp_path / "named")
    else:
        rows = [row | {side: {"bytes": named[row[side]]} for side in ("source", "target")} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        make(documents=(path,))
    folder = tmp_path / "out/interleaved"
    assert texts(folder, tokenizer) == [[None, "make it blue", None], [None, "make it red", None]]
    assert [document.metadata["given"] for document in documents(folder)] == [[0], [0]]


def test_given_images_keep_their_mark_where_a_document_is_split(make, tmp_path):
    row = {
        "texts": [None, "a", None, "b", None, "c"],
        "images": [png(), None, png("blue"), None, png("green"), None],
        "given": [True, None, False, None, True, None],
    }
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "docs.parquet")
    make(documents=(tmp_path / "docs.parquet",), split={"images": 2})
    found = documents(tmp_path / "out/interleaved")
    assert [document.metadata.get("given") for document in found] == [[0], [0]]
    assert [document.metadata.get("after_text") for document in found] == [None, True]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "a", "instruction": " ", "target": "b"}, "an edit without an instruction"),
        ({"source": None, "instruction": "x", "target": "b"}, "an edit without its source or target image"),
        ({"source": "a", "instruction": "x", "target": {"bytes": None, "path": None}}, "or target image"),
        ({"texts": ["a"], "images": [None], "given": [True]}, "`given` is true where there is no image"),
        ({"texts": ["a"], "images": [None], "given": []}, "`given` is not a list of true, false and null"),
        ({"texts": ["a"], "images": [None], "given": [1]}, "`given` is not a list of true, false and null"),
        ({"source": "a", "target": "b"}, "nor `source`, `instruction` and `target`"),
    ],
)
def test_what_is_not_an_edit_or_not_given_is_named(values, message):
    with pytest.raises(BadRecord, match=message):
        document_segments(values, str.encode)


def test_published_obelics_needs_images_named_by_their_urls(make, tmp_path, tokenizer):
    """URLs, and metadata as a JSON string: read if a tar has members of these names, else refused."""
    url = "http://x.org/a.png?size=1"
    row = {
        "images": [None, url],
        "metadata": json.dumps([None, {"alt_text": "a"}]),
        "general_metadata": json.dumps({"url": "http://x.org"}),
        "texts": ["before", None],
    }
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "obelics.parquet")
    message = r"obelics\.parquet, row 0: an image is a URL: fetch the images and store them"
    with pytest.raises(UserError, match=message):
        make(documents=(tmp_path / "obelics.parquet",))
    write_members(tmp_path / "images", [(url, png())])
    make(documents=(tmp_path / "obelics.parquet",), document_images=tmp_path / "images")
    assert texts(tmp_path / "out/interleaved", tokenizer) == [["before", None]]


def test_interleaved_shards_go_through_a_stream(make, tmp_path, tokenizer, vae_folder):
    rows = [{"texts": [f"text {i}", None, "end"], "images": [None, png(), None]} for i in range(12)]
    rows += [{"texts": [None, "after"], "images": [png("blue"), None]} for _ in range(12)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "docs.parquet")
    (made,) = make(documents=(tmp_path / "docs.parquet",), documents_per_shard=5)
    config, sources = streamed(tmp_path, tokenizer, vae_folder, made, num_streams=2)
    shape = SequenceShape(96, 3, (16,), 4, ((8, 8),))
    times = {True: [], False: []}
    with DataLoader(config, sources, shape, tokenizer, DDPMConfig().build(), 2, range(2), 1) as stream:
        for _ in range(30):
            for batch in stream.next():
                for start, t in zip(batch.image_start[0], batch.t[0], strict=True):
                    if start >= 0:
                        opens = batch.tokens[0, start - 2] == tokenizer.bos
                        times[bool(opens)].append(float(t))
    assert max(times[True]) < 0.01  # an image that starts a document is before all of its text
    assert max(times[False]) > 0.5


def test_images_that_start_a_later_part_of_a_document_are_after_its_text(
    make, tmp_path, tokenizer, vae_folder
):
    row = {"texts": ["start", *[None] * 4], "images": [None, png(), png("blue"), png("green"), png("black")]}
    opened = {"texts": [None] * 3, "images": [png(), png("blue"), png("green")]}
    parquet.write_table(pyarrow.Table.from_pylist([row, opened]), tmp_path / "docs.parquet")
    (made,) = make(documents=(tmp_path / "docs.parquet",), split={"images": 2})
    after = [
        document.metadata.get("after_text", False) for document in documents(tmp_path / "out/interleaved")
    ]
    assert after == [False, True, False, False]
    config, sources = streamed(tmp_path, tokenizer, vae_folder, made, num_streams=1)
    shape = SequenceShape(96, 3, (16,), 4, ((8, 8),))
    logical = LogicalStream(0, sources, config, shape, tokenizer, DDPMConfig().build())
    bounds = {}
    for order in range(4):
        document = logical._documents.get(DocumentKey("web", 0, order))
        number = sources["web"].document_at(0, 0, order)
        bounds[number] = [image.max_t for image in document.images]
    assert bounds == {0: [1.0, 1.0], 1: [1.0, 1.0], 2: [0.01, 0.01], 3: [0.01]}


def test_a_byte_order_mark_is_not_text(make, tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}\n')
    make(texts=(tmp_path / "a.txt", tmp_path / "b.jsonl"))
    assert texts(tmp_path / "out/text", tokenizer) == [["one"], ["two"], ["three"]]


def test_a_sheet_finds_the_one_document_with_an_image(make, tmp_path):
    rows = [{"texts": [f"text {i}"], "images": [png() if i == 58 else None]} for i in range(80)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "docs.parquet")
    make(documents=(tmp_path / "docs.parquet",))
    assert (tmp_path / "out/interleaved/sheet.png").is_file()


def test_long_documents_are_split_and_images_stay_complete(make, tmp_path, tokenizer):
    words = " ".join(["word"] * 30)
    row = {
        "texts": ["start", None, None, None, words],
        "images": [None, png(), png("blue"), png("green"), None],
    }
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "docs.parquet")
    (made,) = make(documents=(tmp_path / "docs.parquet",), split={"tokens": 12, "images": 2})
    assert (made.max_images, made.max_tokens_beside_images) == (2, 12)
    found = documents(tmp_path / "out/interleaved")
    images = [sum(s.kind == "moments" for s in document.segments) for document in found]
    assert images[:2] == [2, 1]
    assert sum(images) == 3
    assert [document.metadata["part"] for document in found] == list(range(len(found)))
    tokens = [int(t) for document in found for s in document.segments if s.kind == "tokens" for t in s.data]
    assert tokens == tokenizer.encode("start") + tokenizer.encode(words)
    assert max(sum(len(s.data) for s in d.segments if s.kind == "tokens") for d in found) == 12
