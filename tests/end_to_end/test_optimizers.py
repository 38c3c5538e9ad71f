"""Optimizers and schedules seen from outside: what `check` and a training say of them, and what the log holds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_wrong_argument_is_in_the_one_report_with_its_line(cli, config, tmp_path: Path) -> None:
    ended = cli(config(optimizer_type="Lion", batch_size=0, tables="[optimizer_kwargs]\nbetas = [0.9, 0.99]\nmomentum = 0.9\n"))
    assert ended.code == 2 and not (tmp_path / "out").exists()
    line = (tmp_path / "sdxl.toml").read_text().splitlines().index("momentum = 0.9") + 1
    assert f"sdxl.toml:{line}: optimizer_kwargs.momentum: Lion takes no momentum" in ended.err
    assert "batch_size" in ended.err and "betas:" not in ended.err


def test_an_optimizer_that_needs_a_closure_is_refused_before_the_model_is_read(cli, config, tmp_path: Path) -> None:
    ended = cli(config(optimizer_type="LBFGS"))
    assert ended.code == 2 and "closure" in ended.err and not (tmp_path / "out").exists()


def test_an_optimizer_for_lora_matrices_is_refused_before_the_model_is_read(cli, config, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer")
    ended = cli(config(optimizer_type="LoRARite"))
    assert ended.code == 2 and "LoRA" in ended.err and not (tmp_path / "out").exists()


def test_check_resolves_names_and_packages_without_importing_them(config) -> None:
    file = config(optimizer_type="came", tables="[optimizer_kwargs]\nweight_decay = 0.1\n")
    code = (
        "import sys; from sdxl_train.cli import main; sys.argv = ['sdxl-train', 'check', sys.argv[1]]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    print(stop.code)\n"
        "print([name for name in ('sdxl_train_plugins.named_optimizers', 'torch', 'pytorch_optimizer') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-2:] == ["0", "['sdxl_train_plugins.named_optimizers']"], ran.stdout


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("lion8bit", "bitsandbytes", 'pip install "sdxl-train[bitsandbytes]"'),
        ("prodigy", "pytorch_optimizer", 'pip install "sdxl-train[optimizers]"'),
        ("DAdaptAdanIP", "dadaptation", "pip install dadaptation"),
        ("no_such_package.Class", "no_such_package", "pip install"),
    ],
)
@pytest.mark.parametrize("command", ["check", "train"])
def test_a_missing_package_is_named_with_how_to_install_it(
    cli, config, monkeypatch: pytest.MonkeyPatch, name: str, package: str, install: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    ended = cli(command, config(optimizer_type=name))
    said = ended.out + ended.err
    assert ended.code == 2 and f"needs the package {package}, which is not installed: {install}" in said and "sdxl.toml:" in said


@pytest.mark.parametrize("name", ["lion", "AdamW8bit", "prodigy", "torch.optim.RAdam"])
def test_a_training_with_a_named_optimizer_changes_the_weights(cli, config, tmp_path: Path, tiny_base: Path, name: str) -> None:
    import torch
    from safetensors.torch import load_file

    ended = cli(config(optimizer_type=name, max_train_steps=2, learning_rate=1.0 if name == "prodigy" else 1e-3))
    assert ended.code == 0, ended.err
    after = load_file(next((tmp_path / "out" / "models").iterdir()))
    before = load_file(tiny_base)
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_prodigy_logs_the_rate_it_finds(cli, config, tmp_path: Path, metrics) -> None:
    ended = cli(config(optimizer_type="Prodigy", learning_rate=0.5, max_train_steps=6, tables="[optimizer_kwargs]\nd0 = 1e-8\n"))
    assert ended.code == 0, ended.err
    lines = metrics(tmp_path / "out")
    assert [line["lr/unet"] for line in lines] == [0.5] * 6
    found = [line["lr_effective/unet"] for line in lines]
    assert found[0] == pytest.approx(0.5e-8) and found == sorted(found) and found[-1] > found[0]


def test_other_optimizers_log_no_effective_rate(cli, config, tmp_path: Path, metrics) -> None:
    assert cli(config(optimizer_type="AdamW", max_train_steps=1)).code == 0
    assert not [tag for line in metrics(tmp_path / "out") for tag in line if tag.startswith("lr_effective")]


def test_adafactors_own_rate_is_followed_and_logged(cli, config, tmp_path: Path, metrics) -> None:
    tables = "[optimizer_kwargs]\nwarmup_init = true\nscale_parameter = false\n"
    ended = cli(
        config(
            optimizer_type="transformers.optimization.Adafactor",
            learning_rate=1e-4,
            lr_scheduler="cosine",
            lr_warmup_steps=9,
            max_train_steps=4,
            tables=tables,
        )
    )
    assert ended.code == 0, ended.err
    assert 'lr_scheduler is "adafactor:0.0001"' in ended.err and "lr_warmup_steps counts as 0" in ended.err
    assert "schedule: adafactor:0.0001, warm-up 0 steps" in ended.err and "learning rate set by the optimizer" in ended.err
    assert [line["lr/unet"] for line in metrics(tmp_path / "out")] == pytest.approx([1e-4, 1e-6, 2e-6, 3e-6])


@pytest.mark.parametrize("schedule", ["adafactor", "adafactor:1e-5"])
@pytest.mark.parametrize("optimizer", ["AdaFactor", "AdamW"])
def test_the_adafactor_schedule_needs_an_adafactor_with_a_rate_of_its_own(cli, config, schedule: str, optimizer: str) -> None:
    ended = cli("check", config(lr_scheduler=schedule, optimizer_type=optimizer))
    said = ended.out + ended.err
    assert ended.code == 2 and "lr_scheduler" in said and "optimizer_type" in said and "relative_step = true" in said


WARNINGS = {
    "max_grad_norm with Adafactor": {"max_grad_norm": 1.0},
    "Adafactor with relative_step = false is usually run": {"lr_scheduler": "cosine"},
    "Adafactor is usually run with clip_threshold = 1": {"tables": "[optimizer_kwargs]\nclip_threshold = 2.0\n"},
    "learning_rate is a factor": {"optimizer_type": "prodigy", "learning_rate": 0.1},
    "lr_warmup_steps = 6: the run has only 6 steps": {"lr_warmup_steps": 6},
}


@pytest.mark.parametrize("said", WARNINGS)
def test_check_warns_of_settings_that_are_probably_a_mistake(cli, config, said: str) -> None:
    ended = cli("check", config(**WARNINGS[said]))
    assert ended.code == 0 and said in ended.out, ended.out + ended.err
    assert said not in cli("check", config("plain.toml", optimizer_type="AdaFactor")).out


def test_a_training_prints_the_warnings_too(cli, config) -> None:
    ended = cli(config(optimizer_type="DAdaptSGD", learning_rate=0.01, lr_warmup_steps=7, max_train_steps=1))
    assert ended.code == 0, ended.err
    assert "learning_rate is a factor on the rate that D-adaptation and Prodigy find" in ended.err
    assert "lr_warmup_steps = 7: the run has only 1 steps" in ended.err


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_the_recommended_settings_train(cli, tmp_path: Path, tiny_base: Path, pictures: Path, metrics, name: str) -> None:
    """The shipped files, with nothing changed but paths, size and the number of steps."""
    settings = [
        f'pretrained_model_name_or_path="{tiny_base}"', f'image_dirs=["{pictures}"]', f'output_dir="{tmp_path / "out"}"',
        f'tokenizer_cache_dir="{tmp_path / "tokenizers"}"', "resolution=64", "cpu=true", "max_train_steps=3", "max_dataloader_n_workers=0",
    ]  # fmt: skip
    ended = cli(ROOT / "examples" / f"{name}.toml", *(part for setting in settings for part in ("--set", setting)))
    assert ended.code == 0, ended.err
    lines = metrics(tmp_path / "out")
    assert [line["lr/unet"] for line in lines] == pytest.approx([0, 1e-5 / 250, 2e-5 / 250])
    assert "Adafactor" not in "".join(line for line in ended.err.splitlines() if "warning" in line.lower())
