"""What a start finds out about the data, kept for the next one.

`image_size.json`, `num_repeats.json` and `counter.json` are for people and other programs. `index.safetensors` holds the whole index; the
next start maps it into memory, and checks whether it still holds. It is a cache: one that cannot be read is no error.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_train.atomic import atomic_file
from sdxl_train.data.columns import NameColumn, TextColumn
from sdxl_train.data.file_stamps import FileStamp, file_stamp
from sdxl_train.data.index import Caches, Index
from sdxl_train.data.sources import Inputs
from sdxl_train.errors import CheckpointError
from sdxl_train.model.safetensors_header import header_of

INDEX_NAME, SIZES_NAME = "index.safetensors", "image_size.json"
_VERSION = "2"  # of the columns; another one is not read


@dataclass(frozen=True)
class KnownSize:
    """Upright (w, h) in px of a picture that had this time and length."""

    size: tuple[int, int]
    mtime_ns: int
    num_bytes: int


@dataclass(frozen=True)
class Records:
    """
    Attributes:
        index: of an earlier start, its arrays mapped from the file (writing to them changes no file); None if there is none.
        inputs: what it was made from.
        sizes: of pictures by path, from an `image_size.json` that does not belong to the index.
    """

    index: Index | None
    inputs: Inputs
    sizes: dict[str, KnownSize]


def read_records(directory: Path) -> Records | None:
    """What is in the folder; None if nothing can be used."""
    mapped = _read_index(directory / INDEX_NAME)
    stamp = file_stamp(str(directory / SIZES_NAME))
    if mapped is None:
        sizes = _read_sizes(directory / SIZES_NAME) if stamp else {}
        return Records(None, Inputs([]), sizes) if sizes else None
    index, inputs, sizes_stamp = mapped
    if stamp is None or stamp == sizes_stamp:
        return Records(index, inputs, {})
    return Records(None, inputs, _read_sizes(directory / SIZES_NAME))  # it was edited: what it says is used, and the rest read anew


def write_records(directory: Path, index: Index, inputs: Inputs) -> None:
    """Write all files, each whole or not at all, the index last.

    Raises:
        OSError: from the file system.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / SIZES_NAME, _size_entries(index))
    trained = zip(index.keys, index.num_repeats.tolist(), index.is_bad.tolist(), strict=True)
    _write_json(directory / "num_repeats.json", ((key, repeats) for key, repeats, is_bad in trained if not is_bad))
    _write_json(directory / "counter.json", iter(index.counter.items()))
    meta = {name: getattr(index, name) for name in _PLAIN}
    meta |= {"version": _VERSION, "inputs": asdict(inputs), "sizes_stamp": file_stamp(str(directory / SIZES_NAME))}
    arrays = {name: np.ascontiguousarray(array) for name, array in _arrays(index)}
    # An array and not the file's metadata, which has a limit; in ASCII, since names may hold what is no UTF-8.
    arrays[_META] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    from safetensors.numpy import save_file

    with atomic_file(directory / INDEX_NAME) as temporary:
        save_file(arrays, temporary)


_META = "meta"
_PLAIN = ("counter", "missing", "hidden", "run_folders", "placed_for", "sizes_chosen_for", "vae_digest")
_PAIRS = ("placed_for", "sizes_chosen_for")
_NO_COLUMNS = (*_PLAIN, "uses_caches")


def _arrays(holder: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every column, those of nested ones as `outer.inner`."""
    for name in (one.name for one in fields(holder)):
        value = getattr(holder, name)
        if isinstance(value, np.ndarray):
            yield prefix + name, value
        elif isinstance(value, TextColumn):
            yield from ((f"{prefix}{name}.buffer", value.buffer), (f"{prefix}{name}.ends", value.ends))
        elif isinstance(value, NameColumn):
            names = TextColumn.of(value.names)
            yield from ((f"{prefix}{name}.names", names.buffer), (f"{prefix}{name}.name_ends", names.ends))
            yield f"{prefix}{name}.codes", value.codes
        elif is_dataclass(value):
            yield from _arrays(value, f"{prefix}{name}.")


def _read_index(path: Path) -> tuple[Index, Inputs, FileStamp | None] | None:
    try:
        arrays = _map(path)
        meta = json.loads(arrays[_META].tobytes()) if _META in arrays else {}
    except (OSError, CheckpointError, ValueError):
        return None  # torn, or something else: everything is found out anew
    if meta.get("version") != _VERSION:
        return None
    columns: dict[str, Any] = {one.name: _column(one.name, str(one.type), arrays) for one in fields(Index) if one.name not in _NO_COLUMNS}
    plain: dict[str, Any] = {name: tuple(meta[name]) if name in _PAIRS else meta[name] for name in _PLAIN}
    counter = plain["counter"]
    counter |= {"character": counter["characters"], "style": counter["styles"]}  # the same dicts again
    stamp = meta["sizes_stamp"]
    return Index(**columns, **plain), Inputs(**meta["inputs"]), tuple(stamp) if stamp else None


def _map(path: Path) -> dict[str, np.ndarray]:
    """Every array of a safetensors file, mapped copy-on-write: pages are shared until somebody writes to them."""
    with open(path, "rb") as file:  # once: another start may replace the file at any moment
        header = header_of(file, str(path))
        if not {info.dtype for info in header.tensors.values()} <= set(_DTYPES):
            raise ValueError("no index of ours")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {
        name: np.frombuffer(mapped, _DTYPES[info.dtype], math.prod(info.shape), info.begin).reshape(info.shape)
        for name, info in header.tensors.items()
    }


_DTYPES = {"BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I32": np.int32, "I64": np.int64}


def _column(name: str, kind: str, arrays: dict[str, np.ndarray]) -> Any:
    if kind == "TextColumn":
        return TextColumn(arrays[f"{name}.buffer"], arrays[f"{name}.ends"])
    if kind == "NameColumn":
        return NameColumn(list(TextColumn(arrays[f"{name}.names"], arrays[f"{name}.name_ends"])), arrays[f"{name}.codes"])
    if kind == "Caches":
        return Caches(**{one.name: arrays[f"{name}.{one.name}"] for one in fields(Caches)})
    return arrays[name]


def _size_entries(index: Index) -> Iterator[tuple[str, dict[str, Any]]]:
    """One entry for each picture that is good; sizes from caches are no sizes of pictures."""
    for row in np.flatnonzero((index.image_paths.lengths > 0) & ~index.is_bad).tolist():
        num_bytes, mtime_ns = index.stamps[row, :2].tolist()
        entry = {"size": index.image_sizes[row].tolist(), "path": index.image_paths[row], "mtime_ns": mtime_ns, "bytes": num_bytes}
        yield index.keys[row], entry


def _read_sizes(path: Path) -> dict[str, KnownSize]:
    """By path of the picture; a file that is damaged or of another kind tells nothing."""
    try:
        with open(path, "rb") as file:
            entries = json.load(file).values()
        found = ((entry["path"], *entry["size"], entry["mtime_ns"], entry["bytes"]) for entry in entries)
        return {path: KnownSize((int(width), int(height)), mtime_ns, num_bytes) for path, width, height, mtime_ns, num_bytes in found}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _write_json(path: Path, entries: Iterator[tuple[str, Any]]) -> None:
    """An object with an entry a line, written as it comes."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        separator = "{\n"
        for key, value in entries:
            file.write(f"{separator}{json.dumps(key)}: {json.dumps(value)}")  # ASCII, since names may hold what is no UTF-8
            separator = ",\n"
        file.write("\n}\n" if separator != "{\n" else "{}\n")
