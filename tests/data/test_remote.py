"""Shards on a server: fetched with retries, verified, and cached in a bounded folder that processes share."""

import fcntl
import http.server
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megafusion.data import remote
from megafusion.data.cache import CacheFull, ShardCache
from megafusion.data.reader import ShardFolder
from megafusion.errors import UserError
from tests.support.rows import digest, stream_of, write_pairs, write_texts


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `server.faults` has the failures of a path's next requests."""

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        with self.server.lock:
            self.server.asked[name] += 1
            faults = self.server.faults.get(name.rsplit("/", 1)[-1], [])
            fault = faults.pop(0) if faults else None
        if fault is None:
            super().do_GET()
        elif isinstance(fault, int):
            self.send_error(fault)
        else:
            content = (Path(self.directory) / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            half = content[: len(content) // 2]
            if fault == "stall":
                self.wfile.write(half)
                self.wfile.flush()
                time.sleep(1.5)
            elif fault == "truncate":
                self.wfile.write(half)
            elif fault == "other bytes":
                self.wfile.write(half + bytes(len(content) - len(half)))
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path):
    served = tmp_path / "served"
    write_pairs(served / "pairs", 200)
    write_texts(served / "text", 100)
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(served)))
    made.asked, made.faults, made.lock, made.daemon_threads = Counter(), {}, threading.Lock(), True
    made.url, made.folder = f"http://127.0.0.1:{made.server_port}", served
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def sources_at(place: object) -> dict:
    return {"pairs": (f"{place}/pairs", 0.5), "text": (f"{place}/text", 0.5)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_url_gives_the_rows_of_the_folder(server, tmp_path, num_workers):
    here = stream_of(sources_at(server.folder), range(4), 4)
    options = {"cache_dir": tmp_path / "cache", "num_workers": num_workers}
    with stream_of(sources_at(server.url), range(4), 4, **options) as there:
        assert [digest(there.next()) for _ in range(40)] == [digest(here.next()) for _ in range(40)]
    asked = {name: n for name, n in server.asked.items() if name.endswith(".tar")}
    assert max(asked.values()) == 1  # two workers share the cache
    before = server.asked.total()
    again = stream_of(sources_at(server.url), range(4), 4, cache_dir=tmp_path / "cache")
    [again.next() for _ in range(40)]
    assert server.asked.total() == before + 2  # the manifests


@pytest.mark.parametrize("fault", [500, 503, 429, 408, "stall", "truncate", "other bytes"])
def test_transient_failures_are_retried(server, tmp_path, monkeypatch, fault):
    if fault == "stall":
        monkeypatch.setattr(remote, "TIMEOUT_SECONDS", (2.0, 0.5))
    server.faults = {"shard-000001.tar": [fault, fault], "manifest.json": [503]}
    folder = ShardFolder(f"{server.url}/pairs", ShardCache(tmp_path / "cache", 1 << 30))
    assert folder.read(19).metadata == {"key": "k19", "caption": "image 19"}
    assert server.asked["pairs/shard-000001.tar"] == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, r"shard-000001\.tar: not available in 6 tries; the last: the server answers 500"),
        ("truncate", r"shard-000001\.tar: not available in 6 tries"),
        ("other bytes", r"not available in 6 tries; the last: hash \w{12} where the manifest says"),
    ],
)
def test_a_lasting_failure_stops_the_run_by_name_even_if_bad_documents_are_skipped(
    server, tmp_path, fault, message
):
    server.faults = {"shard-000001.tar": [fault] * 6}
    stream = stream_of(
        {"pairs": (f"{server.url}/pairs", 1.0)}, range(4), 4, cache_dir=tmp_path / "cache", on_error="skip"
    )
    with pytest.raises(UserError, match=message):
        [stream.next() for _ in range(60)]
    assert not list((tmp_path / "cache").glob("*.part"))
    assert [stream.next() for _ in range(3)]  # the server is back


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_is_raised_at_once(server, tmp_path, status):
    server.faults = {"manifest.json": [status] * 9}
    with pytest.raises(UserError, match=rf"pairs/manifest\.json: the server answers {status}"):
        ShardFolder(f"{server.url}/pairs", ShardCache(tmp_path / "cache", 1 << 30))
    assert server.asked["pairs/manifest.json"] == 1


