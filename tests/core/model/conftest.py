"""A tiny SDXL in the real file layout, made once."""

from pathlib import Path

import pytest

from sdxl_train.model.single_file import Checkpoint, open_checkpoint
from sdxl_train.model.tiny import write_tiny_sdxl


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "base.safetensors"
    write_tiny_sdxl(path)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_path))
