"""diffusers' attention layers with another way of computing softmax(q k^T) v."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from diffusers.models.attention_processor import Attention
from torch import Tensor

# (query, key, value [B, S, heads, channels], scale) -> [B, S of the query, heads, channels]
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class HeadwiseProcessor:
    """Attention of U-Net (self and cross, [B, S, C]) and VAE (self, [B, C, h, w]). Heads are split by a view, without copies."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        assert attention_mask is None and attn.spatial_norm is None, "SDXL masks nothing and has no spatial norm"
        assert attn.norm_cross is None and attn.norm_q is None and attn.norm_k is None, "SDXL norms neither text nor queries nor keys"
        residual, tokens = hidden_states, hidden_states
        if residual.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)  # [B, S, C]
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        source = tokens if encoder_hidden_states is None else encoder_hidden_states
        assert attn.to_k is not None and attn.to_v is not None and attn.to_out is not None
        query, key, value = (
            layer(states).unflatten(-1, (attn.heads, -1))  # [B, S, heads, channels]
            for layer, states in ((attn.to_q, tokens), (attn.to_k, source), (attn.to_v, source))
        )
        dtype = query.dtype
        if attn.upcast_attention:
            query, key, value = query.float(), key.float(), value.float()
        output = self._attend(query, key, value, attn.scale).to(dtype).flatten(2)  # [B, S, C]
        for layer in attn.to_out:  # the projection, and dropout
            output = layer(output)
        if residual.ndim == 4:
            output = output.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor if attn.rescale_output_factor != 1 else output


def xformers_attention() -> Attend:
    """xformers' kernels, chosen by it.

    Raises:
        ImportError: the package is missing.
    """
    xops = importlib.import_module("xformers.ops")

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return xops.memory_efficient_attention(query, key, value, scale=scale)

    return attend
