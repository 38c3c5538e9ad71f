"""`sdxl-train demo`: writes a tiny SDXL, pictures and a configuration, trains on them by the ordinary path, and shows before and after."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from string import Template
from typing import TYPE_CHECKING

from sdxl_train.atomic import atomic_file
from sdxl_train.errors import ConfigError
from sdxl_train.toml_text import toml_value

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdxl_train.sample_benchmark import SampleEntry

FILES = ("sdxl.toml", "benchmark.json", "metadata.json", "NOTICE.md", "base.safetensors")  # and the folder images/
SHEET = "before_and_after.png"
MEAN_OVER_STEPS = 20
DRAWN = ("apple", "banana", "bear", "anchor", "bus", "lotus")  # pictures whose captions are the prompts of the benchmark

FIRST_WORDS = "# The demo's configuration."
TOML = Template("""\
$first_words Change what you like and train again:
#     sdxl-train $file
# `sdxl-train example` prints every key with its default. / 演示配置，可随意修改后重新训练；sdxl-train example 列出所有配置项。

# ---- What to train, on what, and where to / 模型与数据 ----
pretrained_model_name_or_path = $base  # a tiny SDXL; yours: sd_xl_base_1.0.safetensors / 预训练模型
image_dirs = [$images]  # searched recursively / 图像文件夹
metadata_files = [$metadata]  # captions and more; [] reads .txt files beside the pictures / 元数据文件
output_dir = $output  # models, samples, logs / 输出文件夹
tokenizer_cache_dir = $tokenizers  # 分词器缓存路径

# ---- Pictures / 图像 ----
resolution = 128  # px; SDXL itself: 1024 / 分桶的最大分辨率
flip_aug = false  # true mirrors half of the pictures / 随机水平翻转
max_token_length = 75  # of a caption; 225 for long ones / 最大 token 长度
max_dataloader_n_workers = 0  # these few pictures need no processes of their own / 数据加载进程数

# ---- Training / 训练 ----
num_train_epochs = 70  # of 6 steps each / 训练总轮数
batch_size = 16  # 批量大小
optimizer_type = "AdamW"  # the default is "AdaFactor", which needs less memory / 优化器
learning_rate = 3e-3  # so high since this model knows nothing yet; a real one takes about 1e-5 / 学习率
lr_scheduler = "cosine"  # down to 0 at the last step / 学习率调度器
lr_warmup_steps = 20  # 预热步数
cpu = true  # leave it out to use your GPU / 使用 CPU 训练

# ---- Pictures drawn before the first step and at the end / 采样 ----
sample_benchmark = $benchmark  # prompts / 采样基准
sample_every_n_epochs = 70  # 每 n 轮采样一次

