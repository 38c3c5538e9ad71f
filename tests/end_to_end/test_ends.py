"""How a run ends: exit codes, signals, exceptions, and what is saved then. Real processes where signals and codes are concerned."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PLUGINS = """
import json, os, time
import torch
from sdxl_train import hookimpl

class Slow:
    '''Marks each micro-batch with a file and takes its time, so that a signal can be sent in the middle.'''
    def __init__(self): self.n = 0
    @hookimpl(wrapper=True)
    def compute_loss(self, batch):
        self.n += 1
        open(os.path.join(os.environ['MARKS'], str(self.n)), 'w').close()
        time.sleep(0.3)
        return (yield)

class RaiseAt4:
    @hookimpl
    def on_step_end(self, run):
        if run.step == 4:
            raise KeyError('lost in step 4')

class RaiseInUpdate:
    @hookimpl
    def build_optimizer(self, param_groups):
        class Broken(torch.optim.SGD):
            calls = 0
            def step(self, closure=None):
                Broken.calls += 1
                if Broken.calls == 3:
                    raise RuntimeError('update broke')
                return super().step(closure)
        return Broken(param_groups)

class StopAt2:
    @hookimpl
    def should_stop(self, run):
        return 'enough' if run.step == 2 else None

class NanAt:
    def __init__(self): self.steps = {int(s) for s in os.environ['NAN_AT'].split(',')}; self.n = 0
    @hookimpl(wrapper=True)
    def compute_loss(self):
        self.n += 1
        loss = yield
        return loss * float('nan') if self.n in self.steps else loss

class Metadata:
    @hookimpl
    def checkpoint_metadata(self, run): return {'mine': 'yes'}

class MoreMetadata:
    @hookimpl
    def checkpoint_metadata(self, run): return {'mine': 'too'}

class Recorder:
    def __init__(self): self.told = []
    @hookimpl
    def on_train_start(self, run): self.told.append('train_start')
    @hookimpl
    def on_epoch_start(self, run): self.told.append(f'epoch_start {run.epoch}')
    @hookimpl
    def on_step_end(self, run, metrics): self.told.append(f'step_end {run.step}')
    @hookimpl
    def on_log(self, run, metrics): self.told.append(f"log {metrics['step']}")
    @hookimpl
    def on_epoch_end(self, run, metrics): self.told.append(f'epoch_end {run.epoch} {sorted(metrics)}')
    @hookimpl
    def on_save(self, run, path, reason): self.told.append(f'save {path.name}')
    @hookimpl
    def on_sample(self, run, paths): self.told.append(f'sample {paths[0].parent.name}')
    @hookimpl
    def on_train_end(self, run, moment):
        self.told.append(f'train_end {moment}')
        json.dump(self.told, open(os.environ['TOLD'], 'w'))
