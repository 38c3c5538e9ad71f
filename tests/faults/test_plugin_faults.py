"""Plugins that are broken, hang, or answer wrongly in a training: who it was, in which hook, and what is kept."""

import re
import signal
import sys
import time
from pathlib import Path

import pytest
from command_runs import Ended, run_command, write_config
from forked_runs import ForkedRun
from train_states import by_step, differing, final

import sdxl_train.hook_watch as hook_watch
from sdxl_train.state_directory import state_faults

CODE = """
import time
import torch
from sdxl_train import hookimpl

class Hangs:
    @hookimpl
    def on_step_end(self, run):
        if run.step == 2: self.wait_for_ever()
    def wait_for_ever(self):
        while True: time.sleep(0.05)

class HangsAround:
    @hookimpl(wrapper=True)
    def compute_loss(self):
        answer = yield
        while True: time.sleep(0.05)
        return answer

def forgets(batch_size):
    while True: time.sleep(0.05)

class RaisesAt7:
    @hookimpl(wrapper=True)
    def shape_noise(self):
        self.n = getattr(self, "n", 0) + 1
        if self.n == 7: raise ValueError("seven is right out")
        return (yield)

class Tracker:
    @hookimpl
    def on_log(self, metrics): raise OSError("the server is gone")
    @hookimpl
    def on_epoch_end(self, metrics): raise OSError("still gone")

def as_float(model_pred, target): return 0.5
def of_one(model_pred, target): return ((model_pred - target) ** 2).mean()
def of_float64(model_pred, target): return ((model_pred - target).double() ** 2).mean((1, 2, 3))
def detached(model_pred, target): return ((model_pred - target) ** 2).mean((1, 2, 3)).detach()
def nothing(model_pred, target): return None
"""


@pytest.fixture
def named(tmp_path: Path):
    (tmp_path / "mine.py").write_text(CODE)
    return lambda name: f"{tmp_path}/mine.py:{name}"


