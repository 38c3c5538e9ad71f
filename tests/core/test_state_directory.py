"""A state on the disk is whole and verified, or it is no state."""

import json
from pathlib import Path

import pytest

from sdxl_train.state_directory import MANIFEST, discard, staged_state, state_faults, states_in, step_of


def write(directory: Path, content: bytes = b"weights") -> None:
    with staged_state(directory) as staging:
        with staging.file("a.bin") as file:
            file.write(content)
        staging.write_json("state.json", {"step": 1})


def test_a_written_state_verifies_and_leaves_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "train_state" / "m_ep1_step2")
    assert state_faults(tmp_path / "train_state" / "m_ep1_step2") == []
    assert [path.name for path in (tmp_path / "train_state").iterdir()] == ["m_ep1_step2"]


def test_a_state_whose_writing_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), staged_state(tmp_path / "m_ep1_step2") as staging, staging.file("a.bin"):
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda state: (state / "a.bin").write_bytes(b"weighty"), "SHA-256"),
        (lambda state: (state / "a.bin").write_bytes(b"weight"), "6 bytes in place of 7"),
        (lambda state: (state / "a.bin").unlink(), "missing"),
        (lambda state: (state / MANIFEST).unlink(), "missing"),
        (lambda state: (state / MANIFEST).write_text("[" * 100_000), "cannot be read"),
        (lambda state: (state / MANIFEST).write_text(json.dumps({"../x": {"bytes": 1, "sha256": ""}})), "no file of the state"),
    ],
)
def test_each_damage_is_named_with_its_file(tmp_path: Path, damage, said) -> None:
    state = tmp_path / "m_ep1_step2"
    write(state)
    damage(state)
    (fault,) = state_faults(state)
    assert said in fault and str(state) in fault


def test_states_are_ordered_by_step_as_numbers_and_other_folders_are_none(tmp_path: Path) -> None:
    for name in ("m_ep1_step9", "m_ep2_step10", "my_ep1_step_ep3_step100", "other", "m_ep1_step9.old-20260101000000", ".sdxl-train-0.tmp"):
        (tmp_path / "train_state" / name).mkdir(parents=True)
    assert [(step, path.name) for step, path in states_in(tmp_path)] == [(100, "my_ep1_step_ep3_step100"), (10, "m_ep2_step10"), (9, "m_ep1_step9")]
    assert step_of("my_ep1_step_ep3_step100") == ("my_ep1_step", 100)


def test_replacing_and_discarding_leave_no_half_state_under_its_name(tmp_path: Path) -> None:
    state = tmp_path / "m_ep1_step2"
    write(state)
    write(state, b"newer")
    assert (state / "a.bin").read_bytes() == b"newer" and state_faults(state) == []
    discard(state)
    assert not state.exists()
