"""Losses count in inputs, limits are not told as damage, and what the scan accepts can be written."""

import json
import os
import random
import shutil
import tarfile
from contextlib import suppress

import pyarrow
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from data_prep.config import PreprocessConfig
from data_prep.filters import inspect_record
from data_prep.images import decode_caption
from data_prep.readers.parquet import BATCH_BYTES, ParquetPairs, ParquetTexts
from data_prep.readers.records import UNKNOWN, BadRecord, RawPair, Record
from data_prep.readers.webdataset import TarReader
from data_prep.write import DocumentBuilder
from megafusion.errors import UserError
from tests.support.raw import drawing, encoded, png, write_tar

within_a_test = hypothesis_settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25
)


def report_of(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


def damage(path, place: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


def write_texts(path, num_rows: int, rows_per_group: int, **options) -> tuple[int, int]:
    """Parquet of texts; first byte and size of its second row group."""
    table = pyarrow.table({"text": [f"text {i}" for i in range(num_rows)]})
    parquet.write_table(table, path, row_group_size=rows_per_group, write_page_checksum=True, **options)
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    return column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size


def test_the_rows_of_a_damaged_row_group_count_each(make, tmp_path):
    start, size = write_texts(tmp_path / "t.parquet", 2000, 1000)
    damage(tmp_path / "t.parquet", start + size // 2, b"\xff" * 64)
    with pytest.raises(UserError, match=r"t\.parquet, row 1000: a row group is not readable as parquet; fix"):
        make(texts=(tmp_path / "t.parquet",))
    message = r"1000 of 2000 inputs are bad \(1000 x a row group is not readable as parquet\), more than max"
    with pytest.raises(UserError, match=message):
        make(texts=(tmp_path / "t.parquet",), on_error="skip")
    (made,) = make(texts=(tmp_path / "t.parquet",), on_error="skip", max_skip_rate=0.5)
    report = report_of(tmp_path / "out/text")
    assert (made.num_documents, report["inputs"], sum(report["bad"].values())) == (1000, 2000, 1000)
    assert report["bad_by_estimate"] == {}


@within_a_test
@given(data=st.data(), codec=st.sampled_from(["none", "snappy", "zstd", "gzip"]))
def test_every_row_is_read_or_counted_as_lost_wherever_the_damage_is(tmp_path, data, codec):
    num_rows, rows_per_group = data.draw(st.integers(300, 900)), data.draw(st.integers(50, 299))
    start, size = write_texts(tmp_path / "t.parquet", num_rows, rows_per_group, compression=codec)
    place = data.draw(st.integers(0, size - 8))
    content = data.draw(st.binary(min_size=8, max_size=64))[: size - place]  # the footer stays whole
    damage(tmp_path / "t.parquet", start + place, content)
    reader, numbers, num_lost = ParquetTexts(tmp_path / "t.parquet", "text"), [], 0
    for record in reader.records():
        assert int(record.key) == len(numbers) + num_lost
        if record.problem:
            num_lost += record.num_lost
            continue
        numbers.append(int(record.key))
        with suppress(BadRecord):
            assert reader.read(record) == f"text {record.key}"
    assert len(numbers) + num_lost == num_rows


def pairs(number: int) -> dict:
    return {f"k{i:03d}": {"png": png(), "txt": b"a square"} for i in range(number)}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.61])
def test_a_cut_tar_beside_complete_ones_has_lost_what_they_hold_more(tmp_path, make, share):
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in "abc":
        write_tar(folder / f"{name}.tar", pairs(20))
    content = (folder / "b.tar").read_bytes()
    used = 40 * 1024  # without the blocks of zeros at the end
    (folder / "b.tar").write_bytes(content[: int(share * used)])
    held = [record for record in TarReader(folder / "b.tar").records() if not record.problem]
    lost = 20 - len(held)
    with pytest.raises(
        UserError, match=rf"{lost} of 60 inputs are bad .*, {lost} of them by estimate: .*b\.tar"
    ):
        make(images=(folder,), on_error="skip")


def test_a_cut_tar_alone_has_lost_as_many_as_it_holds(make, tmp_path, capsys):
    tar = write_tar(tmp_path / "in.tar", pairs(60))
    content = tar.read_bytes()
    tar.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        UserError, match=r"of them by estimate: .*in\.tar cannot be read to the end, more than"
    ):
        make(images=(tar,), on_error="skip")
    (made,) = make(images=(tar,), on_error="skip", max_skip_rate=0.5)
    report = report_of(tmp_path / "out/pairs")
    assert report["bad_by_estimate"] == {str(tar): made.num_documents}
    assert report["inputs"] == 2 * made.num_documents
    assert made.num_documents == 32  # of 60 and the zeros at the end
    assert f"{made.num_documents} of them by estimate" in " ".join(capsys.readouterr().err.split())


