"""A training that was stopped and resumed, against the same training without a stop."""

import json
from pathlib import Path

import pytest
from train_states import by_step, differing, final

RANDOM = {  # everything that draws
    "flip_aug": True, "caption_processor": "shuffle_tags", "noise_offset": 0.05, "multires_noise_iterations": 3, "ip_noise_gamma": 0.05,
    "timestep_sampler_type": "logit_normal", "train_text_encoder": True, "lr_scheduler": "cosine", "lr_warmup_steps": 3,
}  # fmt: skip


@pytest.fixture
def run(cli, config, tmp_path: Path):
    """Trains into `out` and asserts the exit code."""

    def running(out: str, code: int = 0, **keys):
        ended = cli(config(f"{out}.toml", output_dir=str(tmp_path / out), **keys))
        assert ended.code == code, ended.err
        return ended

    return running


def losses(metrics, out: Path) -> dict[int, dict[str, float]]:
    found = {}
    for log in sorted((out / "logs").iterdir()):
        for line in (log / "metrics.jsonl").read_text().splitlines():
            values = json.loads(line)
            if "loss/step" in values:
                step = values.pop("step")
                values.pop("time")
                values = {name: value for name, value in values.items() if not name.startswith("speed/")}
                assert found.get(step, values) == values
                found[step] = values
    return found


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["AdaFactor", "AdamW"])
@pytest.mark.parametrize("extras", [RANDOM, RANDOM | {"cache_latents": False, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"}], ids=["cached", "encoded"])
def test_a_training_stopped_at_any_step_and_resumed_equals_the_uninterrupted_one(run, metrics, tmp_path: Path, optimizer, extras) -> None:
    keys = {**extras, "optimizer_type": optimizer, "batch_size": 3, "keep_train_states": 0, "save_every_n_steps": 1}
    run("whole", **keys)
    whole = final(tmp_path / "whole")
    states = by_step(tmp_path / "whole" / "train_state")
    assert len(states) >= 4
    for state in states[:-1]:
        out = tmp_path / f"from_{state.name}"
        run(out.name, resume_from=str(state), **keys)
        assert differing(whole, final(out)) == [], state.name
    last = losses(metrics, tmp_path / "whole")
    assert losses(metrics, tmp_path / f"from_{states[0].name}") == {step: values for step, values in last.items() if step > 1}


@pytest.mark.slow
def test_latest_goes_on_five_times_in_the_same_folder_with_every_step_logged_once(run, metrics, tmp_path: Path) -> None:
    keys = {**RANDOM, "optimizer_type": "AdamW", "num_train_epochs": 3, "batch_size": 3}
    run("whole", **keys)
    total = max(losses(metrics, tmp_path / "whole"))
    stop = tmp_path / "stop.py"
    stop.write_text(
        "from sdxl_train import hookimpl\n"
        "class Stop:\n"
        "    def __init__(self):\n        self.steps = 0\n"
        "    @hookimpl\n"
        "    def should_stop(self, run):\n"
        "        self.steps += 1\n"
        "        return 'enough' if self.steps == 2 else None\n"
    )
    for _ in range(5):
        run("parts", resume_from="latest", plugins=[f"{stop}:Stop"], **keys)
    run("parts", resume_from="latest", **keys)
    assert losses(metrics, tmp_path / "parts") == losses(metrics, tmp_path / "whole") and total > 10
    assert final(tmp_path / "parts") == final(tmp_path / "whole")
    assert len(list((tmp_path / "parts" / "train_state").iterdir())) == 1
    ended = run("parts", resume_from="latest", **keys)
    assert "finished" in ended.err


def test_a_damaged_newest_state_is_passed_over_and_a_single_one_is_refused_by_file(run, tmp_path: Path) -> None:
    run("out", keep_train_states=0, save_every_n_steps=2)
    states = sorted((tmp_path / "out" / "train_state").iterdir())
    broken = states[-1] / "weights.safetensors"
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)
    ended = run("out", code=2, resume_from=str(states[-1]))
    assert str(broken) in ended.err
    ended = run("out", resume_from="latest", num_train_epochs=3)
    assert str(broken) in ended.err and f"resuming: {states[-2]}" in ended.err
    assert any(path.name.startswith(f"{states[-1].name}.old-") for path in (tmp_path / "out" / "train_state").iterdir())
    for state in (tmp_path / "out" / "train_state").iterdir():
        (state / "manifest.json").unlink()
    ended = run("out", code=2, resume_from="latest")
    assert "manifest.json" in ended.err


def test_without_any_state_latest_begins_anew_with_a_warning(run, tmp_path: Path) -> None:
    ended = run("out", resume_from="latest", max_train_steps=1)
    assert "no train state" in ended.err and (tmp_path / "out" / "models").is_dir()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch_size": 2}, "batch_size (4 then, 2 now)"),
        ({"seed": 1}, "seed (42 then, 1 now)"),
        ({"gradient_accumulation_steps": 2}, "micro-batches of a step"),
        ({"train_text_encoder": True}, "trained parameters"),
        ({"num_repeats_getter": "folder", "resolution": 96}, "data"),
    ],
)
def test_another_training_is_refused_with_all_differences_and_nothing_is_renamed(run, tmp_path: Path, changed, said) -> None:
    run("out", keep_train_states=0, save_every_n_steps=1)
    before = sorted(str(path) for path in (tmp_path / "out" / "train_state").rglob("*"))
    state = tmp_path / "out" / "train_state" / "model_ep1_step1"
    ended = run("out", code=2, resume_from=str(state), **changed)
    assert said in ended.err
    assert sorted(str(path) for path in (tmp_path / "out" / "train_state").rglob("*")) == before


