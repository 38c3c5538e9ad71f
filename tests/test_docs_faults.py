"""docs/faults.md names tests that exist, and each fault once."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "faults.md").read_text("utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if re.match(r"\| [A-Z]{2}\d+ \|", line)]
NAMED = sorted({name for row in ROWS for name in re.findall(r"`([^`]+)`", row[2])})


def test_every_row_has_an_id_of_its_own_a_sentence_and_tests() -> None:
    assert all(len(row) == 3 and row[1].endswith(".") and row[2].startswith("`") for row in ROWS)
    ids = [row[0].strip() for row in ROWS]
    assert len(ids) == len(set(ids)) > 50


@pytest.mark.parametrize("file", sorted({name.partition("::")[0] for name in NAMED}))
def test_the_tests_that_the_page_names_exist(file: str) -> None:
    tree = ast.parse((TESTS / file).read_text("utf-8"))
    there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = {name.partition("::")[2] for name in NAMED if name.startswith(f"{file}::")}
    assert named <= there, named - there
