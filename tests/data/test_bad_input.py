"""Bad shards are named with their location and the way out, or skipped and counted, on every rank alike."""

import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megafusion.config import parse_config
from megafusion.data.config import SourceConfig
from megafusion.data.document_format import BadDocument
from megafusion.data.loader import packed_and_skipped
from megafusion.data.manifest import load_manifest
from megafusion.data.reader import ShardFolder
from megafusion.data.shards import npy
from megafusion.errors import UserError
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import file_sha256
from tests.support.damage import damage
from tests.support.rows import IDS, LATENTS, digest, stream_of, write_pairs, write_texts
from tests.support.tars import add_members, link

TOKENS = npy(np.arange(3, 8, dtype=np.int32))
MOMENTS = npy(np.zeros((2, *LATENTS), np.float16))
META = b'{"key": "k"}'
GOOD = [("k.json", META), ("k.0.tokens.npy", TOKENS), ("k.1.moments.npy", MOMENTS)]


def folder_of(folder: Path, members: list) -> ShardFolder:
    """A folder whose only shard holds one document of these members, valid or not."""
    write_pairs(folder, 1)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        add_members(tar, members)
        end = tar.offset
    path = folder / "shard-000000.tar"
    path.write_bytes(content.getvalue())
    np.save(path.with_suffix(".index.npy"), np.array([0, end]))
    values = json.loads((folder / "manifest.json").read_text())
    values["shards"][0] |= {"num_bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(values))
    return ShardFolder(folder)


BAD = {
    "symbolic link": ([*GOOD[:2], link("k.1.moments.npy", "/etc/passwd")], "not a plain file"),
    "path traversal": ([GOOD[0], ("../../k.0.tokens.npy", TOKENS)], "name is a path"),
    "absolute path": ([GOOD[0], ("/etc/k.0.tokens.npy", TOKENS)], "name is a path"),
    "doubled member": ([*GOOD[:2], GOOD[1]], "members duplicated or without a number"),
    "doubled json": ([GOOD[0], GOOD[0]], "two .json members"),
    "two keys": ([*GOOD[:2], ("other.1.moments.npy", MOMENTS)], "several keys"),
    "missing member": ([GOOD[0], GOOD[2]], "members missing"),
    "no json": (GOOD[1:], "no .json member"),
    "bad json": ([("k.json", b"{"), *GOOD[1:]], "is not valid JSON"),
    "deep json": ([("k.json", b'{"a":' + b"[" * 100_000), *GOOD[1:]], "is not valid JSON"),
    "json list": ([("k.json", b"[]"), *GOOD[1:]], "not a mapping"),
    "unknown member": ([*GOOD, ("k.2.jpg", b"x")], "unknown kind"),
    "no npy": ([GOOD[0], ("k.0.tokens.npy", b"x" * 90)], "not an npy file"),
    "pickle": (
        [GOOD[0], ("k.0.tokens.npy", TOKENS.replace(b"'<i4'", b"'|O' "))],
        "unsupported layout",
    ),
    "header that is code": (
        [GOOD[0], ("k.0.tokens.npy", TOKENS.replace(b"{'descr': '<i4'", b"exit() #scr': "))],
        "not an npy file",
    ),
    "endless axis": (
        [GOOD[0], ("k.0.tokens.npy", TOKENS.replace(b"(5,), }    ", b"(1e999,), }"))],
        "not an npy file",
    ),
    "deep header": (
        [GOOD[0], ("k.0.tokens.npy", TOKENS[:8] + (60_000).to_bytes(2, "little") + b"-" * 60_000)],
        "not an npy file",
    ),
    "cut array": ([GOOD[0], ("k.0.tokens.npy", TOKENS[:-4])], "bytes does not match its shape"),
    "long array": (
        [GOOD[0], ("k.0.tokens.npy", TOKENS + b"1234")],
        "bytes does not match its shape",
    ),
    "int64 tokens": ([GOOD[0], ("k.0.tokens.npy", npy(np.arange(5)))], "type int64"),
    "negative token": ([GOOD[0], ("k.0.tokens.npy", npy(np.array([3, -1], np.int32)))], "negative token"),
    "other latents": (
        [*GOOD[:2], ("k.1.moments.npy", npy(np.zeros((2, 1, 8, 8), np.float16)))],
        "moments of shape",
    ),
    "nan": (
        [*GOOD[:2], ("k.1.moments.npy", npy(np.full((2, *LATENTS), np.nan, np.float16)))],
        "contain NaN or Inf",
    ),
    "infinity": (
        [*GOOD[:2], ("k.1.moments.npy", npy(np.full((2, *LATENTS), -np.inf, np.float16)))],
        "contain NaN or Inf",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_document_is_named_with_its_shard_and_the_reason(tmp_path, case):
    members, reason = BAD[case]
    folder = folder_of(tmp_path / "pairs", members)
    with pytest.raises(BadDocument, match=rf"shard-000000\.tar, document 0: not readable \(.*{reason}"):
        folder.read(0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs"]  # nothing is ever extracted


def test_the_good_document_of_these_cases_is_read(tmp_path):
    found = folder_of(tmp_path / "pairs", GOOD).read(0)
    assert found.segments[0].data.tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (124, b"77777777777", "damaged tar header"),
        (124, b"zzz", "not a tar header"),
        (0, b"x", "damaged tar"),
    ],
)
def test_a_wrong_size_or_name_in_a_header(tmp_path, at, value, reason):
    folder_of(tmp_path / "pairs", GOOD)
    path = tmp_path / "pairs/shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(BadDocument, match=reason):
        ShardFolder(tmp_path / "pairs").read(0)


def test_a_size_beyond_the_document_with_a_valid_checksum(tmp_path):
    folder_of(tmp_path / "pairs", GOOD)
    path = tmp_path / "pairs/shard-000000.tar"
    content = bytearray(path.read_bytes())
    info = tarfile.TarInfo("k.json")
    info.size = 1 << 20
    content[:512] = info.tobuf(tarfile.USTAR_FORMAT)[:512]
    path.write_bytes(content)
    with pytest.raises(BadDocument, match="extends beyond the document"):
        ShardFolder(tmp_path / "pairs").read(0)


@pytest.mark.parametrize("name", ["../../etc/shard.tar", "/etc/shard.tar", ".hidden.tar", "a b.tar", "shard"])
def test_a_manifest_that_names_files_of_other_folders_is_refused(tmp_path, name):
    write_pairs(tmp_path / "pairs", 1)
    path = tmp_path / "pairs/manifest.json"
    path.write_text(path.read_text().replace("shard-000000.tar", name))
    with pytest.raises(UserError, match=r"manifest.json: key 'shards\.0\.name'"):
        load_manifest(tmp_path / "pairs")


@pytest.mark.parametrize(
    "path",
    ["pipe:cat /etc/passwd", "pipe:curl http://x/", "file:///data", "ftp://x/y", "http:x", "http://x/y?z=1"],
)
def test_locations_that_run_a_command_or_hide_something_are_refused(path):
    with pytest.raises(UserError, match="path: "):
        parse_config(SourceConfig, {"path": path}, "test")
    with pytest.raises(UserError):
        SourceConfig(path=path)


@pytest.fixture
def sources(tmp_path):
    pairs, texts = write_pairs(tmp_path / "pairs", 400), write_texts(tmp_path / "text", 150)
    return {"pairs": (pairs, 0.5), "text": (texts, 0.5)}


def test_by_default_a_bad_document_stops_the_run_by_name(sources, tmp_path):
    damage(tmp_path / "pairs", [5, 150])
    stream = stream_of(sources, range(4), 4)
    with pytest.raises(UserError, match=r"pairs/shard-0000\d\d\.tar, document \d+: .*data\.on_error=skip"):
        [stream.next() for _ in range(100)]


def test_skipping_is_counted_logged_and_the_same_on_all_ranks_and_after_restarts(sources, tmp_path, caplog):
    damage(tmp_path / "pairs", [5, 150])
    options = {"on_error": "skip", "max_skip_rate": 0.05}
    whole = stream_of(sources, range(4), 4, **options)
    with caplog.at_level(logging.WARNING):
        batches = [(digest(whole.next()), whole.state_dict()) for _ in range(60)]
    expected = [hashes for hashes, _ in batches]
    state = whole.state_dict()
    skipped = packed_and_skipped(state)[1]
    assert skipped >= 2
    assert sum("skipped" in r.message and ".tar, document" in r.message for r in caplog.records) == skipped
    reasons = [s["skipped"] for s in state["streams"].values() if s["skipped"]]
    assert set().union(*reasons) == {"not a tar header where a member should start"} or reasons
    for split in (2, 4):
        ranks = [stream_of(sources, range(r, r + 4 // split), 4, **options) for r in range(0, 4, 4 // split)]
        for rank in ranks:
            rank.load_state_dict(json.loads(json.dumps(batches[19][1])))
        assert [[d for r in ranks for d in digest(r.next())] for _ in range(40)] == expected[20:]
    with stream_of(sources, range(4), 4, num_workers=2, **options) as ahead:
        assert [digest(ahead.next()) for _ in range(60)] == expected
        assert packed_and_skipped(ahead.state_dict())[1] == skipped


def test_too_many_bad_documents_stop_the_run_with_their_reasons(sources, tmp_path):
    damage(tmp_path / "pairs", list(range(0, 400, 3)))
    stream = stream_of(sources, range(4), 4, on_error="skip")
    message = r"stream \d skipped \d+ documents of \d+ \(\d+ x .*more than data\.max_skip_rate 0\.01"
    with pytest.raises(UserError, match=message):
        [stream.next() for _ in range(300)]


@pytest.mark.parametrize("rate", [0.9, 1.0])
@pytest.mark.parametrize("names", [["pairs"], ["pairs", "text"]])
def test_a_source_with_only_bad_documents_stops_the_run(sources, tmp_path, names, rate):
    damage(tmp_path / "pairs", list(range(400)))
    mixture = {name: sources[name] for name in names}
    stream = stream_of(mixture, range(4), 4, on_error="skip", max_skip_rate=rate)
    with pytest.raises(
        UserError, match=r"data\.sources\.pairs: no good document among the 100 of stream 0 \("
    ):
        stream.next()


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_shard_lost_or_truncated_during_a_run_stops_it_at_any_policy(sources, tmp_path, on_error):
    """Another rank may still see it, so skipping it would give the ranks different data."""
    stream = stream_of(sources, range(4), 4, on_error=on_error)
    stream.next()
    for path in (tmp_path / "text").glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"text/shard-\d+\.tar: shard named in manifest\.json is missing"):
        [stream.next() for _ in range(300)]
    stream = stream_of({"pairs": sources["pairs"]}, range(4), 4, on_error=on_error)
    stream.next()
    for path in (tmp_path / "pairs").glob("*.tar"):
        path.open("r+b").truncate(700)
    with pytest.raises(UserError, match=r"pairs/shard-\d+\.tar: (became shorter|700 bytes where)"):
        [stream.next() for _ in range(300)]


RESERVING = Tokenizer(Path("t"), "t", 62, bos=1, eos=2, reserved=[40, 41, 42, 43])


@pytest.mark.parametrize(
    ("token", "ids", "reason"),
    [
        (64, IDS, "a token that the tokenizer does not have"),
        (62, IDS, "a token that the tokenizer does not have"),  # boi
        (63, IDS, "a token that the tokenizer does not have"),  # eoi
        (61, IDS, None),
        (40, RESERVING, "a text with a token that begins or ends images"),
        (42, RESERVING, "a text with a token that begins or ends images"),  # boi of the second size
        (43, RESERVING, None),
    ],
)
def test_a_token_that_is_no_text_is_bad(tmp_path, token, ids, reason):
    folder = tmp_path / "pairs"
    folder_of(folder, [GOOD[0], ("k.0.tokens.npy", npy(np.array([3, token], np.int32))), GOOD[2]])
    stream = stream_of({"pairs": (folder, 1.0)}, range(1), 1, ids=ids, more_sizes=((4, 8),))
    if reason is None:
        assert token in stream.next()[0].tokens
        return
    with pytest.raises(BadDocument, match=rf"pairs, document 0.*{reason}"):
        stream.next()


def test_segments_of_another_kind_are_bad(tmp_path):
    folder = tmp_path / "pairs"
    folder_of(folder, GOOD[:2])
    with pytest.raises(BadDocument, match="not a document of kind pair"):
        stream_of({"pairs": (folder, 1.0)}, range(1), 1).next()
