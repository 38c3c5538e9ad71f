"""What the rules make of keys that belong together: Adafactor's own rate, rates that an optimizer finds, schedules without effect."""

from typing import Any

import pytest

from sdxl_train.config import load_settings
from sdxl_train.config_rules import follow_relative_step, schedule_warnings, warnings

OWN_RATE = {"optimizer_kwargs": {"relative_step": True}}


def test_a_rate_of_its_own_replaces_the_schedule_and_the_warmup() -> None:
    data, notes = follow_relative_step({**OWN_RATE, "optimizer_type": "adafactor", "learning_rate": 2e-5})
    assert (data["lr_scheduler"], data["lr_warmup_steps"]) == ("adafactor:2e-05", 0)
    assert [key for key, _ in notes] == ["lr_scheduler"]


def test_what_has_no_effect_then_is_noted() -> None:
    given = {"lr_scheduler": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2.0}, "lr_warmup_steps": 5, "learning_rate_te1": 1e-6}
    data, notes = follow_relative_step({**OWN_RATE, **given})
    assert data["lr_scheduler"] == "adafactor:1e-05" and data["lr_warmup_steps"] == 0 and "lr_scheduler_kwargs" not in data
    assert {key for key, _ in notes} == {"lr_scheduler", "lr_scheduler_kwargs", "lr_warmup_steps", "learning_rate_te1"}


def test_a_given_initial_rate_is_kept() -> None:
    data, notes = follow_relative_step({**OWN_RATE, "lr_scheduler": "adafactor:3e-4"})
    assert (data["lr_scheduler"], notes) == ("adafactor:3e-4", [])
    assert follow_relative_step({**OWN_RATE, "lr_scheduler": "adafactor", "learning_rate": 1})[0]["lr_scheduler"] == "adafactor:1"


def test_warmup_init_turns_relative_step_on() -> None:
    data, notes = follow_relative_step({"optimizer_kwargs": {"warmup_init": True, "relative_step": False}})
    assert data["lr_scheduler"] == "adafactor:1e-05" and "turns relative_step on" in notes[0][1]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"optimizer_type": "AdamW", **OWN_RATE},
        {"optimizer_kwargs": {"relative_step": False}},
        {"optimizer_kwargs": 3},
        {"optimizer_type": 3, **OWN_RATE},
        {"lr_scheduler": ["cosine"]},
    ],
)
def test_other_files_are_left_as_they_are(data: dict[str, Any]) -> None:
    assert follow_relative_step(data) == (data, [])


def test_a_warmup_as_long_as_the_run_is_warned_about() -> None:
    for name, warmup, warns in (("cosine", 10, True), ("cosine", 9, False), ("constant", 10, False), ("adafactor:1", 10, False)):
        assert bool(schedule_warnings({"lr_scheduler": name, "lr_warmup_steps": warmup}, 10)) is warns


@pytest.mark.parametrize(
    ("changes", "is_low", "differs"),
    [
        ({"learning_rate": 1.0}, False, False),
        ({"learning_rate": 0.1}, True, False),
        ({"learning_rate": 1.0, "learning_rate_te2": 0.5}, False, False),  # not trained
        ({"learning_rate": 1.0, "learning_rate_te2": 0.5, "train_text_encoder": True}, False, True),
        ({"learning_rate": 1.0, "learning_rate_te1": 1e-6, "train_text_encoder": True}, True, True),
        ({"learning_rate": 1.0, "learning_rate_te1": 0.0, "train_text_encoder": True}, False, False),  # frozen
        ({"learning_rate": 0.0, "learning_rate_te1": 1.0, "learning_rate_te2": 1.0, "train_text_encoder": True}, False, False),
        ({"learning_rate": 1e-5, "optimizer_type": "Lion"}, False, False),
    ],
)
@pytest.mark.parametrize("name", ["Prodigy", "DAdaptation", "dadaptation.DAdaptAdam"])
def test_rates_for_an_optimizer_that_finds_its_own(config, name: str, changes: dict[str, Any], is_low: bool, differs: bool) -> None:
    values = {**load_settings(config(), needs=()).values, "optimizer_type": name, **changes}
    said = list(warnings(values, set()))
    assert any("1 is usual" in text for text in said) is is_low
    assert any("use the first rate only" in text for text in said) is differs


@pytest.mark.parametrize(
    ("keys", "tables", "said"),
    [
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-7}, "", "lr_scheduler_kwargs.lr_end = 1e-07 is not below the learning rate"),
        (
            {"optimizer_type": "AdamW", "full_bf16": True, "mixed_precision": "bf16"},
            "[optimizer_kwargs]\nforeach = true",
            "optimizer_kwargs.foreach",
        ),
    ],
)
def test_options_that_do_not_fit_other_keys_are_found_by_check(cli, config, keys: dict[str, Any], tables: str, said: str) -> None:
    ended = cli("check", config(tables=tables, **keys))
    assert ended.code == 2 and said in ended.err + ended.out
