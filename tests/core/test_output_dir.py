import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from sdxl_train.atomic import atomic_file
from sdxl_train.errors import ConfigError
from sdxl_train.output_dir import locked_output_dir, matching_output_dirs, prepare_output_dir, resolve_output_dir

NOW = datetime(2024, 4, 12, 20, 50, 11)
ORACLE = json.loads((Path(__file__).parents[1] / "oracles.json").read_text("utf-8"))["output_dir"]


def start_python(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


HOLD_LOCK = """
import sys
from datetime import datetime
from pathlib import Path
from sdxl_train.output_dir import locked_output_dir
with locked_output_dir(Path(sys.argv[1]), datetime(2024, 4, 12, 20, 50, 11)):
    print("held", flush=True)
    sys.stdin.read()
"""

CLAIM_INDICES = """
import sys
from datetime import datetime
from sdxl_train.output_dir import resolve_output_dir
print("ready", flush=True)
sys.stdin.readline()
for _ in range(200):
    print(resolve_output_dir(sys.argv[1], datetime.now()), flush=True)
"""


@pytest.mark.parametrize(("given", "expected"), list(zip(ORACLE["inputs"], ORACLE["expected"], strict=True)))
def test_placeholders_resolve_as_the_oracle_says(tmp_path, monkeypatch, given, expected):
    monkeypatch.chdir(tmp_path)
    for name in given["existing"]:
        Path(name).mkdir()
    assert resolve_output_dir(given["output_dir"], NOW) == Path(expected["resolved"])


@pytest.mark.parametrize(
    ("pattern", "existing", "resolved"),
    [
        ("%time%/%datetime%", [], "20-50-11/2024-04-12-20-50-11"),
        ("%date%-%date%", [], "2024-04-12-2024-04-12"),
        ("a-%index%-%index%", ["a-0-0"], "a-1-1"),
        ("a-%index%/out", ["a-0"], "a-1/out"),
        ("a-%index%/b-%index%", ["a-0/b-0"], "a-1/b-1"),
        ("%date%/%index%", [], "2024-04-12/0"),
        ("a-%index%", ["a-0", "a-2"], "a-1"),
        ("%index", [], "%index"),
        ("%user%-%Index%-%", [], "%user%-%Index%-%"),
        ("{now.__class__}-{n:>99999999}-%s-%d", [], "{now.__class__}-{n:>99999999}-%s-%d"),
    ],
)  # fmt: skip
def test_placeholders_in_any_component_any_number_of_times_and_the_rest_is_literal(tmp_path, monkeypatch, pattern, existing, resolved):
    monkeypatch.chdir(tmp_path)
    for name in existing:
        Path(name).mkdir(parents=True)
    assert resolve_output_dir(pattern, NOW) == Path(resolved)


def test_a_file_of_that_name_is_no_free_index(tmp_path):
    (tmp_path / "run-0").write_text("")
    (tmp_path / "run-1").symlink_to("nowhere")
    assert resolve_output_dir(f"{tmp_path}/run-%index%", NOW).name == "run-2"


def test_an_index_is_claimed_by_making_its_directory_and_only_then(tmp_path):
    pattern = f"{tmp_path}/run-%index%"
    assert resolve_output_dir(pattern, NOW, claim=False).name == "run-0"
    assert list(tmp_path.iterdir()) == []
    assert [resolve_output_dir(pattern, NOW).name for _ in range(3)] == ["run-0", "run-1", "run-2"]


def test_two_processes_that_race_for_indices_share_none(tmp_path):
    racers = [start_python(CLAIM_INDICES, tmp_path / "run-%index%") for _ in range(2)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    claimed = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert sorted(int(path.rpartition("-")[2]) for path in claimed[0] + claimed[1]) == list(range(400))


@pytest.mark.parametrize("name", ["run-%index%\0", "a" * 300 + "%index%", "file/%index%"])
def test_a_directory_that_cannot_be_made_is_an_error_naming_the_key(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir"):
        resolve_output_dir(f"{tmp_path}/{name}", NOW)


def test_matching_directories_are_those_the_pattern_could_have_become(tmp_path):
    for name in ("a-0/x", "a-10/x", "a-01/x", "a-b/x", "a-1/y", "2024-04-12+3", "2024-4-12+3"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a-7").write_text("no directory")

    def found(pattern: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in matching_output_dirs(f"{tmp_path}/{pattern}")]

    assert found("a-%index%/x") == ["a-0/x", "a-10/x"]
    assert found("a-%index%") == ["a-0", "a-1", "a-10"]
    assert found("%date%+%index%") == ["2024-04-12+3"]
    assert found("a-1") == ["a-1"] and found("a-2") == []


def test_a_start_makes_the_tree_and_a_new_log_folder_each_time(tmp_path):
    logs = [prepare_output_dir(tmp_path, fresh=False, now=NOW, warn=pytest.fail) for _ in range(2)]
    assert [log.relative_to(tmp_path).as_posix() for log in logs] == ["logs/20240412205011", "logs/20240412205012"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "models", "samples"]


def test_a_fresh_run_sets_models_and_states_of_an_earlier_one_aside(tmp_path):
    for name in ("models/a.safetensors", "train_state/s/state.json", "samples/old.png", "samples/sheets/index.html"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("earlier")
    said: list[str] = []
    prepare_output_dir(tmp_path, fresh=True, now=NOW, warn=said.append)
    assert (tmp_path / "models.old-20240412205011/a.safetensors").read_text() == "earlier"
    assert (tmp_path / "train_state.old-20240412205011/s/state.json").read_text() == "earlier"
    assert list((tmp_path / "models").iterdir()) == [] and (tmp_path / "samples/old.png").exists()
    assert (tmp_path / "samples/sheets.old-20240412205011/index.html").exists() and not (tmp_path / "samples/sheets").exists()
    assert len(said) == 3 and "models.old-20240412205011" in said[0]


def test_setting_aside_twice_in_one_second_keeps_both(tmp_path):
    for content in ("first", "second"):
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models/a").write_text(content)
        prepare_output_dir(tmp_path, fresh=True, now=NOW, warn=lambda _: None)
    assert [(tmp_path / f"models.old-2024041220501{second}/a").read_text() for second in (1, 2)] == ["first", "second"]


def test_a_resuming_run_and_empty_folders_move_nothing(tmp_path):
    (tmp_path / "train_state").mkdir()
    prepare_output_dir(tmp_path, fresh=True, now=NOW, warn=pytest.fail)
    (tmp_path / "models/a").write_text("mine")
    prepare_output_dir(tmp_path, fresh=False, now=NOW, warn=pytest.fail)
    assert (tmp_path / "models/a").read_text() == "mine"


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "samples/step_1").mkdir(parents=True)
    killed = atomic_file(tmp_path / "samples/step_1/picture.png")
    leftover = killed.__enter__()  # never ended, as after SIGKILL
    assert leftover.exists()
    (tmp_path / "samples/step_1/kept.png").write_text("")
    prepare_output_dir(tmp_path, fresh=True, now=NOW, warn=pytest.fail)
    assert [path.name for path in (tmp_path / "samples/step_1").iterdir()] == ["kept.png"]
    with pytest.raises(FileNotFoundError):
        killed.__exit__(None, None, None)


def test_an_output_dir_may_be_a_symlink_but_not_a_file(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    prepare_output_dir(tmp_path / "link", fresh=True, now=NOW, warn=pytest.fail)
    assert (tmp_path / "real/models").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir"):
        prepare_output_dir(tmp_path / "file", fresh=True, now=NOW, warn=pytest.fail)
    with pytest.raises(ConfigError, match="output_dir"), locked_output_dir(tmp_path / "file", NOW):
        pass


def test_a_second_run_in_the_same_directory_is_refused_naming_the_first(tmp_path):
    first = start_python(HOLD_LOCK, tmp_path / "run")
    try:
        assert first.stdout.readline() == "held\n"
        naming = rf"process {first.pid} on .+, started 2024-04-12 20:50:11"
        with pytest.raises(ConfigError, match=naming), locked_output_dir(tmp_path / "run", NOW):
            pass
        assert json.loads((tmp_path / "run/.lock").read_text())["pid"] == first.pid
    finally:
        first.communicate("", timeout=60)
    with locked_output_dir(tmp_path / "run", NOW):  # freed by the end of the first
        pass


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path):
    killed = start_python(HOLD_LOCK, tmp_path)
    assert killed.stdout.readline() == "held\n"
    killed.kill()
    killed.communicate(timeout=60)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == killed.pid  # it left its name behind
    with locked_output_dir(tmp_path, NOW):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_that_outlives_the_run_does_not_hold_the_lock(tmp_path):
    fork = "import os, time\n    worker = os.fork()\n    if worker == 0: time.sleep(60)\n    print(worker"
    holder = start_python(HOLD_LOCK.replace('print("held"', fork), tmp_path)
    worker = int(holder.stdout.readline())
    try:
        holder.kill()
        holder.wait(timeout=60)
        os.kill(worker, 0)  # still there
        with locked_output_dir(tmp_path, NOW):
            pass
    finally:
        os.kill(worker, 9)


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with locked_output_dir(tmp_path / "run", NOW):
            prepare_output_dir(tmp_path / "run", fresh=True, now=NOW, warn=pytest.fail)
    finally:
        os.umask(before)
    assert (tmp_path / "run/.lock").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "run/models").stat().st_mode & 0o777 == 0o777 & ~umask
