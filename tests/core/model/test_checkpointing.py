"""Gradient checkpointing changes memory and nothing else."""

import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdxl_train.model.checkpointing import checkpoint_activations
from sdxl_train.model.sdxl import make_add_time_ids, predict
from sdxl_train.model.single_file import Checkpoint, load_text_encoders, load_unet
from sdxl_train.model.text import encode_prompts


def networks(tiny: Checkpoint) -> tuple[Any, Any, Any]:
    return (load_unet(tiny, torch.float32).train(), *load_text_encoders(tiny, torch.float32))


def loss_of(parts: tuple[Any, Any, Any], seed: int, side: int = 16) -> Tensor:
    unet, *encoders = parts
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 49000, (2, 1, 77), generator=draw)
    text, pooled = encode_prompts(ids, ids, *encoders, clip_skip=1)
    sizes = torch.tensor([[side * 8] * 2] * 2)
    latents = torch.randn(2, 4, side, side // 2, generator=draw)
    return predict(unet, latents, torch.tensor([7, 993]), text, pooled, make_add_time_ids(sizes, sizes, sizes)).float().square().mean()


def gradients(parts: tuple[Any, Any, Any], context: Callable[[], Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Two losses, and the gradients that they give together, as in accumulation."""
    losses = []
    for seed in (0, 1):
        with context():
            loss = loss_of(parts, seed)
        (loss / 2).backward()
        losses.append(loss.item())
    found = {f"{number}.{name}": parameter.grad for number, part in enumerate(parts) for name, parameter in part.named_parameters()}
    return losses, {name: grad for name, grad in found.items() if grad is not None}


def in_bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


@pytest.mark.parametrize("context", [nullcontext, in_bf16], ids=["float32", "autocast"])
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)], ids=["all", "only_text", "only_unet"])
def test_losses_and_gradients_are_bit_equal(tiny: Checkpoint, context: Callable[[], Any], frozen: tuple[int, ...]) -> None:
    results = []
    for is_on in (False, True):
        parts = networks(tiny)
        for number in frozen:
            parts[number].requires_grad_(False)
        if is_on:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # also deprecations
                checkpoint_activations(parts[0], [part for number, part in enumerate(parts) if number and number not in frozen])
        results.append(gradients(parts, context))
    (losses, expected), (checkpointed_losses, found) = results
    assert losses == checkpointed_losses
    assert found.keys() == expected.keys() and len(found) > 50
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.now += (num_bytes := storage.nbytes())
                weakref.finalize(storage, self._freed, num_bytes)
                self.peak = max(self.peak, self.now)
        return made

    def _freed(self, num_bytes: int) -> None:
        self.now -= num_bytes


def peak_bytes(run: Callable[[], Tensor]) -> int:
    with LiveBytes() as live:
        run()
    return live.peak


@pytest.mark.parametrize("number", [0, 1], ids=["unet", "text_encoder"])
def test_less_is_alive_between_the_passes(tiny: Checkpoint, number: int) -> None:
    peaks = []
    for is_on in (False, True):
        parts = networks(tiny)
        if is_on:
            checkpoint_activations(parts[0], parts[1:])

        def run(parts: tuple[Any, Any, Any] = parts) -> Tensor:
            if number == 0:
                with torch.no_grad():
                    ids = torch.zeros(2, 1, 77, dtype=torch.int64)
                    text, pooled = encode_prompts(ids, ids, *parts[1:], clip_skip=1)
                return predict(parts[0], torch.ones(2, 4, 64, 64), torch.tensor([7, 9]), text, pooled, torch.zeros(2, 6, dtype=torch.int64))
            return parts[1](torch.zeros(8, 77, dtype=torch.int64)).last_hidden_state

        peaks.append(peak_bytes(run))
    assert peaks[1] < 0.5 * peaks[0]


def test_no_random_state_is_kept_without_dropout_and_it_is_with_it(tiny: Checkpoint) -> None:
    for dropout in (0.0, 0.5):
        unet, first, second = networks(tiny)
        for module in [*unet.modules(), *first.modules()]:
            if isinstance(module, nn.Dropout):
                module.p = dropout
        first.config.attention_dropout = dropout
        checkpoint_activations(unet, [first, second])
        kept = [
            network._gradient_checkpointing_func.keywords["preserve_rng_state"]
            for network in (unet.mid_block, first.encoder.layers[0], second.text_model.encoder.layers[0])
        ]
        assert kept == [dropout > 0, dropout > 0, False]
        assert first.training


@torch.no_grad()
def test_rendering_is_untouched(tiny: Checkpoint) -> None:
    parts = networks(tiny)
    before = loss_of(parts, 0)
    checkpoint_activations(parts[0], parts[1:])
    assert torch.equal(loss_of(parts, 0), before)
    assert not parts[1](torch.zeros(1, 77, dtype=torch.int64)).last_hidden_state.requires_grad