@pytest.mark.slow
def test_a_new_rate_gives_the_whole_new_curve_and_is_logged(run, metrics, tmp_path: Path) -> None:
    keys = {"lr_scheduler": "linear", "optimizer_type": "AdamW", "keep_train_states": 0, "save_every_n_steps": 1, "num_train_epochs": 3}
    run("old", learning_rate=1e-3, **keys)
    run("new", learning_rate=5e-4, **keys)
    ended = run("resumed", learning_rate=5e-4, resume_from=str(tmp_path / "old" / "train_state" / "model_ep1_step2"), **keys)
    assert "learning_rate was 0.001 and is now 0.0005" in ended.err
    new, resumed = losses(metrics, tmp_path / "new"), losses(metrics, tmp_path / "resumed")
    assert {step: values["lr/unet"] for step, values in resumed.items()} == {step: new[step]["lr/unet"] for step in new if step > 2}


def test_a_state_is_whole_and_holds_no_frozen_part(run, tmp_path: Path) -> None:
    from safetensors import safe_open

    run("out")
    (state,) = (tmp_path / "out" / "train_state").iterdir()
    assert sorted(path.name for path in state.iterdir()) == [
        "manifest.json", "optimizer.safetensors", "other.safetensors", "state.json", "weights.safetensors",
    ]  # fmt: skip
    with safe_open(state / "weights.safetensors", "pt") as file:
        assert {name.partition(".")[0] for name in file.keys()} == {"unet"}  # noqa: SIM118


FOUND_STEP = ("Prodigy", "DAdapt")  # what finds its own step size wants a rate of 1


@pytest.mark.parametrize(
    "optimizer",
    [
        "Lion8bit",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "Prodigy", "AdamW8bit", "SGDNesterov8bit", "PagedAdamW8bit", "PagedLion8bit", "PagedAdamW32bit", "Lion", "DAdaptAdam", "DAdaptAdaGrad",
                "DAdaptAdan", "DAdaptLion", "DAdaptSGD", "SGDNesterov", "CAME", "Adan", "StableAdamW", "torch.optim.RAdam",
            )
        ),
    ],
)  # fmt: skip
def test_every_documented_optimizer_goes_on_bit_for_bit(run, tmp_path: Path, optimizer: str, recwarn) -> None:
    for package in ("bitsandbytes", "pytorch_optimizer"):
        pytest.importorskip(package)
    recwarn.clear()
    keys = {
        "optimizer_type": optimizer, "max_train_steps": 4, "save_every_n_steps": 2, "keep_train_states": 0, "max_grad_norm": 1.0,
        "learning_rate": 1.0 if optimizer.startswith(FOUND_STEP) else 1e-3, "lr_warmup_steps": 3,
    }  # fmt: skip
    run("whole", **keys)
    (state,) = (tmp_path / "whole" / "train_state").glob("*step2")
    run("again", resume_from=str(state), **keys)
    assert differing(final(tmp_path / "whole"), final(tmp_path / "again")) == []
    assert [warning for warning in recwarn if "learning rate" in str(warning.message)] == []
