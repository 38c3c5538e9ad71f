"""Reading what others have made runs no code, takes little memory, writes nowhere else and connects to nothing."""

import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_files import Payload, noise
from command_runs import Ended, contents, memory_growth, run_command, write_config
from forked_runs import ForkedRun
from train_states import by_step


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What a payload makes when it is run."""
    return tmp_path / "marker"


@pytest.fixture
def refused(tiny_base: Path, pictures: Path, tmp_path: Path, marker: Path):
    """Runs a command that must exit 2 without having run a payload, shown a traceback or written a cache or a model."""

    def refusing(command: str = "train", **keys: Any) -> Ended:
        ended = run_command(command, write_config(tmp_path / "run", tiny_base, [pictures], **keys))
        assert ended.code == 2 and "Traceback" not in ended.err, ended.err[-3000:]
        assert not marker.exists(), "a payload was run"
        assert not [*pictures.glob("*.npz"), *tmp_path.glob("run/out/models/*")]
        return ended

    return refusing


# ---- Pickles ----


def pickles(marker: Path) -> dict[str, bytes]:
    """The same payload in every form in which torch and Python write it."""
    import io

    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": Payload(marker)}, zipped)
    torch.save({"state_dict": Payload(marker)}, legacy, _use_new_zipfile_serialization=False)
    return {"zip": zipped.getvalue(), "legacy": legacy.getvalue(), "plain": pickle.dumps(Payload(marker)), "protocol 0": pickle.dumps(Payload(marker), 0)}


def test_the_payload_would_run(marker: Path) -> None:
    pickle.loads(pickles(marker)["plain"])
    assert marker.exists()


@pytest.mark.parametrize("key", ["pretrained_model_name_or_path", "vae"])
def test_a_pickle_is_refused_as_a_model_whatever_its_name(refused, tmp_path: Path, marker: Path, key: str) -> None:
    forms = pickles(marker)
    for form, extension in [*((form, "safetensors") for form in forms), ("zip", "ckpt"), ("legacy", "pt"), ("plain", "bin"), ("zip", "pth")]:
        path = tmp_path / f"model {form}.{extension}"
        path.write_bytes(forms[form])
        ended = refused(**{key: str(path)})
        assert str(path) in ended.err and re.search(r"pickles .*are not read", ended.err), ended.err


def test_a_pickle_in_a_diffusers_directory_is_not_opened(refused, tmp_path: Path, marker: Path) -> None:
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (tmp_path / "model" / part).mkdir(parents=True)
        (tmp_path / "model" / part / "diffusion_pytorch_model.bin").write_bytes(pickles(marker)["zip"])
        (tmp_path / "model" / part / "config.json").write_text("{}")
    (tmp_path / "model/model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert str(tmp_path / "model") in refused(pretrained_model_name_or_path=str(tmp_path / "model")).err


@pytest.fixture(scope="module")
def a_state(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state after step 1 of a training on the data of `pictures`. Not to be changed."""
    folder = tmp_path_factory.mktemp("state")
    (folder / "data").mkdir()
    for key, size in ({f"square{i}": (64, 64) for i in range(6)} | {f"wide{i}": (128, 48) for i in range(4)}).items():
        noise(1, size).save(folder / "data" / f"{key}.png")
    ended = run_command("train", write_config(folder, tiny_base, [folder / "data"], max_train_steps=1, save_on_train_end=True))
    assert ended.code == 0, ended.err
    return by_step(folder / "out/train_state")[0]


def with_manifest(state: Path) -> Path:
    """The state as its maker would have it: complete, with right sums."""
    files = {path.name: path.read_bytes() for path in state.iterdir() if path.name != "manifest.json"}
    listed = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    (state / "manifest.json").write_text(json.dumps(listed))
    return state


@pytest.mark.parametrize(
    ("name", "form"),
    [("weights.safetensors", "zip"), ("optimizer.safetensors", "legacy"), ("other.safetensors", "plain"), ("state.json", "plain"), ("manifest.json", "plain")],
)
def test_a_pickle_in_a_state_is_refused(refused, a_state: Path, tmp_path: Path, marker: Path, name: str, form: str) -> None:
    state = tmp_path / "states" / a_state.name
    shutil.copytree(a_state, state)
    (state / name).write_bytes(pickles(marker)[form])
    if name != "manifest.json":
        with_manifest(state)
    ended = refused(resume_from=str(state), cache_latents=False)
    assert str(state / name) in ended.err, ended.err


