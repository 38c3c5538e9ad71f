"""The header of a safetensors file, read without torch and without trusting it.

Layout: 8 bytes little-endian length, JSON {name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}, then the data
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
import os
import stat
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from sdxl_train.errors import CheckpointError

# A full SDXL file has 2,515 tensors and a header of 0.4 MB. The limit bounds time and memory on crafted files: parsed JSON takes up to
# 25 times its size.
MAX_HEADER_BYTES = 8 * 2**20

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip

# Protocols 2 to 5, and the zip archive that torch.save writes. Told apart only to say so: whatever is no safetensors file is refused.
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's dtype (safetensors' name for it), shape, and first and last + 1 byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str) -> Header:
    """Reads and checks the header: every byte of the data belongs to exactly one tensor and every span fits its shape.

    Raises:
        CheckpointError: not a regular file, not safetensors, or a header that is too long, inconsistent or has equal keys.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            return header_of(file, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def header_of(file: BinaryIO, path: str) -> Header:
    """`read_header` of a regular file that is open at its beginning.

    Raises:
        CheckpointError: as `read_header`.
        OSError: it cannot be read.
    """
    size, start = os.fstat(file.fileno()).st_size, file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 2 <= length <= size - 8:
        raise _not_safetensors(path, start)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: its safetensors header has {length} bytes, more than the {MAX_HEADER_BYTES} that are read")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise _not_safetensors(path, start)
    try:
        entries = json.loads(text, object_pairs_hook=_unique_keys)
        metadata = _parse_metadata(entries.pop("__metadata__", {}))
        tensors = {name: _parse_tensor(name, entry, 8 + length) for name, entry in entries.items()}
        _check_spans(tensors, 8 + length, size)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged safetensors header: {error or 'nested too deeply'}") from error
    return Header(tensors, metadata)


def _not_safetensors(path: str, start: bytes) -> CheckpointError:
    found = "this is a pickle" if start.startswith(_PICKLE_STARTS) else "this is something else, or cut off"
    return CheckpointError(
        f"{path}: not a safetensors file ({found}). Weights are read from safetensors only, pickles (.ckpt, .pt, .pth, .bin) are not read"
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in result if names.count(name) > 1)[:200]!r} occurs twice")
    return result


def _parse_metadata(entry: Any) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise ValueError("__metadata__ is not a table of strings")
    return entry


def _parse_tensor(name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name[:200]!r} is not {{dtype, shape, data_offsets}}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{name[:200]!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _are_counts(shape) or len(shape) > 16:
        raise ValueError(f"{name[:200]!r} has a shape that is not a list of counts")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name[:200]!r} has data_offsets that are not two counts")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise ValueError(f"{name[:200]!r} takes {end - begin} bytes, which is not {dtype} of shape {shape}")
    return TensorInfo(dtype, tuple(shape), data_start + begin, data_start + end)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_spans(tensors: dict[str, TensorInfo], data_start: int, file_size: int) -> None:
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            fault = "overlaps the tensor before it" if info.begin < position else "leaves a hole before it"
            raise ValueError(f"{name[:200]!r} {fault}")
        position = info.end
    if position != file_size:
        raise ValueError(f"the tensors end at byte {position}, the file at {file_size}: it is cut off or has something appended")
