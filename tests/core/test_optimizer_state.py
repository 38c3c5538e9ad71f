"""The state of an optimizer by names, and back: dtypes and places in memory."""

import pytest
import torch
from optimizer_runs import are_equal, parameters, run, tensors_of

from sdxl_train.optimizer_state import groups_by_name, load_optimizer_state, optimizer_state
from sdxl_train_plugins.adafactor import StackedAdafactor
from sdxl_train_plugins.adamw import StackedAdamW
from sdxl_train_plugins.fused_adamw import FusedAdamW


@pytest.mark.parametrize("optimizer_class", [FusedAdamW, torch.optim.AdamW, StackedAdamW, StackedAdafactor])
def test_a_state_from_a_file_continues_weights_in_channels_last(optimizer_class: type) -> None:
    """Files hold tensors row by row; torch's fused kernel would pair each gradient with the running mean of another place."""
    extra = {"fused": True} if optimizer_class is torch.optim.AdamW else {}
    extra |= {"relative_step": False, "scale_parameter": False} if optimizer_class is StackedAdafactor else {}

    def built() -> tuple[torch.optim.Optimizer, dict[int, str]]:
        weights = parameters(channels_last=True)
        names = {id(weight): f"unet.{i}" for i, weight in enumerate(weights)}
        return optimizer_class([{"params": weights, "name": "unet"}], lr=1e-2, **extra), names

    (whole, names), (goes_on, names_then) = built(), built()
    run(whole, range(1, 4))
    saved = optimizer_state(whole, names)
    saved["state"] = {
        name: {key: value.clone(memory_format=torch.contiguous_format) for key, value in values.items()} for name, values in saved["state"].items()
    }
    with torch.no_grad():
        for mine, weight in zip(goes_on.param_groups[0]["params"], whole.param_groups[0]["params"], strict=True):
            mine.copy_(weight)
    load_optimizer_state(goes_on, names_then, saved, groups_by_name(whole), groups_by_name(goes_on))
    assert any(not weight.is_contiguous() for weight in goes_on.param_groups[0]["params"])
    run(whole, range(4, 7))
    run(goes_on, range(4, 7))
    assert are_equal(tensors_of(whole), tensors_of(goes_on))
