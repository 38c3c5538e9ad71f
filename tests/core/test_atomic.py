"""A file is whole under its name, or as it was."""

import os
import stat
from pathlib import Path

import pytest

from sdxl_train.atomic import atomic_file, remove_leftovers


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == tmp_path and not path.exists()
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_a_failed_sync_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError), atomic_file(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_the_file_is_synced_before_the_rename_and_the_directory_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        calls.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def logged_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_bytes(b"x")
    assert calls == ["file", "rename", "directory"]


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_the_mode_follows_the_umask_whatever_wrote_the_file(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        with atomic_file(tmp_path / "a") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 126 + "abc")
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"x")
    assert path.exists()


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mine.tmp").touch()
    process = os.fork()
    if process == 0:
        with atomic_file(tmp_path / "a"):
            os._exit(0)
    os.waitpid(process, 0)
    assert len(remove_leftovers(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["mine.tmp"]
