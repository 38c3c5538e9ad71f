"""The core's own TOML keys. Keys that belong to a plugin are declared beside it; keys that name plugins are in plugin_keys.py."""

from typing import Literal

from pydantic import field_validator

from sdxl_train.learning_rates import block_rates
from sdxl_train.options import Options, option


class LossRecorderOptions(Options):
    """The table `loss_recorder_kwargs`."""

    gamma: float = option(
        0.1, "forgetting factor of the moving average of the loss; 1 is the current loss, 0 the mean since the start", zh="损失移动平均的遗忘因子，0~1，越大越接近当前 loss", ge=0, le=1
    )
    stride: int = option(1000, "window of the plain average of the loss, in steps", zh="最近平均 loss 的步长，越小越接近当前 loss", ge=1)


class SampleParams(Options):
    """The table `sample_params`: fills what an entry of the sample benchmark leaves out."""

    prompt: str | None = option(None, "the prompt; absent: every entry of the benchmark needs its own", zh="提示词；缺省时每个采样条目必须自带")
    negative_prompt: str = option("", "what the picture should not show", zh="负面提示词")
    steps: int = option(28, "denoising steps", zh="采样步数", ge=1, le=1000)
    batch_size: int = option(1, "pictures rendered at once", zh="每批图片数", ge=1)
    batch_count: int = option(1, "batches of an entry", zh="批次数", ge=1)
    scale: float = option(7.5, "classifier-free guidance; 1 or less turns it off", zh="CFG 系数，小于等于 1 时关闭", ge=0)
    seed: int = option(42, "seed of an entry's first picture; -1 draws one at random", zh="第一张图的种子；-1 为随机", ge=-1)
    width: int = option(832, "picture width in px, floored to a multiple of 32, at least 64", zh="宽度（像素），向下取 32 的倍数，至少 64", ge=1)
    height: int = option(1216, "picture height in px, floored to a multiple of 32, at least 64", zh="高度（像素），向下取 32 的倍数，至少 64", ge=1)
    original_width: int | None = option(None, "width told to the model as the original one, in px; absent: width * original_scale_factor", zh="条件中的原始宽度（像素）", ge=1)
    original_height: int | None = option(None, "height told to the model as the original one, in px; absent: height * original_scale_factor", zh="条件中的原始高度（像素）", ge=1)
    original_scale_factor: float = option(1.0, "original size / picture size where no original size is given", zh="原始尺寸与图片尺寸之比", gt=0)
    save_latents: bool = option(False, "also decode and save every denoising step", zh="同时保存每一步的解码结果")


