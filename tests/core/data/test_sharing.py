"""Which data would have their cache at one path."""

import os
from pathlib import Path

import numpy as np
import pytest

from sdxl_train.data import sharing
from sdxl_train.data.sharing import is_named_by, rows_with_one_cache


def shares(data: dict[str, str]) -> list[int]:
    return rows_with_one_cache(list(data.values())).tolist()


def test_pictures_that_differ_in_their_extension_or_key_only_share_a_cache() -> None:
    assert shares({"a": "d/a.png", "b": "d/b.png", "c": "d/a.jpg", "d": "d/a.png", "e": "e/a.png", "f": "", "g": ""}) == [0, -1, 0, 0, -1, -1, -1]


@pytest.mark.parametrize(
    ("key", "path", "named"),
    [
        ("a", "d/a.png", True),
        ("a.b", "/d.x/a.b.png", True),
        ("", "d/a.png", False),
        ("a", "d/xa.png", False),
        ("xa", "d/a.png", False),
        ("d", "e/d.x/a", False),
        ("a", "d/a", False),
    ],
)
def test_a_picture_is_called_like_its_key_or_not(key: str, path: str, named: bool) -> None:
    assert is_named_by(key, path) == named


def test_names_with_several_dots_or_none() -> None:
    assert shares({"1": "d.x/a", "2": "d.x/a.png", "3": "d/a.b.png", "4": "d/a.png", "5": "d.png"}) == [0, 0, -1, -1, -1]


def test_a_folder_may_be_written_in_several_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    os.symlink("d", "link")
    assert shares({"1": "d/a.png", "2": f"{tmp_path}/d/a.jpg", "3": "./d/a.png", "4": "link/a.png", "5": "a.png"}) == [0, 0, 0, 0, -1]


def test_no_data_share_nothing() -> None:
    assert shares({}) == []


def test_equal_hashes_are_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "hash", lambda text: 1 + len(text) % 2, raising=False)
    names = [f"d/{'x' * (i % 5)}{i}.png" for i in range(60)]
    found = np.array(shares({f"k{i:03}": name for i, name in enumerate([*names, "d/0.jpg"])}))
    assert found[0] == found[60] == 0 and (found[1:60] == -1).all()
