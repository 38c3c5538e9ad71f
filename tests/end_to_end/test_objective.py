"""The objective of real runs, recorded by a plugin and held against formulas computed here in float64, and against a step written anew."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

PROBE = """
from pathlib import Path
import torch
from sdxl_train import hookimpl

HERE = Path(__file__)

class Probe:
    '''Notes what each micro-batch is made of, and the gradients of each step.'''
    def __init__(self): self.rows = []
    @hookimpl
    def on_train_start(self, run):
        def note(module, args, kwargs): self.rows[-1]["unet_input"] = args[0].detach().clone()
        run.unet.register_forward_pre_hook(note, with_kwargs=True)
    @hookimpl(wrapper=True)
    def sample_timesteps(self, batch):
        timesteps = yield
        self.rows.append({"timesteps": timesteps, "keys": batch.keys, "captions": batch.captions, "places": batch.places})
        return timesteps
    @hookimpl(wrapper=True)
    def shape_noise(self, noise, latents):
        shaped = yield
        self.rows[-1].update(drawn=noise, latents=latents, noise=shaped)
        return shaped
    @hookimpl(wrapper=True)
    def shape_input_noise(self):
        shaped = yield
        self.rows[-1]["input_noise"] = shaped
        return shaped
    @hookimpl(wrapper=True)
    def compute_loss(self, model_pred, target, snr):
        losses = yield
        if getattr(self, "spoilt", False):
            losses = losses * float("nan")
        self.rows[-1].update(model_pred=model_pred.detach(), target=target, losses=losses.detach(), loss_snr=snr)
        return losses
    @hookimpl(wrapper=True)
    def weigh_loss(self, snr):
        factors = yield
        self.rows[-1].update(snr=snr, factors=factors)
        return factors
    @hookimpl
    def on_train_end(self, run):
        torch.save({"rows": self.rows, "gradients": getattr(run.optimizer, "gradients", [])}, HERE.with_name("probed.pt"))

class FirstIsSpoilt(Probe):
    @property
    def spoilt(self): return len(self.rows) == 1

class KeepWeights:
    '''An optimizer that notes the gradients and leaves the weights as they are.'''
    @hookimpl
    def build_optimizer(self, param_groups):
        class Noting(torch.optim.SGD):
            def step(self, closure=None):
                self.gradients = [*getattr(self, "gradients", []), [p.grad.clone() for group in self.param_groups for p in group["params"]]]
        return Noting(param_groups)
