"""What a base model says about itself against what the configuration says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from sdxl_train.config import Settings
    from sdxl_train.model.single_file import Checkpoint


def contradicted_marks(base: Checkpoint, settings: Settings) -> Iterator[Problem]:
    """A base that says it predicts velocity, or has zero terminal SNR, is not trained otherwise unless the file says so explicitly."""
    keys = settings.config
    for key, mark in (("prediction_type", base.prediction_type), ("zero_terminal_snr", base.zero_terminal_snr)):
        value = getattr(keys, key)
        if mark not in (None, value) and value in ("epsilon", False) and key not in settings.given:
            shown = f'"{mark}"' if isinstance(mark, str) else str(mark).lower()
            message = (
                f"{base.path} says {key} = {shown}, but the configuration leaves it at its default; "
                f"set {key} = {shown}, or set the default explicitly to train against the mark"
            )
            yield Problem("config", message, key=key)
