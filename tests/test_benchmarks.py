"""The benchmarks work, and measure what they say that they do. No time is judged here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HEADINGS = ["goal of", "measured", "count", "value", "plain alternative", "ratio", "goal", "met"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


def run(*arguments: object, script: str = "data.py", tiny: bool = True) -> subprocess.CompletedProcess[str]:
    options = ["--tiny"] if tiny else []
    return subprocess.run([sys.executable, str(BENCHMARKS / script), *options, *map(str, arguments)], capture_output=True, text=True)


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
@pytest.mark.slow
def test_starts_and_loader_processes_see_all_data(folder: Path) -> None:
    found = lines(folder, "C6")
    assert {line["count"] for line in found} == {2000}
    assert [line["goal"]["limit"] for line in found if line["metric"] == "C5"] == [1, 1], "with and without the stat of every picture"
    assert [line["goal"]["limit"] for line in found if line["metric"] == "C6"] == [150, 150, 1], "warm, cold, and a loader process"
    assert all_positive([line for line in found if "CPU" in line["unit"]])


@pytest.mark.slow
def test_latents_are_read_from_caches_that_were_written(folder: Path) -> None:
    found = lines(folder, "C7")
    assert [(line["count"], line["plain_what"]) for line in found] == [(3, "memcpy"), (3, "np.load and np.stack")]
    assert all_positive(found)
    assert len(list(folder.glob("plain-*/*.npz"))) == 20


@pytest.mark.slow
def test_jpegs_of_each_size_are_compared_with_a_full_decode(folder: Path) -> None:
    found = lines(folder, "C8")
    assert [line["unit"] for line in found] == ["CPU ms", "dB"] * 3 and all_positive(found)
    assert all(line["is_met"] for line in found if line["unit"] == "dB")
    assert [path.name for path in sorted(folder.glob("photographs-*/*.jpg"))] == ["00-00.jpg"] * 3


@pytest.mark.slow
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


def step_lines(metrics: str) -> list[dict[str, Any]]:
    done = run("--only", metrics, "--json", script="step.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_trainer_is_measured_beside_a_plain_loop_and_hooks_beside_direct_calls() -> None:
    found = step_lines("C1,C12")
    limits = [(line["metric"], line["goal"]["limit"], line["goal"]["of_ratio"]) for line in found]
    assert limits == [("C1", 1.02, True), ("C1", 1, False)] * 2 + [("C12", 60, False)] * 2
    assert all(line["value"] > 0 and line["plain"] > 0 for line in found[:5])
    outside = [(line["value"], line["plain"]) for line in found[1:4:2]]
    assert all(part < whole["value"] and plain < whole["plain"] for (part, plain), whole in zip(outside, found[0:4:2], strict=True))


@pytest.mark.slow
def test_updates_of_as_many_tensors_as_sdxl_has_are_measured() -> None:
    found = step_lines("C2")
    assert {line["count"] for line in found} == {1680} and all_positive(found)
    assert {line["goal"]["limit"] for line in found if line["goal"]} == {5}


@pytest.mark.slow
def test_waits_saves_and_memory_are_measured_without_a_device() -> None:
    found = step_lines("C3,C11,C13")
    assert [line["value"] for line in found if line["metric"] == "C3"] == [0, 0, 0]
    memory = [line for line in found if line["metric"] == "C13"]
    assert [line["goal"]["limit"] for line in memory] == [5.9, 16.5, 11.0, 41.5]
    with_frozen = [line["value"] for line in found if not line["metric"]]
    saves = [line for line in found if line["metric"] == "C11"]
    assert [line["goal"]["limit"] for line in saves] == [1.3, 1.35] and all_positive(saves) and all(line["plain"] > 0 for line in saves)
    assert all(0 < line["value"] < more for line, more in zip(memory, with_frozen, strict=True))


@pytest.mark.slow
def test_every_goal_of_a_gpu_has_figures_and_levels() -> None:
    done = run("--json", script="gpu.py")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["figures"]
    assert {figure["metric"] for figure in figures} - {""} == {f"G{number}" for number in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12)}
    assert all(figure["levels"] for figure in figures if figure["metric"])
    assert all(figure["value"] > 0 for figure in figures if figure["value"] is not None)
    ways = [figure["what"].rsplit(", ")[-1] for figure in figures if figure["metric"] == "G1"]
    assert ways == ["eager", "compiled"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.slow
def test_without_a_gpu_the_benchmark_says_what_it_needs() -> None:
    done = run(script="gpu.py", tiny=False)
    assert done.returncode == 2 and "needs one CUDA GPU" in done.stderr and not done.stdout
