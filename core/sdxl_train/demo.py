"""`sdxl-train demo`: writes a tiny SDXL, pictures and a configuration, trains on them by the ordinary path, and shows before and after."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from sdxl_train.errors import ConfigError

PROMPTS = ("monkey face, mammal, animal", "red apple, fruit, food", "sailboat, vehicle, transport")
SHEET = "before_and_after.png"

TOML = """\
# The demo's configuration. Change what you like and run: sdxl-train {file}
# 演示配置。可随意修改后运行上面的命令。docs/configuration.md explains every key.

pretrained_model_name_or_path = {base}  # base model / 预训练模型
image_dirs = [{images}]  # pictures / 图像文件夹
metadata_files = [{metadata}]  # captions and more / 标注等元数据
output_dir = {output}  # everything a run writes / 输出文件夹
tokenizer_cache_dir = {tokenizers}

resolution = 128  # SDXL itself: 1024
batch_size = 8
num_train_epochs = 10  # 12 steps or so in each
optimizer_type = "AdamW"
learning_rate = 1e-3  # high, since this model starts from random weights; a real one takes about 1e-5
lr_warmup_steps = 20
max_token_length = 75
mixed_precision = "no"
cpu = true
max_dataloader_n_workers = 0

sample_benchmark = {benchmark}  # what to draw / 采样基准
sample_every_n_epochs = 10  # before training and at its end
"""


def run_demo(directory: Path, prepare_only: bool) -> None:
    """Write the demo's files into `directory`, and train unless told not to.

    Files of an earlier demo are written anew; nothing else in the folder is touched.

    Raises:
        ConfigError: the folder cannot be made, or holds something that is not a demo.
    """
    directory = directory.resolve()
    config_file = directory / "sdxl.toml"
    if directory.exists() and any(directory.iterdir()) and not (directory / "base.safetensors").exists():
        raise ConfigError(f"{directory} is not empty and holds no demo; name another folder: sdxl-train demo DIR")
    try:
        prepare(directory)
    except OSError as error:
        raise ConfigError(f"{directory}: the demo cannot be written: {error}") from error
    print(f"wrote base.safetensors, images/, metadata.json, benchmark.json and sdxl.toml into {directory}")
    if prepare_only:
        print(f"train with: sdxl-train {config_file}")
        return
    from sdxl_train.config import load_settings
    from sdxl_train.training import run_training

    run_training(load_settings(config_file))
    output_dir = directory / "output"
    sheet = _before_and_after(directory, output_dir)
    model = max((output_dir / "models").glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    print(f"model:            {model}")
    print(f"before and after: {sheet}")
    print(f"losses:           {output_dir / 'logs'} (tensorboard --logdir {output_dir / 'logs'})")
    print("The base has random weights, so its pictures are patterns; what falls is the loss.")
    print(f"Try next: change {config_file} and run `sdxl-train {config_file}`;")
    print("for pictures of your own name an SDXL checkpoint and your folder there (docs/quickstart.md).")


def prepare(directory: Path) -> None:
    """Write base.safetensors, images/, metadata.json, benchmark.json and sdxl.toml, all deterministic but for the paths in the last."""
    from sdxl_train.model.tiny import write_tiny_sdxl

    images = directory / "images"
    images.mkdir(parents=True, exist_ok=True)
    packaged = resources.files("sdxl_train") / "demo_data"
    for name in ("metadata.json", "NOTICE.md"):
        (directory / name).write_bytes((packaged / name).read_bytes())
    for picture in (packaged / "images").iterdir():
        (images / picture.name).write_bytes(picture.read_bytes())
    write_tiny_sdxl(directory / "base.safetensors", unet_channels=(32, 64, 64))
    entries = [{"prompt": prompt, "width": 128, "height": 128, "steps": 12, "scale": 3.0, "seed": 1} for prompt in PROMPTS]
    (directory / "benchmark.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    paths = {
        "file": directory / "sdxl.toml",
        "base": directory / "base.safetensors",
        "images": images,
        "metadata": directory / "metadata.json",
        "output": directory / "output",
        "tokenizers": directory / "tokenizers",
        "benchmark": directory / "benchmark.json",
    }
    text = TOML
    for name, path in paths.items():  # one pass over fixed names: a path is never read for further placeholders
        text = text.replace("{" + name + "}", str(path) if name == "file" else json.dumps(str(path), ensure_ascii=False))
    (directory / "sdxl.toml").write_text(text, encoding="utf-8")


def _before_and_after(directory: Path, output_dir: Path) -> Path:
    """One sheet of what the model drew before step 1 and after the last."""
    from PIL import Image

    from sdxl_train.sample_files import comparison_sheet

    rounds = sorted((output_dir / "samples").glob("epoch_*"), key=lambda path: path.stat().st_mtime)
    pairs = [[_newest_of(folder, i) for folder in (output_dir / "samples" / "step_0", rounds[-1])] for i in range(len(PROMPTS))]
    rows = [(prompt, [Image.open(path) for path in pair]) for prompt, pair in zip(PROMPTS, pairs, strict=True)]
    comparison_sheet(("before", "after"), rows).save(directory / SHEET)
    return directory / SHEET


def _newest_of(folder: Path, i: int) -> Path:
    """The latest picture of benchmark entry i in a round's folder (a second run adds its own there)."""
    return sorted(folder.glob(f"*_{i:02d}.png"))[-1]