"""


@pytest.fixture
def plugin(tmp_path: Path):
    (tmp_path / "watch.py").write_text(PLUGINS)
    return lambda name: f"{tmp_path}/watch.py:{name}"


def models(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out" / "models").iterdir())


def wait_for(path: Path, child: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


@pytest.fixture
def interrupted(process, config, plugin, tmp_path: Path):
    """Starts a slow run, sends a signal in micro-batch `mark`, and gives back the exit code and stderr."""

    def interrupting(signum: int, mark: int, **keys) -> tuple[int, str]:
        marks = tmp_path / "marks"
        marks.mkdir()
        child = process(config(plugins=[plugin("Slow")], **keys), MARKS=str(marks))
        wait_for(marks / str(mark), child)
        child.send_signal(signum)
        return child.wait(30), child.stderr.read()

    return interrupting


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_run_with_its_code_after_saving_the_last_completed_step(interrupted, tmp_path: Path, signum: int, code: int) -> None:
    ended, err = interrupted(signum, 5, gradient_accumulation_steps=2, batch_size=2, save_every_n_steps=1000)
    assert ended == code, err
    assert models(tmp_path) == ["model_ep1_step2.safetensors"]  # micro-batches 1 to 4; the third group is discarded
    assert "once more stops at once" in err and "Traceback" not in err


@pytest.mark.slow
def test_the_file_of_an_interrupted_run_is_that_of_the_step_it_names(interrupted, cli, config, tmp_path: Path) -> None:
    interrupted(signal.SIGINT, 3, batch_size=2, max_dataloader_n_workers=1)
    assert cli(config("other.toml", batch_size=2, max_train_steps=2, output_dir=str(tmp_path / "whole"))).code == 0
    name = "models/model_ep1_step2.safetensors"
    first, second = load_file(tmp_path / "out" / name), load_file(tmp_path / "whole" / name)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_no_file_is_written_when_saving_on_interrupt_is_off(interrupted, tmp_path: Path) -> None:
    ended, _ = interrupted(signal.SIGINT, 2, save_on_keyboard_interrupt=False)
    assert (ended, models(tmp_path)) == (130, [])


def test_a_second_signal_ends_at_once_without_a_partial_file(process, config, plugin, tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    child = process(config(plugins=[plugin("Slow")]), MARKS=str(tmp_path / "marks"))
    wait_for(tmp_path / "marks" / "2", child)
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGTERM)
    assert child.wait(3) in (130, 143)
    assert all(name.endswith(".safetensors") for name in os.listdir(tmp_path / "out" / "models"))


@pytest.mark.slow
def test_a_hangup_ignored_at_start_stays_ignored(process, config, plugin, tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    child = process(config(plugins=[plugin("Slow")], max_train_steps=3), ignore=signal.SIGHUP, MARKS=str(tmp_path / "marks"))  # as under nohup
    wait_for(tmp_path / "marks" / "1", child)
    child.send_signal(signal.SIGHUP)
    assert child.wait(30) == 0


def test_an_exception_saves_the_last_completed_step_and_exits_1_with_its_traceback(cli, config, plugin, tmp_path: Path) -> None:
    ended = cli(config(plugins=[plugin("RaiseAt4")]))
    assert ended.code == 1 and models(tmp_path) == ["model_ep2_step4.safetensors"]
    for said in ("Traceback", "lost in step 4", "RaiseAt4", "on_step_end", "step 4"):
        assert said in ended.err, said


def test_nothing_is_saved_on_an_exception_when_it_is_off(cli, config, plugin, tmp_path: Path) -> None:
    assert cli(config(plugins=[plugin("RaiseAt4")], save_on_exception=False)).code == 1
    assert models(tmp_path) == []


def test_nothing_is_saved_when_the_update_itself_broke_off(cli, config, plugin, tmp_path: Path) -> None:
    ended = cli(config(optimizer_type=plugin("RaiseInUpdate")))
    assert ended.code == 1 and models(tmp_path) == []
    assert "update broke" in ended.err and "nothing is saved" in ended.err


def test_a_plugin_may_end_the_run_as_if_it_were_over(cli, config, plugin, tmp_path: Path) -> None:
    ended = cli(config(plugins=[plugin("StopAt2")]))
    assert (ended.code, models(tmp_path)) == (0, ["model_ep1_step2.safetensors"])
    assert "enough" in ended.err


def test_a_step_with_a_loss_that_is_not_finite_changes_nothing(cli, config, plugin, tmp_path: Path, metrics, monkeypatch) -> None:
    monkeypatch.setenv("NAN_AT", "2")
    ended = cli(config(plugins=[plugin("NanAt")], save_every_n_steps=1))
    assert ended.code == 0 and "step 2: the loss is not finite" in ended.err and "1 steps were dropped" in ended.err
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and "loss/step" not in lines[1]
    folder = tmp_path / "out" / "models"
    first, second = load_file(folder / "model_ep1_step1.safetensors"), load_file(folder / "model_ep1_step2.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = load_file(folder / "model_ep1_step3.safetensors")
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_a_dropped_step_does_not_advance_the_schedule(cli, config, plugin, tmp_path: Path, metrics, monkeypatch) -> None:
    monkeypatch.setenv("NAN_AT", "2")
    cli(config(plugins=[plugin("NanAt")], lr_warmup_steps=10))
    assert [line["lr/unet"] for line in metrics(tmp_path / "out")] == pytest.approx([0, 1e-4, 1e-4, 2e-4, 3e-4, 4e-4])


def test_a_loss_that_stays_not_finite_ends_the_run(cli, config, plugin, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NAN_AT", "2,3,4,5,6")
    ended = cli(config(plugins=[plugin("NanAt")], max_nonfinite_steps=3))
    error = next(line for line in ended.err.splitlines() if "3 steps in a row" in line)
    assert ended.code == 1 and ("square" in error or "wide" in error)
    named = [line for line in ended.err.splitlines() if "the loss is not finite" in line]
    assert len(named) == 3 and all("square" in line or "wide" in line for line in named)
    assert models(tmp_path) == ["model_ep1_step3.safetensors"]  # the weights after step 1; steps 2 and 3 were done, and dropped


def test_metadata_of_plugins_is_in_the_file_and_a_clash_is_an_error(cli, config, plugin, tmp_path: Path) -> None:
    from safetensors import safe_open

    assert cli(config(plugins=[plugin("Metadata")], max_train_steps=1)).code == 0
    with safe_open(tmp_path / "out/models/model_ep1_step1.safetensors", "pt") as file:
        assert file.metadata()["mine"] == "yes"
    ended = cli(config(plugins=[plugin("Metadata"), plugin("MoreMetadata")], max_train_steps=1))
    assert ended.code == 1 and "mine" in ended.err


def test_the_events_of_a_run_come_in_this_order(cli, config, plugin, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TOLD", str(tmp_path / "told.json"))
    (tmp_path / "bench.json").write_text(json.dumps([{"prompt": "x", "width": 64, "height": 64, "steps": 1}]))
    ended = cli(
        config(
            plugins=[plugin("Recorder")], save_every_n_steps=2, sample_benchmark=str(tmp_path / "bench.json"), sample_every_n_epochs=1,
            num_train_epochs=1,
        )
    )
    assert ended.code == 0, ended.err
    told = json.loads((tmp_path / "told.json").read_text())
    saves = [event for event in told if event.startswith("save ")]  # told when another thread is done with them
    assert saves == ["save model_ep1_step2.safetensors", "save model_ep1_step3.safetensors"]
    assert told.index(saves[0]) > told.index("step_end 2") and told.index(saves[1]) == len(told) - 2
    assert [event for event in told if event not in saves] == [
        "train_start", "sample step_0", "epoch_start 1", "log 1", "step_end 1", "log 2", "step_end 2",
        "log 3", "step_end 3", "epoch_end 1 ['loss/epoch']", "sample epoch_1", "train_end train_end",
    ]  # fmt: skip


def test_a_failed_periodic_save_is_told_and_tried_again(cli, config, tmp_path: Path, monkeypatch) -> None:
    import sdxl_train.model.saving as saving

    real, calls = saving.write_safetensors, []

    def full_disk_once(file, tensors, metadata):
        calls.append(1)
        if len(calls) == 1:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        return real(file, tensors, metadata)

    monkeypatch.setattr(saving, "write_safetensors", full_disk_once)
    ended = cli(config(save_every_n_steps=2))
    assert ended.code == 0, ended.err
    assert "No space left" in ended.err and "bytes needed" in ended.err
    assert models(tmp_path) == ["model_ep2_step4.safetensors", "model_ep2_step6.safetensors"]
    assert sorted(os.listdir(tmp_path / "out" / "models")) == models(tmp_path)


def test_a_failed_last_save_exits_1(cli, config, monkeypatch) -> None:
    import sdxl_train.model.saving as saving

    def full_disk(file, tensors, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_safetensors", full_disk)
    assert cli(config(max_train_steps=1)).code == 1


def test_a_render_that_fails_ends_nothing(cli, config, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps([{"prompt": "x", "width": 64, "height": 64, "steps": 1}]))
    (tmp_path / "broken.py").write_text(
        "calls = []\ndef broken(noise_scheduler):\n    calls.append(1)\n    if len(calls) > 1:\n        raise RuntimeError('no picture today')\n"
        "    from diffusers import EulerDiscreteScheduler\n    return EulerDiscreteScheduler()\n"
    )
    keys = {"sample_benchmark": str(tmp_path / "bench.json"), "sample_every_n_steps": 2, "sample_sampler": f"{tmp_path}/broken.py:broken"}
    ended = cli(config(**keys))
    assert ended.code == 0 and "no picture today" in ended.err
    assert models(tmp_path) == ["model_ep2_step6.safetensors"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"pretrained_model_name_or_path": "gone.safetensors"}, "gone.safetensors"),
        ({"learning_rate": "1e-4"}, "learning_rate"),
        ({"clip_skip": 12}, "clip_skip"),
    ],
)
def test_what_is_wrong_before_step_1_exits_2_without_traceback(cli, config, keys: dict, said: str) -> None:
    ended = cli(config(**keys))
    assert ended.code == 2 and said in ended.err and "Traceback" not in ended.err


def test_bad_pictures_are_all_named_before_step_1_or_left_out(cli, config, pictures: Path, tmp_path: Path) -> None:
    whole = (pictures / "square0.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "page.jpg").write_bytes(b"<html>not a picture</html>")
    (pictures / "empty.webp").touch()
    ended = cli(config())
    assert ended.code == 2 and all(name in ended.err for name in ("cut.png", "page.jpg", "empty.webp"))
    ended = cli(config(bad_images="skip"))
    assert ended.code == 0 and "3 bad and left out" in ended.err


def test_a_plugin_that_raises_while_the_data_is_indexed_exits_1(cli, config, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(img_key, img_md, **kwargs):\n    raise ValueError('no count')\n")
    ended = cli(config(num_repeats_getter=f"{tmp_path}/bad.py:f"))
    assert ended.code == 1 and "no count" in ended.err and "Traceback" in ended.err


def test_a_plugin_that_cannot_be_loaded_exits_2_together_with_other_problems(cli, config, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("from sdxl_train import hookimpl\nclass P:\n    @hookimpl\n    def on_step_ends(self, run): pass\n")
    ended = cli(config(plugins=[f"{tmp_path}/bad.py:P"], batch_size=0))
    assert ended.code == 2 and "on_step_end" in ended.err and "batch_size" in ended.err and "Traceback" not in ended.err


def test_a_run_opens_no_network_connection(process, config, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\nreal = socket.socket.connect\ndef connect(self, address):\n"
        "    if self.family != socket.AF_UNIX:\n        raise RuntimeError(f'connection to {address}')\n    return real(self, address)\n"
        "socket.socket.connect = connect\n"
    )
    child = process(config(max_train_steps=1), PYTHONPATH=str(tmp_path), HF_HUB_OFFLINE="0")
    assert child.wait(60) == 0, child.stderr.read()
