"""`sdxl-train demo`: writes a small SDXL that can draw, pictures it has never seen and a configuration, and fine-tunes it on them.

What it learned and what it forgot is measured and shown; docs/demo.md says how the base was made.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from sdxl_train.atomic import atomic_file
from sdxl_train.demo_pictures import Split, benchmark_of, canvas_of, on_canvas, packaged_captions, packaged_picture, split_pictures
from sdxl_train.errors import ConfigError
from sdxl_train.toml_text import toml_value

FILES = ("sdxl.toml", "benchmark.json", "metadata.json", "NOTICE.md", "base.safetensors")  # and the folder images/
NUM_OLD_PROMPTS = 20  # of pictures that the base knows

FIRST_WORDS = "# The demo's configuration."
TOML = Template("""\
$first_words Change what you like and train again:
#     sdxl-train $file
# `sdxl-train example` prints every key with its default. / 演示配置，可随意修改后重新训练；sdxl-train example 列出所有配置项。

# ---- What to train, on what, and where to / 模型与数据 ----
pretrained_model_name_or_path = $base  # a small SDXL that draws 200 icons; yours: sd_xl_base_1.0.safetensors / 预训练模型
image_dirs = [$images]  # 24 pictures it has never seen; searched recursively / 图像文件夹
metadata_files = [$metadata]  # captions and more; [] reads .txt files beside the pictures / 元数据文件
output_dir = $output  # models, samples, logs / 输出文件夹
tokenizer_cache_dir = $tokenizers  # 分词器缓存路径

# ---- Pictures / 图像 ----
resolution = 128  # px; SDXL itself: 1024 / 分桶的最大分辨率
flip_aug = false  # true mirrors half of the pictures / 随机水平翻转
max_token_length = 75  # of a caption; 225 for long ones / 最大 token 长度
max_dataloader_n_workers = 0  # these few pictures need no processes of their own / 数据加载进程数
caption_processor = "drop_caption"  # some steps without text, which guidance (scale below) needs / 随机丢弃描述，供 CFG 使用

# ---- Training / 训练 ----
num_train_epochs = 60  # of 5 steps each / 训练总轮数
batch_size = 8  # 批量大小
optimizer_type = "AdamW"  # the default is "AdaFactor", which needs less memory / 优化器
learning_rate = 5e-4  # so high since three minutes have to do; a real base takes about 1e-5 / 学习率
lr_scheduler = "cosine"  # down to 0 at the last step / 学习率调度器
lr_warmup_steps = 20  # 预热步数
max_grad_norm = 1.0  # 梯度裁剪
prediction_type = "v_prediction"  # what this base was trained for; SDXL itself: "epsilon" / 预测目标，须与底模一致
min_snr_gamma = 0.0  # off: so small a model learns captions from the noisiest steps, which it would weaken / 关闭
seed = 1  # 随机种子
cpu = true  # leave it out to use your GPU / 使用 CPU 训练

# ---- Pictures drawn before the first step and at the end / 采样 ----
sample_benchmark = $benchmark  # prompts: the new pictures, and some that the base knows / 采样基准
sample_every_n_epochs = 60  # 每 n 轮采样一次
sample_sampler = "ddim"  # 采样器

[sample_params]  # for what the benchmark leaves out; tables come last in the file / 基础采样参数
steps = 20
scale = 5.0  # CFG 系数

[caption_processor_kwargs]
probability = 0.1
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
    from sdxl_train.demo_report import say_what_was_made
    from sdxl_train.training import run_training

    settings = load_settings(config_file)
    run_training(settings)
    say_what_was_made(directory, settings.config.output_dir, settings.samples)


def _is_of_the_demo(config_file: Path) -> bool:
    if not config_file.is_file():
        return False
    with open(config_file, "rb") as file:
        return file.read(len(FIRST_WORDS)) == FIRST_WORDS.encode()


def _prepare(directory: Path) -> list[str]:
    """Write what is missing; all but the paths in sdxl.toml is the same each time. Returns which of the files were there."""
    packaged: Traversable = resources.files("sdxl_train") / "demo_data"
    captions = packaged_captions()
    split = split_pictures(captions)
    contents: dict[str, Callable[[Path], object]] = {  # sdxl.toml first: it makes the folder a demo's
        "sdxl.toml": lambda path: path.write_text(_configuration(directory), "utf-8"),
        "benchmark.json": lambda path: path.write_text(_benchmark(split, captions), "utf-8"),
        "metadata.json": lambda path: path.write_text(_lines({key: {"caption": captions[key]} for key in split.new}), "utf-8"),
        "NOTICE.md": lambda path: path.write_bytes((packaged / "NOTICE.md").read_bytes()),
    }
    for key in split.new:
        contents[f"images/{key}.png"] = lambda path, key=key: on_canvas(packaged_picture(key)).save(path, format="PNG")
    contents["base.safetensors"] = lambda path: path.write_bytes((packaged / "base.safetensors").read_bytes())
    kept = [name for name in FILES if (directory / name).exists()]
    for name, write in contents.items():
        if not (directory / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(directory / name) as temporary:
                write(temporary)
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


def _benchmark(split: Split, captions: dict[str, str]) -> str:
    """All new pictures, and some of the base's, each in the size in which it is trained."""
    prompts = [*split.new, *split.base[:: len(split.base) // NUM_OLD_PROMPTS]]
    return benchmark_of((captions[key], canvas_of(packaged_picture(key).size)) for key in prompts)


def _lines(metadata: dict[str, dict[str, str]]) -> str:
    return "{\n  " + ",\n  ".join(f"{json.dumps(key)}: {json.dumps(fields)}" for key, fields in metadata.items()) + "\n}\n"
