"""What CUDA does and the meta device does not, as far as memory and operations go: autocast, and attention without a matrix of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What the networks call of the lists of torch.autocast for CUDA (pytorch.org/docs/stable/amp.html, "Autocast Op Reference").
_IN_HALF = frozenset({F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.bmm})
_IN_FLOAT32 = frozenset({F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax})


class CudaStandIn(TorchFunctionMode):
    """Within it, tensors on the meta device are computed as CUDA would compute them.

    Autocast follows that of the CPU, which has no effect on the meta device of its own: so gradient checkpointing, which keeps the state
    of autocast for its second pass, keeps this one too.

    Args:
        on_weight_cast: called with each copy of weights that autocast makes.
    """

    def __init__(self, on_weight_cast: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._on_weight_cast = on_weight_cast
        self._cache: dict[Tensor, Tensor] = {}

    @contextmanager
    def autocast(self, dtype: torch.dtype, enabled: bool, cache_enabled: bool) -> Iterator[None]:
        """As `torch.autocast("cuda", ...)`."""
        with torch.autocast("cpu", dtype, enabled=enabled, cache_enabled=cache_enabled):
            yield
        self._cache.clear()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return self._backward(*args)
        if torch.is_autocast_enabled("cpu"):
            if func in _IN_HALF or func is F.scaled_dot_product_attention:
                args, kwargs = self._cast(args, kwargs, torch.get_autocast_dtype("cpu"))
            elif func in _IN_FLOAT32:
                args, kwargs = self._cast(args, kwargs, torch.float32)
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        """Backward pass of a loss within this mode, since gradient checkpointing computes in it.

        torch's own functions for it leave the mode first, so the engine behind them is called.
        """
        with self:
            run = torch.autograd.graph._engine_run_backward
            run((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)

    def _cast(self, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(self._of_dtype(arg, dtype) for arg in args), {name: self._of_dtype(arg, dtype) for name, arg in kwargs.items()}

    def _of_dtype(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta or not value.is_floating_point() or value.dtype is dtype:
            return value
        is_weight = value.is_leaf and value.requires_grad
        if is_weight and value in self._cache:
            return self._cache[value]
        cast = value.to(dtype)
        if is_weight:
            self._on_weight_cast(cast)
            if torch.is_autocast_cache_enabled() and dtype is not torch.float32:
                self._cache[value] = cast
        return cast


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the kernel that CUDA takes: flash attention in half precision, the memory-efficient one in float32 or with a mask."""
    if query.dtype is torch.float32 or attn_mask is not None:
        bias = None if attn_mask is None else attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, needs_gradient, dropout_p, is_causal, scale=scale
        )[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
