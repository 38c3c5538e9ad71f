"""The closed forms of operations and parameters agree with what torch counts on the meta device, and with published figures of SDXL."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sdxl_train.model.architecture import SDXL, Architecture
from sdxl_train.model.blank import blank_text_encoder, blank_text_encoder_2, blank_unet, blank_vae
from sdxl_train.model.tiny import tiny_architecture
from sdxl_train.step_costs import (
    Trained,
    block_parameters,
    num_parameters,
    step_flops,
    text_encoder_flops,
    unet_flops,
    vae_decode_flops,
    vae_encode_flops,
)

TINY = tiny_architecture(unet_channels=(32, 64, 64), transformer_layers=(0, 1, 2))


def count_unet(unet, size: tuple[int, int], tokens: int, architecture: Architecture, backward: bool) -> int:
    context = torch.empty(1, tokens, architecture.context_width, device="meta")
    added = {
        "text_embeds": torch.empty(1, architecture.text_encoder_2.projection, device="meta"),
        "time_ids": torch.empty(1, 6, device="meta"),
    }
    latents = torch.empty(1, 4, size[1] // 8, size[0] // 8, device="meta")
    with FlopCounterMode(display=False) as counter, nullcontext() if backward else torch.no_grad():
        out = unet(latents, torch.empty(1, device="meta"), encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False)[0]
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("size", "tokens", "tera"),
    [((1024, 1024), 77, 6.761), ((1024, 1024), 231, 6.931), ((832, 1216), 77, 6.500), ((768, 768), 77, 3.641), ((512, 512), 77, 1.589)],
)
def test_a_forward_pass_of_sdxl_costs_what_is_known(size: tuple[int, int], tokens: int, tera: float) -> None:
    assert unet_flops(SDXL, size, tokens).forward == pytest.approx(tera * 1e12, abs=6e8)


def test_the_other_known_costs_of_sdxl() -> None:
    assert unet_flops(SDXL, (1024, 1024), 77).total == pytest.approx(20.231e12, abs=6e8)
    both = text_encoder_flops(SDXL.text_encoder) + text_encoder_flops(SDXL.text_encoder_2)
    assert both.forward == pytest.approx(0.111e12, abs=6e8)
    assert vae_encode_flops(SDXL, (1024, 1024)) == pytest.approx(4.879e12, abs=6e8)
    assert vae_decode_flops(SDXL, (1024, 1024)) == pytest.approx(10.47e12, abs=6e9)


def test_the_parameters_of_sdxl_are_counted() -> None:
    assert num_parameters(SDXL) == {"unet": 2567463684, "vae": 83653863, "text_encoder": 123060480, "text_encoder_2": 694659840}
    assert sum(block_parameters(SDXL)) == 2567463684


def test_the_counter_finds_the_same_for_sdxl() -> None:
    unet = blank_unet(SDXL)
    assert unet_flops(SDXL, (832, 1216), 77).total == pytest.approx(count_unet(unet, (832, 1216), 77, SDXL, True), rel=1e-6)


@pytest.mark.parametrize("size", [pytest.param((64, 64), marks=pytest.mark.slow), pytest.param((96, 32), marks=pytest.mark.slow), (72, 40)])
def test_the_counter_finds_the_same_for_a_small_model(size: tuple[int, int]) -> None:
    unet = blank_unet(TINY)
    for tokens in (77, 227):
        assert unet_flops(TINY, size, tokens).forward == count_unet(unet, size, tokens, TINY, False)
        assert unet_flops(TINY, size, tokens).total == count_unet(unet, size, tokens, TINY, True)
    for encoder, text in ((blank_text_encoder(TINY), TINY.text_encoder), (blank_text_encoder_2(TINY), TINY.text_encoder_2)):
        with FlopCounterMode(display=False) as counter:
            encoder(torch.zeros(1, 77, dtype=torch.long, device="meta"))
        assert text_encoder_flops(text).forward == counter.get_total_flops()
    vae = blank_vae(TINY)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(torch.empty(1, 3, size[1], size[0], device="meta"))
    assert vae_encode_flops(TINY, (size[0] // 8 * 8, size[1] // 8 * 8)) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decode(torch.empty(1, 4, size[1] // 8, size[0] // 8, device="meta"))
    assert vae_decode_flops(TINY, size) == counter.get_total_flops()


def test_frozen_blocks_cost_no_backward_pass() -> None:
    """With the last block alone there is nothing to go back through but that block; with only the text encoders, no weight gradients."""
    size = (1024, 1024)
    last = unet_flops(SDXL, size, 77, Trained(frozenset({22})))
    assert last.backward == 2 * 2 * 9 * 320 * 4 * 128 * 128
    text = unet_flops(SDXL, size, 77, Trained(frozenset(), text_encoder_2=True))
    assert 1.0 < text.backward / text.forward < 1.2  # activations only; attention twice


def test_a_step_is_the_text_encoders_and_the_unet() -> None:
    size, trained = (1024, 1024), Trained()
    step = step_flops(SDXL, size, 3, trained)
    text = text_encoder_flops(SDXL.text_encoder) + text_encoder_flops(SDXL.text_encoder_2)
    assert step.total == unet_flops(SDXL, size, 227, trained).total + 3 * text.forward
    more = step_flops(SDXL, size, 3, Trained(text_encoder=True, text_encoder_2=True))
    assert more.forward == step.forward and more.backward > step.backward + 5 * text.forward