[sample_params]  # for what the benchmark leaves out; tables come last in the file / 基础采样参数
width = 128
height = 128
steps = 30
scale = 1.0  # 1 is without guidance, which this model never learned; the default is 7.5 / CFG 系数
""")


def run_demo(directory: Path, prepare_only: bool) -> None:
    """Write the demo's files into `directory`, and train unless told not to.

    A folder that is not empty is taken for a demo when its sdxl.toml begins as the demo's does. What is there is kept, so the demo can be
    run again, also with a changed configuration, and nothing of a user's is lost.

    Raises:
        ConfigError: the folder cannot be made or written to, or holds something that is not a demo.
    """
    directory = directory.resolve()
    config_file = directory / "sdxl.toml"
    try:
        if directory.exists() and any(directory.iterdir()) and not _is_of_the_demo(config_file):
            raise ConfigError(
                f"{directory} is not empty, and holds no sdxl.toml that begins with {FIRST_WORDS!r}, so it is no demo's folder; "
                "nothing was written there. Name another folder: sdxl-train demo DIR"
            )
        kept = _prepare(directory)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{directory}: the demo cannot be written: {error}") from error
    print(f"{directory} holds {', '.join(FILES)} and images/" + (f"; kept as found: {', '.join(kept)}" if kept else ""), flush=True)
    if prepare_only:
        print(f'train with: sdxl-train "{config_file}"')
        return
    from sdxl_train.config import load_settings
    from sdxl_train.training import run_training

    settings = load_settings(config_file)
    run_training(settings)
    _say_what_was_made(directory, settings.config.output_dir, settings.samples)


def _is_of_the_demo(config_file: Path) -> bool:
    if not config_file.is_file():
        return False
    with open(config_file, "rb") as file:
        return file.read(len(FIRST_WORDS)) == FIRST_WORDS.encode()


def _prepare(directory: Path) -> list[str]:
    """Write what is missing; all but the paths in sdxl.toml is the same each time. Returns which of the files were there."""
    from sdxl_train.demo_base import write_demo_base

    packaged = resources.files("sdxl_train") / "demo_data"
    captions = _captions((packaged / "metadata.json").read_text("utf-8"))
    contents: dict[str, Callable[[], bytes]] = {  # sdxl.toml first: it makes the folder a demo's
        "sdxl.toml": lambda: _configuration(directory).encode(),
        "benchmark.json": lambda: _benchmark([captions[key] for key in DRAWN]).encode(),
        "metadata.json": (packaged / "metadata.json").read_bytes,
        "NOTICE.md": (packaged / "NOTICE.md").read_bytes,
    }
    kept = [name for name in FILES if (directory / name).exists()]
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {f"images/{picture.name}": picture.read_bytes for picture in (packaged / "images").iterdir()}
    for name, content in {**contents, **pictures}.items():
        if not (directory / name).exists():
            (directory / name).parent.mkdir(exist_ok=True)
            with atomic_file(directory / name) as temporary:
                temporary.write_bytes(content())
    if "base.safetensors" not in kept:
        write_demo_base(directory / "base.safetensors")
    return kept


def _configuration(directory: Path) -> str:
    paths = {
        "base": "base.safetensors",
        "images": "images",
        "metadata": "metadata.json",
        "output": "output",
        "tokenizers": "tokenizers",
        "benchmark": "benchmark.json",
    }
    values = {name: toml_value(str(directory / path)) for name, path in paths.items()}
    return TOML.substitute(values, file=toml_value(str(directory / "sdxl.toml")), first_words=FIRST_WORDS)


def _benchmark(prompts: Sequence[str]) -> str:
    entries = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts, start=1)]
    return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in entries) + "\n]\n"


def _captions(metadata: str) -> dict[str, str]:
    return {key: fields["caption"] for key, fields in json.loads(metadata).items()}


def _say_what_was_made(directory: Path, output_dir: str, samples: Sequence[SampleEntry]) -> None:
    """The closing words, after a training without mishap. A changed configuration may have saved or drawn nothing."""
    from sdxl_train.output_dir import matching_output_dirs
    from sdxl_train.sample_sheets import INDEX_NAME, SHEETS_FOLDER

    made = max(matching_output_dirs(output_dir), key=lambda path: (path / "logs").stat().st_mtime)
    models = sorted((made / "models").glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    print("\nThe demo is done. What it made:")
    if models:
        print(f"  model             {models[-1]}")
    if sheet := _before_and_after(directory, made, samples):
        print(f"  before and after  {sheet}")
    if (pages := made / "samples" / SHEETS_FOLDER / INDEX_NAME).exists():
        print(f"  samples over time {pages}")
    if losses := _losses(made):
        first, last = fmean(losses[:MEAN_OVER_STEPS]), fmean(losses[-MEAN_OVER_STEPS:])
        print(f"  loss              {first:.3f} at first, {last:.3f} at the end (means of {min(MEAN_OVER_STEPS, len(losses))} steps)")
    print(f'  curves            {made / "logs"} (tensorboard --logdir "{made / "logs"}")')
    print("The tiny base knew nothing. A minute teaches it to put soft patches of colour on white; real pictures take a real base.")
    print(f'Try next: change {directory / "sdxl.toml"}, and run `sdxl-train demo "{directory}"` again to compare.')
    print("For pictures of your own copy that file, name an SDXL checkpoint and your folder in it, and run `sdxl-train FILE.toml`.")


def _losses(made: Path) -> list[float]:
    """The loss of each step of the last run; none where its configuration keeps no metrics.jsonl."""
    log = max((made / "logs").iterdir()) / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    return [line["loss/step"] for line in lines if line.get("loss/step") is not None]


def _before_and_after(directory: Path, made: Path, samples: Sequence[SampleEntry]) -> Path | None:
    """One sheet: drawn before step 1, drawn last, and the picture whose caption is the prompt. None where nothing was drawn."""
    from sdxl_train.sample_files import comparison_sheet

    rounds = [path for path in (made / "samples").iterdir() if path.name.startswith(("epoch_", "step_"))]
    rounds.sort(key=lambda path: path.stat().st_mtime)
    before = made / "samples" / "step_0"
    if not samples or before not in rounds or rounds[-1] == before:
        return None
    pictures = {caption: key for key, caption in _captions((directory / "metadata.json").read_text("utf-8")).items()}
    rows: list[tuple[str, list[Image | None]]] = []
    for i, entry in enumerate(samples):
        trained = directory / "images" / f"{pictures.get(entry.prompt)}.webp"
        rows.append((entry.prompt, [_newest(before, i), _newest(rounds[-1], i), _on_white(trained) if trained.exists() else None]))
    with atomic_file(directory / SHEET) as temporary:
        comparison_sheet(("before", "after", "trained on"), rows, max_side_px=128).save(temporary, format="PNG")
    return directory / SHEET


def _newest(folder: Path, i: int) -> Image | None:
    """The latest picture of benchmark entry i in a round's folder, to which each run of the demo adds its own."""
    from PIL import Image

    paths = sorted(folder.glob(f"*_{i:02d}.png"))
    return Image.open(paths[-1]) if paths else None


def _on_white(path: Path) -> Image:
    from PIL import Image

    picture = Image.open(path).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
