"""constraints.txt pins what was tested, in the ranges that pyproject.toml gives, and nothing that brings CUDA."""

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import tomli
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LINES = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and not line.startswith("#")]
PINS = {canonicalize_name(name): version for name, version in (line.split("==") for line in LINES)}
DEPENDENCIES = [Requirement(text) for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"])]


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=lambda dependency: dependency.name)
def test_the_pin_of_a_dependency_is_in_its_range(dependency: Requirement) -> None:
    assert PINS[canonicalize_name(dependency.name)] in dependency.specifier


def test_every_pin_is_exact_and_without_a_local_build() -> None:
    assert [line for line in LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9.]*(?:\.?(?:post|rc|a|b)\d+)?", line)] == []


def test_no_pin_brings_cuda() -> None:
    assert [name for name in PINS if name.startswith(("nvidia", "cuda", "triton")) or name == "torchvision"] == []


def test_what_the_installed_dependencies_need_is_pinned_too() -> None:
    """Their own dependencies on this machine, without extras, each with a pin; setuptools comes with the environment."""
    needed: set[str] = set()
    queue = [dependency.name for dependency in DEPENDENCIES]
    while queue:
        name = canonicalize_name(queue.pop())
        if name in needed:
            continue
        needed.add(name)
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        parsed = [Requirement(text) for text in requires]
        queue += [one.name for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    brought_by_cuda_builds = {name for name in needed if name.startswith(("nvidia", "cuda", "triton"))}
    assert sorted(needed - set(PINS) - brought_by_cuda_builds - {"setuptools"}) == []


def test_the_licence_and_the_readme_are_there() -> None:
    assert PROJECT["license"] == "MIT" and (ROOT / PROJECT["readme"]).is_file()
    assert all((ROOT / name).is_file() for name in PROJECT["license-files"])
