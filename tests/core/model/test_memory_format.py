"""Kernels with their channels innermost: the same results, the same files."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from sdxl_train.model.memory_format import to_channels_last
from sdxl_train.model.saving import save_checkpoint
from sdxl_train.model.sdxl import make_add_time_ids, predict
from sdxl_train.model.single_file import Checkpoint, load_unet


def test_results_and_gradients_agree_and_activations_follow_the_kernels(tiny: Checkpoint) -> None:
    sizes = torch.tensor([[128, 128]] * 2)
    draw = torch.Generator().manual_seed(0)
    given = (torch.randn(2, 4, 16, 16, generator=draw), torch.tensor([7, 993]), torch.randn(2, 77, 40, generator=draw))
    results = []
    for is_on in (False, True):
        unet = load_unet(tiny, torch.float32)
        if is_on:
            to_channels_last(unet)
        seen: list[bool] = []
        for module in unet.modules():
            if isinstance(module, ResnetBlock2D | Downsample2D | Upsample2D | Transformer2DModel):
                module.register_forward_hook(partial(note_layout, seen))
        prediction = predict(unet, *given, torch.ones(2, 24), make_add_time_ids(sizes, sizes, sizes))
        prediction.square().mean().backward()
        results.append([prediction.detach(), *(parameter.grad for parameter in unet.parameters())])
        assert len(seen) > 20 and set(seen) == {is_on}
    for ours, expected in zip(*reversed(results), strict=True):
        assert ours is not None and expected is not None
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-7


def note_layout(seen: list[bool], module: nn.Module, args: object, output: Any) -> None:
    tensor = output[0] if isinstance(output, tuple) else output
    seen.append(tensor.is_contiguous(memory_format=torch.channels_last))


def test_a_saved_file_is_the_same_byte_by_byte(tiny: Checkpoint, tmp_path: Path) -> None:
    unet = load_unet(tiny, torch.float32)
    for precision in ("float", "fp16", "keep"):
        files = []
        for is_on in (False, True):
            if is_on:
                to_channels_last(unet)
                assert not unet.conv_out.weight.is_contiguous()
            else:
                unet.to(memory_format=torch.contiguous_format)  # pyright: ignore
                assert unet.conv_out.weight.is_contiguous()
            path = tmp_path / f"{precision}{is_on}.safetensors"
            save_checkpoint(path, tiny, {"unet": unet.state_dict()}, precision, {})
            files.append(path.read_bytes())
        assert files[0] == files[1]
