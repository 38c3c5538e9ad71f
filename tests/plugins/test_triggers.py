"""When saves and samples are asked for."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from sdxl_train_plugins import sample_triggers, save_triggers

ORACLES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text("utf-8"))
CASES = list(zip(ORACLES["saves"]["inputs"], ORACLES["saves"]["expected"], strict=True))
MOMENTS = ("step", "epoch", "train_end", "keyboard_interrupt", "exception")


def at(step: int, epoch: int) -> Any:
    return SimpleNamespace(step=step, epoch=epoch)


@pytest.mark.parametrize(("given", "expected"), CASES)
def test_the_triggers_save_at_the_oracle_steps(given: dict, expected: dict) -> None:
    steps = save_triggers.Steps(save_triggers.Steps.Options(save_every_n_steps=given["save_every_n_steps"]))
    epochs = save_triggers.Epochs(save_triggers.Epochs.Options(save_every_n_epochs=given["save_every_n_epochs"]))
    train_end = save_triggers.TrainEnd(save_triggers.TrainEnd.Options(save_on_train_end=given["save_on_train_end"]))
    saved: dict[str, None] = {}
    num_steps = given["num_train_epochs"] * given["steps_per_epoch"]
    for step in range(1, num_steps + 1):
        epoch = -(-step // given["steps_per_epoch"])
        moments = ["step", *(["epoch"] if step % given["steps_per_epoch"] == 0 else []), *(["train_end"] if step == num_steps else [])]
        for moment in moments:
            if steps.should_save(at(step, epoch), moment) or epochs.should_save(at(step, epoch), moment) or train_end.should_save(moment):
                saved[f"ep{epoch}_step{step}"] = None
    assert list(saved) == expected["saved"]


@pytest.mark.parametrize("off", [None, 0])
def test_absent_and_0_turn_a_trigger_off(off: int | None) -> None:
    for moment in MOMENTS:
        assert save_triggers.Steps(save_triggers.Steps.Options(save_every_n_steps=off)).should_save(at(4, 2), moment) is None
        assert save_triggers.Epochs(save_triggers.Epochs.Options(save_every_n_epochs=off)).should_save(at(4, 2), moment) is None
        assert sample_triggers.Steps(sample_triggers.Steps.Options(sample_every_n_steps=off)).should_sample(at(0, 0), moment) is None
        assert sample_triggers.Epochs(sample_triggers.Epochs.Options(sample_every_n_epochs=off)).should_sample(at(0, 0), moment) is None


@pytest.mark.parametrize(
    ("plugin_class", "key", "moment"),
    [
        (save_triggers.TrainEnd, "save_on_train_end", "train_end"),
        (save_triggers.KeyboardInterrupted, "save_on_keyboard_interrupt", "keyboard_interrupt"),
        (save_triggers.ExceptionRaised, "save_on_exception", "exception"),
    ],
)
def test_a_moment_saves_unless_it_is_turned_off(plugin_class: Any, key: str, moment: str) -> None:
    on, off = plugin_class(plugin_class.Options()), plugin_class(plugin_class.Options(**{key: False}))
    assert [asked for asked in MOMENTS if on.should_save(asked)] == [moment]
    assert not any(off.should_save(asked) for asked in MOMENTS)


def test_sample_triggers_keep_to_their_own_moment_and_multiples() -> None:
    steps = sample_triggers.Steps(sample_triggers.Steps.Options(sample_every_n_steps=3))
    epochs = sample_triggers.Epochs(sample_triggers.Epochs.Options(sample_every_n_epochs=2))
    assert [step for step in range(1, 10) if steps.should_sample(at(step, 2), "step")] == [3, 6, 9]
    assert [epoch for epoch in range(1, 7) if epochs.should_sample(at(3, epoch), "epoch")] == [2, 4, 6]
    assert not any(steps.should_sample(at(3, 2), moment) for moment in MOMENTS[1:])
    assert not any(epochs.should_sample(at(3, 2), moment) for moment in MOMENTS if moment != "epoch")


def test_a_fresh_run_is_sampled_before_its_first_step() -> None:
    assert sample_triggers.Steps(sample_triggers.Steps.Options(sample_every_n_steps=100)).should_sample(at(0, 0), "step")
    assert sample_triggers.Epochs(sample_triggers.Epochs.Options(sample_every_n_epochs=100)).should_sample(at(0, 0), "epoch")


def test_a_negative_interval_is_an_error() -> None:
    with pytest.raises(ValidationError):
        save_triggers.Steps.Options(save_every_n_steps=-1)
