"""A training seen from outside: the command, its files, its log."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

UNET = "model.diffusion_model."


def models(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "models").iterdir())


def losses(lines: list[dict]) -> list[float]:
    return [line["loss/step"] for line in lines]


@pytest.fixture
def train(cli, config, tmp_path: Path, metrics):
    """Trains with these keys and gives back the log; asserts success."""

    def training(out: str = "out", tables: str = "", **keys) -> list[dict]:
        ended = cli(config(f"{out}.toml", tables, output_dir=str(tmp_path / out), **keys))
        assert ended.code == 0, ended.err
        return metrics(tmp_path / out)

    return training


def test_the_unet_is_trained_and_everything_else_written_back_as_it_was(train, tmp_path: Path, tiny_base: Path) -> None:
    train()
    before, after = load_file(tiny_base), load_file(tmp_path / "out" / "models" / "model_ep2_step6.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(UNET) for name in changed)
    assert len(changed) > 0.9 * sum(name.startswith(UNET) for name in before)


def test_the_saved_file_says_what_it_is(train, tmp_path: Path) -> None:
    train(prediction_type="v_prediction", zero_terminal_snr=True, output_name="mine")
    with safe_open(tmp_path / "out" / "models" / "mine_ep2_step6.safetensors", "pt") as file:
        metadata = file.metadata()
        assert {"v_pred", "ztsnr"} <= set(file.keys())
    assert metadata["prediction_type"] == "v_prediction" and metadata["zero_terminal_snr"] == "true"
    assert (metadata["epoch"], metadata["step"], metadata["modelspec.title"]) == ("2", "6", "mine")
    assert metadata["modelspec.resolution"] == "64x64"


def test_a_base_that_says_v_prediction_is_not_trained_as_epsilon_by_default(train, cli, config, tmp_path: Path) -> None:
    train(prediction_type="v_prediction", save_every_n_steps=1, max_train_steps=1)
    marked = str(next((tmp_path / "out" / "models").iterdir()))
    ended = cli(config("second.toml", pretrained_model_name_or_path=marked, output_dir=str(tmp_path / "second")))
    assert ended.code == 2 and "prediction_type" in ended.err and "v_prediction" in ended.err
    train("third", pretrained_model_name_or_path=marked, prediction_type="epsilon", max_train_steps=1)


def test_two_runs_of_one_configuration_give_the_same_bytes(train, tmp_path: Path) -> None:
    first, second = train("a"), train("b")
    assert losses(first) == losses(second)
    name = "model_ep2_step6.safetensors"
    assert (tmp_path / "a/models" / name).read_bytes() == (tmp_path / "b/models" / name).read_bytes()


def test_another_seed_gives_other_losses(train) -> None:
    assert losses(train("a")) != losses(train("b", seed=43))


def test_the_number_of_loader_processes_changes_nothing(train) -> None:
    tables = "[timestep_sampler_kwargs]\nmu = 0.5\n"
    keys = {"timestep_sampler_type": "logit_normal", "noise_offset": 0.1, "multires_noise_iterations": 3, "ip_noise_gamma": 0.05}
    expected = losses(train("none", tables, **keys))
    assert losses(train("one", tables, max_dataloader_n_workers=1, **keys)) == expected
    assert losses(train("kept", tables, max_dataloader_n_workers=1, persistent_data_loader_workers=True, **keys)) == expected


def test_two_micro_batches_of_one_are_one_of_two(train, pictures: Path) -> None:
    for path in pictures.glob("wide*"):
        path.unlink()
    together = train("together", batch_size=6, num_train_epochs=3)
    apart = train("apart", batch_size=1, gradient_accumulation_steps=6, num_train_epochs=3)
    assert losses(apart) == pytest.approx(losses(together), rel=1e-4)


def test_a_short_last_group_is_the_mean_of_what_it_holds(train) -> None:
    lines = train(batch_size=4, gradient_accumulation_steps=2, num_train_epochs=1)  # buckets of 6 and 4: batches of 4, 2 and 4
    assert [line["step"] for line in lines] == [1, 2]


def test_gradient_checkpointing_changes_neither_losses_nor_weights(train, tmp_path: Path) -> None:
    plain, checkpointed = train("plain"), train("checkpointed", gradient_checkpointing=True)
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-5)
    name = "models/model_ep2_step6.safetensors"
    first, second = load_file(tmp_path / "plain" / name), load_file(tmp_path / "checkpointed" / name)
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=1e-4)


def test_plain_attention_agrees_with_sdpa(train) -> None:
    assert losses(train("plain", sdpa=False)) == pytest.approx(losses(train("sdpa")), rel=1e-4)


def test_bf16_trains_near_float32_with_float32_weights(train, tmp_path: Path) -> None:
    half = train("half", mixed_precision="bf16", save_precision="keep")
    assert losses(half) == pytest.approx(losses(train("full")), rel=0.05)
    assert losses(half) != losses(train("full2"))
    saved = load_file(tmp_path / "half/models/model_ep2_step6.safetensors")
    assert all(tensor.dtype == torch.float32 for name, tensor in saved.items() if name.startswith(UNET))


def test_latents_can_be_encoded_in_every_step(train) -> None:
    lines = train(cache_latents=False)
    assert len(lines) == 6 and all(math.isfinite(loss) for loss in losses(lines))


def test_save_precision_is_the_dtype_in_the_file_and_integers_stay(train, tmp_path: Path) -> None:
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        train(precision, save_precision=precision, max_train_steps=1)
        saved = load_file(next((tmp_path / precision / "models").iterdir()))
        assert {tensor.dtype for tensor in saved.values()} == {dtype, torch.int64}


def test_saves_are_named_by_epoch_and_step(train, tmp_path: Path, oracle) -> None:
    for inputs, expected in oracle("saves"):
        steps = inputs["steps_per_epoch"]
        assert steps == 5
        keys = {key: inputs[key] for key in ("num_train_epochs", "save_every_n_steps", "save_every_n_epochs", "save_on_train_end")}
        train(batch_size=2, **keys)  # 6 and 4 pictures: 3 + 2 batches
        assert models(tmp_path / "out") == sorted(f"model_{name}.safetensors" for name in expected["saved"])


def test_a_saved_file_holds_the_weights_after_exactly_that_step(train, tmp_path: Path) -> None:
    train("long", save_every_n_steps=2)
    train("short", max_train_steps=2)
    first, second = (load_file(tmp_path / run / "models/model_ep1_step2.safetensors") for run in ("long", "short"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_is_saved_when_every_trigger_is_off(train, tmp_path: Path) -> None:
    train(save_on_train_end=False)
    assert models(tmp_path / "out") == []


def test_the_first_change_of_the_weights_scales_with_the_learning_rate(train, tmp_path: Path, tiny_base: Path) -> None:
    before = load_file(tiny_base)
    moved = {}
    for rate in (1e-3, 2e-3):
        train(str(rate), learning_rate=rate, max_train_steps=1, optimizer_type="AdamW")
        after = load_file(next((tmp_path / str(rate) / "models").iterdir()))
        moved[rate] = sum(float((after[name] - before[name]).abs().sum()) for name in after if name.startswith(UNET))
    assert moved[2e-3] / moved[1e-3] == pytest.approx(2, rel=0.02)


def test_every_step_is_logged_once_with_the_documented_tags(train, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = train(trackers=["tensorboard", "jsonl"], lr_warmup_steps=3)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and [line["epoch"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert [line["lr/unet"] for line in lines] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3])
    assert lines[0]["loss/step"] == lines[0]["loss_avr/step"] == pytest.approx(lines[0]["loss_ema/step"])
    assert lines[5]["loss_avr/step"] == pytest.approx(sum(losses(lines)) / 6)
    (folder,) = (tmp_path / "out" / "logs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"loss/step", "loss_avr/step", "loss_ema/step", "lr/unet", "loss/epoch"} == {tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")}
    assert [event.step for event in events.Scalars("loss/step")] == [1, 2, 3, 4, 5, 6]
    epochs = events.Scalars("loss/epoch")
    assert [event.step for event in epochs] == [3, 6]
    assert epochs[0].value == pytest.approx(sum(losses(lines)[:3]) / 3, rel=1e-5)
    assert [line["step"] for line in lines if "loss/epoch" in line] == [3, 6]


def test_the_banner_says_what_is_really_active(cli, config, tmp_path: Path) -> None:
    ended = cli(config(gradient_accumulation_steps=2, mixed_precision="bf16", max_train_steps=1, optimizer_type="adamw"))
    for said in ("effective batch: 8 = 4", "10 pictures, 10 captioned", "64x64: 6, 96x32: 4", "autocast bfloat16", "sdpa", "AdamW", "uniform", "seed: 42",
                 "learning rate 0.001"):  # fmt: skip
        assert said in ended.err, said
    assert "\x1b" not in ended.err


def test_clipping_bounds_the_norm_of_the_gradient(train, tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "sgd.py").write_text(
        "import torch\nfrom sdxl_train import hookimpl\nclass Sgd:\n    @hookimpl\n    def build_optimizer(self, param_groups):\n"
        "        return torch.optim.SGD(param_groups)\n"
    )
    before = load_file(tiny_base)
    moved = {}
    for norm in (0.0, 0.01):  # at rate 1 SGD moves by the gradient itself
        train(f"n{norm}", max_grad_norm=norm, max_train_steps=1, learning_rate=1.0, optimizer_type=f"{tmp_path}/sgd.py:Sgd")
        after = load_file(next((tmp_path / f"n{norm}" / "models").iterdir()))
        moved[norm] = math.sqrt(sum(float(((after[name] - before[name]).double() ** 2).sum()) for name in after))
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3)
    assert moved[0.0] > 5 * moved[0.01]


def test_an_output_dir_with_a_placeholder_gives_each_run_its_own(cli, config, tmp_path: Path) -> None:
    file = config(output_dir=str(tmp_path / "run-%index%"), max_train_steps=1)
    assert cli(file).code == cli(file).code == 0
    assert models(tmp_path / "run-0") == models(tmp_path / "run-1") == ["model_ep1_step1.safetensors"]


def test_a_second_run_in_the_same_folder_sets_the_models_of_the_first_aside(cli, config, tmp_path: Path) -> None:
    file = config(max_train_steps=1)
    cli(file)
    ended = cli(file)
    assert ended.code == 0 and "models.old-" in ended.err
    (old,) = (tmp_path / "out").glob("models.old-*")
    assert [path.name for path in old.iterdir()] == models(tmp_path / "out")


def test_samples_are_rendered_before_training_and_at_the_triggers(train, tmp_path: Path) -> None:
    from PIL import Image

    benchmark = tmp_path / "bench.json"
    benchmark.write_text(json.dumps([{"prompt": "一只猫", "width": 64, "height": 64, "steps": 2}, {"prompt": "dog", "batch_count": 2}]))
    tables = "[sample_params]\nwidth = 64\nheight = 64\nsteps = 2\n"
    with_samples = train("with", tables, sample_benchmark=str(benchmark), sample_every_n_epochs=1, sample_every_n_steps=4)
    assert losses(with_samples) == losses(train("without"))
    samples = tmp_path / "with" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["epoch_1", "epoch_2", "sheets", "step_0", "step_4"]
    names = sorted(path.name for path in (samples / "epoch_2").iterdir())
    assert [name.split("_", 2)[2] for name in names] == ["e000002_00.png", "e000002_01-1.png", "e000002_01.png"]
    picture = Image.open(next((samples / "step_4").glob("*_00.png")))
    assert picture.info["parameters"].startswith("一只猫\nSteps: 2, Sampler: euler_a, CFG scale: 7.5, Seed: 42, Size: 64x64")
    assert picture.info["parameters"].endswith("Epoch: 2, Step: 4") and picture.size == (64, 64)


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++"])
def test_other_samplers_render_too(train, tmp_path: Path, sampler: str) -> None:
    (tmp_path / "bench.json").write_text(json.dumps([{"prompt": "x", "width": 64, "height": 64, "steps": 3}]))
    train(sample_benchmark=str(tmp_path / "bench.json"), sample_every_n_steps=1, sample_sampler=sampler, max_train_steps=1)
    assert len(list((tmp_path / "out/samples/step_1").iterdir())) == 1


def test_v_prediction_with_zero_terminal_snr_trains_and_samples(train, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps([{"prompt": "x", "width": 64, "height": 64, "steps": 3}]))
    lines = train(
        prediction_type="v_prediction",
        zero_terminal_snr=True,
        min_timestep=990,
        sample_benchmark=str(tmp_path / "bench.json"),
        sample_every_n_epochs=1,
    )
    assert all(math.isfinite(loss) for loss in losses(lines))
    assert len(list((tmp_path / "out/samples/epoch_2").iterdir())) == 1


def test_every_picture_is_trained_num_repeats_times_an_epoch(train, tmp_path: Path) -> None:
    (tmp_path / "watch.py").write_text(
        "import json\nfrom sdxl_train import hookimpl\n"
        "def repeats(img_key, img_md, **kwargs): return {'square0': 0, 'square1': 3}.get(img_key, 1)\n"
        "class Keys:\n    def __init__(self): self.seen = []\n"
        "    @hookimpl(wrapper=True)\n    def sample_timesteps(self, batch):\n        self.seen.append(list(batch.keys))\n        return (yield)\n"
        f"    @hookimpl\n    def on_train_end(self, run): json.dump(self.seen, open({str(tmp_path / 'seen.json')!r}, 'w'))\n"
    )
    train(plugins=[f"{tmp_path}/watch.py:Keys"], num_repeats_getter=f"{tmp_path}/watch.py:repeats")
    batches = json.loads((tmp_path / "seen.json").read_text())
    assert len(batches) == 6  # 7 squares and 4 wide ones in batches of 4, twice
    first, second = batches[:3], batches[3:]
    for epoch in (first, second):
        keys = sorted(key for batch in epoch for key in batch)
        assert keys == sorted(["square1"] * 3 + [f"square{i}" for i in range(2, 6)] + [f"wide{i}" for i in range(4)])
        assert all(len({key[:4] for key in batch}) == 1 for batch in epoch)
    assert first != second


def test_metadata_files_give_the_captions_and_sizes(train, tmp_path: Path, pictures: Path) -> None:
    entries = {"square0": {"caption": "one", "original_size": [640, 480]}, "wide1": {"description": "two"}, "gone": {"caption": "three"}}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    (tmp_path / "watch.py").write_text(
        "import json\nfrom sdxl_train import hookimpl\nclass W:\n    def __init__(self): self.seen = {}\n"
        "    @hookimpl(wrapper=True)\n    def compute_loss(self, batch):\n"
        "        for row in zip(batch.keys, batch.captions, batch.original_sizes, batch.target_sizes): self.seen[row[0]] = row[1:]\n"
        "        return (yield)\n"
        f"    @hookimpl\n    def on_train_end(self, run): json.dump(self.seen, open({str(tmp_path / 'seen.json')!r}, 'w'))\n"
    )
    train(metadata_files=[str(tmp_path / "meta.json")], plugins=[f"{tmp_path}/watch.py:W"])
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert set(seen) == {"square0", "wide1"}
    assert seen["square0"] == ["one", [480, 640], [64, 64]]
    assert seen["wide1"] == ["two", [48, 128], [32, 96]]