@pytest.fixture
def training(tiny_base: Path, pictures: Path, tmp_path: Path):
    """Writes a configuration for a training into a folder."""
    return lambda name="run", **keys: write_config(tmp_path / name, tiny_base, [pictures], **keys)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a distribution of one module by hand, version 1.2, as an entry point "it" of `sdxl_train.plugins`."""

    def installing(distribution: str, code: str, group: str = "sdxl_train.plugins") -> None:
        site, info = tmp_path / distribution, tmp_path / distribution / f"{distribution}-1.2.dist-info"
        info.mkdir(parents=True)
        (site / f"{distribution}_code.py").write_text("from sdxl_train import hookimpl\n" + code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{distribution} = {distribution}_code:It\n")
        monkeypatch.syspath_prepend(str(site))

    return installing


# ---- Loading ----


def test_what_is_installed_and_not_named_is_not_imported_by_a_training(training, install, tmp_path: Path) -> None:
    install("uninvited", f"open({str(tmp_path / 'marker')!r}, 'w')\nclass It:\n    pass\n")
    assert run_command("train", training(max_train_steps=1)).code == 0
    assert not (tmp_path / "marker").exists() and "uninvited_code" not in sys.modules


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import a_module_that_is_not_there\n", "a_module_that_is_not_there"),
        ("class It:\n    @hookimpl\n    def on_step_ended(self, run): pass\n", "did you mean on_step_end?"),
        ("class It:\n    @hookimpl\n    def on_step_end(self, run, extra): pass\n", "on_step_end has no argument extra"),
    ],
    ids=["import error", "misspelt hook", "extra argument"],
)
def test_a_broken_package_exits_2_naming_distribution_version_and_hook(training, install, code: str, said: str) -> None:
    install("acme", code)
    ended = run_command("train", training(plugins=["acme"]))
    sys.modules.pop("acme_code", None)
    assert ended.code == 2 and said in ended.err and "acme 1.2" in ended.err and "Traceback" not in ended.err, ended.err


def test_two_plugins_for_one_answer_exit_2_naming_both(training, install) -> None:
    for name in ("first", "second"):
        install(name, f"class It:\n    @hookimpl\n    def compute_loss(self, target):\n        return target  # {name}\n")
    ended = run_command("train", training(plugins=["first"], loss_type="mse"))
    assert ended.code == 2 and "first" in ended.err and "loss_type" in ended.err
    install("third", "class It:\n    @hookimpl\n    def compute_loss(self, target):\n        return target\n", "sdxl_train.loss_type")
    install("third_too", "class It:\n    @hookimpl\n    def compute_loss(self, target):\n        return target\n", "sdxl_train.loss_type")
    info = Path(sys.path[0]) / "third_too-1.2.dist-info" / "entry_points.txt"
    info.write_text("[sdxl_train.loss_type]\nthird = third_too_code:It\n")
    ended = run_command("train", training(loss_type="third"))
    assert ended.code == 2 and "third 1.2" in ended.err and "third_too 1.2" in ended.err and "Traceback" not in ended.err, ended.err


# ---- Answers and exceptions ----


def failed(ended: Ended, out: Path, step: int) -> str:
    """The last line of a training that failed after this step, which it has saved."""
    assert ended.code == 1, ended.err[-3000:]
    newest = by_step(out / "train_state")[-1]
    assert newest.name.endswith(f"step{step}") and state_faults(newest) == []
    return ended.err.splitlines()[-1]


def test_an_exception_in_step_7_saves_step_6_and_names_plugin_and_hook(training, named, tmp_path: Path) -> None:
    line = failed(run_command("train", training(plugins=[named("RaisesAt7")], num_train_epochs=3)), tmp_path / "run/out", 6)
    assert all(said in line for said in ("after step 6", "RaisesAt7", "shape_noise", "seven is right out")), line


@pytest.mark.parametrize(
    ("name", "got"),
    [("as_float", "float 0.5"), ("of_one", "Tensor [] torch.float32"), ("of_float64", "Tensor [2] torch.float64"), ("detached", "detached"), ("nothing", "None")],
)
def test_a_loss_of_another_kind_exits_1_with_what_was_expected_and_given(training, named, tmp_path: Path, name: str, got: str) -> None:
    ended = run_command("train", training(loss_type=named(name), batch_size=2))
    line = ended.err.splitlines()[-1]
    assert ended.code == 1, ended.err[-3000:]
    assert re.search(rf":{name}\".* answered compute_loss .* expected one loss per sample, \[2\] torch.float32, .*, got .*{re.escape(got)}", line), line


def test_a_tracker_that_raises_warns_once_and_changes_nothing(training, named, tmp_path: Path) -> None:
    keys = {"num_train_epochs": 2, "save_on_train_end": True}
    assert run_command("train", training("quiet", **keys)).code == 0
    ended = run_command("train", training("told", trackers=["jsonl", named("Tracker")], **keys))
    assert ended.code == 0, ended.err
    assert [line for line in ended.err.splitlines() if "gone" in line] == [line for line in ended.err.splitlines() if line.startswith("warning") and "Tracker" in line]
    assert ended.err.count("the server is gone") == 1
    assert differing(final(tmp_path / "told/out"), final(tmp_path / "quiet/out")) == []


# ---- A hook that hangs ----


def limit_of_a_second() -> None:
    hook_watch.LIMIT_S = 1.0


@pytest.mark.parametrize(
    ("key", "plugin", "hook", "place", "step"),
    [
        ("plugins", "Hangs", "on_step_end", "in wait_for_ever", 2),
        ("plugins", "HangsAround", "compute_loss", "in compute_loss", 0),
        ("timestep_sampler_type", "forgets", "sample_timesteps", "in forgets", 0),
    ],
    ids=["event", "wrapper", "function"],
)
def test_a_hook_that_hangs_is_named_with_its_stack_and_a_second_sigterm_ends_the_run(
    training, named, tmp_path: Path, key: str, plugin: str, hook: str, place: str, step: int
) -> None:
    keys = {key: [named(plugin)] if key == "plugins" else named(plugin)}
    with ForkedRun(tmp_path / "log", training(**keys), prepare=limit_of_a_second) as run:
        run.await_that(lambda: "It is here:" in run.err)
        run.send(signal.SIGTERM)
        run.await_that(lambda: "once more stops at once" in run.err)
        run.send(signal.SIGTERM)
        began = time.monotonic()
        assert run.code() == 143, run.err
    assert time.monotonic() - began < 10
    told = run.err[run.err.index("warning: ") :]
    assert re.search(rf"{plugin}.* has not returned from {hook} for \d+ s, after step {step};", told) and place in told, told
    assert "typer" not in told, "the stack begins at the hook"
