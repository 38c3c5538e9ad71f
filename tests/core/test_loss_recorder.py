"""The loss recorder against the oracles, closed forms and an uninterrupted recorder."""

import json
import random
from pathlib import Path

import pytest
import torch

from sdxl_train.loss_recorder import LossRecorder

ORACLES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text("utf-8"))


def cases(group: str) -> list[tuple[dict, dict]]:
    return list(zip(ORACLES[group]["inputs"], ORACLES[group]["expected"], strict=True))


def record_all(recorder: LossRecorder, losses: list[float]) -> list[tuple[float, float]]:
    return [(average.item(), ema.item()) for average, ema in (recorder.record(torch.tensor(float(loss))) for loss in losses)]


@pytest.mark.parametrize(("given", "expected"), cases("loss_ema"))
def test_ema_holds_the_oracle_values(given: dict, expected: dict) -> None:
    emas = [ema for _, ema in record_all(LossRecorder(given["gamma"], 1000), given["losses"])]
    assert emas == pytest.approx(expected["ema"], rel=1e-6)


@pytest.mark.parametrize(("given", "expected"), cases("loss_average"))
def test_average_holds_the_oracle_values(given: dict, expected: dict) -> None:
    averages = [average for average, _ in record_all(LossRecorder(0.1, given["stride"]), given["losses"])]
    assert averages == pytest.approx(expected["average"], rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_a_constant_loss_reads_as_itself(gamma: float) -> None:
    for average, ema in record_all(LossRecorder(gamma, 3), [0.25] * 50):
        assert average == 0.25
        assert ema == pytest.approx(0.25, rel=1e-12)


def test_gamma_1_reads_the_current_loss() -> None:
    assert [ema for _, ema in record_all(LossRecorder(1.0, 2), [3, 1, 2])] == [3, 1, 2]


def test_a_larger_gamma_follows_the_loss_more_closely() -> None:
    losses = [1.0] * 20 + [0.0] * 5
    last = [record_all(LossRecorder(gamma, 10), losses)[-1][1] for gamma in (0.0, 0.05, 0.3, 1.0)]
    assert last == sorted(last, reverse=True) and len(set(last)) == 4


@pytest.mark.parametrize("stride", [1, 3, 1024, 1500, 10_000_000])
def test_the_window_is_the_stride_however_long(stride: int) -> None:
    losses = [random.Random(i).random() for i in range(2600)]
    averages = [average for average, _ in record_all(LossRecorder(0.1, stride), losses)]
    singles = [torch.tensor(loss).item() for loss in losses]
    for seen in (1, 2, 3, 4, 1024, 1025, 1500, 1501, 2048, 2049, 2600):
        window = singles[max(0, seen - stride) : seen]
        assert averages[seen - 1] == pytest.approx(sum(window) / len(window), rel=1e-12)


def test_one_huge_loss_leaves_no_trace_once_it_is_out_of_the_window() -> None:
    assert record_all(LossRecorder(1.0, 2), [1e30, 0.5, 0.25])[-1] == (0.375, 0.25)


def test_small_losses_are_not_lost_in_a_long_mean() -> None:
    recorder = LossRecorder(0.0, 10)
    recorder.record(torch.tensor(2.0**24))  # float32 could not add 1 to this
    recorder.record(torch.tensor(1.0))
    assert recorder.record(torch.tensor(1.0))[1].item() == (2**24 + 2) / 3


@pytest.mark.parametrize("stop", [1, 4, 5, 7, 10, 23])
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_a_restored_recorder_goes_on_bit_by_bit(stop: int, gamma: float) -> None:
    losses = [random.Random(i).random() for i in range(30)]
    whole = record_all(LossRecorder(gamma, 5), losses)
    first = LossRecorder(gamma, 5)
    record_all(first, losses[:stop])
    state = first.state_dict()
    record_all(first, [9.0] * 7)  # the state is a snapshot
    second = LossRecorder(gamma, 5)
    second.load_state_dict(state)
    assert record_all(second, losses[stop:]) == whole[stop:]


@pytest.mark.parametrize("old", [2, 3, 6, 9])
@pytest.mark.parametrize("new", [1, 4, 8])
def test_another_stride_keeps_the_newest_losses_that_fit(old: int, new: int) -> None:
    losses = [float(i) for i in range(1, 13)]
    first, second = LossRecorder(0.1, old), LossRecorder(0.1, new)
    record_all(first, losses[:8])
    second.load_state_dict(first.state_dict())
    kept = losses[:8][-min(old, new, 8) :] if min(old, new) < 8 else losses[:8]
    for seen in range(8, 12):
        kept = [*kept, losses[seen]][-new:]
        assert record_all(second, [losses[seen]])[0][0] == sum(kept) / len(kept)


def test_nothing_is_read_back_from_the_device() -> None:
    average, ema = LossRecorder(0.1, 4).record(torch.zeros((), device="meta", requires_grad=True))  # a meta tensor has no value to read
    assert (average.device.type, average.shape, average.dtype) == ("meta", (), torch.float64)
    assert (ema.device.type, ema.shape, ema.requires_grad) == ("meta", (), False)


@pytest.mark.parametrize(("gamma", "stride"), [(-0.1, 5), (1.1, 5), (0.1, 0)])
def test_settings_out_of_range_are_refused(gamma: float, stride: int) -> None:
    with pytest.raises(ValueError, match="gamma"):
        LossRecorder(gamma, stride)
