"""A second signal ends the process at once, whatever is being written."""

import os
import signal
from pathlib import Path

import pytest

from sdxl_train import stopping
from sdxl_train.stopping import StopRequest


def test_a_second_signal_ends_the_process_also_when_half_written_files_cannot_be_removed(tmp_path: Path, monkeypatch) -> None:
    def fails(directory: Path) -> None:
        raise OSError(39, "Directory not empty")

    class EndedError(BaseException):
        pass

    def leave(code: int) -> None:
        raise EndedError(code)

    monkeypatch.setattr(stopping, "remove_leftovers", fails)
    monkeypatch.setattr(os, "_exit", leave)
    request = StopRequest()
    request.writes_into = tmp_path
    request.handle(signal.SIGINT, None)
    with pytest.raises(EndedError, match="130"):
        request.handle(signal.SIGINT, None)
