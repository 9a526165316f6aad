"""Large files are scanned in parts: records, shards and reports do not depend on the cut."""

import json

import pyarrow
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import parquet

from data_prep.config import PreprocessConfig
from data_prep.preprocess import ShardRange
from data_prep.readers import splits
from data_prep.readers.jsonl import LineReader, byte_ranges, count_lines
from data_prep.readers.parquet import row_group_ranges
from megafusion.errors import UserError
from tests.support.raw import drawing, encoded, made_files, png

KINDS = ("pairs", "text", "interleaved")


@pytest.fixture
def large(tmp_path) -> dict:
    """A file of each format that is cut, with duplicates and bad records far apart."""
    lines = [f"line number {n % 37}" for n in range(60)]
    lines[5], lines[40], lines[41], lines[50] = "", "x" * 700, "  ", "windows\r"
    content = "\n".join(lines).encode().replace(b"number 33", b"number \xff")
    (tmp_path / "a.txt").write_bytes(content)  # without a last newline
    rows = [{"text": f"row {n}\ntwo {n % 13}"} if n % 20 else {"no": 1} for n in range(50)]
    (tmp_path / "b.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n\n")
    parquet.write_table(
        pyarrow.table({"text": [f"cell {n % 17}" for n in range(40)]}),
        tmp_path / "c.parquet",
        row_group_size=3,
    )
    images = [encoded(drawing(n % 9)) if n != 7 else b"no image" for n in range(14)]
    table = pyarrow.table({"image": images, "caption": [f"c {n}" for n in range(14)]})
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=2)
    documents = [{"texts": [f"a {n}", None], "images": [None, png()]} for n in range(11)]
    parquet.write_table(pyarrow.Table.from_pylist(documents), tmp_path / "e.parquet", row_group_size=2)
    web = [{"text_list": [f"b {n % 8}"], "image_info": []} if n != 6 else {} for n in range(20)]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, web)))
    return {
        "texts": tuple(tmp_path / name for name in ("a.txt", "b.jsonl", "c.parquet")),
        "images": (tmp_path / "d.parquet",),
        "documents": tuple(tmp_path / name for name in ("e.parquet", "f.jsonl")),
        "documents_per_shard": 7,
        "batch_size": 3,
        "on_error": "skip",
        "max_skip_rate": 0.2,
        "filters": {"duplicates": "exact"},
    }


@pytest.mark.full
def test_any_cut_of_the_files_gives_the_same_bytes(make, settings, large, tmp_path, monkeypatch):
    make(**large, out=tmp_path / "uncut")
    uncut = {kind: made_files(tmp_path / "uncut" / kind) for kind in KINDS}
    report = json.loads(uncut["text"]["report.json"])
    assert set(report["bad"]) == {"not UTF-8", "no string under 'text'"}
    assert report["dropped"]["exact duplicate"] > 20
    for num_bytes, num_workers in ((97, 0), (400, 2)):
        monkeypatch.setattr(splits, "BYTES_PER_SPLIT", num_bytes)
        for kind in ("pair", "text", "interleaved"):
            found = splits.Inputs(kind, PreprocessConfig(**settings | large).inputs[kind]).splits
            assert len(found) >= 3 * len({split.files for split in found})
        out = tmp_path / f"parts of {num_bytes}"
        make(**large, out=out, num_workers=num_workers)
        assert {kind: made_files(out / kind) for kind in KINDS} == uncut
    out = tmp_path / "tasks"
    for index in (1, 2, 0):
        make(ShardRange(index, 3), **large, out=out)
    assert {kind: made_files(out / kind) for kind in KINDS} == uncut


def test_partial_work_of_other_splits_is_not_reused(make, large, tmp_path, monkeypatch):
    """As if a later version cut differently: a task left tables that are numbered by other splits."""
    make(**large, out=tmp_path / "uncut")
    values = large | {"out": tmp_path / "out"}
    make(ShardRange(0, 2), **values)
    assert list((tmp_path / "out").glob("text.*.partial/work/scan/*.parquet"))
    monkeypatch.setattr(splits, "BYTES_PER_SPLIT", 200)
    make(**values)
    for kind in KINDS:
        assert made_files(tmp_path / "out" / kind) == made_files(tmp_path / "uncut" / kind)


@pytest.mark.parametrize(("name", "where"), [("a.txt", "line 34"), ("b.jsonl", "line 1")])
def test_a_bad_line_of_a_part_is_named_by_its_number_in_the_file(
    make, large, tmp_path, monkeypatch, name, where
):
    monkeypatch.setattr(splits, "BYTES_PER_SPLIT", 100)
    with pytest.raises(UserError, match=rf"{name}, {where}: "):
        make(texts=(tmp_path / name,))


def test_which_files_are_cut(make, large, tmp_path, monkeypatch):
    """Parquet is cut between row groups, whatever the bytes per split; an unreadable file is not cut."""
    assert row_group_ranges(tmp_path / "c.parquet", 1) == [(n, n + 1) for n in range(14)]
    assert row_group_ranges(tmp_path / "c.parquet", 1 << 30) == [(0, 14)]
    some = row_group_ranges(tmp_path / "c.parquet", 300)
    assert 1 < len(some) < 14
    assert [group for first, end in some for group in range(first, end)] == list(range(14))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more, but long enough")
    assert row_group_ranges(tmp_path / "c.parquet", 1) == []
    monkeypatch.setattr(splits, "BYTES_PER_SPLIT", 1)
    with pytest.raises(UserError, match=r"c\.parquet: not readable as parquet"):
        make(texts=(tmp_path / "c.parquet",))


@given(
    content=st.lists(st.sampled_from([b"\n", b"\r\n", b"a", b"bcd ", b" ", b"\xff"])).map(b"".join),
    num_bytes=st.integers(1, 9),
)
@example(content=b"a\n", num_bytes=1)
@example(content=b"\n\nab", num_bytes=2)
def test_the_lines_of_all_byte_ranges_are_those_of_the_file(tmp_path_factory, content, num_bytes):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(content)
    reader, before = LineReader(path), 0
    found = []
    for part in byte_ranges(path, num_bytes):
        assert count_lines(path, 0, part[0]) == before
        found += [(before + int(record.key), record.location) for record in reader.records(*part)]
        before += count_lines(path, *part)
    assert found == [(int(record.key), record.location) for record in reader.records()]
    assert before == len(content.splitlines()) if b"\r" not in content else True
    reader._file.close()