@within_a_test
@given(place=st.integers(2, 38))
def test_of_a_tar_with_a_damaged_header_the_bytes_behind_it_are_counted(tmp_path, place):
    tar = write_tar(tmp_path / "in.tar", pairs(20))
    with tarfile.open(tar) as archive:
        header = archive.getmembers()[place].offset
    damage(tar, header + 148, b"garbage!")
    *read, last = TarReader(tar).records()
    assert last.problem
    lost = 20 - len(read)
    if len(read):
        assert lost <= last.num_lost <= lost + 6  # the zeros at the end of the tar count
    else:
        assert last.num_lost == UNKNOWN


@pytest.mark.parametrize("cut", ["in a line", "in a character"])
def test_a_cut_text_file_is_told_and_its_loss_is_estimated(make, tmp_path, cut):
    lines = "".join(
        json.dumps({"text": f"text é {i:03d}"}, ensure_ascii=False) + "\n" for i in range(200)
    ).encode()
    place = lines.index(b"\xc3", 24 * 100) + (1 if cut == "in a character" else 3)
    (tmp_path / "t.jsonl").write_bytes(lines[:place])
    reason = "not UTF-8" if cut == "in a character" else "not valid JSON: the file ends in this line"
    with pytest.raises(UserError, match=rf"t\.jsonl, line \d+: {reason}; fix"):
        make(texts=(tmp_path / "t.jsonl",))
    with pytest.raises(
        UserError, match=rf"100 of 200 inputs are bad \(100 x {reason}\), 100 of them by estimate"
    ):
        make(texts=(tmp_path / "t.jsonl",), on_error="skip")
    with (tmp_path / "t.jsonl").open("ab") as file:
        file.write(b"\n" + lines)  # now it is one bad line of 300
    assert make(texts=(tmp_path / "t.jsonl",), on_error="skip")[0].num_documents == 300


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_hole_of_zeros_counts_as_the_lines_that_it_would_hold(make, tmp_path, suffix):
    line = '{{"text": "text {:04d}"}}\n' if suffix == "jsonl" else "text {:04d}\n"
    path, content = tmp_path / f"t.{suffix}", bytearray("".join(map(line.format, range(1000))).encode())
    size = len(content) // 1000
    content[200 * size + 3 : 600 * size + 3] = bytes(400 * size)  # 400 lines
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"t\.{suffix}, line 201: holds NUL characters: .*; fix or remove"):
        make(texts=(path,))
    with pytest.raises(UserError, match=r"(40[012]) of 1[0-9]{3} inputs are bad \(\1 x holds NUL characters"):
        make(texts=(path,), on_error="skip")
    (made,) = make(texts=(path,), on_error="skip", max_skip_rate=0.9)
    assert made.num_documents == 599


@within_a_test
@given(
    texts=st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1), min_size=1),
    encoding=st.sampled_from(["utf-16-le", "utf-16-be", "utf-16", "utf-32", "utf-32-be"]),
)
def test_no_text_of_another_encoding_is_learnt(make, tmp_path_factory, texts, encoding):
    folder = tmp_path_factory.mktemp("in")
    (folder / "t.txt").write_bytes("\n".join(texts).encode(encoding))
    with pytest.raises(UserError, match=r"NUL characters|not UTF-8"):
        make(texts=(folder / "t.txt",), out=folder / "out")
    with pytest.raises(BadRecord, match=r"NUL characters|not UTF-8"):
        decode_caption(texts[0].encode(encoding))


@pytest.mark.parametrize("damaged", ["a.parquet", "a.tar"])
def test_a_file_that_opens_no_more_counts_as_those_of_other_folders(make, tmp_path, damaged):
    """Damaged at its start or its end, so that it holds nothing."""
    for name in "ab":
        (tmp_path / name).mkdir()
        content = encoded(drawing(0))
        write_tar(tmp_path / name / "a.tar", {f"k{i}": {"png": content, "txt": b"x"} for i in range(60)})
        rows = [{"image": content, "caption": "x"}] * 60
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, tmp_path / name / "a.parquet", use_dictionary=False, compression="none")
    path = tmp_path / "a" / damaged
    damage(path, 148 if damaged == "a.tar" else path.stat().st_size - 6, b"garbage"[:6])
    with pytest.raises(
        UserError, match=r"(\d+) of (\d+) inputs are bad .*, \1 of them by estimate"
    ) as raised:
        make(images=(path, tmp_path / "b" / damaged), on_error="skip")
    assert str(raised.value).startswith("60 of 120 ")


