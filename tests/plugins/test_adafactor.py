"""AdaFactor beside transformers', whose kernels are given as matrices; its state on SDXL; the rate it sets itself."""

import pytest
import torch
from optimizer_runs import parameters, run
from transformers.optimization import Adafactor, AdafactorSchedule

from sdxl_train.model.architecture import SDXL
from sdxl_train.model.key_names import unet_entries
from sdxl_train_plugins.adafactor import StackedAdafactor

GIVEN_RATE = {"lr": 1e-2, "relative_step": False}
OPTIONS = {
    "the trainer's defaults": {**GIVEN_RATE, "scale_parameter": False},
    "transformers' defaults": {},
    "warmup_init": {"warmup_init": True},
    "relative_step alone": {"scale_parameter": False},
    "scale_parameter": GIVEN_RATE,
    "beta1 and decay": {**GIVEN_RATE, "beta1": 0.9, "weight_decay": 0.1},
    "everything": {"beta1": 0.5, "weight_decay": 0.1, "clip_threshold": 0.3, "decay_rate": -0.5, "eps": (1e-4, 0.9), "warmup_init": True},
    "no clipping": {**GIVEN_RATE, "clip_threshold": 100.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_it_updates_as_transformers_does_with_kernels_as_matrices(options: dict) -> None:
    ours = run(StackedAdafactor(parameters(), **options), range(1, 41))
    theirs = run(Adafactor(parameters(flat_kernels=True), **options), range(1, 41))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.view(other.shape), other, rtol=2e-6, atol=2e-7)


def test_bfloat16_rounded_to_nearest_is_transformers_too() -> None:
    options = {"scale_parameter": False, **GIVEN_RATE}
    ours = run(StackedAdafactor(parameters(torch.bfloat16), **options, stochastic_rounding=False), range(1, 11))
    theirs = run(Adafactor(parameters(torch.bfloat16, flat_kernels=True), **options), range(1, 11))
    equal = torch.cat([(one.view(other.shape) == other).flatten() for one, other in zip(ours, theirs, strict=True)])
    assert equal.float().mean() > 0.999  # but for values half way between two, up to float32's own rounding


def test_state_of_sdxl_takes_18_mib() -> None:
    kernels = [torch.nn.Parameter(torch.empty(entry.module_shape, device="meta")) for entry in unet_entries(SDXL)]
    assert (len(kernels), sum(kernel.numel() for kernel in kernels)) == (1680, 2_567_463_684)
    optimizer = StackedAdafactor(kernels, lr=1e-5, relative_step=False, scale_parameter=False)
    for kernel in kernels:
        kernel.grad = torch.empty_like(kernel)
    optimizer.step()
    state = {id(tensor): tensor for state in optimizer.state.values() for tensor in state.values()}
    assert all(tensor.dtype is torch.float32 for tensor in state.values())
    by_hand = sum(
        entry.module_shape[0] + torch.Size(entry.module_shape[1:]).numel() if len(entry.module_shape) > 1 else entry.module_shape[0]
        for entry in unet_entries(SDXL)
    )
    assert sum(tensor.numel() for tensor in state.values()) == by_hand + 1  # and the count of steps
    assert 4 * by_hand / 2**20 == pytest.approx(18, abs=0.5)


@pytest.mark.parametrize("options", [{}, {"warmup_init": True}, {"scale_parameter": False}, GIVEN_RATE])
def test_transformers_schedule_reads_its_rate(options: dict) -> None:
    ours, theirs = StackedAdafactor(parameters(), **options), Adafactor(parameters(flat_kernels=True), **options)
    schedules = [AdafactorSchedule(optimizer, 1e-3) for optimizer in (ours, theirs)]
    for step in (1, 2, 3):
        run(ours, [step])
        run(theirs, [step])
        rates = [[float(rate) for rate in schedule.get_lr()] for schedule in schedules]
        assert rates[0] == pytest.approx(rates[1], rel=1e-6)


def test_rates_of_its_own_and_given_ones() -> None:
    optimizer = StackedAdafactor(parameters(), warmup_init=True)
    assert [float(rate) for rate in optimizer.rates()] == [0]
    run(optimizer, [1, 2, 3])
    assert [float(rate) for rate in optimizer.rates()] == pytest.approx([3e-6])
    optimizer = StackedAdafactor(parameters(), scale_parameter=False)
    run(optimizer, [1])
    assert [float(rate) for rate in optimizer.rates()] == pytest.approx([1e-2])
    assert StackedAdafactor(parameters(), **GIVEN_RATE).rates() == [1e-2]


@pytest.mark.parametrize("options", [{"lr": 1e-3}, {"relative_step": False}, {"lr": 1e-3, "relative_step": False, "warmup_init": True}])
def test_a_rate_comes_from_exactly_one_side(options: dict) -> None:
    with pytest.raises(ValueError, match="relative_step"):
        StackedAdafactor(parameters(), **options)
