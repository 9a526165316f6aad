"""Which files of the inputs are read: known forms by their content; the others are ignored and told."""

import io
import json
import os
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from data_prep.config import KEYS_OF_KIND, KEYS_WITHOUT_EFFECT, PreprocessConfig
from data_prep.filters import read_keys
from data_prep.readers.splits import Inputs
from data_prep.vae.config import AutoencoderConfig
from megafusion.config import parse_config
from megafusion.data.reader import ShardFolder
from megafusion.errors import UserError
from megafusion.storage import read_lines, write_file
from tests.support.raw import encoded, png, write_tar


def table(**columns) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


def tar(tmp_path: Path, **members: bytes) -> bytes:
    return write_tar(tmp_path / "tar", {"a": members or {"png": png(), "txt": b"x"}}).read_bytes()


def image(form: str) -> bytes:
    return encoded(Image.new("RGB", (40, 40), "red"), form)


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def keys_in(folder: Path) -> list[str]:
    shards = ShardFolder(folder)
    return [shards.read(number).metadata["key"] for number in range(len(shards))]


def forms_of(kind: str, *paths: Path, **options) -> dict[str, str]:
    return {file.name: split.form for split in Inputs(kind, paths, **options).splits for file in split.files}


CONTENTS = {
    "parquet": table(text=["one"], image=[png()], caption=["x"]),
    "jsonl": b'\xef\xbb\xbf\n{"text": "one"}\n',
    "lines": b"one\n",
    "image": png(),
    "json": b'{\n "text": "one"\n}\n',
    "other json": b'{"description": "one"}\n',
    "binary": bytes(range(256)),
    "empty": b"",
}
READ_BY_CONTENT = {"text": {"parquet", "jsonl"}, "pair": {"parquet", "tar", "image"}}
BY_SUFFIX = {
    "text": {".txt": "lines", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"},
    "pair": {
        ".png": "image",
        ".JPG": "image",
        ".Jfif": "image",
        ".jpe": "image",
        ".avif": "image",
        ".tar": "tar",
    }
    | {".parquet": "parquet"},
}
OTHER_SUFFIXES = [".md", ".json", ".bin", ".csv", ".html", ""]
LEFTOVERS = [".bak", ".part", ".crdownload", ".txt~"]


@pytest.mark.parametrize("kind", ["text", "pair"])
@given(data=st.data())
@hypothesis_settings(max_examples=60, deadline=None)
def test_a_folder_is_read_by_content_and_suffix_and_the_rest_is_told(tmp_path_factory, kind, data):
    folder = tmp_path_factory.mktemp("in")
    contents = CONTENTS | {"tar": tar(folder)}
    (folder / "tar").unlink()
    expected, ignored = {}, Counter()
    for number in range(data.draw(st.integers(1, 6))):
        content = data.draw(st.sampled_from(sorted(contents)))
        suffix = data.draw(st.sampled_from([*BY_SUFFIX[kind], *OTHER_SUFFIXES, *LEFTOVERS]))
        prefix = data.draw(st.sampled_from(["", "", "", ".", "._"]))
        parent = folder / data.draw(st.sampled_from(["", "deep/er", "deep"]))
        parent.mkdir(parents=True, exist_ok=True)
        name = f"{prefix}{number}{suffix}"
        (parent / name).write_bytes(contents[content])
        is_json = kind == "pair" and suffix == ".json"  # only ever beside an image
        by_suffix = BY_SUFFIX[kind].get(suffix)
        if prefix:
            ignored["hidden"] += 1
        elif suffix in LEFTOVERS:
            ignored["no suffix" if suffix == ".txt~" else suffix] += 1
        elif by_suffix == "image":
            expected[name] = "image"
        elif content in READ_BY_CONTENT[kind] and not (is_json or by_suffix == content == "jsonl"):
            expected[name] = content
        elif by_suffix and content not in ("tar", "image", "parquet"):
            expected[name] = by_suffix
        else:
            ignored[suffix or "no suffix"] += 1
    for hidden in (".cache", ".git"):
        (folder / hidden / "deep").mkdir(parents=True)
        (folder / hidden / "deep/a.txt").write_text("hidden\n")
    inputs = Inputs(kind, [folder])
    assert {file.name: split.form for split in inputs.splits for file in split.files} == expected
    assert inputs.ignored == ignored + Counter({"hidden": 2})


def test_a_dataset_as_it_is_downloaded_holds_its_documents_alone(make, tmp_path, tokenizer):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / ".cache/huggingface").mkdir(parents=True)
    (folder / ".cache/huggingface/a.parquet.lock").write_text("")
    (folder / "data/train.parquet").write_bytes(table(text=["one", "two"]))
    (folder / "data/more.ndjson").write_text('{"text": "three"}\n')
    for name in ("README.md", ".gitattributes", "._a.txt", ".DS_Store", "dataset_info.json"):
        (folder / name).write_bytes(b'{"features": "\x00"}\nline\nline\n')
    make(texts=(folder,))
    shards = ShardFolder(tmp_path / "out/text")
    found = [shards.read(number) for number in range(len(shards))]
    assert [tokenizer.decode(document.segments[0].data) for document in found] == ["three", "one", "two"]
    assert [Path(document.metadata["file"]).name for document in found] == [
        "more.ndjson",
        *["train.parquet"] * 2,
    ]
    assert report(tmp_path / "out/text")["ignored"] == {".json": 1, ".md": 1, "hidden": 4}


