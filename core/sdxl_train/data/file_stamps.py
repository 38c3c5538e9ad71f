"""What tells whether a file has changed since it was looked at, without reading it."""

import os
from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

FileStamp = tuple[int, int, int, int]  # size in bytes, mtime_ns, ctime_ns, inode

_NO_FILE: FileStamp = (0, 0, 0, 0)


def stamp_of(status: os.stat_result) -> FileStamp:
    """The stamp of a file with this status; the inode is cut to what a column of int64 holds."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & 0x7FFF_FFFF_FFFF_FFFF


def file_stamp(path: str | bytes) -> FileStamp | None:
    """The stamp of a file; None where there is none."""
    try:
        return stamp_of(os.stat(path))
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None


def file_stamps(paths: Iterable[str | bytes]) -> NDArray[np.int64]:
    """The stamps of many files, zeros where there is none. [N, 4]"""
    flat = array("q")
    for path in paths:
        flat.extend(file_stamp(path) or _NO_FILE)
    return np.frombuffer(flat, np.int64).reshape(-1, 4) if flat else np.zeros((0, 4), np.int64)
