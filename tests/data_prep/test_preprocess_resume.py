"""Shards are bitwise identical at any number of workers or tasks, and after any kill."""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from pyarrow import Table, parquet

from data_prep import preprocess as command
from data_prep.config import PreprocessConfig
from data_prep.preprocess import ShardRange, parse_range, preprocess
from megafusion.data.reader import ShardFolder
from megafusion.errors import UserError
from tests.support.raw import (
    drawing,
    encoded,
    kill_in_the_middle,
    made_files,
    png,
    shards_made,
    write_tar,
)
from tests.support.small import GLOSSES

KINDS = ("pairs", "text", "interleaved")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """Pairs in 6 tars, some of them duplicates and one corrupt, 300 texts in 3 files, 20 documents."""
    folder = tmp_path_factory.mktemp("inputs")
    for number in range(6):
        samples = {f"{number}{i}": {"png": encoded(drawing(7 * number + i)), "txt": b"x"} for i in range(9)}
        if number == 4:
            samples["bad"] = {"png": b"x", "txt": b"x"}
        write_tar(folder / f"{number}.tar", samples)
    lines = GLOSSES.read_text().splitlines()
    for number in range(3):
        (folder / f"{number}.txt").write_text("\n".join(lines[100 * number : 100 * number + 100]))
    rows = [{"texts": ["a", None, line], "images": [None, png(), None]} for line in lines[:20]]
    parquet.write_table(Table.from_pylist(rows), folder / "d.parquet")
    return {
        "images": tuple(folder / f"{i}.tar" for i in range(6)),
        "texts": tuple(folder / f"{i}.txt" for i in range(3)),
        "documents": (folder / "d.parquet",),
        "documents_per_shard": 5,
        "batch_size": 3,
        "on_error": "skip",
        "filters": {"duplicates": "exact"},
    }