"""

Rows = list[dict[str, Any]]
Probed = Callable[..., tuple[Rows, list[list[torch.Tensor]], list[dict[str, Any]]]]
LOWEST_SNR = 0.00468192


@pytest.fixture
def probed(cli, config, metrics, tmp_path: Path) -> Probed:
    """Trains, and gives back the micro-batches, the gradients of each step and the log."""

    def probing(name: str = "probe", probe: str = "Probe", weights_stay: bool = False, **keys: Any) -> tuple[Rows, list, list]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "probe.py").write_text(PROBE)
        if weights_stay:
            keys["optimizer_type"] = f"{folder}/probe.py:KeepWeights"
        keys = {"num_train_epochs": 1, "save_on_train_end": False, **keys}
        ended = cli(config(f"{name}.toml", output_dir=str(folder / "out"), plugins=[f"{folder}/probe.py:{probe}"], **keys))
        assert ended.code == 0, ended.err[-3000:]
        noted = torch.load(folder / "probed.pt")
        return noted["rows"], noted["gradients"], metrics(folder / "out")

    return probing


def alphas_cumprod(zero_terminal_snr: bool) -> NDArray[np.float64]:
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if zero_terminal_snr:
        root = np.sqrt(alphas)
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas


def expected_factors(snr: NDArray[np.float64], keys: dict[str, Any]) -> list[NDArray[np.float64]]:
    """The four factors of the default list, from the signal-to-noise ratios. [B] each."""
    epsilon, ones = keys.get("prediction_type", "epsilon") == "epsilon", np.ones_like(snr)
    gamma, c = keys.get("min_snr_gamma", 5.0), np.minimum(snr, 1000)
    divisor = np.maximum(c, LOWEST_SNR)
    min_snr = np.minimum(1, gamma / np.maximum(snr, 1e-30)) if epsilon else np.minimum(snr, gamma) / (snr + 1)
    scale_v_pred = c / (c + 1) if not epsilon and keys.get("scale_v_pred_loss_like_noise_pred") else ones
    v_pred_like = 1 + keys.get("v_pred_like_loss", 0.0) * (c + 1) / divisor if epsilon else ones
    debiased = (1 / np.sqrt(divisor) if epsilon else 1 / (c + 1)) if keys.get("debiased_estimation_loss") else ones
    return [min_snr if gamma else ones, scale_v_pred, v_pred_like, debiased]


def exact(tensor: torch.Tensor) -> NDArray[np.float64]:
    return tensor.numpy().astype(np.float64)


def near(found: torch.Tensor, expected: NDArray[np.float64], rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(exact(found), expected, rtol=rtol, atol=2e-6)


V, ZTSNR = {"prediction_type": "v_prediction"}, {"prediction_type": "v_prediction", "zero_terminal_snr": True}
LAST = {"min_timestep": 999, "max_timestep": 1000}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        V,
        {"min_snr_gamma": 0},
        {**V, "min_snr_gamma": 1.0, "scale_v_pred_loss_like_noise_pred": True},
        {"v_pred_like_loss": 0.1, "min_timestep": 200, "max_timestep": 210},
        {"debiased_estimation_loss": True, "v_pred_like_loss": 0.5, "noise_offset": 0.1},
        {**V, "debiased_estimation_loss": True, "ip_noise_gamma": 0.1, "max_timestep": 20},
        {**ZTSNR, "multires_noise_iterations": 4},
        {**ZTSNR, **LAST, "scale_v_pred_loss_like_noise_pred": True, "debiased_estimation_loss": True},
        {**LAST, "zero_terminal_snr": True, "debiased_estimation_loss": True, "v_pred_like_loss": 0.1},
        {**LAST, "zero_terminal_snr": True, "loss_type": "huber"},
        {**LAST, "noise_offset": 0.1, "multires_noise_iterations": 3, "ip_noise_gamma": 0.2},
    ],
    ids=lambda keys: " ".join(f"{key}={value}" for key, value in keys.items()) or "defaults",
)
def test_every_number_of_a_run_is_that_of_its_formula(probed: Probed, keys: dict[str, Any]) -> None:
    rows, _, lines = probed(**keys)
    table = alphas_cumprod(keys.get("zero_terminal_snr", False))
    assert len(rows) == len(lines) == 3
    for row, line in zip(rows, lines, strict=True):
        t = row["timesteps"].numpy()
        assert t.min() >= keys.get("min_timestep", 0) and t.max() < keys.get("max_timestep", 1000)
        a, latents, noise, input_noise = table[t], *(exact(row[name]) for name in ("latents", "noise", "input_noise"))
        signal, spread = np.sqrt(a)[:, None, None, None], np.sqrt(1 - a)[:, None, None, None]
        near(row["unet_input"], signal * latents + spread * input_noise)
        near(row["target"], noise if keys.get("prediction_type", "epsilon") == "epsilon" else signal * noise - spread * latents)
        snr = a / (1 - a)
        near(row["snr"], snr)
        assert torch.equal(row["loss_snr"], row["snr"])
        if "loss_type" not in keys:
            near(row["losses"], ((exact(row["model_pred"]) - exact(row["target"])) ** 2).mean(axis=(1, 2, 3)))
        factors = expected_factors(snr, keys)
        for found, expected in zip(row["factors"], factors, strict=True):
            near(found, expected)
        loss = (exact(row["losses"]) * np.prod(factors, axis=0)).mean()
        assert math.isfinite(line["loss/step"]) and line["loss/step"] == pytest.approx(loss, rel=1e-5, abs=1e-12)
        if not any(key in keys for key in ("noise_offset", "multires_noise_iterations")):
            assert torch.equal(row["noise"], row["drawn"])
        if "ip_noise_gamma" not in keys:
            assert torch.equal(row["input_noise"], row["noise"])


@pytest.mark.parametrize("group", ["schedule_weights", "zero_terminal_snr"])
def test_a_run_at_the_timestep_of_an_oracle_weighs_as_the_oracle_says(probed: Probed, oracle, group: str) -> None:
    names = {
        "epsilon": ("min_snr_eps_gamma5", None, "v_pred_like_factor_0.1", "debiased_eps"),
        "v_prediction": ("min_snr_v_gamma5", "scale_v_pred", None, "debiased_v"),
    }
    keys = {"debiased_estimation_loss": True, "scale_v_pred_loss_like_noise_pred": True, "v_pred_like_loss": 0.1, "max_train_steps": 1}
    given, expected = oracle(group)[-1]
    window = {"min_timestep": given["t"], "max_timestep": given["t"] + 1, "zero_terminal_snr": group == "zero_terminal_snr"}
    for prediction_type, weights in names.items():
        rows, _, _ = probed(prediction_type, prediction_type=prediction_type, **window, **keys)
        for found, name in zip(rows[0]["factors"], weights, strict=True):
            near(found, np.full(len(rows[0]["keys"]), 1.0 if name is None else expected[name]), rtol=1e-4)


def by_key(rows: Rows, name: str) -> dict[str, torch.Tensor]:
    return {key: value for row in rows for key, value in zip(row["keys"], row[name], strict=True)}


def test_the_adaptive_offset_follows_the_channel_means_of_each_sample(probed: Probed) -> None:
    plain, _, _ = probed("plain", noise_offset=0.05)
    for scale in (0.1, -5.0):
        adaptive, _, _ = probed(f"adaptive{scale}", noise_offset=0.05, adaptive_noise_scale=scale)
        for one, other in zip(plain, adaptive, strict=True):
            normal = exact(one["noise"] - one["drawn"])[:, :, :1, :1] / 0.05
            means = np.abs(exact(one["latents"]).mean(axis=(2, 3), keepdims=True))
            added = np.maximum(0, 0.05 + scale * means) * normal
            np.testing.assert_allclose(
                exact(other["noise"] - other["drawn"]), np.broadcast_to(added, one["noise"].shape), rtol=1e-3, atol=2e-6
            )


def test_the_perturbation_of_the_input_scales_with_gamma_and_leaves_the_target(probed: Probed) -> None:
    one, two = (probed(f"gamma{gamma}", ip_noise_gamma=gamma, weights_stay=True)[0] for gamma in (0.1, 0.2))
    for first, second in zip(one, two, strict=True):
        added = exact(first["input_noise"] - first["noise"])
        assert added.std() == pytest.approx(0.1, rel=0.1)
        near(second["input_noise"] - second["noise"], 2 * added)
        assert torch.equal(first["target"], second["target"]) and torch.equal(first["target"], first["drawn"])


def upsampled(level: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Bilinear, with pixel centres at half integers and the border repeated. [C, h, w] -> [C, height, width]."""

    def weights(size: int, target: int) -> NDArray[np.float64]:
        matrix = np.zeros((target, size))
        for i in range(target):
            place = max(0.0, (i + 0.5) * size / target - 0.5)
            low = int(place)
            matrix[i, low] += 1 - (place - low)
            matrix[i, min(low + 1, size - 1)] += place - low
        return matrix

    return np.einsum("yh,chw,xw->cyx", weights(level.shape[1], height), level, weights(level.shape[2], width))


