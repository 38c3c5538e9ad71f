"""Optimizers by name: each documented one trains and resumes, and what cannot be meant is said before step 1."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_train import PluginError
from sdxl_train.plugin_discovery import Catalogue, missing_packages
from sdxl_train.plugin_keys import PLUGIN_KEYS

KEY = PLUGIN_KEYS["optimizer_type"]
DOCUMENTED = [
    "AdamW8bit", "SGDNesterov8bit", "Lion8bit", "PagedAdamW8bit", "PagedLion8bit", "PagedAdamW32bit", "Lion", "Prodigy", "DAdaptation",
    "DAdaptAdam", "DAdaptAdaGrad", "DAdaptAdan", "DAdaptLion", "DAdaptSGD", "SGDNesterov", "DAdaptAdamPreprint", "DAdaptAdanIP",
]  # fmt: skip
FURTHER = ["CAME", "adan", "StableAdamW", "Rprop", "SGD", "torch.optim.NAdam", "pytorch_optimizer.Tiger", "bitsandbytes.optim.LAMB8bit"]


def plugin(name: str, **options: Any) -> Any:
    found = Catalogue().find(KEY, name).value
    if missing_packages(found):
        pytest.skip(missing_packages(found)[0])
    return found(found.Options(**options))


def weights() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4,), (80, 64), (4, 4, 3, 3))]


def build(plugin: Any, parameters: list[torch.nn.Parameter], lr: float = 1.0) -> torch.optim.Optimizer:
    groups = [{"name": "unet", "params": parameters[:2], "lr": lr}, {"name": "text_encoder1", "params": parameters[2:], "lr": lr}]
    return plugin.build_optimizer(groups)


def train(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = parameter.detach() + torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


def stored(value: Any, tensors: list[torch.Tensor]) -> Any:
    """A state as tensors and JSON; raises for what is neither."""
    if isinstance(value, torch.Tensor):
        tensors.append(value.clone())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, dict):
        return {"dict": [[key, stored(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return [stored(inner, tensors) for inner in value]
    json.dumps(value)
    return value


def restored(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [restored(inner, tensors) for inner in value]
    if isinstance(value, dict):
        return tensors[value["tensor"]] if "tensor" in value else {key: restored(inner, tensors) for key, inner in value["dict"]}
    return value


@pytest.mark.parametrize("name", [*DOCUMENTED, *FURTHER])
def test_each_name_trains_and_continues_from_a_state_of_tensors_and_json(name: str) -> None:
    chosen = plugin(name)
    assert list(chosen.library_problems()) == []
    parameters = weights()
    optimizer = build(chosen, parameters)
    train(optimizer, parameters, range(3))
    assert any(not torch.equal(before, after) for before, after in zip(weights(), parameters, strict=True))
    tensors: list[torch.Tensor] = []
    text = json.dumps(stored(optimizer.state_dict(), tensors))
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    train(optimizer, parameters, range(3, 6))
    resumed = build(chosen, copies)
    resumed.load_state_dict(restored(json.loads(text), tensors))
    train(resumed, copies, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(parameters, copies, strict=True))


@pytest.mark.parametrize("name", [*DOCUMENTED, "CAME", "RMSprop"])
def test_case_does_not_matter_for_the_listed_names(name: str) -> None:
    assert {Catalogue().find(KEY, text).name for text in (name, name.lower(), name.upper())} == {name}


@pytest.mark.parametrize(("name", "nearest"), [("rprop", "Rprop"), ("AdamW8bits", "AdamW8bit"), ("prodigi", "Prodigy"), ("caim", "CAME")])
def test_an_unknown_name_is_answered_with_the_nearest_known_one(name: str, nearest: str) -> None:
    with pytest.raises(PluginError, match=f'did you mean "{nearest}"') as caught:
        Catalogue().find(KEY, name)
    assert "AdaFactor, AdamW" in str(caught.value) and "torch.optim" in str(caught.value)


def test_a_name_that_both_packages_have_is_torchs() -> None:
    for name in ("RAdam", "radam", "ASGD"):
        (optimizer,) = [build(plugin(name), weights())]
        assert type(optimizer).__module__.startswith("torch.optim"), name


def test_nesterov_is_on_with_momentum_unless_given() -> None:
    group = build(plugin("sgdnesterov"), weights()).param_groups[0]
    assert (group["nesterov"], group["momentum"]) == (True, 0.9)
    group = build(plugin("SGDNesterov", momentum=0.5, weight_decay=0.1), weights()).param_groups[0]
    assert (group["nesterov"], group["momentum"], group["weight_decay"]) == (True, 0.5, 0.1)
    parameters = weights()
    optimizer = build(plugin("SGDNesterov"), parameters, lr=0.5)
    first = parameters[0].detach().clone()
    parameters[0].grad = torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(
        parameters[0].detach(), first - 0.5 * (1 + 0.9)
    )  # gradient + momentum * buffer, the buffer being the gradient


def test_arguments_reach_the_optimizer_and_lists_become_tuples() -> None:
    optimizer = build(plugin("Lion", betas=[0.5, 0.75], weight_decay=0.25), weights())
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75) and optimizer.param_groups[0]["weight_decay"] == 0.25


def test_an_adafactor_of_transformers_uses_the_rates_of_the_file_unless_asked_for_its_own() -> None:
    name = "transformers.optimization.Adafactor"
    assert [group["lr"] for group in build(plugin(name), weights(), lr=0.5).param_groups] == [0.5, 0.5]
    optimizer = build(plugin(name, warmup_init=True), weights())
    assert [(group["lr"], group["relative_step"]) for group in optimizer.param_groups] == [(None, True)] * 2


def test_groups_keep_their_rates_and_names() -> None:
    parameters = weights()
    groups = [{"name": "unet", "params": parameters[:2], "lr": 0.5}, {"name": "text_encoder1", "params": parameters[2:], "lr": 0.25}]
    optimizer = plugin("SGDNesterov8bit").build_optimizer(groups)  # its class has no default rate
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [("unet", 0.5), ("text_encoder1", 0.25)]


@pytest.mark.parametrize(
    ("name", "options", "about", "said"),
    [
        ("Lion", {"beta": [0.5, 0.9]}, "beta", 'did you mean "betas"'),
        ("Prodigy", {"no_such": 1}, "no_such", "takes no no_such"),  # its **kwargs would swallow it
        ("Rprop", {"lr": 1.0}, "lr", "learning_rate"),
        ("Adam", {"betas": [2.0, 0.9]}, "", "Invalid beta parameter"),
        ("SGDNesterov", {"momentum": 0}, "", "Nesterov"),
        ("LBFGS", {}, "", "closure"),
        ("AliG", {}, "", "closure"),
        ("SAM", {}, "", "base_optimizer"),
        ("Lookahead", {}, "", "whole optimizer"),
        ("LOMO", {}, "", "whole model"),
        ("SparseAdam", {}, "", "dense gradients"),
        ("SophiaH", {}, "", "cannot train here"),
        ("ScheduleFreeAdamW", {}, "", "saving would change the training"),
        ("torch.optim.Optimiser", {}, "", "cannot be imported"),
        ("torch.nn.Linear", {}, "", "no torch.optim.Optimizer"),
    ],
)
def test_what_an_optimizer_cannot_do_is_said(name: str, options: dict, about: str, said: str) -> None:
    ((option, message),) = plugin(name, **options).library_problems()
    assert option == about and said in message


def test_looking_at_an_optimizer_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(plugin("AdamW8bit").library_problems())
    assert torch.equal(before, torch.get_rng_state())


def test_a_dadaptation_of_the_preprint_comes_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name with these classes stands in for it."""
    experimental = tmp_path / "dadaptation" / "experimental"
    experimental.mkdir(parents=True)
    (tmp_path / "dadaptation" / "__init__.py").touch()
    body = "import torch\nclass DAdaptAdamPreprint(torch.optim.SGD):\n    pass\nclass DAdaptAdanIP(torch.optim.SGD):\n    pass\n"
    (experimental / "__init__.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] == "dadaptation"]:
        monkeypatch.delitem(sys.modules, module)
    for name in ("DAdaptAdamPreprint", "DAdaptAdanIP"):
        assert type(build(plugin(name), weights())).__name__ == name
    for module in ("dadaptation", "dadaptation.experimental"):
        del sys.modules[module]
