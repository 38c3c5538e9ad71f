"""Which attention is active, that all ways agree, and what a missing xformers is answered with."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdxl_train.errors import ConfigError
from sdxl_train.model.attention import active_backend, backend_problem, check_backend, set_attention, set_text_attention
from sdxl_train.model.sdxl import decode_latents, encode_latents, make_add_time_ids, predict
from sdxl_train.model.single_file import Checkpoint, load_text_encoders, load_unet, load_vae

CPU = torch.device("cpu")
# Stands for the package: it computes by torch and counts its calls. [B, S, channels] or [B, S, heads, channels].
STAND_IN = """
import torch

calls = []

def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    assert attn_bias is None and p == 0 and query.dtype == key.dtype == value.dtype
    calls.append(tuple(query.shape))
    heads = "bqhc,bkhc->bhqk" if query.ndim == 4 else "bqc,bkc->bqk"
    scores = torch.einsum(heads, query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("bhqk,bkhc->bqhc" if query.ndim == 4 else "bqk,bkc->bqc", scores.float().softmax(-1).to(value.dtype), value)
"""


@pytest.fixture(autouse=True)
def no_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not it is installed here."""
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.delitem(sys.modules, "xformers.ops", raising=False)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, ops: str = STAND_IN) -> None:
    """Puts a package named xformers where Python and diffusers find it."""
    (folder / "xformers").mkdir()
    (folder / "xformers" / "__init__.py").write_text('__version__ = "0.0.99"\n')
    (folder / "xformers" / "ops.py").write_text(ops)
    (folder / "xformers-0.0.99.dist-info").mkdir()
    (folder / "xformers-0.0.99.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.99\n")
    monkeypatch.delitem(sys.modules, "xformers")
    monkeypatch.syspath_prepend(str(folder))


def inputs() -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 16, 8, generator=draw), torch.randn(2, 77, 40, generator=draw)
    sizes = torch.tensor([[1023, 769]] * 2)
    return latents, torch.tensor([7, 993]), text, torch.randn(2, 24, generator=draw), make_add_time_ids(sizes, sizes, sizes)


@pytest.fixture
def unet(tiny: Checkpoint) -> UNet2DConditionModel:
    return load_unet(tiny, torch.float32)


@pytest.fixture
def vae(tiny: Checkpoint) -> AutoencoderKL:
    return load_vae(tiny, torch.float32)


def results(unet: UNet2DConditionModel, vae: AutoencoderKL) -> list[Tensor]:
    """A prediction, the gradients of all weights that it gives, latents and pixels."""
    unet.zero_grad(set_to_none=True)
    prediction = predict(unet, *inputs())
    prediction.float().square().mean().backward()
    latents = encode_latents(vae, torch.linspace(-1, 1, 3 * 32 * 48).reshape(1, 3, 32, 48), None)
    grads = [parameter.grad for parameter in unet.parameters()]
    assert all(grad is not None for grad in grads)
    return [prediction.detach(), latents, decode_latents(vae, latents), *(grad.clone() for grad in grads if grad is not None)]


