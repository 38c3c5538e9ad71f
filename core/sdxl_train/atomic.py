"""Files that are whole or absent: written beside their final name, synced, renamed, with the directory synced last."""

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_PREFIX = ".sdxl-train-"
TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a new, empty file in the directory of `path`; when the block ends, it takes the place of `path`.

    The block writes to the yielded name and closes what it opened. Then: fsync of the file, rename, fsync of the directory. The mode is
    0666 & ~umask, also where a library replaced the temporary file by one of its own. When the block raises, the temporary file is
    removed and `path` is as it was.

    The temporary name does not depend on `path`, so it fits wherever `path` does, and does not end like a data file.

    Raises:
        OSError: from the file system. A failed fsync is final: the old file stays.
    """
    temporary = hidden_name(path.parent)
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    # The kernel applies the umask here; asking for the umask itself would change it for all threads.
    mode = os.fstat(descriptor).st_mode & 0o777
    os.close(descriptor)
    try:
        yield temporary
        os.chmod(temporary, mode)
        sync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Waits until the file's bytes are on the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Waits until the directory's names are on the disk; systems that cannot sync directories are left to themselves."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what some network file systems say of directories
            raise
    finally:
        os.close(descriptor)


def hidden_name(directory: Path) -> Path:
    """A new name in the directory that is nobody's final name; `remove_leftovers` knows it."""
    return directory / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"


def remove_leftovers(directory: Path, older_than_s: float = 0) -> list[Path]:
    """Removes what `atomic_file` and staged train states left in `directory` when a process was killed, and returns the names.

    Args:
        older_than_s: spares younger files, where another process may be writing; 0 only under the run's lock.
    """
    latest, removed = time.time() - older_than_s, []
    for leftover in sorted(directory.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}")):
        try:
            if leftover.stat().st_mtime <= latest:
                if leftover.is_dir():
                    # Another thread may still write there: under a new name it cannot become a state while it is being emptied.
                    shutil.rmtree(leftover.rename(hidden_name(directory)))
                else:
                    leftover.unlink()
                removed.append(leftover)
        except FileNotFoundError:  # its writer has just finished with it
            continue
    return removed
