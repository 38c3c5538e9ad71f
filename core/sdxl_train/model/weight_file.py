"""Safetensors files as sources of tensors (mapped, read when asked) and as a stream to write. torch is loaded with the first tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, BinaryIO

from sdxl_train.model.safetensors_header import DTYPE_BITS, read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The dtypes that a model's weights may have; also torch's names for them.
FLOAT_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
# Values of `save_precision` and the dtype they stand for; None keeps each tensor's own.
SAVE_PRECISIONS = {"fp16": "F16", "bf16": "BF16", "float": "F32", "fp32": "F32", "float32": "F32", "keep": None}
_TORCH_NAMES = FLOAT_DTYPES | {
    "F64": "float64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu", "U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64",
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for safetensors' name of it."""
    import torch

    return getattr(torch, _TORCH_NAMES[name])


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors' name for torch's dtype."""
    text = str(dtype).removeprefix("torch.")
    return next(name for name, torch_name in _TORCH_NAMES.items() if torch_name == text)


class WeightFile:
    """A safetensors file whose header has been read and checked."""

    def __init__(self, path: str) -> None:
        """
        Raises:
            CheckpointError: no safetensors, or a damaged one.
        """
        self.path = path
        self.header = read_header(path)

    def read(self, name: str) -> Tensor:
        """The tensor, as a view of the mapped file. The mapping is private: nothing written to the tensor reaches the file."""
        import torch

        info = self.header.tensors[name]
        dtype = torch_dtype(info.dtype)
        if info.begin == info.end:
            return torch.empty(info.shape, dtype=dtype)
        values = self._bytes[info.begin : info.end]
        if info.begin % dtype.itemsize:
            values = values.clone()  # a view needs aligned bytes; not every writer pads its header
        return values.view(dtype).reshape(info.shape)

    @cached_property
    def _bytes(self) -> Tensor:
        import torch

        size = max((info.end for info in self.header.tensors.values()), default=0)
        return torch.from_file(self.path, shared=False, size=size, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class TensorSource:
    """One tensor of the single-file layout, unread: where its values lie and how they are turned into its shape.

    `pieces` are stacked along the rows, then transposed if `transposed`, then given `shape`.
    """

    pieces: tuple[tuple[WeightFile, str], ...]
    dtype: str
    shape: tuple[int, ...]
    transposed: bool = False

    def read(self) -> Tensor:
        """The values in `shape` and `dtype`; may be a view of the file."""
        import torch

        tensors = [file.read(name) for file, name in self.pieces]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat([tensor.to(torch_dtype(self.dtype)) for tensor in tensors])
        return (tensor.T if self.transposed else tensor).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class TensorToWrite:
    """A tensor whose dtype and shape are known before its values are made."""

    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPE_BITS[self.dtype] // 8


def write_safetensors(file: BinaryIO, tensors: Mapping[str, TensorToWrite], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, making one tensor at a time. The same input gives the same bytes.

    Tensors are ordered by size of their elements, then by name, as the safetensors library does: so all are aligned.
    """
    order = sorted(tensors, key=lambda name: (-DTYPE_BITS[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, position + tensor.num_bytes]}
        position += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for values in _as_bytes(tensors[name] for name in order):
        file.write(values)


def _as_bytes(tensors: Iterable[TensorToWrite]) -> Iterable[memoryview]:
    import torch

    for tensor in tensors:
        if tensor.num_bytes == 0:
            continue
        values = tensor.values()
        assert tuple(values.shape) == tuple(tensor.shape) and dtype_name(values.dtype) == tensor.dtype
        yield values.contiguous().reshape(-1).view(torch.uint8).numpy().data