def test_an_unreadable_parquet_file_counts_as_its_neighbours(make, tmp_path):
    for name in "abc":
        write_texts(tmp_path / f"{name}.parquet", 90, 30)
    content = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[:-20])
    files = tuple(tmp_path / f"{name}.parquet" for name in "abc")
    with pytest.raises(UserError, match=r"90 of 270 inputs are bad \(90 x not readable as parquet"):
        make(texts=files, on_error="skip")


def test_json_beyond_the_limits_of_the_reader_is_not_told_as_invalid(make, tmp_path):
    deep = '{"text": "x", "y": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
    long = '{"text": "x", "y": ' + "1" * 5000 + "}\n"
    for line in (deep, long):
        (tmp_path / "t.jsonl").write_text(line)
        with pytest.raises(
            UserError, match="JSON nested too deeply, or with a number of thousands of digits"
        ):
            make(texts=(tmp_path / "t.jsonl",))


IMAGES = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


@within_a_test
@given(data=st.data())
def test_rows_are_read_in_batches_in_any_order(tmp_path, data):
    sizes = data.draw(st.lists(st.sampled_from([10, 1000, 400_000]), min_size=1, max_size=60))
    chance = random.Random(0)
    contents = [chance.randbytes(size) for size in sizes]
    table = pyarrow.table(
        {
            "image": pyarrow.array([{"bytes": content, "path": "x"} for content in contents], IMAGES),
            "caption": [str(i) for i in range(len(sizes))],
        }
    )
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=data.draw(st.integers(1, 60)))
    reader = ParquetPairs(tmp_path / "t.parquet", "image", "caption", [])
    records = list(reader.records())
    order = data.draw(st.permutations(records))
    assert [reader.read(record)[:3] for record in order] == [
        (record.key, contents[int(record.key)], record.key) for record in order
    ]


def test_memory_holds_a_batch_and_a_page_not_a_row_group(tmp_path):
    """In one row group, images of 50 kB: 4,096 of them take 200 MB, and a page 50."""
    images = [os.urandom(50_000) for _ in range(64)] * 64
    table = pyarrow.table({"image": images, "caption": ["x"] * len(images)})
    parquet.write_table(
        table, tmp_path / "t.parquet", row_group_size=5000, compression="none", use_dictionary=False
    )
    del images, table
    before, held = pyarrow.total_allocated_bytes(), []
    reader = ParquetPairs(tmp_path / "t.parquet", "image", "caption", [])
    for record in reader.records():
        if int(record.key) % 64 == 0:
            assert len(reader.read(record).image) == 50_000
            held.append(pyarrow.total_allocated_bytes() - before)
    assert max(held) < 2 * BATCH_BYTES + 1024 * 50_000


def test_columns_of_one_name_are_refused(make, tmp_path):
    names = ["image", "caption", "caption"]
    table = pyarrow.Table.from_arrays([pyarrow.array([x]) for x in (png(), "a", "b")], names)
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet: has 2 columns 'caption'; rename all but one"):
        make(images=(tmp_path / "t.parquet",))


