"""How fast a run is: means over the last steps, by a clock and closed forms."""

import re
from pathlib import Path

import pytest
import torch

from sdxl_train import metrics as metrics_module
from sdxl_train.console import figures_of
from sdxl_train.device_speed import peak_flops
from sdxl_train.metrics import Speed
from sdxl_train.model.architecture import SDXL
from sdxl_train.step_costs import StepCosts, Trained, step_flops

TAGS = ["speed/img_per_s", "speed/tflop_per_s", "speed/data_wait_percent", "speed/rss_gib"]


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: self.now)


def step(speed: Speed, clock: Clock, seconds: float, images: int, waited: float = 0.0, size: tuple[int, int] = (1024, 1024)) -> None:
    speed.waited(waited)
    speed.batch_begun(images, size, 3)
    clock.now += seconds
    speed.step_done()


def test_speed_is_the_mean_over_the_last_twenty_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    speed = Speed(StepCosts(SDXL, Trained()))
    monkeypatch.setattr(speed, "_peak_flops", 100e12)
    assert "speed/img_per_s" not in speed.metrics()
    step(speed, clock, 2.0, 4, waited=0.5)
    first = speed.metrics()
    assert first["speed/img_per_s"] == 2.0 and first["speed/data_wait_percent"] == 25.0
    assert first["speed/tflop_per_s"] == pytest.approx(2 * step_flops(SDXL, (1024, 1024), 3, Trained()).total / 1e12)
    assert first["speed/mfu_percent"] == pytest.approx(first["speed/tflop_per_s"])
    for _ in range(20):
        step(speed, clock, 1.0, 4, size=(512, 512))
    later = speed.metrics()
    assert later["speed/img_per_s"] == 4.0 and later["speed/data_wait_percent"] == 0.0
    assert later["speed/tflop_per_s"] == pytest.approx(4 * step_flops(SDXL, (512, 512), 3, Trained()).total / 1e12)


def test_what_is_no_step_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    speed = Speed()
    step(speed, clock, 1.0, 4)
    clock.now += 1000  # samples are rendered
    speed.restart()
    step(speed, clock, 2.0, 4)
    assert speed.metrics()["speed/img_per_s"] == 2.0


def test_there_is_no_mfu_without_a_known_peak() -> None:
    assert "speed/mfu_percent" not in Speed(StepCosts(SDXL, Trained()), torch.device("cpu")).metrics()


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GeForce RTX 5090", 209),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Quadro RTX 6000", None),
        ("some card", None),
    ],
)
def test_the_peak_of_a_card_is_known_by_its_name(name: str, tera: float | None) -> None:
    assert peak_flops(name) == (None if tera is None else tera * 1e12)


def test_the_progress_line_shows_all_figures() -> None:
    shown = figures_of({"loss/step": 0.5, "speed/img_per_s": 2.0, "speed/tflop_per_s": 40.55, "speed/mfu_percent": 4.1, "speed/data_wait_percent": 0.26, "speed/peak_gib": 10.34})
    assert shown == "loss 0.5000, 2.00 img/s, 40.5 TFLOP/s, MFU 4.1%, data wait 0.3%, peak 10.34 GiB"
    assert figures_of({"speed/rss_gib": 1.5}) == "RSS 1.50 GiB"


def test_every_line_of_a_run_says_how_fast_it_is(config, cli, metrics, tmp_path: Path) -> None:
    ended = cli("train", config(num_train_epochs=1))
    lines = metrics(tmp_path / "out")
    assert ended.code == 0 and len(lines) == 3
    for line in lines:
        assert [line[tag] > 0 for tag in TAGS] == [True] * len(TAGS)
        assert line["speed/data_wait_percent"] < 100 and "speed/mfu_percent" not in line
    assert re.search(r"3/3 loss [\d.]+, avr [\d.]+, ema [\d.]+, [\d.]+ img/s, [\d.e-]+ TFLOP/s, data wait [\d.]+%, RSS [\d.]+ GiB", ended.err)
