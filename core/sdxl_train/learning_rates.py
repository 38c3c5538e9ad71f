"""Which learning rate each part of the model gets, by the keys; the 23 blocks of the U-Net are those of `block_lr`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdxl_train.keys import Config

NUM_BLOCKS = 23
_FIRST_OF = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}


def block_of(name: str) -> int:
    """The block of a U-Net tensor: 0 the embeddings of time and size, 1-9 input, 10-12 middle, 13-21 output blocks, 22 the last layers.

    Args:
        name: as in a single file, without `model.diffusion_model.`: "input_blocks.4.1.norm.weight".
    """
    part, *rest = name.split(".")
    if part in _FIRST_OF:
        return _FIRST_OF[part] + int(rest[0])
    return {"time_embed": 0, "label_emb": 0, "out": NUM_BLOCKS - 1}[part]


def block_rates(block_lr: float | str | list[float]) -> Sequence[float]:
    """The learning rate of each block, 23 of them.

    Args:
        block_lr: one rate for all blocks, or 23 as a list or as a string with commas.
    Raises:
        ValueError: another number of rates, or something that is no rate.
    """
    if isinstance(block_lr, str):
        try:
            rates = [float(part) for part in block_lr.split(",")]
        except ValueError as error:
            raise ValueError(f"it must be {NUM_BLOCKS} numbers with commas between them: {error}") from None
    else:
        rates = list(block_lr) if isinstance(block_lr, list) else [block_lr] * NUM_BLOCKS
    if len(rates) != NUM_BLOCKS:
        raise ValueError(f"it must be one number or {NUM_BLOCKS}, one for each block of the U-Net; got {len(rates)}")
    wrong = [rate for rate in rates if not (math.isfinite(rate) and rate >= 0)]
    if wrong:
        raise ValueError(f"learning rates are finite and not negative; got {wrong[0]:g}")
    return rates


def text_encoder_rates(keys: Config) -> tuple[float, float]:
    """The learning rates of both text encoders; 0 is a frozen one."""
    if not keys.train_text_encoder:
        return 0.0, 0.0
    first, second = (keys.learning_rate if rate is None else rate for rate in (keys.learning_rate_te1, keys.learning_rate_te2))
    return first, second


def trains_unet(keys: Config) -> bool:
    """Whether any block of the U-Net is trained."""
    return any(block_rates(keys.block_lr)) if keys.block_lr is not None else keys.learning_rate > 0