class Config(Options):
    """Every key that the core reads, with its default. Cross-key rules are in config_rules.py."""

    # ---- Model and paths ----
    pretrained_model_name_or_path: str = option(
        ..., "base model: a single-file SDXL .safetensors or a diffusers directory", zh="预训练模型路径：safetensors 单文件或 diffusers 目录", min_length=1
    )
    image_dirs: list[str] = option(..., "folders searched recursively for pictures; may be [] only with metadata_files", zh="图像文件夹路径列表")
    metadata_files: list[str] = option([], "metadata files (JSON; .jsonl or .ndjson with one object a line; .parquet), merged field by field, later ones win; [] reads captions from .txt files", zh="元数据文件路径列表（JSON，每行一个对象的 .jsonl/.ndjson，或 .parquet），按字段合并，后面的优先；为空时读取图片旁的 .txt 标注")
    output_dir: str = option(..., "project folder; may hold %index%, %date%, %time%, %datetime%", zh="项目输出文件夹路径", min_length=1)
    output_name: str = option("model", "prefix of saved files", zh="保存文件名前缀", min_length=1, max_length=150)
    records_cache_dir: str | None = option(None, "folder of the data set records; absent: <output_dir>/records", zh="数据记录文件夹；缺省为 <output_dir>/records")
    vae: str | None = option(None, "VAE that replaces the one of the base model everywhere: file or diffusers directory", zh="VAE 模型路径，将覆盖大模型自带的 vae")
    no_half_vae: bool = option(False, "run the VAE in float32 whatever mixed_precision says", zh="VAE 使用 float32")
    tokenizer_cache_dir: str = option("tokenizers", "folder the tokenizers are read from, and stored in when it is empty", zh="分词器缓存路径", min_length=1)
    # ---- Dataset ----
    flip_aug: bool = option(True, "flip each picture horizontally at half of its fetches; doubles time and size of cached latents", zh="随机水平翻转；缓存潜变量的时长和大小加倍")
    bucket_reso_step: int = option(32, "every bucket side is a multiple of this many px; 32 or 64", zh="分桶分辨率步长（像素），以 32 或 64 最佳", ge=8, multiple_of=8)
    resolution: int = option(1024, "largest bucket: its area is at most resolution * resolution px", zh="分桶的最大分辨率（像素）", ge=8, le=16384)
    bad_images: Literal["error", "skip"] = option("error", "what to do with unreadable pictures: stop before training and list them, or leave them out", zh="遇到损坏图片：报错或跳过")
    max_image_pixels: int = option(200_000_000, "a picture with more px, by its header, is bad and never decoded", zh="单张图片的最大像素数", ge=1)
    max_dataset_n_workers: int = option(1, "threads that build the data set", zh="数据集的最大工作线程数", ge=0)
    max_dataloader_n_workers: int = option(4, "data-loader processes, at most cpu count - 1; 0 loads in the main process", zh="数据加载器的最大工作进程数", ge=0)
    persistent_data_loader_workers: bool = option(False, "keep the data-loader processes between epochs", zh="数据加载器进程持久化")
    # ---- Loss recorder, saving, resuming ----
    loss_recorder_kwargs: LossRecorderOptions = option(LossRecorderOptions(), "loss statistics", zh="损失记录器参数")
    save_precision: Literal["fp16", "bf16", "float", "fp32", "float32", "keep"] = option(
        "fp16", "dtype of floating-point tensors in saved models; keep: as held in training", zh="保存精度，通常与混合精度相同"
    )
    save_model: bool = option(True, "triggers write a model file", zh="触发时保存模型")
    save_train_state: bool = option(True, "triggers also write a resumable train state", zh="触发时同时保存训练状态")
    keep_train_states: int = option(1, "complete train states kept, newest first; 0 keeps all", zh="保留的训练状态数；0 为全部", ge=0)
    keep_models: int = option(0, "saved models kept, newest first; 0 keeps all", zh="保留的模型数；0 为全部", ge=0)
    resume_from: str | None = option(None, 'train state to go on from: a folder, or "latest"', zh='从训练状态恢复：文件夹或 "latest"')
    # ---- Training ----
    seed: int = option(42, "source of every random decision", zh="随机种子", ge=0)
    num_train_epochs: int = option(100, "epochs; in each, every picture is trained num_repeats times", zh="训练总轮数", ge=1)
    max_train_steps: int | None = option(None, "end after this many steps; absent: by epochs", zh="训练总步数上限", ge=1)
    batch_size: int = option(1, "pictures of a micro-batch, on each process", zh="单卡批量大小", ge=1)
    learning_rate: float = option(1e-5, "U-Net learning rate; 0 freezes the U-Net", zh="学习率", ge=0)
    block_lr: float | str | list[float] | None = option(None, "deprecated: U-Net learning rate per block, one number or 23", zh="分块学习率（弃用）")
    lr_warmup_steps: int = option(100, "steps of linear warm-up", zh="学习率预热步数", ge=0)
    full_bf16: bool = option(False, "weights, gradients and text encoders in bf16: less memory, less precision", zh="全 bf16 精度，以精度换显存")
    full_fp16: bool = option(False, "weights, gradients and text encoders in fp16: less memory, less precision", zh="全 fp16 精度，以精度换显存")
    fused_backward: bool = option(False, "update each tensor as soon as its gradient is complete, and free the gradient: less memory, same result", zh="反向传播中逐张量更新并释放梯度，以节省显存")
    compile: bool = option(False, "compile the U-Net's blocks and the update of AdaFactor and AdamW with torch.compile: faster after some minutes, same result within rounding", zh="用 torch.compile 编译 U-Net 模块以及 AdaFactor、AdamW 的更新，首次较慢，之后更快")
    train_text_encoder: bool = option(False, "train both text encoders", zh="训练文本编码器")
    learning_rate_te1: float | None = option(None, "learning rate of text encoder 1; absent: learning_rate, 0 freezes it", zh="文本编码器 1 学习率", ge=0)
    learning_rate_te2: float | None = option(None, "learning rate of text encoder 2; absent: learning_rate, 0 freezes it", zh="文本编码器 2 学习率", ge=0)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time, same result", zh="梯度检查点，以时间换显存")
    gradient_accumulation_steps: int = option(1, "micro-batches of a step, on each process", zh="梯度累积步数", ge=1)
    max_nonfinite_steps: int = option(5, "so many non-finite losses in a row end the run", zh="连续非有限 loss 的步数上限", ge=1)
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "dtype of autocast; no: everything in float32", zh="混合精度；no 为全精度")
    cpu: bool = option(False, "train on the CPU even where an accelerator is present", zh="使用 CPU 训练，极慢")
    # ---- Text, attention, noise, loss, timesteps ----
    max_token_length: Literal[75, 150, 225] = option(225, "tokens of a caption that are used: 75, 150 or 225", zh="最大 token 长度")
    mem_eff_attn: bool = option(False, "attention computed in chunks: low memory, no extra package", zh="内存效率注意力")
    xformers: bool = option(False, "xformers attention in U-Net and VAE", zh="使用 xformers")
    diffusers_xformers: bool = option(False, "xformers through the switch of diffusers", zh="使用 diffusers 的 xformers")
    sdpa: bool = option(True, "torch's scaled-dot-product attention; false: plain attention", zh="使用 sdpa")
    clip_skip: int = option(1, "text-encoder layer used, counted from the last; 1 is what SDXL was trained with, 0 means 1", zh="所用的 CLIP 文本编码器层（从最后一层数起），通常为 1 或 2；0 等同于 1", ge=0, le=12)
    max_grad_norm: float = option(0.0, "total gradient norm is clipped to it; 0 turns it off", zh="最大梯度范数；0 为关闭", ge=0)
    zero_terminal_snr: bool = option(False, "rescale the noise schedule to SNR 0 at the last timestep; meant for v_prediction", zh="零终端信噪比")
    prediction_type: Literal["epsilon", "v_prediction"] = option("epsilon", "what the U-Net predicts", zh="预测类型")
    min_timestep: int = option(0, "lowest timestep drawn", zh="最小时间步", ge=0, le=999)
    max_timestep: int = option(1000, "upper end of the timesteps drawn, exclusive", zh="最大时间步（不含）", ge=1, le=1000)
    # ---- Sampling ----
    sample_benchmark: str | None = option(None, "JSON file with the pictures to render", zh="采样基准 JSON 文件")
    sample_params: SampleParams = option(SampleParams(), "fills what an entry of the benchmark leaves out", zh="基础采样参数，填补采样基准缺失的参数")
    # ---- Latent cache ----
    vae_batch_size: int = option(1, "pictures of a VAE encode while caching", zh="VAE 批量大小", ge=1)
    cache_latents: bool = option(True, "encode every picture before training; false: encode in every step", zh="缓存潜变量")
    cache_latents_to_disk: bool = option(True, "store the latents as .npz beside each picture", zh="将潜变量缓存到磁盘")
    check_cache_validity: bool = option(True, "verify existing caches before training and encode bad ones again", zh="检查缓存有效性")
    keep_cached_latents_in_memory: bool = option(True, "load latents once and keep them; false: read at each fetch", zh="保持缓存潜变量在内存中")
    async_cache: bool = option(True, "write cache files in the background while the next pictures are encoded", zh="异步写入缓存")

    @field_validator("block_lr")
    @classmethod
    def _is_one_rate_or_one_a_block(cls, block_lr: float | str | list[float] | None) -> float | str | list[float] | None:
        if block_lr is not None:
            block_rates(block_lr)
        return block_lr

    @field_validator("output_name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        if any(char in name for char in '/\\:*?"<>|') or any(ord(char) < 32 for char in name) or name.strip(". ") != name:
            raise ValueError("it must be characters of a file name, without / \\ : * ? \" < > | and not starting or ending with a dot or space")
        return name
