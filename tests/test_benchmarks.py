"""The benchmarks work, and measure what they say that they do. No time is judged here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[1] / "benchmarks" / "data.py"
HEADINGS = ["goal of", "measured", "count", "value", "plain alternative", "ratio", "goal", "met"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(DATA), "--tiny", *map(str, arguments)], capture_output=True, text=True)


def lines(folder: Path, metric: str) -> list[dict[str, Any]]:
    done = run("--only", metric, "--dir", folder, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def all_positive(found: list[dict[str, Any]]) -> bool:
    return all(line["value"] > 0 and (line["plain"] is None or line["plain"] > 0) for line in found)


def test_both_kinds_of_metadata_are_indexed_whole(folder: Path) -> None:
    found = lines(folder, "C4")
    assert [(line["metric"], line["count"], line["goal"]["limit"]) for line in found] == [("C4", 2000, 8), ("C4", 2000, 15)]
    assert all_positive(found)


@pytest.mark.skipif(sys.platform != "linux", reason="private memory is read from /proc")
def test_starts_and_loader_processes_see_all_data(folder: Path) -> None:
    found = lines(folder, "C6")
    assert {line["count"] for line in found} == {2000}
    assert [line["goal"]["limit"] for line in found if line["metric"] == "C5"] == [1, 1], "with and without the stat of every picture"
    assert [line["goal"]["limit"] for line in found if line["metric"] == "C6"] == [150, 150, 1], "warm, cold, and a loader process"
    assert all_positive([line for line in found if "CPU" in line["unit"]])


def test_latents_are_read_from_caches_that_were_written(folder: Path) -> None:
    found = lines(folder, "C7")
    assert [(line["count"], line["plain_what"]) for line in found] == [(3, "memcpy"), (3, "np.load and np.stack")]
    assert all_positive(found)
    assert len(list(folder.glob("plain-*/*.npz"))) == 20


def test_jpegs_of_each_size_are_compared_with_a_full_decode(folder: Path) -> None:
    found = lines(folder, "C8")
    assert [line["unit"] for line in found] == ["CPU ms", "dB"] * 3 and all_positive(found)
    assert all(line["is_met"] for line in found if line["unit"] == "dB")
    assert [path.name for path in sorted(folder.glob("photographs-*/*.jpg"))] == ["00-00.jpg"] * 3


def test_all_pictures_are_cached_beside_each_limit(folder: Path) -> None:
    found = lines(folder, "C9")
    assert [line["count"] for line in found] == [8] * 6 and all_positive(found)
    assert all(line["ratio"] == pytest.approx(line["value"] / line["plain"]) for line in found)
    assert len(list(folder.glob("photographs-*/*.npz"))) == 8


def test_the_check_sees_all_pictures_and_imports_no_torch(folder: Path) -> None:
    wall, _, imports = lines(folder, "C14")
    assert (wall["count"], wall["goal"]["limit"]) == (20, 3)
    assert (imports["value"], imports["is_met"]) == (0, True)


def test_the_table_names_each_goal_and_whether_it_is_met(folder: Path) -> None:
    table = run("--only", "C14", "--dir", folder).stdout.splitlines()
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == HEADINGS
    assert table[-1].split("|")[1].strip() == "C14" and table[-1].split("|")[-2].strip() == "yes"


def test_an_unknown_goal_is_named_with_those_that_there_are() -> None:
    done = run("--only", "C7,C99")
    assert done.returncode == 2 and "there is no C99; choose from C4, C5, C6, C7, C8, C9, C14" in done.stderr
