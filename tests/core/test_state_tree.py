"""Nested values survive JSON and tensors of a file."""

import json

import pytest
import torch

from sdxl_train.state_tree import packed, unpacked


def test_nested_values_come_back_with_their_types_dtypes_and_keys() -> None:
    value = {
        "a": [1, 2.5, None, True, "x", float("inf")],
        3: (torch.tensor([1, 2], dtype=torch.bfloat16), b"\0\xff", {"tensor": "not one"}),
        "nested": {"items": [torch.tensor(1.0, dtype=torch.float64)], "": {}},
        "dtype": torch.bfloat16,
        (1, 2): "tuple key",
    }
    tensors: dict[str, torch.Tensor] = {}
    again = unpacked(json.loads(json.dumps(packed(value, tensors, "state"))), tensors)
    assert str(again) == str(value)
    assert again[3][0].dtype is torch.bfloat16 and len(tensors) == 2


@pytest.mark.parametrize("bad", [{1, 2}, object(), lambda: 1])
def test_anything_else_is_refused_with_its_place(bad) -> None:
    with pytest.raises(TypeError, match=r"state/a/0: .*not (set|object|function)"):
        packed({"a": [bad]}, {}, "state")
