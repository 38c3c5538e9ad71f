"""The training of the demo's base by `sdxl-train` itself: its configuration, and the command in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from string import Template
from types import FrameType

from sdxl_train.atomic import atomic_file
from sdxl_train.toml_text import toml_value

TOML = Template("""\
# Written by tools/make_demo_base.py. `sdxl-train example` prints every key with its default.

# ---- What to train, on what, and where to ----
pretrained_model_name_or_path = $base
image_dirs = [$images]  # pictures with a .txt caption beside each
output_dir = $output
tokenizer_cache_dir = $tokenizers
resume_from = "latest"  # the same command goes on after an interrupt

# ---- Pictures ----
resolution = 128  # px; buckets 128x128, 160x96 and 96x160
flip_aug = false  # a mirrored picture would be a second answer to the same caption
max_token_length = 75
max_dataloader_n_workers = 0
caption_processor = "drop_caption"  # some steps without text, which guidance needs

# ---- Training ----
num_train_epochs = 1000000  # max_train_steps ends it
max_train_steps = $num_steps
batch_size = 16
optimizer_type = "AdamW"
learning_rate = 1e-3  # of the U-Net; the text encoders stay as they are
lr_scheduler = "cosine"
lr_warmup_steps = 100
max_grad_norm = 1.0
# Of much noise, epsilon is nearly the input itself, and what the text adds to it is small; v is nearly the picture. Min-SNR would undo it.
prediction_type = "v_prediction"
min_snr_gamma = 0.0
seed = 1
cpu = true

# ---- Saving ----
output_name = "demo"
save_every_n_steps = 200
keep_models = 1
keep_train_states = 1
trackers = ["jsonl"]

# ---- What is drawn to measure it ----
sample_benchmark = $benchmark
sample_sampler = "ddim"

[sample_params]
steps = 25
scale = 5.0
batch_size = 1

[caption_processor_kwargs]
probability = 0.1

[optimizer_kwargs]
betas = [0.9, 0.99]
""")


NUM_STEPS = 4000  # of 16 pictures; 13 are an epoch of the 200


def configuration(base: Path, images: Path, output: Path, benchmark: Path, num_steps: int) -> str:
    """The TOML file of the base's training; the tokenizers are put beside `output`."""
    paths = {"base": base, "images": images, "output": output, "tokenizers": output.parent / "tokenizers", "benchmark": benchmark}
    return TOML.substitute({name: toml_value(str(path)) for name, path in paths.items()}, num_steps=num_steps)


def train(config: Path, text: str, output: Path, num_steps: int, say: Callable[[str], None]) -> Path:
    """Train as `text`, written to `config`, says; go on from the latest state. A training that is done is not begun again.

    Returns:
        the model of the last step.
    Raises:
        SystemExit: the training ended otherwise, with its exit code.
    """
    last = f"demo_ep*_step{num_steps}.safetensors"
    write_text(config, text)
    if not list((output / "models").glob(last)):
        sdxl_train(say, str(config))
    return next((output / "models").glob(last))


def draw(config: Path, model: Path, benchmark: Path, folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Draw the benchmark with a model, into `folder`. One picture a prompt, in its order.

    Raises:
        SystemExit: a picture could not be drawn.
    """
    override = f"sample_benchmark={toml_value(str(benchmark))}"
    printed = sdxl_train(say, "sample", str(config), "--set", override, "--model", str(model), "--out", str(folder))
    return [Path(line) for line in printed.splitlines() if line.endswith(".png")]


def sdxl_train(say: Callable[[str], None], *arguments: str) -> str:
    """Run `sdxl-train` with these arguments; what it prints on stdout. A signal that ends this process is passed on to it first.

    Raises:
        SystemExit: with its exit code, if that is not 0.
    """
    say(f"sdxl-train {' '.join(arguments)}")
    child = subprocess.Popen(
        [sys.executable, "-m", "sdxl_train.cli", *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
    )

    def pass_on(signum: int, frame: FrameType | None) -> None:
        child.send_signal(signum)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        printed, _ = child.communicate()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if child.returncode:
        say(f"sdxl-train ended with exit code {child.returncode}")
        raise SystemExit(child.returncode)
    return printed


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, "utf-8")