def agree(ours: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    """Each tensor to within a share of its largest element."""
    return all((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max() for a, b in zip(ours, expected, strict=True))


def distances(ours: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Relative errors of the prediction, the latents, the pixels, and of all gradients together."""
    parts = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(ours[:3], expected[:3], strict=True)]
    ours_flat, expected_flat = (torch.cat([grad.float().flatten() for grad in found[3:]]) for found in (ours, expected))
    return [*(part.item() for part in parts), ((ours_flat - expected_flat).norm() / expected_flat.norm()).item()]


def test_one_backend_is_active_and_the_strongest_key_decides() -> None:
    keys = ["mem_eff_attn", "xformers", "diffusers_xformers", "sdpa"]
    for chosen in itertools.product([False, True], repeat=4):
        values = dict(zip(keys, chosen, strict=True))
        assert active_backend(values) == ([key for key in keys if values[key]] or ["plain"])[0]


@pytest.mark.parametrize("backend", ["sdpa", "mem_eff_attn", "xformers"])
def test_backends_agree_with_plain_attention_in_values_and_gradients(
    unet: UNet2DConditionModel, vae: AutoencoderKL, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    # Small chunks, so that the tiny U-Net's attention takes several.
    monkeypatch.setattr("sdxl_train.model.chunked_attention.KEY_CHUNK", 10)
    monkeypatch.setattr("sdxl_train.model.chunked_attention.MAX_SCORES", 10 * 8 * 7)
    set_attention(unet, vae, "plain")
    expected = results(unet, vae)
    with torch.autocast("cpu", torch.bfloat16):
        rounding = distances(results(unet, vae), expected)
    set_attention(unet, vae, backend)
    assert agree(results(unet, vae), expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = distances(results(unet, vae), expected)
    assert all(ours <= 1.3 * plain for ours, plain in zip(rounded, rounding, strict=True))  # no less exact than plain attention in bf16


class Attentions(TorchDispatchMode):
    """Counts calls of the fused attention kernels of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fused += func.__name__.startswith("_scaled_dot_product") and "math" not in func.__name__
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_sdpa_makes_the_fused_call_in_every_layer_and_the_others_never(unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    for backend, is_fused in (("sdpa", True), ("plain", False), ("mem_eff_attn", False)):
        set_attention(unet, vae, backend)
        with Attentions() as in_unet:
            predict(unet, *inputs())
        with Attentions() as in_vae:
            encode_latents(vae, torch.ones(1, 3, 32, 32), None)
        assert in_unet.fused == len(unet.attn_processors) * is_fused
        assert in_vae.fused == is_fused  # the encoder's


class Copies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in ("clone", "copy_", "_to_copy", "_reshape_copy"):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_heads_are_split_and_joined_without_copies_for_fused_kernels(
    unet: UNet2DConditionModel, vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "def memory_efficient_attention(query, key, value, scale): return query")
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1  # pyright: ignore
    states = torch.randn(2, 32, attention.query_dim)
    for backend in ("sdpa", "xformers"):
        set_attention(unet, vae, backend)
        with Copies() as copies:
            attention(states)
        assert not copies.names, backend


@pytest.mark.parametrize(
    ("backend", "implementation"), [("sdpa", "sdpa"), ("mem_eff_attn", "sdpa"), ("xformers", "sdpa"), ("plain", "eager")]
)
@torch.no_grad()
def test_text_encoders_leave_the_fused_kernels_only_for_plain_attention(tiny: Checkpoint, backend: str, implementation: str) -> None:
    ids = torch.arange(77)[None]
    for encoder in load_text_encoders(tiny, torch.float32):
        before = encoder(ids, output_hidden_states=True).hidden_states
        set_text_attention(encoder, backend)
        with Attentions() as attentions:
            states = encoder(ids, output_hidden_states=True).hidden_states
        assert attentions.fused == (implementation == "sdpa") * encoder.config.num_hidden_layers
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(states, before, strict=True))


def keys(**chosen: bool) -> dict[str, bool]:
    return {"mem_eff_attn": False, "xformers": False, "diffusers_xformers": False, "sdpa": True, "cpu": False, **chosen}


@pytest.mark.parametrize("backend", ["xformers", "diffusers_xformers"])
def test_missing_xformers_is_found_from_the_keys_and_the_answer_is_sdpa(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = backend_problem(keys(**{backend: True}))
    assert problem is not None and "xformers is not installed" in problem and f"use sdpa = true without {backend}" in problem
    assert backend_problem(keys(**{backend: True}, mem_eff_attn=True)) is None  # which is stronger: xformers is not used
    assert backend_problem(keys()) is None
    install(tmp_path, monkeypatch)
    assert backend_problem(keys(**{backend: True})) is None
    problem = backend_problem(keys(**{backend: True}, cpu=True))
    assert problem is not None and "cpu = true" in problem and "sdpa = true" in problem


def test_the_keys_are_judged_without_torch() -> None:
    code = "import sys; from sdxl_train.model import attention as a; print(a.backend_problem(dict.fromkeys([*a.BACKENDS, 'cpu'], False)), 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "None False\n"


@pytest.mark.parametrize(
    ("ops", "cause"),
    [
        ('raise ImportError("libcudart.so.12: cannot open shared object file")', "libcudart.so.12"),
        ('raise OSError("undefined symbol: _ZN3c10")', "undefined symbol"),
        (
            'def memory_efficient_attention(*args): raise NotImplementedError("No operator found for\\nthese inputs")',
            "float32 on cpu: No operator found for;",
        ),
        (
            'def memory_efficient_attention(q, *_): raise RuntimeError("CUDA error: no kernel image" if q.shape[-1] == 512 else "")',
            "RuntimeError",
        ),
        ("def memory_efficient_attention(q, *_): q.shape[-1] == 64 or q.undefined; return q", None),
    ],
)
def test_xformers_that_cannot_be_loaded_or_has_no_kernels_is_an_error_with_its_cause(
    ops: str, cause: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, ops)
    if cause is None:
        with pytest.raises(AttributeError):  # a fault of another kind is no verdict on the package
            check_backend("xformers", CPU, torch.float32, torch.float32)
        return
    with pytest.raises(ConfigError, match="xformers = true cannot be used") as caught:
        check_backend("xformers", CPU, torch.float32, torch.float32)
    assert cause in str(caught.value) and "use sdpa = true without xformers" in str(caught.value)


def test_both_dtypes_are_tried_each_with_its_number_of_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        tmp_path,
        monkeypatch,
        STAND_IN.replace("calls.append(tuple(query.shape))", "calls.append((query.shape[-1], query.dtype, query.requires_grad))"),
    )
    check_backend("diffusers_xformers", CPU, torch.bfloat16, torch.float32)
    assert sys.modules["xformers.ops"].calls == [(64, torch.bfloat16, True), (512, torch.float32, False)]


def test_other_backends_need_no_check() -> None:
    for backend in ("mem_eff_attn", "sdpa", "plain"):
        check_backend(backend, CPU, torch.float32, torch.float32)


@torch.no_grad()
def test_xformers_is_called_by_both_networks(
    unet: UNet2DConditionModel, vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    set_attention(unet, vae, "xformers")
    calls = sys.modules["xformers.ops"].calls
    predict(unet, *inputs())
    assert len(calls) == len(unet.attn_processors) and all(len(shape) == 4 for shape in calls)
    calls.clear()
    decode_latents(vae, encode_latents(vae, torch.ones(1, 3, 32, 48), None))
    assert calls == [(1, 24, 1, 16)] * 2


# diffusers looks for the package when it is imported, and wants a GPU: it gets a process of its own, and is told that there is one.
THROUGH_DIFFUSERS = """
import sys, torch
from sdxl_train.model.attention import set_attention
from sdxl_train.model.single_file import load_unet, load_vae, open_checkpoint
sys.path.insert(0, sys.argv[2])
from test_attention import agree, inputs, results

base = open_checkpoint(sys.argv[1])
unet, vae = load_unet(base, torch.float32), load_vae(base, torch.float32)
set_attention(unet, vae, "plain")
expected = results(unet, vae)
torch.cuda.is_available = lambda: True
randn = torch.randn
torch.randn = lambda *args, device=None, **kwargs: randn(*args, **kwargs)
set_attention(unet, vae, "diffusers_xformers")
import xformers.ops
xformers.ops.calls.clear()
assert agree(results(unet, vae), expected, 1e-5)
print(len(xformers.ops.calls), len(unet.attn_processors) + len(vae.attn_processors))
"""


@pytest.mark.slow
def test_the_switch_of_diffusers_reaches_both_networks(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", THROUGH_DIFFUSERS, str(tiny_path), str(Path(__file__).parent)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert ended.returncode == 0, ended.stderr
    calls, layers = ended.stdout.split()
    assert calls == layers


def test_what_diffusers_refuses_is_an_error_that_names_sdpa(unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    with pytest.raises(ConfigError, match=r"diffusers_xformers = true cannot be used: diffusers says: .*use sdpa = true"):
        set_attention(unet, vae, "diffusers_xformers")  # imported without the package


def test_the_vae_can_be_set_alone(vae: AutoencoderKL) -> None:
    before = encode_latents(vae, torch.ones(1, 3, 32, 32), None)
    set_attention(None, vae, "mem_eff_attn")
    assert torch.allclose(encode_latents(vae, torch.ones(1, 3, 32, 32), None), before, atol=1e-5)


def test_another_attention_backend_is_an_error(unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    with pytest.raises(ConfigError, match="'flash9'"):
        set_attention(unet, vae, "flash9")
