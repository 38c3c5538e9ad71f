"""Updates inside the backward pass, and the norm they exclude, seen in the saved files of real runs."""

from pathlib import Path

import pytest
import torch

UNET = "model.diffusion_model."


def test_a_frozen_block_takes_no_part_in_the_gradient_norm(train_and_compare) -> None:
    # With everything frozen but the last block, clipping to a norm below that block's own gives the same step as without the other blocks.
    only_last = [0.0] * 22 + [1e-3]
    _, alone, _ = train_and_compare("alone", block_lr=only_last, max_grad_norm=1e-4, optimizer_type="SGD", max_train_steps=1)
    _, small, _ = train_and_compare("small", block_lr=[1e-12] * 22 + [1e-3], max_grad_norm=1e-4, optimizer_type="SGD", max_train_steps=1)
    name = UNET + "out.2.weight"
    assert not torch.equal(alone[name], small[name])



@pytest.mark.parametrize("optimizer", ["AdaFactor", "AdamW"])
@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fused_backward_gives_the_same_weights(train_and_compare, optimizer, full, recwarn) -> None:
    keys = {"optimizer_type": optimizer, "train_text_encoder": True, "gradient_checkpointing": True, "save_precision": "keep"}
    keys |= {"full_bf16": True, "mixed_precision": "bf16"} if full else {}
    changed, plain, _ = train_and_compare("plain", **keys)
    _, fused, ended = train_and_compare("fused", **keys, fused_backward=True)
    assert "fused backward" in ended.err and changed
    assert not [one for one in recwarn if "optimizer.step" in str(one.message)]
    assert [name for name in plain if not torch.equal(plain[name], fused[name])] == []


def test_fused_backward_drops_a_step_whose_loss_is_not_finite(train_and_compare, metrics, tmp_path: Path) -> None:
    plugin = tmp_path / "nan_once.py"
    plugin.write_text(
        "calls = []\n"
        "def loss(model_pred, target, **kwargs):\n"
        "    calls.append(1)\n"
        "    losses = (model_pred - target).square().flatten(1).mean(1)\n"
        "    return losses * float('nan') if len(calls) % 3 == 2 else losses\n"
    )
    runs = {}
    for name, fused in (("plain", False), ("fused", True)):
        _, runs[name], ended = train_and_compare(name, loss_type=f"{plugin}:loss", fused_backward=fused)
        assert "not finite" in ended.err
        assert sum("loss/step" not in line for line in metrics(tmp_path / name)) == 1
    assert [key for key in runs["plain"] if not torch.equal(runs["plain"][key], runs["fused"][key])] == []


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"optimizer_type": "SGD"}, "SGD cannot"),
        ({"optimizer_type": "SGDNesterov"}, "SGDNesterov cannot"),
        ({"optimizer_type": "torch.optim.SGD"}, "torch.optim.SGD cannot"),
        ({"optimizer_type": "AdamW", "tables": "[optimizer_kwargs]\nforeach = true"}, "optimizer_kwargs.foreach"),
    ],
)
def test_fused_backward_refuses_what_it_cannot_do_and_names_it(cli, config, keys, said) -> None:
    path = config(fused_backward=True, **keys)
    ended, checked = cli(path), cli("check", path)
    assert ended.code == 2 and "fused_backward" in ended.err and said in ended.err
    assert checked.code == 2 and "fused_backward" in checked.out and said in checked.out
