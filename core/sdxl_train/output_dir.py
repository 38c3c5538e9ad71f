"""The project folder: its name with the placeholders filled in, the lock on it, and what a run finds there at its start."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from sdxl_train.atomic import remove_leftovers
from sdxl_train.errors import ConfigError

TIMESTAMP = "%Y%m%d%H%M%S"
SET_ASIDE = ("models", "train_state", "samples/sheets")  # the last: pictures of an earlier run are no part of this one's progress
LOCK_NAME = ".lock"

_PLACEHOLDER = re.compile("%(index|date|time|datetime)%")
_TIME_FORMATS = {"date": "%Y-%m-%d", "time": "%H-%M-%S", "datetime": "%Y-%m-%d-%H-%M-%S"}
_EXPANSIONS = {  # what each may become, as regular expressions
    "index": "(?:0|[1-9][0-9]*)",
    "date": "[0-9]{4}(?:-[0-9]{2}){2}",
    "time": "[0-9]{2}(?:-[0-9]{2}){2}",
    "datetime": "[0-9]{4}(?:-[0-9]{2}){5}",
}


def resolve_output_dir(pattern: str, now: datetime, *, claim: bool = True) -> Path:
    """The path that `output_dir` stands for: `%date%`, `%time%` and `%datetime%` of `now`, and `%index%` as the first free number.

    Free is the smallest of 0, 1, 2, ... for which the path up to the last component with `%index%` does not exist; every `%index%` is
    that number. It is claimed by making that directory, which only one of several processes can do. Any other `%...%` stays as it is.

    Args:
        now: local time.
        claim: False only looks which number would be taken, and makes nothing.
    Raises:
        ConfigError: the directory cannot be made.
    """
    dated = _PLACEHOLDER.sub(lambda match: now.strftime(_TIME_FORMATS[match[1]]) if match[1] in _TIME_FORMATS else match[0], pattern)
    parts = Path(dated).parts
    indexed = [i for i, part in enumerate(parts) if "%index%" in part]
    if not indexed:
        return Path(dated)
    with file_errors(pattern):
        for index in itertools.count():
            numbered = [part.replace("%index%", str(index)) for part in parts]
            claimed = Path(*numbered[: indexed[-1] + 1])
            if claim:
                claimed.parent.mkdir(parents=True, exist_ok=True)
                try:
                    claimed.mkdir()
                except FileExistsError:
                    continue
            elif os.path.lexists(claimed):
                continue
            return Path(*numbered)
    raise AssertionError("itertools.count ended")


def matching_output_dirs(pattern: str) -> list[Path]:
    """The existing directories that `pattern` could have been resolved to, each placeholder standing for anything it may become."""
    path = Path(pattern)
    found = [Path(path.anchor)]
    for part in path.parts[1:] if path.anchor else path.parts:
        pieces = _PLACEHOLDER.split(part)  # text, placeholder, text, placeholder, ..., text
        regex = re.compile("".join(_EXPANSIONS[piece] if i % 2 else re.escape(piece) for i, piece in enumerate(pieces)))
        if len(pieces) == 1:
            found = [directory / part for directory in found]
        else:
            children = [child for directory in found if directory.is_dir() for child in sorted(directory.iterdir())]
            found = [child for child in children if regex.fullmatch(child.name)]
    return [directory for directory in found if directory.is_dir()]


def prepare_output_dir(path: Path, *, fresh: bool, now: datetime, warn: Callable[[str], None]) -> Path:
    """Make `models/`, `samples/` and a new `logs/<YYYYmmddHHMMSS>/` in a locked project folder, and return the latter.

    Temporary files of killed runs are removed. A fresh run renames what an earlier one left in `models/`, `train_state/` and
    `samples/sheets/` to `<name>.old-<YYYYmmddHHMMSS>`. A name that is taken counts on from `now` by seconds until it is free.

    Args:
        fresh: the run does not resume.
        now: local time of the start.
        warn: told of what was renamed.
    Raises:
        ConfigError: something cannot be made or renamed there.
    """
    with file_errors(path):
        for directory in _directories(path):
            remove_leftovers(directory)
        if fresh:
            _set_earlier_run_aside(path, now, warn)
        for name in ("models", "samples", "logs"):
            (path / name).mkdir(parents=True, exist_ok=True)
        log_dir = path / "logs" / free_stamp(now, lambda stamp: os.path.lexists(path / "logs" / stamp))
        log_dir.mkdir()
    return log_dir


def _set_earlier_run_aside(path: Path, now: datetime, warn: Callable[[str], None]) -> None:
    earlier = [name for name in SET_ASIDE if (path / name).is_dir() and any((path / name).iterdir())]
    stamp = free_stamp(now, lambda stamp: any(os.path.lexists(path / f"{name}.old-{stamp}") for name in SET_ASIDE))
    for name in earlier:
        kept = path / f"{name}.old-{stamp}"
        (path / name).rename(kept)
        warn(f"{path / name} is of an earlier run; it is now {kept}")


@contextmanager
def locked_output_dir(path: Path, now: datetime) -> Iterator[None]:
    """Hold `<path>/.lock` while the block runs, so that no second run writes into the project folder; makes the folder if need be.

    The kernel frees the lock when the process dies, so one that a killed run left is taken over; forked loader workers do not hold it.
    It belongs to the process: opening and closing the file anywhere else in this process would release it.

    Raises:
        ConfigError: another run holds it (the message names process, host and start), or the file system cannot lock.
    """
    with file_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
    with lock:
        with file_errors(path):
            if not _lock(lock.fileno()):
                holder = _holder(lock.read(4096))
                raise ConfigError(f"output_dir: {path} is in use by another run{holder}; wait for its end or choose another folder")
            lock.truncate(0)
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": now.isoformat(" ", "seconds")}, lock)
            lock.flush()
        try:
            yield
        finally:
            lock.seek(0)
            lock.truncate(0)
            lock.flush()


def is_in_use(path: Path) -> bool:
    """Whether another process runs a training in the folder. Not to be asked by the process that does."""
    try:
        with open(path / LOCK_NAME, "r+", encoding="utf-8") as lock:
            return not _lock(lock.fileno())
    except OSError:
        return False


def _holder(written: str) -> str:
    try:
        held = json.loads(written)
        return f" (process {held['pid']} on {held['host']}, started {held['started']})"
    except (ValueError, KeyError, TypeError):  # it is just starting or ending
        return ""


if os.name == "nt":
    import msvcrt

    _LOCKED_BYTE = 1 << 20  # locks of Windows keep others from reading, so the lock lies behind the text

    def _lock(descriptor: int) -> bool:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _lock(descriptor: int) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the system likes
            return False
        return True


def _directories(path: Path) -> list[Path]:
    """Where `atomic_file` may have written: the folder and everything below it but what belongs to earlier runs."""
    walked: list[Path] = []
    for root, names, _ in os.walk(path):
        walked.append(Path(root))
        names[:] = [name for name in names if ".old-" not in name]
    return walked


def free_stamp(now: datetime, taken: Callable[[str], bool]) -> str:
    """The first second from `now` on whose time stamp is not taken."""
    for seconds in itertools.count():
        stamp = (now + timedelta(seconds=seconds)).strftime(TIMESTAMP)
        if not taken(stamp):
            return stamp
    raise AssertionError("itertools.count ended")


@contextmanager
def file_errors(path: Path | str) -> Iterator[None]:
    """Turns what the file system says about `output_dir` into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"output_dir: {str(path)!r} cannot be used: {error.strerror} ({error.filename or path})") from error
    except ValueError as error:  # a NUL in the name
        raise ConfigError(f"output_dir: {str(path)!r} cannot be used: {error}") from error
