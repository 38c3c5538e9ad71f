"""Nested Python values with tensors in them, as JSON and safetensors: no pickle, so reading a state runs no code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdxl_train.model.weight_file import dtype_name, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


def packed(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """A value that JSON can hold. Taken: dicts (of any plain keys), lists, tuples, tensors, numbers, strings, bytes, bool, None, dtypes.

    Args:
        tensors: gets the tensors, under names that begin with `name`.
        name: of the value, for its tensors and for errors.
    Raises:
        TypeError: it holds something else; the message names the place.
    """
    import torch

    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[packed(key, {}, f"{name}/{key}"), packed(one, tensors, f"{name}/{key}")] for key, one in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [packed(one, tensors, f"{name}/{i}") for i, one in enumerate(value)]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    raise TypeError(f"{name}: a state may hold tensors, numbers, strings, bytes, lists, tuples and dicts, not {type(value).__name__}")


def unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `packed` was given; tensors are those of `tensors`, with the dtypes they have there.

    Raises:
        KeyError, TypeError, ValueError: it is nothing that `packed` makes.
    """
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {unpacked(key, tensors): unpacked(one, tensors) for key, one in content}
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dtype":
        return torch_dtype(content)
    sequence = [unpacked(one, tensors) for one in content]
    return {"list": list, "tuple": tuple}[kind](sequence)
