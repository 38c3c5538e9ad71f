"""From token ids to what the U-Net reads of a text. The ids come from `tokenizer`; torch is loaded when a text is encoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdxl_train.errors import ConfigError
from sdxl_train.model.architecture import Architecture
from sdxl_train.model.tokenizer import CHUNK_LENGTH, PromptTokenizer, load_tokenizers

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["PromptTokenizer", "check_clip_skip", "encode_prompts", "freeze_unused_layers", "load_tokenizers"]


def encode_prompts(
    ids_te1: Tensor, ids_te2: Tensor, text_encoder: nn.Module, text_encoder_2: nn.Module, clip_skip: int
) -> tuple[Tensor, Tensor]:
    """Encodes token chunks with both text encoders, for training and for sampling.

    Chunks are encoded on their own and joined again: the first position of the first chunk, the 75 middle ones of each, the last position
    of the last. The states are those before the last `clip_skip` layers (0 means 1), without the final norm; TE1 and TE2 side by side.

    Args:
        ids_te1, ids_te2: int64 [B, n, 77].
        text_encoder, text_encoder_2: TE1 and TE2 with projection, possibly wrapped for several processes.
    Returns:
        prompt_embeds [B, 75 n + 2, TE1 + TE2 width], and pooled_prompt_embeds [B, projection]: TE2's projected last state at the first
        end marker of each sample's first chunk.
    """
    num_chunks = ids_te1.shape[1]
    outputs_1 = text_encoder(ids_te1.flatten(0, 1), output_hidden_states=True)
    outputs_2 = text_encoder_2(ids_te2.flatten(0, 1), output_hidden_states=True)
    layer = -(max(1, clip_skip) + 1)
    prompt_embeds = _join_chunks(outputs_1.hidden_states[layer], outputs_2.hidden_states[layer], num_chunks)
    return prompt_embeds, outputs_2.text_embeds[::num_chunks]


def _join_chunks(states_1: Tensor, states_2: Tensor, num_chunks: int) -> Tensor:
    import torch

    states = torch.cat([states_1, states_2], dim=-1).unflatten(0, (-1, num_chunks))  # [B, n, 77, width]
    assert states.shape[2] == CHUNK_LENGTH
    middle = states[:, :, 1:-1].flatten(1, 2)  # [B, 75 n, width]
    return torch.cat([states[:, 0, :1], middle, states[:, -1, -1:]], dim=1)


def check_clip_skip(clip_skip: int, architecture: Architecture) -> None:
    """
    Raises:
        ConfigError: a text encoder has too few layers for `clip_skip`.
    """
    for name, text in (("first", architecture.text_encoder), ("second", architecture.text_encoder_2)):
        if clip_skip > text.layers:
            raise ConfigError(f"clip_skip = {clip_skip}: the model's {name} text encoder has {text.layers} layers; take at most that many")


def freeze_unused_layers(text_encoder: nn.Module, clip_skip: int) -> None:
    """Turns off the gradients of what TE1 computes for nobody: its final norm and last `clip_skip` layers (0 means 1).

    Distributed training must not wait for gradients that never come. TE2 uses all its layers: the pooled vector comes from the last.
    """
    network: Any = getattr(text_encoder, "text_model", text_encoder)
    for module in (network.final_layer_norm, *network.encoder.layers[-max(1, clip_skip) :]):
        module.requires_grad_(False)
