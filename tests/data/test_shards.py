"""Shards: a round trip, by any webdataset reader too; corrupt files are named."""

import json

import numpy as np
import pytest
from webdataset import WebDataset

from megafusion.data.manifest import load_manifest
from megafusion.data.reader import ShardFolder
from megafusion.errors import UserError
from tests.support.rows import stored, write_shards

FIELDS = {
    "kind": "pair",
    "tokenizer_sha256": "t",
    "vae_sha256": "v",
    "latent_shape": (2, 3, 3),
    "provenance": {},
}


def documents(num: int):
    random = np.random.default_rng(0)
    for i in range(num):
        tokens = random.integers(0, 100, i + 1).astype(np.int32)
        yield stored({"key": f"k{i}"}, tokens, random.standard_normal((2, 2, 3, 3)).astype(np.float16))


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "pairs", documents(10), 4, **FIELDS)
    return tmp_path / "pairs"


def test_round_trip(folder):
    shards = ShardFolder(folder)
    assert len(shards) == 10
    assert [s.num_documents for s in shards.manifest.shards] == [4, 4, 2]
    assert shards.manifest.num_tokens == 55
    assert shards.manifest.num_images == 10
    for number, expected in enumerate(documents(10)):
        found = shards.read(number)
        assert found.metadata == expected.metadata
        for a, b in zip(found.segments, expected.segments, strict=True):
            assert a.kind == b.kind
            assert a.data.dtype == b.data.dtype
            assert np.array_equal(a.data, b.data)


def test_a_document_of_many_segments_keeps_their_order(tmp_path):
    """webdataset writes members in the order of their names, where 10 comes before 2."""
    segments = tuple(np.full(n + 1, n, np.int32) for n in range(123))
    write_shards(tmp_path / "web", [stored({}, *segments)], 4, **FIELDS | {"kind": "interleaved"})
    found = ShardFolder(tmp_path / "web").read(0).segments
    assert [segment.data.tolist() for segment in found] == [[n] * (n + 1) for n in range(123)]


def test_plain_webdataset_reads_the_same(folder):
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(WebDataset(urls, shardshuffle=False).decode())
    assert [s["json"]["key"] for s in samples] == [f"k{i}" for i in range(10)]
    assert np.array_equal(samples[3]["0.tokens.npy"], list(documents(4))[3].segments[0].data)


def test_equal_documents_make_equal_bytes(folder, tmp_path):
    write_shards(tmp_path / "again", documents(10), 4, **FIELDS)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_missing_shard(folder):
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar.*missing"):
        ShardFolder(folder)


def test_truncated_shard(folder):
    path = folder / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(UserError, match=r"shard-000002\.tar.*truncated"):
        ShardFolder(folder)


def test_damaged_document(folder):
    path = folder / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[0:300] = b"\xff" * 300
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-000000\.tar, document 0: not readable"):
        ShardFolder(folder).read(0)


def test_wrong_latent_shape(folder):
    path = folder / "manifest.json"
    values = json.loads(path.read_text()) | {"latent_shape": [2, 4, 4]}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"shard-000000\.tar, document 1.*\(2, 2, 3, 3\).*\(2, 2, 4, 4\)"):
        ShardFolder(folder).read(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no manifest.json"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"kind": "pair"}', "'num_tokens' is required"),
    ],
)
def test_bad_manifest(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_manifest(tmp_path)


def test_damaged_index(folder):
    (folder / "shard-000000.index.npy").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"shard-000000\.index\.npy: not a readable index"):
        ShardFolder(folder).read(0)


def test_for_the_parent_folder_the_ones_inside_are_named(folder):
    with pytest.raises(UserError, match=rf"not a folder of shards .*; name {folder}$"):
        load_manifest(folder.parent)
