"""A step never waits for the device, except once for its loss after the backward pass is queued.

On the meta device there are no values: whatever reads one (`item`, `cpu`, a branch on a tensor, `nonzero`) raises.
"""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from sdxl_train import loop
from sdxl_train.build import build_run
from sdxl_train.config import load_settings
from sdxl_train.console import Console
from sdxl_train.data.epoch_plan import epoch_plan
from sdxl_train.run import Run
from sdxl_train.stopping import StopRequest
from sdxl_train.update import Update


@pytest.mark.parametrize("optimizer", ["AdaFactor", "AdamW"])
@pytest.mark.parametrize("extras", [{}, {"noise_offset": 0.1, "ip_noise_gamma": 0.1, "max_grad_norm": 1.0, "v_pred_like_loss": 0.5}])
def test_a_step_reads_no_value_from_the_device(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, extras: dict) -> None:
    run = build_run(load_settings(config(optimizer_type=optimizer, **extras)), tmp_path, tmp_path, Console(), StopRequest())
    plan = epoch_plan(run.parts.index, 42, 1, 4)
    (batch,) = run.parts.loader.batches(plan[:1])
    run.device = torch.device("meta")
    run.unet.to("meta")
    for encoder in run.text_encoders:
        encoder.to("meta")
    run.noise_scheduler = run.noise_scheduler.to("meta")
    groups = [{"name": "unet", "params": list(run.unet.parameters()), "lr": 1e-3}]
    run.optimizer = run.parts.hooks.build_optimizer(param_groups=groups)
    run.lr_scheduler = run.parts.hooks.build_lr_scheduler(optimizer=run.optimizer, num_warmup_steps=0, num_training_steps=9)
    run.parts.update = Update(run.optimizer, run.lr_scheduler, run.parts.keys, run.device)
    asked = []

    class Check:
        """Stands in for the one wait: a meta loss has no value to read."""

        def __init__(self, losses: torch.Tensor) -> None:
            assert losses.device.type == "meta" and next(run.unet.parameters()).grad is None, "asked before the backward pass"

        def is_finite(self) -> bool:
            assert next(run.unet.parameters()).grad is not None, "answered after it"
            asked.append(True)
            return True

    monkeypatch.setattr(loop, "FiniteCheck", Check)
    monkeypatch.setattr(Run, "autocast", lambda run: nullcontext())  # the meta device has none
    loss = loop.train_step(run, iter([batch.to("meta")]), 1)
    assert loss is not None and loss.shape == () and asked == [True]


def test_what_reads_a_value_would_be_noticed() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(1, device="meta").item()
