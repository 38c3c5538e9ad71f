"""Where the metrics go: TensorBoard events and JSON lines, both in the run's log folder and written by the main process only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

from sdxl_train import Run, hookimpl

if TYPE_CHECKING:
    from torch.utils.tensorboard import FileWriter

FLUSH_AFTER_S = 5
PLACE = ("step", "epoch", "time")  # entries of `on_log` that say which step it is; all others are tags


class TensorBoard:
    """One scalar per tag and step, at x = the step."""

    def __init__(self) -> None:
        self._writer: FileWriter | None = None

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        if run.is_main_process:
            from torch.utils.tensorboard import FileWriter

            self._writer = FileWriter(str(run.log_dir), flush_secs=FLUSH_AFTER_S)

    @hookimpl
    def on_log(self, metrics: Mapping[str, float]) -> None:
        self._write(metrics, int(metrics["step"]), metrics["time"])

    @hookimpl
    def on_epoch_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        self._write(metrics, run.step)

    @hookimpl
    def on_train_end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, metrics: Mapping[str, float], step: int, walltime: float | None = None) -> None:
        """All tags as one event: `SummaryWriter.add_scalar` would make one of each, which takes ten times as long."""
        if self._writer is not None:
            from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue] # made when it is imported

            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items() if tag not in PLACE]
            self._writer.add_summary(Summary(value=values), step, walltime)


class Jsonl:
    """`metrics.jsonl`: one object per step with `step`, `epoch`, `time` and every tag; numbers that JSON has no word for are null.

    Each line reaches the file as soon as its step is logged. The last line of an epoch ends in spaces, over which the epoch's own tags
    are written when they come: so there is still one object per step, none is ever held back, and no line moves.
    """

    _ROOM = 64  # bytes for `, "loss/epoch": ` and a float of up to 24 characters, and some to spare

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._last: dict[str, Any] = {}
        self._last_place = 0

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        if run.is_main_process:
            run.log_dir.mkdir(parents=True, exist_ok=True)
            self._file = open(run.log_dir / "metrics.jsonl", "wb", buffering=0)  # noqa: SIM115 - closed in on_train_end

    @hookimpl
    def on_log(self, run: Run, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            return
        tags = {tag: _json_number(value) for tag, value in metrics.items() if tag not in PLACE}
        self._last = {"step": int(metrics["step"]), "epoch": int(metrics["epoch"]), "time": metrics["time"], **tags}
        self._last_place = self._file.tell()
        line = json.dumps(self._last).encode()
        if self._last["step"] % run.steps_per_epoch == 0:
            line += b" " * self._ROOM
        self._file.write(line + b"\n")

    @hookimpl
    def on_epoch_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        if self._file is None or not self._last:
            return
        assert self._last["step"] == run.step, "the epoch's last step is logged before the epoch"
        end = self._file.tell()
        self._last.update({tag: _json_number(value) for tag, value in metrics.items()})
        line = json.dumps(self._last).encode()
        self._file.seek(self._last_place)
        self._file.write(line.ljust(end - self._last_place - 1) + b"\n")

    @hookimpl
    def on_train_end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
