"""Train states on the disk: written whole or not at all, verified before they are believed, pruned last.

A state is the directory `<output_name>_ep<E>_step<S>` of files and `manifest.json`, which names each of them with its bytes and SHA-256.
Order of a save: a staging directory, its files, each synced; the manifest, synced last; the directory; the rename; the parent directory.
Needs no torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from sdxl_train.atomic import hidden_name, sync_directory

MANIFEST = "manifest.json"
STATES = "train_state"
_NAME = re.compile(r"(.+)_ep([0-9]+)_step([0-9]+)", re.DOTALL)
_PIECE = 1 << 22


class Staging:
    """A state that is being written. `hasher`, one thread, hashes the files meanwhile: hashing and writing take about as long."""

    def __init__(self, directory: Path, hasher: ThreadPoolExecutor) -> None:
        self._directory = directory
        self._hasher = hasher
        self._files: dict[str, _HashedFile] = {}

    @contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """A new file of the state, to be written from front to back; synced when the block ends."""
        with open(self._directory / name, "xb", buffering=0) as file:
            self._files[name] = _HashedFile(file, self._hasher)
            yield cast(BinaryIO, self._files[name])
            os.fsync(file.fileno())

    def write_json(self, name: str, value: object) -> None:
        """A JSON file of the state."""
        with self.file(name) as file:
            file.write((json.dumps(value, indent=1) + "\n").encode())

    def finish(self) -> None:
        """Write the manifest, after which the state is complete."""
        self._hasher.shutdown()
        manifest = {name: {"bytes": file.num_bytes, "sha256": file.digest.hexdigest()} for name, file in self._files.items()}
        with open(self._directory / MANIFEST, "xb", buffering=0) as file:
            file.write((json.dumps(manifest, indent=1) + "\n").encode())
            os.fsync(file.fileno())
        sync_directory(self._directory)


class _HashedFile(io.RawIOBase):
    """What is written is hashed by `hasher`, in its order; it must not change until that is shut down."""

    def __init__(self, file: io.FileIO, hasher: ThreadPoolExecutor) -> None:
        self._file = file
        self._hasher = hasher
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            self._hasher.submit(self.digest.update, piece)
            while piece:
                piece = piece[self._file.write(piece) :]
        self.num_bytes += len(view)
        return len(view)


@contextmanager
def staged_state(final: Path) -> Iterator[Staging]:
    """A staging directory beside `final` that takes its name when the block ends; when it raises, nothing is left.

    What had the name is removed; between the two renames there is neither, so it must be nothing that is still wanted.

    Raises:
        OSError: from the file system; a failed fsync is final for what was written.
    """
    if not final.parent.is_dir():
        final.parent.mkdir(parents=True, exist_ok=True)
        sync_directory(final.parent.parent)
    directory, replaced = hidden_name(final.parent), hidden_name(final.parent)
    directory.mkdir()
    try:
        with ThreadPoolExecutor(1, "hash") as hasher:
            staging = Staging(directory, hasher)
            yield staging
            staging.finish()
        if final.exists():
            final.rename(replaced)
        directory.rename(final)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    sync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def state_faults(directory: Path) -> list[str]:
    """What is wrong with a state: files that are missing, of another length or content, or not in the manifest; empty if it is complete.

    Reads every file.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except FileNotFoundError:
        return [f"{directory / MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{directory / MANIFEST} cannot be read: {error}"]
    faults = []
    for name, (num_bytes, sha256) in listed.items():
        path = directory / name
        if path.name != name or name in (".", ".."):
            faults.append(f"{directory / MANIFEST} names {name!r}, which is no file of the state")
            continue
        try:
            fault = _file_fault(path, num_bytes, sha256)
        except OSError as error:  # a bad sector, say
            fault = f"cannot be read: {error.strerror}"
        if fault:
            faults.append(f"{path} {fault}")
    return faults


def _file_fault(path: Path, num_bytes: int, sha256: str) -> str | None:
    if not path.is_file():
        return "is missing"
    if (found := path.stat().st_size) != num_bytes:
        return f"has {found} bytes in place of {num_bytes}"
    with open(path, "rb", buffering=0) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            return "has changed: its SHA-256 is another one"
    return None


def step_of(name: str) -> tuple[str, int] | None:
    """(output_name, S) of the name of a state or, without its extension, of a saved model; None for any other name."""
    match = _NAME.fullmatch(name)
    return (match[1], int(match[3])) if match else None


def states_in(output_dir: Path) -> list[tuple[int, Path]]:
    """(S, path) of everything that is called like a state, the newest step first; not verified."""
    folder = output_dir / STATES
    if not folder.is_dir():
        return []
    named = [(step_of(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted(((found[1], path) for found, path in named if found), reverse=True)


def discard(path: Path) -> None:
    """Remove a state or a file. It gets a name that no state has first, so a removal that breaks off leaves no half state."""
    if path.is_dir():
        trash = hidden_name(path.parent)
        path.rename(trash)
        sync_directory(path.parent)
        shutil.rmtree(trash)
    else:
        path.unlink()