def test_a_missing_column_is_named_with_its_key_and_the_columns_there(make, tmp_path):
    table = pyarrow.table({"image": [png()], "alt": ["x"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    for key, inputs in (("caption", "images"), ("text", "texts")):
        message = rf"has no column '{key}'; set {key}_column to one of its columns: image, alt"
        with pytest.raises(UserError, match=message):
            make(**{inputs: (tmp_path / "t.parquet",)})


def test_nulls_are_dropped_and_counted(make, tmp_path):
    rows = [
        {"bytes": png(), "path": "a.png"},
        {"bytes": None, "path": None},
        None,
        {"bytes": png(), "path": None},
        {"bytes": None, "path": "b.png"},
    ]
    table = pyarrow.table({"image": pyarrow.array(rows, IMAGES), "caption": ["a", "b", "c", None, "e"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    make(images=(tmp_path / "t.parquet",), on_error="skip")
    report = report_of(tmp_path / "out/pairs")
    assert (report["kept"], report["dropped"]) == (1, {"no image": 2})
    assert report["bad"] == {"image is a path without bytes": 1, "no caption": 1}
    parquet.write_table(pyarrow.table({"text": ["x", None, " "]}), tmp_path / "u.parquet")
    (tmp_path / "u.jsonl").write_text('{"text": null}\n{"text": "y"}\n')
    make(texts=(tmp_path / "u.parquet", tmp_path / "u.jsonl"))
    report = report_of(tmp_path / "out/text")
    assert (report["kept"], report["dropped"]) == (2, {"empty text": 3})


def test_a_refusal_of_all_inputs_gives_the_reasons_with_an_example_of_each(make, tmp_path):
    scores = [b'{"aesthetic": "5.5"}', b'{"aesthetic": 2.0}', b"{}", b'{"aesthetic": "6.5"}']
    samples = {f"k{i}": {"png": png(), "txt": b"x", "json": score} for i, score in enumerate(scores)}
    tar = write_tar(tmp_path / "in.tar", samples | {"n": {"txt": b"x"}})
    with pytest.raises(UserError) as raised:
        make(images=(tar,), filters={"scores": {"aesthetic": {"min": 5.0}}})
    reasons = [
        f"2 x score aesthetic is not a number (one is {tar}, k0)",
        f"1 x no image (one is {tar}, n)",
        f"1 x no score aesthetic (one is {tar}, k2)",
        f"1 x score aesthetic out of range (one is {tar}, k1)",
    ]
    expected = f"the inputs hold no valid document: of 5 inputs {', '.join(reasons)}; nothing is written"
    assert str(raised.value) == f"{tmp_path}/out/pairs: {expected}; files ignored: none"
    write_tar(tmp_path / "dots.tar", {f"a.{i}": {"png": png(), "txt": b"x"} for i in range(3)})
    with pytest.raises(UserError, match=r"no valid document: of 1 inputs 1 x no image of this key"):
        make(images=(tmp_path / "dots.tar",), on_error="skip")
    with pytest.raises(UserError, match=r"no valid document: of 0 inputs none"):
        make(images=(write_tar(tmp_path / "empty.tar", {}),))


SIDES = st.sampled_from([1, 2, 33, 64, 1000, 16_383, 16_384, 17_000, 40_000])


@within_a_test
@given(
    width=SIDES, height=SIDES, storage=st.sampled_from(["pixels", "latents"]), size=st.sampled_from([32, 64])
)
def test_what_the_scan_accepts_can_be_written(settings, tokenizer, codec, width, height, storage, size):
    assume(width * height < 3_000_000)
    config = PreprocessConfig(
        **settings | {"image_storage": storage, "image_sizes": ((size, size), (32, 48))}
    )
    content = encoded(Image.new("1", (width, height)))
    builder = DocumentBuilder(config, tokenizer, codec if storage == "latents" else None)
    try:
        inspect_record(RawPair("k", content, "a line", {}), config)
    except BadRecord:
        assert storage == "pixels"
        assert max(width, height) > 16_383
        return
    (document,) = builder.documents(iter([(Record("k"), RawPair("k", content, "a line", {}), "here", {})]))
    assert document.segments[1].kind == ("pixels" if storage == "pixels" else "moments")


def test_an_image_that_is_too_long_is_bad_input_at_the_scan(make, tmp_path):
    long = encoded(Image.new("1", (64, 17_000)))
    tar = write_tar(tmp_path / "in.tar", pairs(3) | {"long": {"png": long, "txt": b"x"}})
    values = {"images": (tar,), "image_storage": "pixels"}
    with pytest.raises(
        UserError, match=r"in\.tar, key 'long': image too long for WebP: more than 16,383 pixels .*; fix"
    ):
        make(**values, image_sizes=((64, 64),))
    (made,) = make(**values, image_sizes=((64, 64),), on_error="skip")
    assert made.num_documents == 3
    (made,) = make(**values, image_sizes=((32, 32),), out=tmp_path / "smaller")
    assert made.num_documents == 4


def test_latents_that_are_not_finite_are_named(make, tmp_path, vae_folder):
    model = AutoencoderKL.from_pretrained(vae_folder)
    with torch.no_grad():
        model.quant_conv.bias += 1e6  # beyond float16
    model.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=r"vae: gives latents with NaN or Inf for key 'k000'; use another"):
        make(images=(write_tar(tmp_path / "in.tar", pairs(2)),), vae=tmp_path / "vae")


@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0])
def test_latents_far_from_unit_deviation_are_a_warning_in_the_report(
    make, tmp_path, vae_folder, scale, capfd
):
    shutil.copytree(vae_folder, tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": scale}))
    images = {f"k{i}": {"png": encoded(drawing(i)), "txt": b"x"} for i in range(20)}
    make(images=(write_tar(tmp_path / "in.tar", images),), vae=tmp_path / "vae")
    found = report_of(tmp_path / "out/pairs")["normalized_latents"]
    is_far = not 0.5 <= found["standard_deviation"] <= 2
    assert is_far == (scale != 1.0)
    assert bool(found["warning"]) == is_far == ("warning: " in capfd.readouterr().out)
