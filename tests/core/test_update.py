"""Loss scaling, clipping and the order of an update, on a tiny network on the CPU."""

import pytest
import torch

from sdxl_train.errors import SdxlTrainError
from sdxl_train.keys import Config
from sdxl_train.update import Update, total_norm


def keys(**changed) -> Config:
    return Config(**({"pretrained_model_name_or_path": "base", "image_dirs": ["images"], "output_dir": "out"} | changed))


def made(dtype: torch.dtype = torch.float32, **changed):
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=dtype))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 1.0, "name": "unet"}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    return weight, schedule, Update(optimizer, schedule, keys(**changed), torch.device("cpu"))


def test_a_norm_above_the_limit_is_clipped_to_it_and_one_below_left() -> None:
    for limit, expected in ((0.0, [0.0, 0.0]), (1.0, [2.4, 3.2]), (10.0, [0.0, 0.0])):
        weight, _, update = made(max_grad_norm=limit)
        update.begin(1)
        update.backward((weight.square() / 2).sum())  # the gradient is the weight: norm 5
        update.apply()
        assert weight.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scaled_losses_give_the_plain_step_also_with_clipping_and_fp16_gradients(dtype) -> None:
    weight, schedule, update = made(dtype, mixed_precision="fp16", max_grad_norm=2**-4)
    update.begin(1)
    update.backward((weight.float() * weight.detach().float()).sum() * 2**-4)  # at the first scale 5 * 2**12, which fp16 can hold
    update.apply()
    assert weight.tolist() == pytest.approx([3 - 0.6 / 16, 4 - 0.8 / 16], abs=2e-3)
    assert schedule.get_last_lr() == [0.5] and update.overflows == 0


def test_an_overflow_skips_optimizer_and_schedule_and_is_counted() -> None:
    weight, schedule, update = made(torch.float16, mixed_precision="fp16")
    for _ in range(3):
        update.begin(1)
        update.backward((weight.float() * 100).sum())  # 100 * 65536 is beyond fp16; so are its half and quarter
        update.apply()
    assert weight.tolist() == [3.0, 4.0] and schedule.get_last_lr() == [1.0] and update.overflows == 3
    assert weight.grad is None


def test_gradients_that_overflow_at_every_scale_end_the_run_with_the_remedy() -> None:
    weight, _, update = made(mixed_precision="fp16")
    with pytest.raises(SdxlTrainError, match="bf16"):
        for _ in range(100):
            update.begin(1)
            update.backward((weight * float("inf")).sum())
            update.apply()
    assert weight.tolist() == [3.0, 4.0]


def test_the_norm_of_bfloat16_gradients_is_a_float32() -> None:
    gradients = [torch.full((n,), 0.1, dtype=torch.bfloat16) for n in (1000, 37, 1)]
    expected = (1038 * gradients[0][0].double() ** 2).sqrt().item()
    norm = total_norm(gradients)
    assert norm.dtype is torch.float32 and norm.shape == () and norm.item() == pytest.approx(expected, rel=1e-6)
