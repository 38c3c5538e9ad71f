"""What may have changed between a training and its continuation: places, configuration, versions, data; and what is said of it."""

import json
import math
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_files import noise
from command_runs import Ended, run_command, watched_run, write_config
from forked_runs import ForkedRun
from safetensors.torch import load_file
from train_states import by_step, change_state, differing, final

from sdxl_train.keys import Config
from sdxl_train.plugins import Choice, Plugins
from sdxl_train.update import Update, set_position


@pytest.fixture
def run(cli, config, tmp_path: Path):
    """Trains into `out` and asserts the exit code."""

    def running(out: str, code: int = 0, tables: str = "", **keys: Any):
        ended = cli(config(f"{out}.toml", tables, output_dir=str(tmp_path / out), **keys))
        assert ended.code == code, ended.err[-3000:]
        return ended

    return running


LINE = {"lr_scheduler": "linear", "optimizer_type": "AdamW", "num_train_epochs": 3}


@pytest.fixture(scope="module")
def line(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of the data, folder with the states of steps 1 to 5 of 9 of a training with `LINE`). Not to be changed."""
    folder = tmp_path_factory.mktemp("line")
    (folder / "pictures").mkdir()
    for i in range(10):
        noise(i, (64, 64) if i < 6 else (128, 48)).save(folder / "pictures" / f"{'square' if i < 6 else 'wide'}{i % 6}.png")
        (folder / "pictures" / f"{'square' if i < 6 else 'wide'}{i % 6}.txt").write_text(f"picture {i}")
    keys = {"save_every_n_steps": 1, "keep_train_states": 0, "save_model": False, "max_train_steps": 5}
    ended = run_command("train", write_config(folder, tiny_base, [folder / "pictures"], **LINE, **keys))
    assert ended.code == 0, ended.err[-3000:]
    return folder / "pictures", folder / "out" / "train_state"


@pytest.fixture
def go_on(line: tuple[Path, Path], tiny_base: Path, tmp_path: Path):
    """Goes on from a copy of the state of this step, changed by `change`, in a folder of its own, and asserts the exit code."""

    def going_on(step: int = 4, code: int = 0, change: Callable[[dict[str, Any]], object] | None = None, **keys: Any) -> Ended:
        state = by_step(line[1])[step - 1]
        copy = tmp_path / "copies" / state.name
        shutil.copytree(state, copy)
        if change is not None:
            change_state(copy, change)
        image_dirs = keys.pop("image_dirs", [line[0]])
        file = write_config(tmp_path / "next", tiny_base, image_dirs, **{**LINE, "resume_from": str(copy), **keys})
        ended = run_command("train", file)
        assert ended.code == code, ended.err[-3000:]
        assert "Traceback" not in ended.err
        return ended

    return going_on


# ---- The same folder, an earlier step ----


@pytest.mark.slow
def test_going_back_sets_later_states_aside_and_the_new_line_is_kept_pruned_and_found(run, tmp_path: Path) -> None:
    keys = {"num_train_epochs": 6, "max_train_steps": 8, "save_every_n_steps": 2, "lr_scheduler": "constant", "optimizer_type": "AdamW"}
    run("out", keep_train_states=0, keep_models=0, **keys)
    states = tmp_path / "out" / "train_state"
    old = {path.name: (path / "weights.safetensors").read_bytes() for path in by_step(states)}
    assert [name.rpartition("step")[2] for name in old] == ["2", "4", "6", "8"]
    again = {**keys, "learning_rate": 5e-4, "max_train_steps": 6}
    ended = run("out", resume_from=str(by_step(states)[1]), keep_train_states=1, keep_models=1, **again)
    lines = ended.err.splitlines()
    aside = [i for i, line in enumerate(lines) if "is of a later step" in line]
    assert len(aside) == 4 and max(aside) < min(i for i, line in enumerate(lines) if line.startswith("saved ")), "two states and two models"
    kept = {path.name.partition(".old-")[0]: path for path in states.iterdir() if ".old-" in path.name}
    assert {name: (path / "weights.safetensors").read_bytes() for name, path in kept.items()} == {name: old[name] for name in list(old)[2:]}
    (newest,) = by_step(states)
    assert newest.name == list(old)[2] and (newest / "weights.safetensors").read_bytes() != old[newest.name]
    ended = run("out", resume_from="latest", keep_train_states=1, keep_models=1, **{**again, "max_train_steps": 8})
    assert f"resuming: {newest}, after step 6" in ended.err
    assert [path.name for path in by_step(states)] == [list(old)[3]] and len(kept) == 2
    assert len([path for path in states.iterdir() if ".old-" in path.name]) == 2, "pruning takes none that was set aside"


# ---- Every draw and every step ----

EVERYTHING = {  # that draws
    "flip_aug": True, "caption_processor": ["shuffle_tags", "drop_tags"], "description_processor": ["drop_caption"], "noise_offset": 0.05,
    "multires_noise_iterations": 3, "ip_noise_gamma": 0.05, "timestep_sampler_type": "logit_normal", "cache_latents": False,
    "train_text_encoder": True, "gradient_accumulation_steps": 1, "lr_scheduler": "cosine", "lr_warmup_steps": 3, "optimizer_type": "AdamW",
}  # fmt: skip
TABLES = "[caption_processor_kwargs.drop_tags]\nprobability = 0.3\n[description_processor_kwargs.drop_caption]\nprobability = 0.3\n"


def check_continuations(folder: Path, base: Path, from_steps: list[int], **keys: Any) -> None:
    """Train 24 pictures of three buckets for 3 epochs of 8 steps, then go on from the states of these steps: equal byte by byte."""
    (folder / "data").mkdir(parents=True)
    rows = {}
    for i in range(24):
        noise(i, (64, 64) if i < 10 else (128, 48) if i < 19 else (48, 128)).save(folder / "data" / f"{i}.png")
        rows[str(i)] = {"caption": ", ".join(f"tag {i + j}" for j in range(6)), "description": f"this is picture {i}"}
    (folder / "rows.json").write_text(json.dumps(rows))
    keys = {"metadata_files": [str(folder / "rows.json")], "num_train_epochs": 3, "save_every_n_steps": 1, "keep_train_states": 0, "save_on_train_end": True, **keys}
    ended, seen = watched_run(folder / "whole", base, [folder / "data"], TABLES, **keys)
    assert ended.code == 0, ended.err[-3000:]
    assert {sample["caption"][:4] for sample in seen} == {"tag ", "this", ""} and {sample["flipped"] for sample in seen} == {True, False}
    whole, states = final(folder / "whole/out"), by_step(folder / "whole/out/train_state")
    assert len(states) == 24
    for step in from_steps:
        out = folder / f"from{step}"
        ended, rest = watched_run(out, base, [folder / "data"], TABLES, resume_from=str(states[step - 1]), **{**keys, "save_every_n_steps": 8})
        assert ended.code == 0, ended.err[-3000:]
        assert differing(final(out / "out"), whole) == [], f"from step {step}"
        assert rest == seen[len(seen) - len(rest) :] and rest


@pytest.mark.slow
def test_a_training_with_every_draw_on_that_is_stopped_at_any_of_24_steps_goes_on_equally(tiny_base: Path, tmp_path: Path) -> None:
    check_continuations(tmp_path, tiny_base, list(range(1, 24)), **EVERYTHING)


# ---- Another configuration ----


@pytest.mark.parametrize(
    ("change", "said", "rate"),
    [
        ({"learning_rate": 5e-4}, "learning_rate was 0.001 and is now 0.0005", lambda s: 5e-4 * (1 - s / 9)),
        ({"lr_scheduler": "cosine"}, "lr_scheduler was 'linear' and is now 'cosine'", lambda s: 1e-3 * (1 + math.cos(math.pi * s / 9)) / 2),
        ({"num_train_epochs": 5}, "num_train_epochs was 3 and is now 5", lambda s: 1e-3 * (1 - s / 15)),
        ({"lr_warmup_steps": 6}, "lr_warmup_steps was 0 and is now 6", lambda s: 1e-3 * (s / 6 if s < 6 else (9 - s) / 3)),
    ],
    ids=["rate", "schedule", "epochs", "warm-up"],
)
def test_a_changed_schedule_is_logged_and_followed_from_its_own_curve(go_on, metrics, tmp_path: Path, change, said: str, rate) -> None:
    ended = go_on(4, **change)
    assert f"resuming: {said}" in ended.err
    num_steps = 3 * change.get("num_train_epochs", 3)
    followed = {line["step"]: line["lr/unet"] for line in metrics(tmp_path / "next/out")}
    assert followed == {step: pytest.approx(rate(step - 1), rel=1e-12) for step in range(5, num_steps + 1)}


def test_the_new_curve_counts_updates_and_not_dropped_steps(go_on, metrics, tmp_path: Path) -> None:
    go_on(4, change=lambda content: content["update"]["items"].__setitem__(0, ["num_applied", 3]), learning_rate=5e-4)
    rates = [line["lr/unet"] for line in metrics(tmp_path / "next/out")]
    assert rates == pytest.approx([5e-4 * (1 - s / 9) for s in range(3, 8)], rel=1e-12)


def test_another_training_is_refused_with_every_difference_in_one_message(go_on, line, tmp_path: Path) -> None:
    shutil.copytree(line[0], tmp_path / "renamed", ignore=shutil.ignore_patterns("*.npz"))
    for suffix in (".png", ".txt"):
        (tmp_path / f"renamed/square0{suffix}").rename(tmp_path / f"renamed/square9{suffix}")
    changed = {"batch_size": 2, "gradient_accumulation_steps": 2, "seed": 7, "train_text_encoder": True, "optimizer_type": "AdaFactor"}
    ended = go_on(code=2, image_dirs=[tmp_path / "renamed"], **changed)
    (message,) = [told for told in ended.err.splitlines() if "is of another training" in told]
    for said in ("data (", "batch_size (4 then, 2 now)", "micro-batches of a step", "seed (42 then, 7 now)", "trained parameters (", "optimizer ("):
        assert said in message, said
    assert "resuming:" not in ended.err and not list(tmp_path.glob("next/out/models/*"))


def test_a_picture_less_or_more_often_is_another_training(go_on, line, tmp_path: Path) -> None:
    (tmp_path / "more.py").write_text("def more(img_key, **kwargs):\n    return 3 if img_key == 'wide0' else 1\n")
    assert "is of another training: data (" in go_on(1, code=2, num_repeats_getter=f"{tmp_path}/more.py:more").err
    shutil.copytree(line[0], tmp_path / "fewer", ignore=shutil.ignore_patterns("*.npz", "wide0.*"))
    assert "is of another training: data (" in go_on(2, code=2, image_dirs=[tmp_path / "fewer"]).err


def test_a_state_of_a_model_of_other_widths_is_refused(go_on, tmp_path: Path) -> None:
    from sdxl_train.model.tiny import write_tiny_sdxl

    write_tiny_sdxl(tmp_path / "wider.safetensors", unet_channels=(24, 48, 48))
    ended = go_on(code=2, pretrained_model_name_or_path=str(tmp_path / "wider.safetensors"))
    assert "unet.conv_in.weight is (16, 4, 3, 3) there and (24, 4, 3, 3) in the model" in ended.err and "resuming:" not in ended.err


def test_a_state_that_is_missing_or_none_exits_2_before_anything_is_begun(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, said in (("gone", "missing"), ("file", "no folder"), ("empty", "not a complete train state"), ("pictures", "not a complete train state")):
        ended = run_command("train", write_config(tmp_path / "run", tiny_base, [pictures], resume_from=str(tmp_path / name)))
        assert ended.code == 2 and f"resume_from: {tmp_path / name} is {said}" in ended.err, ended.err
        assert not (tmp_path / "run/out").exists() and not list(pictures.glob("*.npz"))


def test_other_keys_threads_and_versions_are_logged_from_old_to_new(go_on, tmp_path: Path) -> None:
    def of_another_machine(content: dict[str, Any]) -> None:
        content["environment"] = {"torch": "2.0.1", "device": "cpu, s390x", "threads": 16}

    ended = go_on(5, change=of_another_machine, noise_offset=0.1, save_precision="bf16", max_train_steps=6, lr_scheduler="constant")
    told = [line for line in ended.err.splitlines() if line.startswith("resuming: ")]
    for said in (f"torch was 2.0.1 and is now {torch.__version__}", "device was cpu, s390x and is now cpu", "threads was 16 and is now 1"):
        (line,) = [line for line in told if said in line]
        assert "not exact" in line
    keys = ("noise_offset was 0.0 and is now 0.1", "save_precision was 'fp16' and is now 'bf16'", "lr_scheduler was 'linear' and is now 'constant'")
    for said in (*keys, "max_train_steps was 5 and is now 6"):
        (line,) = [line for line in told if said in line]
        assert "not exact" not in line
    assert not any("resume_from" in line or "output_dir" in line for line in told), "places are no change of the training"


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "piecewise_constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_every_schedule_goes_on_bit_by_bit(name: str, warmup: int) -> None:
    options = {"step_rules": "1:4,0.1:9,0.01"} if name == "piecewise_constant" else {}
    hooks = Plugins([Choice("lr_scheduler", name, options)], seed=0).hooks

    def made() -> tuple[torch.optim.Optimizer, Any]:
        groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "name": part, "lr": lr} for part, lr in (("unet", 1e-4), ("te1", 3e-5))]
        optimizer = torch.optim.SGD(groups)
        return optimizer, hooks.build_lr_scheduler(optimizer=optimizer, num_warmup_steps=warmup, num_training_steps=20)

    optimizer, schedule = made()
    rates = []
    for _ in range(20):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    for step in range(20):
        optimizer, schedule = made()
        set_position(schedule, step)
        for later in range(step, 20):
            assert [group["lr"] for group in optimizer.param_groups] == rates[later], (step, later)
            optimizer.step()
            schedule.step()


def test_the_loss_scaler_of_fp16_goes_on_with_its_scale_and_its_count() -> None:
    given = {"pretrained_model_name_or_path": "base", "image_dirs": ["images"], "output_dir": "out", "mixed_precision": "fp16"}

    def made() -> tuple[torch.Tensor, Update]:
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return weight, Update(optimizer, schedule, Config(**given), torch.device("cpu"))

    weight, update = made()
    for factor in (1e38, 1e-6, 1e-6):  # the first overflows: the scale is halved, and then two steps are counted
        update.begin(1)
        update.backward((weight * factor).sum())
        update.apply()
    saved = json.loads(json.dumps(update.state_dict()))
    _, other = made()
    other.load_state_dict(saved)
    assert other.state_dict() == update.state_dict()
    assert saved["scaler"]["scale"] == 32768 and saved["scaler"]["_growth_tracker"] == 2 and saved["num_applied"] == 2


# ---- In the middle of an epoch ----


@pytest.mark.slow
def test_an_epoch_with_leftovers_that_is_resumed_anywhere_trains_every_datum_as_often_as_asked(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    repeats = {"square1": 3, "wide2": 2, "square5": 0}  # 7 squares and 5 wide ones: batches of 4, 3, 4 and 1
    (tmp_path / "repeats.py").write_text(f"def getter(img_key, **kwargs):\n    return {repeats!r}.get(img_key, 1)\n")
    keys = {"num_repeats_getter": f"{tmp_path}/repeats.py:getter", "num_train_epochs": 2, "save_every_n_steps": 1, "keep_train_states": 0, "save_model": False}
    _, whole = watched_run(tmp_path / "whole", tiny_base, [pictures], **keys)
    assert len(whole) == 24
    assert Counter(sample["key"] for sample in whole) == {path.stem: 2 * repeats.get(path.stem, 1) for path in pictures.glob("*.png") if path.stem != "square5"}
    states = by_step(tmp_path / "whole/out/train_state")
    assert len(states) == 8
    for state in states[4:7:2]:
        ended, rest = watched_run(tmp_path / f"from_{state.name}", tiny_base, [pictures], resume_from=str(state), **keys)
        assert ended.code == 0, ended.err[-2000:]
        trained = len(whole) - len(rest)
        assert 12 < trained < 24 and rest == whole[trained:], state.name


# ---- A state of another release ----

STORED = Path(__file__).parent / "state_version_1"


def test_a_state_of_another_version_is_refused_with_the_rule(go_on) -> None:
    for step, version in enumerate((0, 2, "1"), 1):
        ended = go_on(step, code=2, change=lambda content, version=version: content.update(version=version))
        assert f"a train state of version {version}; this program reads version 1" in ended.err
    assert "is no train state" in go_on(5, code=2, change=lambda content: content.pop("version")).err


def test_a_stored_state_of_version_1_goes_on(run, tmp_path: Path) -> None:
    """It was written after step 2 of 3 by the release that introduced version 1, with the last block of the U-Net trained alone."""
    keys = {"block_lr": [0.0] * 22 + [1e-3], "optimizer_type": "AdamW", "num_train_epochs": 1, "seed": 5}
    state = tmp_path / "elsewhere" / "train_state" / STORED.name
    shutil.copytree(STORED, state)
    ended = run("out", resume_from=str(state), **keys)
    assert f"resuming: {state}, after step 2" in ended.err
    (newest,) = by_step(tmp_path / "out" / "train_state")
    before, after = load_file(state / "weights.safetensors"), load_file(newest / "weights.safetensors")
    moves = [float((after[name] - before[name]).abs().max()) for name in before]
    assert before.keys() == after.keys() and 0 < max(moves) < 3e-3, "one step of AdamW at 1e-3 from the stored weights"
    moments = load_file(newest / "optimizer.safetensors"), load_file(state / "optimizer.safetensors")
    assert moments[0].keys() == moments[1].keys() and {tensor.dtype for tensor in moments[0].values()} == {torch.float32}
    counted = [tensor for name, tensor in moments[0].items() if name.endswith("step")]
    assert all(float(tensor) == 3 for tensor in counted)


# ---- Killed without a signal ----

MARKS = """
import os
from sdxl_train import hookimpl
class Marks:
    @hookimpl(trylast=True)
    def on_step_end(self, run):
        open(os.path.join(os.environ["MARKS"], str(run.step)), "w").close()
