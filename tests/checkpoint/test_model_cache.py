"""The cache folder: where it is, who may write, and what happens when nobody can."""

from __future__ import annotations

import errno
from pathlib import Path
from threading import Event, Thread

import pytest

from swarmcore.checkpoint import cache_folder
from swarmcore.checkpoint.storage import (
    check_room,
    gigabytes,
    locked,
    new_folder,
    no_progress,
    storage_errors,
    write_file,
)
from swarmcore.errors import StorageError


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("SWARMCORE_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/swarmcore")
    monkeypatch.setenv("SWARMCORE_CACHE", "~/models")
    assert cache_folder() == Path("/home/me/models")
    assert cache_folder(tmp_path) == tmp_path


def test_the_second_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    waiting, entered = Event(), Event()

    def progress(what: str, done: int, total: int) -> None:
        assert (what, done, total) == ("waiting for the other", 0, 0)
        waiting.set()

    def second() -> None:
        with locked(tmp_path / "target", tmp_path, "waiting for the other", progress):
            entered.set()

    thread = Thread(target=second)
    with locked(tmp_path / "target", tmp_path, "", no_progress):
        thread.start()
        assert waiting.wait(30)
        assert not entered.is_set()
    assert entered.wait(30)
    thread.join()


def test_different_targets_do_not_wait(tmp_path: Path) -> None:
    with locked(tmp_path / "a", tmp_path, "", no_progress), locked(tmp_path / "b", tmp_path, "", no_progress):
        pass


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt), new_folder(target) as part:
        (part / "file").write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with new_folder(target) as part:
        (part / "file").write_bytes(b"whole")
        assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file"
    write_file(path, b"first")
    monkeypatch.setattr(
        Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(errno.EIO, "broken"))
    )
    with pytest.raises(OSError, match="broken"):
        write_file(path, b"second")
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full: testing needs 2 kB, "),
        (errno.EACCES, "no permission for testing"),
        (errno.EROFS, "no permission for testing"),
        (errno.EIO, "testing failed: "),
    ],
)
def test_what_the_operating_system_refuses(tmp_path: Path, code: int, words: str) -> None:
    with pytest.raises(StorageError, match=words), storage_errors("testing", tmp_path, 2000):
        raise OSError(code, "whatever", str(tmp_path))


def test_room_is_that_of_the_disk_the_folder_would_be_on(tmp_path: Path) -> None:
    check_room("testing", tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(StorageError, match="the disk is full") as caught:
        check_room("testing", tmp_path / "not" / "there" / "yet", 10**18)
    assert 0 < caught.value.free < caught.value.needed == 10**18


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (12, "12 bytes"),
        (5000, "5 kB"),
        (269_030_016, "269 MB"),
        (1_500_000_000, "1.5 GB"),
        (10**18, "1000000000 GB"),
    ],
)
def test_sizes_as_people_read_them(size: int, text: str) -> None:
    assert gigabytes(size) == text
