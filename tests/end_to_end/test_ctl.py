"""Requests to a training that runs, from another process."""

import json
import time
from pathlib import Path

import pytest

from sdxl_train.control import CONTROL_NAME, send_request, take_requests


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_running_training_saves_samples_and_stops_when_asked(process, cli, config, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps([{"prompt": "x", "width": 64, "height": 64, "steps": 1}]))
    out = tmp_path / "out"
    started = process(config(num_train_epochs=5000, sample_benchmark=str(tmp_path / "bench.json")))
    wait_for(lambda: list(out.glob("logs/*/metrics.jsonl")) and next(out.glob("logs/*/metrics.jsonl")).stat().st_size > 0)
    assert cli("ctl", str(out), "save").code == 0
    wait_for(lambda: list(out.glob("models/*.safetensors")) and list(out.glob("train_state/*/manifest.json")))
    assert cli("ctl", str(out), "sample").code == 0
    wait_for(lambda: list(out.glob("samples/step_*/*.png")))
    assert cli("ctl", str(out), "dance").code == 2
    assert cli("ctl", str(out), "stop").code == 0
    assert started.wait(120) == 0
    assert len(list(out.glob("models/*.safetensors"))) == 2 and not (out / CONTROL_NAME).exists()
    ended = cli("ctl", str(out), "stop")
    assert ended.code == 2 and "no training runs" in ended.err


@pytest.mark.parametrize("folder", ["missing", "."])
def test_a_folder_without_a_training_is_refused(cli, tmp_path: Path, folder) -> None:
    ended = cli("ctl", str(tmp_path / folder), "save")
    assert ended.code == 2 and "no training runs" in ended.err


def test_requests_are_taken_once_and_in_order(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sdxl_train.control.is_in_use", lambda path: True)
    for request in ("sample", "save", "sample"):
        send_request(tmp_path, request)
    assert take_requests(tmp_path) == ["sample", "save"] and take_requests(tmp_path) == []