def test_a_pickle_as_a_state_or_beside_its_files_is_not_opened(refused, a_state: Path, tmp_path: Path, marker: Path, tiny_base: Path, pictures: Path) -> None:
    (tmp_path / "state.pt").write_bytes(pickles(marker)["zip"])
    assert "state.pt" in refused(resume_from=str(tmp_path / "state.pt")).err
    state = tmp_path / "states" / a_state.name
    shutil.copytree(a_state, state)
    for name in ("random_states_0.pkl", "optimizer.bin", "scheduler.bin"):
        (state / name).write_bytes(pickles(marker)["plain"])
    file = write_config(tmp_path / "run", tiny_base, [pictures], resume_from=str(state), max_train_steps=2)
    ended = run_command("train", file)
    assert ended.code in (0, 2) and not marker.exists(), ended.err


# ---- Crafted headers ----


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(begin: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


HEADERS: dict[str, Callable[[], bytes]] = {
    "over 100 MB": lambda: with_header(b"{" + b" " * (101 << 20) + b"}"),
    "claims an exabyte": lambda: struct.pack("<Q", 1 << 60) + b"{}",
    "overlap": lambda: with_header({"a": tensor(0, 8, 2), "b": tensor(4, 12, 2)}, bytes(12)),
    "hole": lambda: with_header({"a": tensor(0, 8, 2), "b": tensor(12, 20, 2)}, bytes(20)),
    "wrong span": lambda: with_header({"a": tensor(0, 8, 3)}, bytes(8)),
    "beyond the end": lambda: with_header({"a": tensor(0, 1 << 40, 1 << 38)}, bytes(8)),
    "equal keys": lambda: with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
    "a million tensors": lambda: with_header(
        b"{" + b",".join(b'"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6)) + b"}"
    ),
    "deep": lambda: with_header(b'{"a":' + b"[" * 1_000_000),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_crafted_header_is_refused_in_little_memory(refused, tmp_path: Path, name: str) -> None:
    path = tmp_path / "crafted.safetensors"
    path.write_bytes(HEADERS[name]())
    for key in ("pretrained_model_name_or_path", "vae")[: 2 if name == "overlap" else 1]:
        with memory_growth() as growth:
            ended = refused(**{key: str(path)})
        assert "crafted.safetensors" in ended.err and max(map(len, ended.err.splitlines())) < 2000, ended.err[:3000]
        if growth.num_bytes is not None:
            assert growth.num_bytes < 256 << 20


# ---- Names and configurations ----


@pytest.mark.parametrize("name", ["../escaped", "a/b", "/abs", "..", ".", "nul\0", "x" * 300, "line\nfeed", ""])
def test_an_output_name_that_is_no_file_name_exits_2(refused, tmp_path: Path, name: str) -> None:
    before = contents(tmp_path)
    ended = refused(output_name=name)
    assert "output_name" in ended.err
    assert {os.path.basename(path) for path in contents(tmp_path).keys() - before.keys()} <= {b"run", b"sdxl.toml"}


@pytest.mark.slow
def test_placeholders_of_other_languages_are_literal_text(tiny_base: Path, pictures: Path, tmp_path: Path, marker: Path) -> None:
    names = ["{x.__class__}", "{n:>99999999}", "%s%n", "{0}", f"$(mkdir {marker.name})", "-rf"]
    for number, name in enumerate(names):
        shutil.move(pictures / f"{'square' if number < 4 else 'wide'}{number % 4}.png", pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(name)
    entries = [{"prompt": name, "width": 64, "height": 64, "steps": 1, "scale": 1} for name in names]
    (tmp_path / "bench.json").write_text(json.dumps(entries))
    for name in ("{x.__class__}", f"%s{{0}}$(mkdir {marker.name})"):
        out = tmp_path / "run" / f"out {name}"
        keys = {"output_name": name, "output_dir": str(out), "save_on_train_end": True, "sample_benchmark": str(tmp_path / "bench.json"), "sample_every_n_steps": 1}
        with memory_growth() as growth:
            ended = run_command("train", write_config(tmp_path / "run", tiny_base, [pictures], max_train_steps=1, **keys))
        assert ended.code == 0, ended.err[-3000:]
        assert (out / "models" / f"{name}_ep1_step1.safetensors").is_file() and len(list(out.glob("samples/step_1/*.png"))) == 6
        assert growth.num_bytes is None or growth.num_bytes < 256 << 20
    assert not list(tmp_path.rglob(marker.name)) and not Path(marker.name).exists()


@pytest.mark.parametrize("optimizer", ["os.system", "subprocess.Popen", "builtins.exec", "torch.nn.Linear"])
def test_an_optimizer_that_is_none_exits_2_and_is_not_called(refused, marker: Path, optimizer: str) -> None:
    tables = f'[optimizer_kwargs]\nargs = "mkdir {marker}"\ncommand = "mkdir {marker}"\nshell = true\n'
    assert "optimizer_type" in refused(optimizer_type=optimizer, tables=tables).err


def test_a_program_as_configuration_exits_2(tmp_path: Path, marker: Path) -> None:
    for name in ("config.py", "config.toml"):
        (tmp_path / name).write_text(f"import os\nos.mkdir({str(marker)!r})\n")
        ended = run_command("train", tmp_path / name)
        assert ended.code == 2 and f"{name}:1: this is not TOML" in ended.err and "Traceback" not in ended.err
    assert not marker.exists()


# ---- Connections ----


def without_network() -> None:
    """In this process: whatever would connect, resolve a name or listen ends it, but for sockets of the file system."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto"):
            os._exit(88)
        if event in ("socket.connect", "socket.bind") and not isinstance(arguments[1], str | bytes):
            os._exit(89)

    sys.addaudithook(audit)


def local_run(tiny_base: Path, pictures: Path, tmp_path: Path) -> Path:
    """Everything that a training does on one machine: loader processes, samples, trackers, saves."""
    (tmp_path / "bench.json").write_text(json.dumps([{"prompt": "x", "width": 64, "height": 64, "steps": 1, "scale": 1}]))
    keys = {"sample_benchmark": str(tmp_path / "bench.json"), "sample_every_n_steps": 1, "save_on_train_end": True, "trackers": ["tensorboard", "jsonl"]}
    return write_config(tmp_path / "run", tiny_base, [pictures], max_train_steps=2, max_dataloader_n_workers=1, tokenizer_cache_dir=None, **keys)


def test_a_training_opens_no_connection(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    with ForkedRun(tmp_path / "log", local_run(tiny_base, pictures, tmp_path), environment={"HF_HUB_OFFLINE": "0"}, prepare=without_network) as run:
        assert run.code() == 0, run.err[-3000:]


@pytest.mark.slow
def test_no_library_opens_a_connection_either(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log = tmp_path / "calls"
    command = ["strace", "-f", "-qq", "-o", str(log), "-e", "trace=connect", sys.executable, "-m", "sdxl_train.cli", str(local_run(tiny_base, pictures, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr[:200]}")
    assert done.returncode == 0, done.stderr[-3000:]
    elsewhere = [line for line in log.read_text().splitlines() if "connect(" in line and "AF_UNIX" not in line and not re.search(r'"127\.|"::1"', line)]
    assert elsewhere == []


# ---- Texts ----


@pytest.mark.slow
def test_names_and_captions_cannot_command_a_terminal(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    evil = "\x1b]0;title\x07\x1b[31mred\x1b[2J\rback"
    os.rename(pictures / "square0.png", os.fsencode(pictures) + b"/" + evil.encode() + b".png")
    (pictures / "square0.txt").unlink()
    (pictures / "square1.txt").write_text(evil + " tag," * 200_000, newline="")
    (tmp_path / "nan.py").write_text("def nan(model_pred, target):\n    return ((model_pred - target) ** 2).mean((1, 2, 3)) * float('nan')\n")
    file = write_config(tmp_path / "run", tiny_base, [pictures], batch_size=10, loss_type=f"{tmp_path}/nan.py:nan", max_nonfinite_steps=4, num_train_epochs=2)
    master, slave = os.openpty()
    seen = bytearray()

    def read() -> None:
        try:
            while piece := os.read(master, 65536):
                seen.extend(piece)
        except OSError:  # the last who had the other end open has closed it
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with ForkedRun(Path(os.ttyname(slave)), file) as run:
        assert run.code() == 1
    os.close(slave)
    reader.join(10)
    os.close(master)
    text = seen.decode()
    assert "\\x1b[31mred" in text, "the name is shown, escaped"
    assert "step 1" in text and "the loss is not finite" in text
    for command in ("\x1b]0;title", "\x1b[31mred", "red\x1b[2J", "\rback"):
        assert command not in text, ascii(command)