def all_files(out: Path) -> dict[str, dict[str, bytes]]:
    """Output files by kind; nothing else may be left."""
    assert sorted(path.name for path in out.iterdir()) == sorted(KINDS)
    return {kind: made_files(out / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def uninterrupted(inputs, tokenizer, vae_folder, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    preprocess(
        PreprocessConfig(out=out, tokenizer=tokenizer.path, vae=vae_folder, image_sizes=((32, 32),), **inputs)
    )
    return all_files(out)


@pytest.mark.full
def test_any_number_of_workers_gives_the_same_bytes(make, inputs, tmp_path, uninterrupted):
    make(**inputs, num_workers=3)
    assert all_files(tmp_path / "out") == uninterrupted
    assert len(uninterrupted["pairs"]) > 20


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_array_tasks_give_the_same_bytes_in_any_order(make, inputs, tmp_path, uninterrupted, order):
    made = [make(ShardRange(index, 3), **inputs) for index in order]
    assert [len(manifests) for manifests in made] == [0, 0, 3]
    assert all_files(tmp_path / "out") == uninterrupted


def test_a_run_without_shard_range_finishes_for_a_lost_task(make, inputs, tmp_path, uninterrupted):
    make(ShardRange(0, 2), **inputs)
    assert not (tmp_path / "out/pairs").exists()
    assert len(make(**inputs)) == 3
    assert all_files(tmp_path / "out") == uninterrupted


def test_concurrent_tasks_give_the_same_bytes(settings, inputs, tmp_path, uninterrupted):
    config = PreprocessConfig(**settings | inputs)
    fork = multiprocessing.get_context("fork")
    tasks = [fork.Process(target=preprocess, args=(config, ShardRange(index, 3))) for index in range(3)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    assert [task.exitcode for task in tasks] == [0, 0, 0]
    assert all_files(tmp_path / "out") == uninterrupted


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/2", "1/0", ""])
def test_invalid_shard_ranges_are_refused(text):
    with pytest.raises(UserError, match=r"--shard-range .*: is not I/N"):
        parse_range(text)


def test_ten_kills_at_random_moments_change_no_byte(settings, inputs, tmp_path, uninterrupted):
    """SIGKILL of a command that resumes, at random moments from the scan to the last shard."""
    config = PreprocessConfig(**settings | inputs)
    chance = random.Random(0)
    num_shards = sum(name.endswith(".tar") for files in uninterrupted.values() for name in files)
    for moment in [0, 0, *sorted(chance.sample(range(1, num_shards - 4), 8))]:
        kill_in_the_middle(config, moment, chance.uniform(0, 0.02))
    assert not (tmp_path / "out/interleaved").exists()
    preprocess(config)
    assert all_files(tmp_path / "out") == uninterrupted


def run_command(config: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "megafusion.cli", "preprocess", str(config)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def test_workers_end_with_a_killed_command(settings, inputs, tmp_path, uninterrupted):
    """Two workers, killed after some shards; complete shards are kept, and the others written."""
    config = PreprocessConfig(**settings | inputs, num_workers=2)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    run = run_command(path)
    while shards_made(tmp_path / "out") < 4:
        assert run.poll() is None
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    time.sleep(1.0)
    (partial,) = (tmp_path / "out").glob("*.partial")
    times = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    time.sleep(0.5)
    assert {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")} == times
    kept = {f"shard-{path.stem}.tar" for path in (partial / "work/shards").iterdir()}
    assert kept
    preprocess(config.model_copy(update={"num_workers": 0}))
    assert all_files(tmp_path / "out") == uninterrupted
    folder = tmp_path / "out" / partial.name.split(".")[0]
    assert all((folder / name).stat().st_mtime_ns == times[name] for name in kept)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_of_the_command_at_random_moments(settings, inputs, tmp_path, uninterrupted):
    config = PreprocessConfig(**settings | inputs, num_workers=2)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json") | {"out": str(tmp_path / "timed")}))
    begun = time.monotonic()
    assert run_command(path).wait() == 0
    seconds, chance = time.monotonic() - begun, random.Random(1)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    for _ in range(10):
        run = run_command(path)
        try:
            run.wait(chance.uniform(0.3, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            os.kill(run.pid, signal.SIGKILL)
            run.wait()
    assert run_command(path).wait() == 0
    assert all_files(tmp_path / "out") == uninterrupted


@pytest.mark.parametrize("damage", ["cut", "gone", "index gone"])
def test_an_incomplete_shard_is_written_again(make, inputs, tmp_path, uninterrupted, damage):
    make(ShardRange(0, 2), **inputs)
    (partial,) = (tmp_path / "out").glob("pairs.*.partial")
    shard = partial / "shard-000002.tar"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-512])
    else:
        (shard if damage == "gone" else shard.with_suffix(".index.npy")).unlink()
    make(**inputs)
    assert all_files(tmp_path / "out") == uninterrupted


def test_other_inputs_start_over_and_remove_partial_work(make, inputs, tmp_path):
    make(ShardRange(0, 2), **inputs)
    (tmp_path / "t.txt").write_text("only this\n")
    make(images=inputs["images"], texts=(tmp_path / "t.txt",), on_error="skip")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name for name in left if not name.startswith("interleaved")} == {"pairs", "text"}
    assert len(ShardFolder(tmp_path / "out/text")) == 1


@pytest.mark.parametrize("change", ["image", "gone"])
def test_an_input_that_changes_after_the_scan_is_named(make, inputs, tmp_path, change):
    """Its size and modification time are restored, or it is missing on resume."""
    tar = write_tar(tmp_path / "x.tar", {f"k{i}": {"png": png(), "txt": b"x"} for i in range(4)})
    make(ShardRange(0, 2), images=(tar,), documents_per_shard=2)
    status = tar.stat()
    content = tar.read_bytes()
    tar.write_bytes(content.replace(png(), b"?" * len(png())))
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    message = r"x\.tar, key 'k2': has changed since it was scanned"
    if change == "gone":
        tar.unlink()
        message = r"x\.tar: no such file"
    with pytest.raises(UserError, match=message):
        make(images=(tar,), documents_per_shard=2)


def test_an_input_that_changes_before_the_manifest_is_named(make, tmp_path, monkeypatch):
    """Lines of equal lengths would still give complete shards, with the hash of another file."""
    lines, finish = tmp_path / "x.txt", command._Job._finish
    lines.write_text("one\ntwo\n" * 4)

    def change_and_finish(*arguments):
        lines.write_text("six\nten\n" * 4)
        return finish(*arguments)

    monkeypatch.setattr(command._Job, "_finish", change_and_finish)
    with pytest.raises(UserError, match=r"x\.txt: has changed since it was scanned"):
        make(texts=(lines,))
    assert not (tmp_path / "out/text").exists()


def test_a_full_disk_is_reported_and_finished_work_kept(settings, inputs, tmp_path, uninterrupted):
    """A limit on file sizes, which fails as a full disk does, in a process of its own."""
    config = PreprocessConfig(**settings | inputs)
    message, said = tmp_path / "message", tmp_path / "stderr"

    def limited() -> None:
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))
        try:
            preprocess(config)
        except UserError as error:
            message.write_text(str(error))

    run = multiprocessing.get_context("fork").Process(target=limited)
    run.start()
    run.join()
    assert f"{tmp_path}/out/pairs: cannot be written" in message.read_text()
    assert "free space or choose another folder" in message.read_text()
    assert "Exception ignored" not in said.read_text()
    assert not (tmp_path / "out/pairs").exists()
    assert list((tmp_path / "out").glob("pairs.*.partial/work/scan/*"))
    preprocess(config)
    assert all_files(tmp_path / "out") == uninterrupted


def test_a_killed_worker_is_reported(make, inputs, monkeypatch, tmp_path):
    """Killed from outside, as when memory runs out."""
    import psutil

    def kill_one() -> None:
        while True:
            for child in psutil.Process(os.getppid()).children(recursive=True):
                if any("forkserver" in part for part in child.cmdline()) and child.children():
                    child.children()[0].kill()
                    return
            time.sleep(0.01)

    killer = multiprocessing.get_context("fork").Process(target=kill_one)
    killer.start()
    with pytest.raises(UserError, match="a preprocessing worker died"):
        make(**inputs, num_workers=2)
    killer.join()