def test_a_server_that_does_not_listen(tmp_path):
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/pairs/manifest\.json: not available in 6 tries"):
        ShardFolder("http://127.0.0.1:9/pairs", ShardCache(tmp_path / "cache", 1 << 30))


def test_the_cache_stays_within_its_size_and_evicts_the_least_recently_used(server, tmp_path):
    plain = ShardFolder(server.folder / "pairs")
    sizes = [entry.num_bytes for entry in plain.manifest.shards]
    cache = ShardCache(tmp_path / "cache", 3 * max(sizes))
    folder = ShardFolder(f"{server.url}/pairs", cache)
    names = [entry.sha256 for entry in folder.manifest.shards]

    def there() -> set[int]:
        return {i for i, name in enumerate(names) if (cache.folder / name).is_file()}

    for shard in (0, 1, 2):
        folder.read(16 * shard)
        folder.close()
        time.sleep(0.01)
    folder.read(0)  # now 1 is the oldest
    folder.close()
    folder.read(48)
    assert there() == {0, 2, 3}
    for shard in range(len(names)):
        folder.read(16 * shard)
        used = sum(p.stat().st_size for p in cache.folder.iterdir() if len(p.name) == 64)
        assert used <= cache.max_bytes
    indices = {p.name[:64] for p in cache.folder.glob("*.index.npy")}
    assert indices == {names[i] for i in there()}


def test_a_shard_that_another_process_reads_is_never_evicted(server, tmp_path):
    size = max(entry.num_bytes for entry in ShardFolder(server.folder / "pairs").manifest.shards)
    cache = ShardCache(tmp_path / "cache", 2 * size)
    first, second = (ShardFolder(f"{server.url}/pairs", cache) for _ in range(2))
    first.read(0)
    held = cache.folder / first.manifest.shards[0].sha256
    for shard in (1, 2, 3, 4):
        second.read(16 * shard)
        assert held.is_file()
    second.close()
    second.read(16)
    third = ShardFolder(f"{server.url}/pairs", cache)
    with pytest.raises(CacheFull, match=r"data\.cache_bytes \d+: \d+ bytes of .* are in use"):
        third.read(80)
    first.close()
    third.read(80)
    assert not held.is_file()


def test_a_shard_larger_than_the_cache_is_refused_at_the_start(server, tmp_path):
    with pytest.raises(UserError, match=r"data\.cache_bytes 1000: .* has a shard of"):
        ShardFolder(f"{server.url}/pairs", ShardCache(tmp_path / "cache", 1000))


def read_all(url: str, cache: Path, max_bytes: int, found) -> None:
    folder = ShardFolder(url, ShardCache(cache, max_bytes))
    for _ in range(3):
        for shard in range(len(folder.manifest.shards)):
            assert folder.read(16 * shard).metadata["key"] == f"k{16 * shard}"
            folder.close()
    found.put(os.getpid())


def test_processes_share_a_small_cache(server, tmp_path):
    """Four processes and room for five of thirteen shards: every read is right, no fetch is repeated."""
    size = max(entry.num_bytes for entry in ShardFolder(server.folder / "pairs").manifest.shards)
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    arguments = (f"{server.url}/pairs", tmp_path / "cache", 5 * size, found)
    processes = [context.Process(target=read_all, args=arguments) for _ in range(4)]
    [p.start() for p in processes]
    [p.join(60) for p in processes]
    assert [p.exitcode for p in processes] == [0] * 4
    used = sum(p.stat().st_size for p in (tmp_path / "cache").iterdir() if len(p.name) == 64)
    assert used <= 5 * size
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_partial_file_of_a_killed_process_is_fetched_again(server, tmp_path):
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    folder = ShardFolder(f"{server.url}/pairs", cache)
    (cache.folder / (folder.manifest.shards[0].sha256 + ".part")).write_bytes(b"half")
    assert folder.read(0).metadata["key"] == "k0"
    assert not list(cache.folder.glob("*.part"))