def test_pyramid_noise_is_the_normalised_sum_of_its_upsampled_levels(probed: Probed) -> None:
    from sdxl_train.randomness import StepRandom

    rows, _, _ = probed(multires_noise_iterations=3, multires_noise_discount=0.6)
    for row in rows:
        random = StepRandom(row["places"], "shape_noise").stream("plugin/multires_noise")
        ratios = 2 + 2 * random.uniform(3)
        channels, height, width = row["noise"].shape[1:]
        for i in range(len(row["keys"])):
            total = exact(row["drawn"][i])
            for level in range(3):
                shrunk = [max(1, math.floor(side / ratios[i, level].item() ** level)) for side in (height, width)]
                total = total + 0.6**level * upsampled(exact(random[i].normal(channels, *shrunk)[0]), height, width)
                if 1 in shrunk:
                    break
            near(row["noise"][i], total / total.std(ddof=1))


def chunked(content: list[int], num_chunks: int, padding: int) -> list[list[int]]:
    rows = []
    for k in range(num_chunks):
        row = [49406, *content[: 75 * num_chunks][75 * k : 75 * k + 75], 49407]
        rows.append(row + [padding] * (77 - len(row)))
    return rows


WIDE = [48, 128, 2, 0, 32, 96]  # 128 x 48 px in the bucket 96 x 32: original height, width, crop top, left, target height, width


