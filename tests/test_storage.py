"""Folders and files appear whole, and what is not ours is never deleted."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megafusion import storage
from megafusion.errors import UserError
from megafusion.storage import expand_path, new_folder, write_file


def fill(folder, content="new"):
    with new_folder(folder, "marker") as partial:
        (partial / "marker").write_text(content)


def test_a_folder_replaces_its_own_kind_and_an_empty_one(tmp_path):
    fill(tmp_path / "a", "old")
    fill(tmp_path / "a")
    assert (tmp_path / "a/marker").read_text() == "new"
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_ours_stays(tmp_path, kind):
    place = tmp_path / "thesis"
    if kind == "folder":
        place.mkdir()
        (place / "thesis.txt").write_text("years of work")
    else:
        place.write_text("years of work")
    with pytest.raises(UserError, match=r"thesis: (holds other files, which would be lost|is a file)"):
        fill(place)
    assert (place / "thesis.txt" if kind == "folder" else place).read_text() == "years of work"


def test_a_failure_leaves_the_old_and_nothing_half_made(tmp_path):
    fill(tmp_path / "a", "old")

    def fail():
        with new_folder(tmp_path / "a", "marker") as partial:
            (partial / "marker").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"a: cannot be written \(No space left"):
        fail()
    assert (tmp_path / "a/marker").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("when", ["deleting the old", "between the renames"])
def test_a_kill_while_a_folder_is_replaced_leaves_one_that_can_be_replaced(tmp_path, when):
    fill(tmp_path / "a", "old")
    (tmp_path / "a/second").touch()

    def die(*_arguments, **_options):
        os._exit(9)

    def delete_some(path, **options):
        if path.exists():
            (path / "marker").unlink()
            die()

    if (child := os.fork()) == 0:
        with new_folder(tmp_path / "a", "marker") as partial:
            (partial / "marker").write_text("new")
            if when == "deleting the old":
                storage.shutil.rmtree = delete_some
            else:
                real = Path.rename
                Path.rename = lambda path, to: real(path, to) if path == tmp_path / "a" else die()
        die()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    fill(tmp_path / "a", "newer")
    assert (tmp_path / "a/marker").read_text() == "newer"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep/file.txt"
    write_file(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_umask_says_who_may_read_a_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_file(tmp_path / "file.txt", "words")
    finally:
        os.umask(before)
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == mode


@given(name=st.text(st.sampled_from("$~{}[]%#:é aB_'\""), min_size=1).map("x{}".format))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_a_folder_of_any_name_is_not_expanded(tmp_path, name):
    (tmp_path / name).mkdir(exist_ok=True)
    for inside in ("", "/run/config.yaml"):
        assert expand_path(f"{tmp_path}/{name}{inside}") == f"{tmp_path}/{name}{inside}"


def test_home_and_variables_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    for path, found in (
        ("~/a", f"{tmp_path}/a"),
        ("$DATA/a", "/data/a"),
        ("/x/${DATA}", "/x//data"),
        ("a~", "a~"),
    ):
        assert expand_path(path) == found
    for path in ("$NOT_SET/a", "~not_a_user/a", "a/${NOT_SET}"):
        with pytest.raises(UserError, match="is not known here; write the path out"):
            expand_path(path)


@pytest.mark.parametrize("url", ["s3://bucket/run", "file:///run", "s3:/bucket", "https://host/run"])
def test_a_url_is_no_path(url):
    with pytest.raises(UserError, match=r": is a URL, where a path on a disk is needed"):
        expand_path(url)
