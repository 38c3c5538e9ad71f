"""Compiled blocks: the same results and names, and a number of compilations that does not grow with the buckets."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sdxl_train.model.attention import set_attention
from sdxl_train.model.checkpointing import checkpoint_activations
from sdxl_train.model.compiling import RECOMPILE_LIMIT, compile_regions
from sdxl_train.model.saving import save_checkpoint
from sdxl_train.model.sdxl import make_add_time_ids, predict
from sdxl_train.model.single_file import Checkpoint, load_unet, load_vae, open_checkpoint
from sdxl_train.model.tiny import write_tiny_sdxl

KINDS = 3  # of blocks of the small U-Net: ResNet blocks of 16 and of 32 channels to 16, transformer blocks of 16
BUCKETS = [(8, 16), (16, 8), (16, 16), (8, 24), (24, 8), (12, 20), (20, 12), (16, 24), (24, 16), (32, 8)]  # latents, h and w


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("small") / "base.safetensors"
    write_tiny_sdxl(path, unet_channels=(16, 16), transformer_layers=(0, 1))
    return open_checkpoint(str(path))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def loss_of(unet: UNet2DConditionModel, batch: int = 2, size: tuple[int, int] = (16, 8)) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(batch, 4, *size, generator=draw), torch.randn(batch, 77, 40, generator=draw)
    sizes = torch.tensor([[1024, 768]] * batch)
    timesteps = torch.tensor([7, 993, 50][:batch])
    return predict(unet, latents, timesteps, text, torch.ones(batch, 24), make_add_time_ids(sizes, sizes, sizes)).float().square().mean()


def results(unet: UNet2DConditionModel) -> list[Tensor]:
    unet.zero_grad(set_to_none=True)
    loss = loss_of(unet)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in unet.parameters() if parameter.grad is not None)]


def in_bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


@pytest.mark.slow
def test_more_buckets_need_no_more_compilations(small: Checkpoint) -> None:
    unet, counter = load_unet(small, torch.float32).train(), CompileCounterWithBackend("eager")
    assert compile_regions(unet, counter) == 18  # 12 ResNet blocks, 6 transformer blocks
    counts = []
    for size in BUCKETS:
        for batch in (2, 3, 1):
            loss_of(unet, batch, size).backward()
        counts.append(counter.frame_count)
    assert KINDS < counts[0] <= 3 * KINDS and counts == counts[:1] * len(BUCKETS)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_names_files_and_results_stay_the_same(small: Checkpoint, backend: str, tmp_path: Path) -> None:
    unet = load_unet(small, torch.float32).train()
    expected, names = results(unet), list(unet.state_dict())
    save_checkpoint(tmp_path / "before", small, {"unet": unet.state_dict()}, "float", {})
    compile_regions(unet, backend)
    for ours, exact in zip(results(unet), expected, strict=True):
        assert torch.allclose(ours, exact, atol=1e-6)
    assert list(unet.state_dict()) == names == [name for name, _ in unet.named_parameters()]
    save_checkpoint(tmp_path / "after", small, {"unet": unet.state_dict()}, "float", {})
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("context", "tolerance"), [(nullcontext, 1e-5), (in_bf16, 0.03)], ids=["float32", "autocast"])
def test_checkpointed_blocks_are_compiled_too(small: Checkpoint, context: Callable[[], Any], tolerance: float, backend: str) -> None:
    unet, counter = load_unet(small, torch.float32).train(), CompileCounterWithBackend(backend)
    checkpoint_activations(unet, [])
    with context():
        expected = results(unet)
        compile_regions(unet, counter)
        found = results(unet)
    assert counter.frame_count >= KINDS
    for ours, exact in zip(found, expected, strict=True):
        assert (ours - exact).norm() <= tolerance * exact.norm() + 1e-6


@pytest.mark.slow
def test_attention_in_chunks_stays_outside_compiled_code(small: Checkpoint) -> None:
    unet, counter = load_unet(small, torch.float32).train(), CompileCounterWithBackend("eager")
    set_attention(unet, load_vae(small, torch.float32), "mem_eff_attn")
    expected = results(unet)
    compile_regions(unet, counter)
    assert all(torch.allclose(ours, exact, atol=1e-6) for ours, exact in zip(results(unet), expected, strict=True))
    loss_of(unet, 3, (16, 16))
    before = counter.frame_count
    for size in BUCKETS:
        loss_of(unet, 2, size)
    assert before > KINDS and counter.frame_count == before


@pytest.mark.slow
def test_inductor_agrees(small: Checkpoint) -> None:
    unet = load_unet(small, torch.float32).train()
    expected = results(unet)
    compile_regions(unet)
    for ours, exact in zip(results(unet), expected, strict=True):
        assert torch.allclose(ours, exact, atol=1e-5)