def test_a_waiting_process_uses_what_the_other_fetches(server, tmp_path):
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    folder = ShardFolder(f"{server.url}/pairs", cache)
    entry = folder.manifest.shards[0]
    with (cache.folder / f"lock-{entry.sha256[:2]}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as while another process fetches it
        thread = threading.Thread(target=folder.read, args=(0,), daemon=True)
        thread.start()
        time.sleep(0.2)
        assert thread.is_alive()
        (cache.folder / entry.sha256).write_bytes((server.folder / "pairs" / entry.name).read_bytes())
    thread.join(10)
    assert not thread.is_alive()
    assert server.asked["pairs/shard-000000.tar"] == 0


def test_a_shard_is_whole_before_it_has_its_name(server, tmp_path, monkeypatch):
    """A process may be killed at any moment after the rename."""
    monkeypatch.setattr(remote, "CHUNK", 1000)  # smaller than a buffered file's buffer
    rename, renamed = Path.rename, []

    def checked(path: Path, target: Path) -> Path:
        renamed.append(path.read_bytes())
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", checked)
    ShardFolder(f"{server.url}/pairs", ShardCache(tmp_path / "cache", 1 << 30)).read(0)
    assert renamed == [(server.folder / "pairs/shard-000000.tar").read_bytes()]


def test_a_shard_that_is_evicted_while_it_is_opened_is_fetched_again(server, tmp_path, monkeypatch):
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    folder = ShardFolder(f"{server.url}/pairs", cache)
    path = cache.folder / folder.manifest.shards[0].sha256
    path.write_bytes((server.folder / "pairs/shard-000000.tar").read_bytes())
    lock = fcntl.flock

    def evict_first(file, operation: int) -> None:
        if not server.asked["pairs/shard-000000.tar"]:
            path.unlink(missing_ok=True)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", evict_first)
    assert folder.read(0).metadata["key"] == "k0"
    assert path.is_file()


def test_a_full_disk_is_named(server, tmp_path, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    folder = ShardFolder(f"{server.url}/pairs", ShardCache(tmp_path / "cache", 1 << 30))
    with pytest.raises(UserError, match=r"data\.cache_dir: .*No space left.*lower data\.cache_bytes"):
        folder.read(0)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_objects_of_a_store_are_read_through_fsspec(server, tmp_path, monkeypatch):
    """An in-memory store in place of S3, whose client users install themselves."""
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", MemoryFileSystem)
    store = MemoryFileSystem()
    for path in (server.folder / "pairs").iterdir():
        store.pipe(f"s3://bucket/pairs/{path.name}", path.read_bytes())
    try:
        folder = ShardFolder("s3://bucket/pairs", ShardCache(tmp_path / "cache", 1 << 30))
        assert folder.read(33).metadata["key"] == "k33"
        store.rm("s3://bucket/pairs/shard-000003.tar")
        with pytest.raises(UserError, match=r"s3://bucket/pairs/shard-000003\.tar: no such object"):
            folder.read(48)
    finally:
        store.rm("s3://bucket", recursive=True)


def test_access_denied_by_a_store_is_refused_at_once(tmp_path, monkeypatch):
    asked = []

    class Private(MemoryFileSystem):
        def _open(self, path: str, *arguments: object, **options: object) -> None:
            asked.append(path)
            raise PermissionError("Access Denied")  # as s3fs and gcsfs do for 403

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Private)
    with pytest.raises(UserError, match=r"s3://bucket/pairs/manifest\.json: access denied \(Access Denied\)"):
        ShardFolder("s3://bucket/pairs", ShardCache(tmp_path / "cache", 1 << 30))
    assert len(asked) == 1


def test_a_store_whose_client_is_missing_says_what_to_install(tmp_path):
    with pytest.raises(UserError, match=r"gs://bucket/pairs/manifest\.json: .*gcsfs"):
        ShardFolder("gs://bucket/pairs", ShardCache(tmp_path / "cache", 1 << 30))