"""


def test_every_step_is_in_the_logs_after_a_kill_and_a_continuation(config, tmp_path: Path) -> None:
    """Whatever state is gone on from, the steps before it have reached the files, and steps that two runs trained have equal values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "marks.py").write_text(MARKS)
    (tmp_path / "marks").mkdir()
    keys = {"trackers": ["tensorboard", "jsonl"], "plugins": [f"{tmp_path}/marks.py:Marks"], "save_model": False, "save_every_n_steps": 3}
    file = config(num_train_epochs=5, resume_from="latest", **keys)
    for stop in (8, None):
        with ForkedRun(tmp_path / f"{stop}.log", file, environment={"MARKS": str(tmp_path / "marks")}) as child:
            if stop is not None:
                child.await_file(tmp_path / "marks" / str(stop))
                child.send(signal.SIGKILL)
            assert child.code() == (0 if stop is None else -signal.SIGKILL), child.err
    logs = sorted((tmp_path / "out/logs").iterdir())
    assert len(logs) == 2
    tags: dict[str, dict[int, float]] = {}
    for log in logs:
        (events,) = log.glob("events.out.tfevents*")
        if log != logs[-1]:
            events.write_bytes(events.read_bytes()[:-7])  # torn in the middle of the last event
        read = EventAccumulator(str(events)).Reload()
        for tag in read.Tags()["scalars"]:
            for event in read.Scalars(tag):
                if not tag.startswith("speed/"):
                    assert tags.setdefault(tag, {}).setdefault(event.step, event.value) == event.value, (tag, event.step)
    lines = [json.loads(line) for log in logs for line in (log / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == set(range(1, 16)) == tags["lr/unet"].keys()
    assert tags["loss/step"].keys() >= set(range(1, 16))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("must_match"),
        lambda content: content.update(optimizer={"tensor": "no such"}),
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in (lambda content: content["update"].clear(), lambda content: content.update(recorder=[1, 2]), lambda content: content.pop("epoch"))
        ),
    ],
)
def test_a_complete_state_of_nonsense_is_refused_without_a_traceback(cli, config, tmp_path: Path, change) -> None:
    ended = cli(config(max_train_steps=2))
    assert ended.code == 0, ended.err
    (state,) = by_step(tmp_path / "out" / "train_state")
    change_state(state, change)
    ended = cli(config(max_train_steps=4, resume_from=str(state)))
    assert ended.code == 2 and str(state) in ended.err and "hold no state of this training" in ended.err and "Traceback" not in ended.err


def test_an_optimizer_whose_state_cannot_be_kept_is_refused_after_the_first_step(cli, config, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer")
    keys = {"optimizer_type": "AdaShift", "max_train_steps": 3}
    ended = cli(config(**keys))
    assert ended.code == 1 and "deque" in ended.err and "after step 1" in ended.err and "save_train_state = false" in ended.err
    ended = cli(config(**keys, save_train_state=False))
    assert ended.code == 0, ended.err