def test_named_files_of_no_use_are_refused_by_name(make, tmp_path):
    for name, content in (("a.png", png()), ("a.bin", b"a\0b"), ("a.tar", tar(tmp_path))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: not a file of the forms parquet, jsonl, lines"):
            make(texts=(tmp_path / name,))
    (tmp_path / "a.csv").write_text("one,two\n")
    with pytest.raises(UserError, match=r"a\.csv: not a file of the forms tar, parquet, image"):
        make(images=(tmp_path / "a.csv",))
    (tmp_path / "only").mkdir()
    (tmp_path / "a.csv").rename(tmp_path / "only/a.csv")
    with pytest.raises(UserError, match=r"out/text: .*no valid document.*files ignored: 1 x \.csv"):
        make(texts=(tmp_path / "only",))


@pytest.mark.parametrize("layout", ["files", "webdataset", "parquet"])
def test_each_layout_of_img2dataset_is_read(make, tmp_path, layout):
    """Of four downloads one has failed. Tables and statistics beside the images are not documents."""
    folder = tmp_path / "laion"
    folder.mkdir()
    keys = [f"0000000{number}" for number in range(4)]
    images = [None if number == 2 else png() for number in range(4)]
    columns = {"key": keys, "url": ["x"] * 4, "caption": ["a square"] * 4, "status": ["success"] * 4}
    samples = {
        key: {"jpg": content, "txt": b"a square", "json": b"{}"}
        for key, content in zip(keys, images, strict=True)
        if content
    }
    if layout == "files":
        (folder / "00000").mkdir()
        for key, members in samples.items():
            for suffix, content in members.items():
                (folder / f"00000/{key}.{suffix}").write_bytes(content)
    elif layout == "webdataset":
        write_tar(folder / "00000.tar", samples)
    else:
        columns |= {"jpg": images}
    (folder / "00000.parquet").write_bytes(table(**columns))
    (folder / "00000_stats.json").write_text("{}")
    (made,) = make(images=(folder,), image_column="jpg")
    assert made.num_documents == 3
    found = report(tmp_path / "out/pairs")
    assert (found["bad"], found["dropped"]) == ({}, {"no image": 1} if layout == "parquet" else {})
    assert found["ignored"] == {".json": 1} | ({} if layout == "parquet" else {"table of img2dataset": 1})


def test_an_image_that_is_only_a_path_is_bad_input(make, tmp_path):
    rows = [{"image": {"bytes": None, "path": "a.png"}, "caption": "x"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 0: image is a path without bytes"):
        make(images=(tmp_path / "a.parquet",))


VISIBLE = st.characters(exclude_categories=("C", "Z"), exclude_characters="\ufeff")
KEYS = st.text(st.one_of(VISIBLE, st.just(" ")), min_size=1).map(str.strip).filter(bool)


@given(
    keys=st.lists(KEYS, min_size=1, unique=True),
    mark=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    ends=st.booleans(),
)
def test_a_side_file_has_one_key_per_line(tmp_path_factory, keys, mark, newline, ends):
    path = tmp_path_factory.mktemp("side") / "keys.txt"
    text = newline.join(keys) + newline * ends
    path.write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
    assert read_lines(path) == keys
    assert read_keys(path) == {key.removeprefix("./") for key in keys}


@given(st.text(min_size=1), st.sampled_from(["latin-1", "utf-16", "cp1252", "shift_jis"]))
def test_a_side_file_of_another_encoding_is_refused_in_a_sentence(tmp_path_factory, text, encoding):
    path = tmp_path_factory.mktemp("side") / "keys.txt"
    path.write_bytes(content := f"é{text}".encode(encoding, "ignore") + b"\xff")
    with pytest.raises(UserError, match=r"keys\.txt: is not UTF-8 from byte \d+ on; save it as UTF-8"):
        read_lines(path)
    assert content


def test_keys_with_spaces_and_of_tars_packed_from_a_folder_are_found(make, tmp_path):
    sample = {"png": png(), "txt": b"x"}
    path = write_tar(tmp_path / "a.tar", {"./red apple": sample, "./b": sample, "./c": sample})
    (tmp_path / "keys.txt").write_text("\ufeffred apple\r\n./b\r\n\r\n")
    make(images=(path,), keys=tmp_path / "keys.txt")
    assert keys_in(tmp_path / "out/pairs") == ["./red apple", "./b"]
    (tmp_path / "keys.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"keys\.txt: is not UTF-8 from byte 3 on"):
        make(images=(path,), keys=tmp_path / "keys.txt", out=tmp_path / "other")


def folder_of_images(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.png").write_bytes(png())
        (folder / f"{name}.txt").write_text(name)
    return folder


def test_linked_folders_are_followed(make, tmp_path):
    folder = folder_of_images(tmp_path / "in", "a")
    folder_of_images(tmp_path / "elsewhere/deep", "b")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "c.png").symlink_to(folder / "a.png")
    (folder / "c.txt").write_text("c")
    (folder / "lost.png").symlink_to(tmp_path / "nowhere")
    make(images=(folder,))
    assert keys_in(tmp_path / "out/pairs") == ["a", "c", "linked/deep/b"]
    assert report(tmp_path / "out/pairs")["ignored"] == {"neither a file nor a folder": 1}
    (tmp_path / "elsewhere/deep/up").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"linked/deep/up: is the same folder as .*in/linked, by a link"):
        make(images=(folder,))


@pytest.mark.parametrize(
    "again",
    ["in", "in/../in", "in/deep", "in/a.png", "link", "i[n]", "in/*", "in/{a,a}.png", "link.tar"],
)
def test_an_input_named_twice_is_refused(make, tmp_path, again):
    folder_of_images(tmp_path / "in", "a")
    folder_of_images(tmp_path / "in/deep", "b")
    write_tar(tmp_path / "in/t.tar", {})
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "link.tar").symlink_to(tmp_path / "in/t.tar")
    with pytest.raises(UserError, match=r"is the same folder as|is an input twice"):
        make(images=(tmp_path / "in", tmp_path / again))


SUFFIXES = {
    "jfif": "JPEG",
    "jpe": "JPEG",
    "avif": "AVIF",
    "JPG": "JPEG",
    "TiFF": "TIFF",
    "img": "PNG",
    "": "GIF",
}


@pytest.mark.parametrize(
    ("form", "suffix"), [*(("folder", suffix) for suffix in SUFFIXES), *(("tar", s) for s in SUFFIXES if s)]
)
def test_images_are_known_by_content_and_captions_by_a_suffix_of_any_case(make, tmp_path, suffix, form):
    content = image(SUFFIXES[suffix])
    if form == "tar":
        write_tar(tmp_path / "in", {"A": {suffix: content, "TXT": b"red", "cls": b"3"}})
    else:
        (tmp_path / "in").mkdir()
        (tmp_path / f"in/A{'.' * bool(suffix)}{suffix}").write_bytes(content)
        (tmp_path / "in/A.TXT").write_text("red")
    make(images=(tmp_path / "in",))
    assert keys_in(tmp_path / "out/pairs") == ["A"]


def test_masks_beside_an_image_are_not_images_of_the_pair(make, tmp_path):
    plain = {"png": png(), "txt": b"red"}
    make(images=(write_tar(tmp_path / "plain.tar", {"a": plain}),), out=tmp_path / "plain")
    masks = {"seg": png("blue"), "mask.png": png("blue")}
    make(images=(write_tar(tmp_path / "a.tar", {"a": masks | plain}),))
    moments = [ShardFolder(tmp_path / name / "pairs").read(0).segments[1].data for name in ("plain", "out")]
    assert (moments[0] == moments[1]).all()


def test_invisible_characters_are_no_caption(make, tmp_path, tokenizer):
    folder = folder_of_images(tmp_path / "in", "a", "b")
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfred apple\r\n")
    (folder / "b.txt").write_text("\u200b")
    make(images=(folder,), on_error="skip")
    document = ShardFolder(tmp_path / "out/pairs").read(0)
    assert document.metadata["caption"] == "red apple"
    assert document.segments[0].data.tolist() == tokenizer.encode("red apple")
    assert report(tmp_path / "out/pairs")["bad"] == {"empty caption": 1}


def test_invisible_characters_are_no_text(make, tmp_path, tokenizer):
    (tmp_path / "t.jsonl").write_text('{"text": "\\ufeffone\\u200b two"}\n{"text": "\\u2060"}\n')
    rows = [{"texts": ["\ufeff a \u200b", "\u200b"], "images": [None, None]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    make(texts=(tmp_path / "t.jsonl",), documents=(tmp_path / "d.parquet",))
    for kind, text in (("text", "one two"), ("interleaved", "a")):
        (segment,) = ShardFolder(tmp_path / "out" / kind).read(0).segments
        assert segment.data.tolist() == tokenizer.encode(text)
    assert report(tmp_path / "out/text")["dropped"] == {"empty text": 1}


def test_output_inside_an_input_is_never_read(make, tmp_path, capsys):
    folder = folder_of_images(tmp_path / "in", "a", "b")
    (folder / "t.txt").write_text("one\ntwo\n")
    inputs = {"images": (folder,), "texts": (folder,)}
    for again in (False, True):
        make(**inputs, out=folder / "shards")
        assert keys_in(folder / "shards/pairs") == ["a", "b"]
        assert len(ShardFolder(folder / "shards/text")) == 4
        # The console wraps long paths anywhere.
        assert ("shards/pairs:uptodate" in "".join(capsys.readouterr().err.split())) == again
    partial = folder / "shards/pairs.0123456789ab.partial"
    os.renames(folder / "shards/pairs", partial)  # as a killed command leaves it
    (partial / "manifest.json").unlink()
    make(**inputs, out=folder / "other")
    assert keys_in(folder / "other/pairs") == ["a", "b"]
    assert report(folder / "other/pairs")["ignored"] == {".txt": 1, "folder of outputs": 2}
    with pytest.raises(UserError, match=r"other/pairs: holds shards, which are the output of preprocessing"):
        make(images=(folder / "other/pairs",), out=tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (("config.yaml", "environment.json", "samples/step-00000002.txt", "metrics.jsonl"), "a run"),
        (("config.json", "diffusion_pytorch_model.safetensors", "reconstructions.txt"), "a model"),
        (("config.json", "model-00001-of-00002.safetensors"), "a model"),
    ],
)
def test_what_other_commands_wrote_is_no_input(make, tmp_path, files, what):
    folder = folder_of_images(tmp_path / "in", "a")
    for name in files:
        write_file(folder / "made" / name, "one\n")
        write_file((folder / "made" / name).with_suffix(".png"), png())
    make(images=(folder,), texts=(folder,))
    assert keys_in(tmp_path / "out/pairs") == ["a"]
    assert len(ShardFolder(tmp_path / "out/text")) == 1
    assert report(tmp_path / "out/pairs")["ignored"] == {"folder of outputs": 1}
    with pytest.raises(UserError, match=rf"in/made: holds {what}; name its inputs"):
        make(images=(folder / "made",), out=tmp_path / "other")


def test_images_of_one_key_in_a_folder_are_bad_input(make, tmp_path):
    folder = folder_of_images(tmp_path / "in", "a", "b")
    (folder / "a.jpg").write_bytes(image("JPEG"))
    with pytest.raises(UserError, match=r"in, key 'a': the folder has this key twice; .*on_error=skip"):
        make(images=(folder,))
    make(images=(folder,), on_error="skip")
    assert keys_in(tmp_path / "out/pairs") == ["b"]
    assert report(tmp_path / "out/pairs")["bad"] == {"the folder has this key twice": 2}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("in/a.png", ["a"]),
        ("in/*.png", ["a", "b"]),
        ("in/*", ["a", "b", "deep/c"]),
        ("in/{b,a}.png", ["b", "a"]),
        ("in/**/c.png", ["c"]),
        ("{in/deep,in/a.png}", ["deep/c", "a"]),
        ("in/[b-z].png", ["b"]),
    ],
)
def test_single_images_and_patterns_are_expanded(make, tmp_path, pattern, expected):
    folder_of_images(tmp_path / "in", "a", "b")
    folder_of_images(tmp_path / "in/deep", "c")
    make(images=(tmp_path / pattern,))
    assert keys_in(tmp_path / "out/pairs") == expected
    make(images=(tmp_path / pattern,))
    with pytest.raises(UserError, match=r"in/z\.png: no such file or folder"):
        make(images=(tmp_path / "in/{a,z}.png",), out=tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl.gz", b"x"), ("a.txt", b"\x1f\x8b\x08"), ("a.ndjson", b"PK\x03\x04"), ("a.PARQUET.zst", b"x")],
)
def test_compressed_texts_in_a_folder_are_refused(make, tmp_path, name, content):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: is compressed.*unpack it first"):
        make(texts=(tmp_path / "in",))


def test_a_folder_as_spark_writes_it(tmp_path):
    folder = tmp_path / "a.parquet"
    folder.mkdir()
    for name in ("part-0.snappy.parquet", "_metadata"):
        (folder / name).write_bytes(CONTENTS["parquet"])
    for name in ("_SUCCESS", ".part-0.crc", "backup.ZIP", "notes of 3.5 and more"):
        (folder / name).write_bytes(b"PK\x03\x04")
    inputs = Inputs("text", [folder])
    assert [split.files for split in inputs.splits] == [(folder / "part-0.snappy.parquet",)]
    assert inputs.ignored == {"no suffix": 3, ".zip": 1, "hidden": 1}


def test_every_key_is_known_to_matter_or_not():
    kinds = set().union(*KEYS_OF_KIND.values())
    assert kinds | KEYS_WITHOUT_EFFECT | {"tokenizer", "vae"} == set(PreprocessConfig.model_fields)
    assert not kinds & KEYS_WITHOUT_EFFECT


@pytest.mark.parametrize("form", ["folder", "tar", "keys"])
def test_inputs_that_moved_are_known_by_their_hashes(make, tmp_path, form, capsys):
    folder = folder_of_images(tmp_path / "in", "a", "b")
    tar = write_tar(tmp_path / "in.tar", {"a": {"png": png(), "txt": b"x"}})
    (tmp_path / "keys").write_text("a\n")
    inputs = {"images": (folder if form != "tar" else tar,)} | {"keys": tmp_path / "keys"}
    make(**inputs)
    shard = tmp_path / "out/pairs/shard-000000.tar"
    written = shard.stat().st_ino
    moved = tmp_path / "moved"
    key, path = ("keys", tmp_path / "keys") if form == "keys" else ("images", inputs["images"][0])
    path.rename(moved)
    capsys.readouterr()
    inputs[key] = moved if form == "keys" else (moved,)
    make(**inputs)
    assert "pairs:uptodate" in "".join(capsys.readouterr().err.split())
    assert shard.stat().st_ino == written
    changed = moved / "a.txt" if form == "folder" else moved
    changed.write_bytes(changed.read_bytes() + b"\n")
    with pytest.raises(UserError, match=rf"out/pairs: holds 1 documents made with other values of {key};"):
        make(**inputs)


@pytest.mark.parametrize(
    ("values", "warnings"),
    [
        ({"text_column": "x", "keys": "k", "texts": ["t"]}, {"keys": "images"}),
        ({"split": {}, "document_images": "d", "images": ["i"]}, {"document_images": "documents"}),
        ({"caption_column": "x", "image_storage": "pixels", "texts": ["t"]}, {"caption_column": "images"}),
        ({"images": ["i"], "filters": {}, "image_sizes": [[8, 8]], "texts": [], "overwrite": True}, {}),
    ],
)
def test_keys_of_inputs_that_are_not_there_are_warned_of(values, warnings):
    config = parse_config(PreprocessConfig, {"out": "o", "tokenizer": "t", "vae": "v"} | values, "test")
    given = [f"warning: {key} has no effect without {needs}" for key, needs in warnings.items()]
    others = {"image_storage": "images or documents", "split": "documents"}
    given += [f"warning: {key} has no effect without {others[key]}" for key in others if key in values]
    assert sorted(config.warnings()) == sorted(given)


@pytest.mark.parametrize("side", [16_385, 1_000_000])
def test_a_size_that_no_memory_holds_is_refused(side):
    preprocessing = {"out": "o", "tokenizer": "t", "vae": "v", "image_sizes": [[side, 64]]}
    autoencoder = {"out": "o", "data": {"images": ["i"], "image_size": side}, "network": {"channels": [8]}}
    autoencoder["optimization"] = {"num_steps": 1}
    for cls, values in ((PreprocessConfig, preprocessing), (AutoencoderConfig, autoencoder)):
        with pytest.raises(UserError, match=rf"(less than or equal to|and <=) 16384 \(got {side}\)"):
            parse_config(cls, values, "test")


def test_shards_of_another_recipe_are_replaced_only_where_that_is_said(make, tmp_path):
    (tmp_path / "t.txt").write_text("one\n")
    images = write_tar(tmp_path / "a.tar", {"a": {"png": png(), "txt": b"x"}})
    make(images=(images,))
    shard = tmp_path / "out/pairs/shard-000000.tar"
    written = shard.stat().st_ino
    make(images=(images,), texts=(tmp_path / "t.txt",), text_column="body")  # pairs do not depend on these
    assert shard.stat().st_ino == written
    for change in ({"image_sizes": ((16, 16),)}, {"filters": {"min_side": 2}}, {"image_storage": "pixels"}):
        (name,) = change
        with pytest.raises(UserError, match=rf"out/pairs: holds 1 documents .*{name}.* set overwrite=true"):
            make(images=(images,), texts=(tmp_path / "t.txt",), **change)
        assert shard.stat().st_ino == written
    with pytest.raises(
        UserError, match=r"out/text: holds 1 documents made with other values of text_column;"
    ):
        make(texts=(tmp_path / "t.txt",))
    killed = tmp_path / "out/pairs.old.partial"  # what an earlier command had not deleted
    killed.mkdir()
    (killed / "shard-000000.tar").touch()
    make(images=(images,), image_sizes=((16, 16),), overwrite=True)
    assert shard.stat().st_ino != written
    assert not killed.exists()
