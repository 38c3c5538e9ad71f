"""A model of any architecture whose weights are random and lie in no file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdxl_train.model.architecture import Architecture
from sdxl_train.model.key_names import LOGIT_SCALE, POSITION_IDS, Entry, file_entries
from sdxl_train.model.single_file import Checkpoint

_BLOCK = 2**20 + 1  # values that are repeated: drawing billions would take longer than what is to be measured


@dataclass(frozen=True)
class MadeTensor:
    """Stands in for a tensor of a file: norms are 1, biases 0, other weights N(0, 1 / fan-in)."""

    entry: Entry
    values: Tensor
    dtype: str = "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def read(self) -> Tensor:
        """[*shape] bfloat16."""
        if len(self.shape) < 2:
            return torch.full(self.shape, float(self.entry.name.endswith(".weight")), dtype=torch.bfloat16)
        size = math.prod(self.shape)
        values = self.values.repeat(-(-size // _BLOCK))[:size].view(self.shape)
        return values.mul_(math.prod(self.shape[1:]) ** -0.5)


def made_checkpoint(architecture: Architecture) -> Checkpoint:
    """What opening a file with such a model would give. It has no digest of its VAE, which is read from files alone."""
    values = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    entries = [entry for entry in file_entries(architecture) if entry.name not in (POSITION_IDS, LOGIT_SCALE)]
    tensors: dict[str, Any] = {entry.name: MadeTensor(entry, values) for entry in entries}
    return Checkpoint("random weights", architecture, tensors, {}, None, None)
