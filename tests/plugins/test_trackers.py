"""What the trackers have written at any moment, read back from the files."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdxl_train_plugins.trackers import Jsonl, TensorBoard

TAGS = {"loss/step": 0.5, "loss_avr/step": 0.25, "loss_ema/step": 0.125, "lr/unet": 1e-5, "lr/text_encoder2": 2e-6}


def new_run(folder: Path, is_main_process: bool = True) -> Any:
    return SimpleNamespace(log_dir=folder / "logs" / "20240102030405", step=0, epoch=1, steps_per_epoch=2, is_main_process=is_main_process)


def logged(step: int, epoch: int, **more: float) -> dict[str, float]:
    return {"step": step, "epoch": epoch, "time": 1.7e9 + step, **TAGS, **more}


def lines(run: Any) -> list[dict]:
    text = (run.log_dir / "metrics.jsonl").read_text("utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def start(tracker: Any, run: Any) -> Any:
    tracker.on_train_start(run)
    return tracker


def test_each_line_is_in_the_file_as_soon_as_its_step_is_logged(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    tracker = start(Jsonl(), run)
    for step in (1, 2, 3):
        run.step, run.epoch = step, 1 + (step > 2)
        tracker.on_log(run, logged(step, run.epoch))
        assert lines(run)[-1] == {"step": step, "epoch": run.epoch, "time": 1.7e9 + step, **TAGS}
        if step == 2:
            tracker.on_epoch_end(run, {"loss/epoch": 0.75})
    assert [line["step"] for line in lines(run)] == [1, 2, 3]


def test_the_loss_of_an_epoch_joins_the_line_of_its_last_step(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    tracker = start(Jsonl(), run)
    for step, epoch in ((1, 1), (2, 1), (3, 2), (4, 2)):
        run.step, run.epoch = step, epoch
        tracker.on_log(run, logged(step, epoch))
        if step % 2 == 0:
            tracker.on_epoch_end(run, {"loss/epoch": step / 3})
    tracker.on_train_end()
    assert [line.get("loss/epoch") for line in lines(run)] == [None, 2 / 3, None, 4 / 3]
    assert lines(run)[1] == {**logged(2, 1), "loss/epoch": 2 / 3}


def test_no_line_moves_when_the_loss_of_an_epoch_joins_it(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    tracker = start(Jsonl(), run)
    run.step = 2
    tracker.on_log(run, logged(2, 1))
    size = os.stat(run.log_dir / "metrics.jsonl").st_size
    tracker.on_epoch_end(run, {"loss/epoch": -1.2345678901234567e-300})  # as long as a float gets
    assert os.stat(run.log_dir / "metrics.jsonl").st_size == size  # a reader who follows the file finds whole lines only
    assert lines(run)[0]["loss/epoch"] == -1.2345678901234567e-300


def test_numbers_that_json_has_no_word_for_are_null(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    tracker = start(Jsonl(), run)
    tracker.on_log(run, logged(1, 1, **{"loss/extra": float("nan"), "loss/other": float("inf")}))
    assert (lines(run)[0]["loss/extra"], lines(run)[0]["loss/other"]) == (None, None)
    assert "NaN" not in (run.log_dir / "metrics.jsonl").read_text("utf-8")


def test_an_epoch_that_ends_before_anything_is_logged_writes_nothing(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    start(Jsonl(), run).on_epoch_end(run, {"loss/epoch": 1.0})
    assert lines(run) == []


@pytest.mark.parametrize("tracker_class", [Jsonl, TensorBoard])
def test_only_the_main_process_writes(tmp_path: Path, tracker_class: type) -> None:
    run = new_run(tmp_path, is_main_process=False)
    tracker = start(tracker_class(), run)
    if tracker_class is Jsonl:
        tracker.on_log(run, logged(1, 1))
    else:
        tracker.on_log(logged(1, 1))
    tracker.on_epoch_end(run, {"loss/epoch": 1.0})
    tracker.on_train_end()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_holds_every_tag_once_per_step_at_its_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = new_run(tmp_path)
    tracker = start(TensorBoard(), run)
    for step in (1, 2, 3):
        run.step = step
        tracker.on_log(logged(step, 1))
        if step == 2:
            tracker.on_epoch_end(run, {"loss/epoch": 0.75})
    tracker.on_train_end()
    events = EventAccumulator(str(run.log_dir)).Reload()
    assert set(events.Tags()["scalars"]) == {*TAGS, "loss/epoch"}
    for tag, value in TAGS.items():
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [(step, pytest.approx(value)) for step in (1, 2, 3)]
    assert [(event.step, event.value) for event in events.Scalars("loss/epoch")] == [(2, 0.75)]
    assert events.Scalars("loss/step")[0].wall_time == 1.7e9 + 1