@pytest.mark.parametrize(("clip_skip", "state", "max_token_length"), [(1, -2, 75), (0, -2, 150), (1, -2, 225), (2, -3, 225)])
def test_loss_and_gradients_of_a_step_are_those_of_a_step_written_anew(
    probed: Probed, tiny_base: Path, pictures: Path, clip_skip: int, state: int, max_token_length: int
) -> None:
    from sdxl_train.model.single_file import load_text_encoders, load_unet, open_checkpoint
    from sdxl_train.model.tokenizer import load_tokenizers

    for path in [*pictures.glob("square*"), *pictures.glob("wide3*")]:
        path.unlink()
    for number, path in enumerate(sorted(pictures.glob("*.txt"))):
        path.write_text(f"picture {number}, " + "red and blue words, " * (20 * number))
    keys = {"max_token_length": max_token_length, "clip_skip": clip_skip, "batch_size": 3, **ZTSNR}
    rows, gradients, lines = probed(**keys, max_train_steps=1, weights_stay=True)
    (row,), (found,) = rows, gradients

    base, tokenizer = open_checkpoint(str(tiny_base)), load_tokenizers(None, None)
    unet, encoders = load_unet(base, torch.float32), load_text_encoders(base, torch.float32)
    contents = []
    for caption in row["captions"]:
        chunks = tokenizer.tokenize(caption, 225)[0]
        contents.append([token for chunk in chunks for token in chunk[1:76] if token < 49406])
    samples, num_chunks = len(contents), max_token_length // 75
    assert samples == 3 and sorted(len(content) > 75 for content in contents) == [False, True, True]
    states, pooled = [], None
    with torch.no_grad():
        for encoder, padding in zip(encoders, (49407, 0), strict=True):
            ids = torch.tensor([chunk for content in contents for chunk in chunked(content, num_chunks, padding)])
            outputs = encoder(input_ids=ids, output_hidden_states=True)
            hidden = outputs.hidden_states[state]
            joined = [
                torch.cat([own[0, :1], *(chunk[1:76] for chunk in own), own[-1, 76:]])
                for own in (hidden[i * num_chunks : (i + 1) * num_chunks] for i in range(samples))
            ]
            states.append(torch.stack(joined))
            pooled = outputs.text_embeds[[i * num_chunks for i in range(samples)]] if hasattr(outputs, "text_embeds") else None
    text = torch.cat(states, dim=-1)
    assert text.shape[1] == max_token_length + 2

    t = row["timesteps"]
    a = torch.tensor(alphas_cumprod(True), dtype=torch.float64)[t]
    signal, spread = (rate.float()[:, None, None, None] for rate in (a.sqrt(), (1 - a).sqrt()))
    latents, noise = row["latents"], row["drawn"]
    time_ids = torch.tensor([WIDE] * samples, dtype=torch.float32)
    predicted = unet(
        signal * latents + spread * noise, t, encoder_hidden_states=text, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}
    ).sample
    losses = torch.nn.functional.mse_loss(predicted, signal * noise - spread * latents, reduction="none").mean(dim=(1, 2, 3))
    snr = (a / (1 - a)).float()
    loss = (losses * torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)).mean()
    loss.backward()
    assert lines[0]["loss/step"] == pytest.approx(loss.item(), rel=1e-5)
    for parameter, gradient in zip(unet.parameters(), found, strict=True):
        assert parameter.grad is not None
        assert (gradient - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-9


def same(found: list[torch.Tensor], expected: list[torch.Tensor], rtol: float = 1e-5) -> None:
    size = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected))
    difference = math.sqrt(sum(float((one - other).square().sum()) for one, other in zip(found, expected, strict=True)))
    assert size > 0 and difference <= rtol * size


def test_two_micro_batches_of_one_have_the_draws_and_the_gradient_of_one_of_two(probed: Probed, pictures: Path) -> None:
    for path in [*pictures.glob("wide*"), *pictures.glob("square[2-5]*")]:
        path.unlink()
    keys = {"weights_stay": True, "noise_offset": 0.1, "multires_noise_iterations": 3, "ip_noise_gamma": 0.1, "loss_type": "smooth_l1"}
    together, expected, _ = probed("together", batch_size=2, **keys)
    apart, found, _ = probed("apart", batch_size=1, gradient_accumulation_steps=2, **keys)
    for name in ("timesteps", "drawn", "noise", "input_noise", "target", "unet_input"):
        one, other = by_key(together, name), by_key(apart, name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert len(found) == len(expected) == 1
    same(found[0], expected[0])


def test_the_gradient_of_a_group_is_the_mean_of_the_micro_batches_it_holds(probed: Probed) -> None:
    _, each, alone = probed("each", weights_stay=True)  # buckets of 6 and 4 pictures: batches of 4, 2 and 4
    _, grouped, lines = probed("grouped", gradient_accumulation_steps=2, weights_stay=True)
    assert (len(each), len(grouped)) == (3, 2)
    same(grouped[0], [(one + other) / 2 for one, other in zip(each[0], each[1], strict=True)])
    same(grouped[1], each[2])
    first, second, third = (line["loss/step"] for line in alone)
    assert [line["loss/step"] for line in lines] == pytest.approx([(first + second) / 2, third], rel=1e-5)


def test_one_micro_batch_that_is_not_finite_drops_its_group_and_leaves_no_gradient(probed: Probed) -> None:
    _, expected, _ = probed("sound", gradient_accumulation_steps=2, weights_stay=True)
    _, found, lines = probed("spoilt", "FirstIsSpoilt", gradient_accumulation_steps=2, weights_stay=True)
    assert ["loss/step" in line for line in lines] == [False, True]
    assert len(found) == 1
    assert all(torch.equal(one, other) for one, other in zip(found[0], expected[1], strict=True))
