"""Attention in chunks of queries and keys: never more than a part of the scores is in memory, forward or backward.

The forward pass keeps a running maximum and sum of each softmax (Rabe and Staats 2021, arXiv:2112.05682); the backward pass computes each
part of the scores again from the logarithm of that sum, as FlashAttention does (Dao et al. 2022, arXiv:2205.14135, algorithm 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KEY_CHUNK = 1024  # keys of a part of the scores
MAX_SCORES = 2**24  # elements of a part of the scores: 64 MiB in float32


def chunked_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale x query key^T) value for each sample and head. [B, Sq, H, D], in value's dtype.

    Products are computed in the dtype given, softmax and sums in float32. Besides tensors as large as the arguments, no more than a few
    times MAX_SCORES elements are in memory.

    Args:
        query: [B, Sq, H, D].
        key, value: [B, Sk, H, D].
    """
    batch = query.shape[0]
    rows = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))  # [B H, S, D], contiguous
    output: Tensor = _ChunkedAttention.apply(*rows, scale)  # pyright: ignore[reportAssignmentType]
    return output.unflatten(0, (batch, -1)).transpose(1, 2)


class _ChunkedAttention(torch.autograd.Function):
    """On [B H, S, D]. What is saved: the arguments, the output, and one number a query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            output, log_sums = _forward(query, key, value, scale)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, output, log_sums = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            return *_backward(query, key, value, output, log_sums, grad_output, ctx.scale), None


def _forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [N, Sq, D] in value's dtype, and the logarithm of each softmax's sum, [N, Sq, 1] float32."""
    output = value.new_empty(*query.shape[:2], value.shape[2])
    log_sums = query.new_empty(*query.shape[:2], 1, dtype=torch.float32)
    for part in _query_chunks(query, key):
        rows = query[:, part] * scale
        top = total = weighted = None  # [N, q, 1] maximum and sum of exponentials so far, [N, q, D] values weighed by these
        for chunk in _chunks(key.shape[1], KEY_CHUNK):
            scores = (rows @ key[:, chunk].mT).float()  # [N, q, k]
            new_top = scores.amax(-1, keepdim=True)
            new_top = new_top if top is None else torch.maximum(top, new_top)
            weights = scores.sub_(new_top).exp_()
            new_total = weights.sum(-1, keepdim=True)
            new_weighted = (weights.to(value.dtype) @ value[:, chunk]).float()
            if top is not None:
                assert total is not None and weighted is not None
                shrink = (top - new_top).exp()
                new_total, new_weighted = new_total + total * shrink, new_weighted + weighted * shrink
            top, total, weighted = new_top, new_total, new_weighted
        assert top is not None and total is not None and weighted is not None
        output[:, part] = weighted / total
        log_sums[:, part] = top + total.log()
    return output, log_sums


def _backward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sums: Tensor, grad_output: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    grad_query = torch.empty_like(query)
    grad_key, grad_value = torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)
    for part in _query_chunks(query, key):
        rows, grad_rows = query[:, part] * scale, grad_output[:, part]
        mean = (grad_rows.float() * output[:, part].float()).sum(-1, keepdim=True)  # of the weights' gradients, by the weights. [N, q, 1]
        sums = torch.zeros_like(rows, dtype=torch.float32)
        for chunk in _chunks(key.shape[1], KEY_CHUNK):
            keys = key[:, chunk]
            weights = (rows @ keys.mT).float().sub_(log_sums[:, part]).exp_()  # [N, q, k]
            grad_value[:, chunk] += weights.to(value.dtype).mT @ grad_rows
            grad_scores = (grad_rows @ value[:, chunk].mT).float().sub_(mean).mul_(weights).to(key.dtype)
            sums += grad_scores @ keys
            grad_key[:, chunk] += grad_scores.mT @ rows
        grad_query[:, part] = sums * scale
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _query_chunks(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Queries in parts that make at most MAX_SCORES scores with one chunk of keys."""
    return _chunks(query.shape[1], max(1, MAX_SCORES // (query.shape[0] * min(key.shape[1], KEY_CHUNK))))


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
