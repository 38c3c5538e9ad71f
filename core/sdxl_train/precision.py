"""In which number formats a run trains, and the scaling of losses that fp16 needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sdxl_train.keys import Config

COMPUTE_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# GradScaler starts at 65536 and halves it at each overflow. Gradients that overflow even with this scale are no matter of the scale.
LEAST_LOSS_SCALE = 2.0**-10


@dataclass(frozen=True)
class Precision:
    """
    Attributes:
        weights: of the networks that are trained, and of their gradients.
        compute: of their forward and backward passes, by autocast where it differs from `weights`; frozen networks are held in it.
        is_full: `full_bf16` or `full_fp16`: trained or not, U-Net and text encoders are held in `compute`.
    """

    weights: torch.dtype
    compute: torch.dtype
    is_full: bool

    @classmethod
    def of(cls, keys: Config) -> Precision:
        """What `mixed_precision`, `full_bf16` and `full_fp16` say together."""
        compute = COMPUTE_DTYPES[keys.mixed_precision]
        is_full = keys.full_bf16 or keys.full_fp16
        return cls(compute if is_full else torch.float32, compute, is_full)

    @property
    def uses_autocast(self) -> bool:
        return self.weights is not self.compute

    def held(self, is_trained: bool) -> torch.dtype:
        """The dtype a network's weights are held in."""
        return self.weights if is_trained else self.compute

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.weights, self.compute)]
        if self.uses_autocast:
            return f"autocast {names[1]}, trained weights {names[0]}"
        return f"{names[0]}, also weights and gradients" if self.is_full else names[0]


class LossScaler(torch.amp.GradScaler):  # pyright: ignore[reportPrivateImportUsage]
    """torch's scaler of losses for fp16, which also takes gradients that are fp16 themselves (`full_fp16`)."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)
