"""Regional compilation: the U-Net's repeated blocks are compiled, equal ones once."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

# SDXL has 14 kinds of blocks, each compiled a few times: for one sample or several, square or not, with and without gradients. Above
# its limit, by default 8 for each class, torch would run blocks uncompiled.
RECOMPILE_LIMIT = 128


def compile_regions(unet: nn.Module, backend: Any = "inductor") -> int:
    """Compiles each transformer and ResNet block when it is first called: everything between them stays as it is, and parameter names too.

    Heights, widths and batch sizes are symbols of the compiled code, so another bucket needs no new one (one sample does: torch treats the
    size 1 apart). Blocks of equal shapes share their code. Call it when the U-Net is on its device, with its attention set; gradient
    checkpointing may be turned on before or after. What it changes outside the U-Net is the limit named above.

    Args:
        backend: as for torch.compile.
    Returns:
        The number of blocks.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock | ResnetBlock2D)]
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
    return len(blocks)
