"""Names and shapes of every tensor: the single-file SDXL layout beside the names inside diffusers' and transformers' modules.

The layout is that of Stability's generative-models, which ComfyUI, A1111 and diffusers' single-file loader read. The rules follow the
architecture, so the list is complete: what it does not hold is not part of the model. Needs no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sdxl_train.model.architecture import CONTEXT_LENGTH, LATENT_CHANNELS, NUM_SIZE_IDS, VOCABULARY_SIZE, Architecture, TextArchitecture

PartName = Literal["unet", "vae", "text_encoder", "text_encoder_2"]

# What can be trained, in the order of the networks in a run.
TRAINABLE_PARTS: tuple[PartName, PartName, PartName] = ("unet", "text_encoder", "text_encoder_2")

PREFIXES: dict[PartName, str] = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.text_model.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
POSITION_IDS = PREFIXES["text_encoder"] + "embeddings.position_ids"
LOGIT_SCALE = PREFIXES["text_encoder_2"] + "logit_scale"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file.

    `modules` are the names in the network's state dict, without the `text_model.` that some versions of transformers put before them:
    one name; three whose rows are stacked in the file (queries, keys, values); or none for what the networks do not hold (position ids,
    logit scale), which a file may lack. `transposed` values lie transposed in the file. Where the file's shape is (C, C, 1, 1) for a
    linear layer, `module_shape` is (C, C).
    """

    part: PartName
    name: str
    shape: tuple[int, ...]
    modules: tuple[str, ...]
    module_shape: tuple[int, ...]
    transposed: bool = False


def file_entries(architecture: Architecture) -> list[Entry]:
    """All tensors of a file of this architecture, U-Net first. SDXL has 1680 + 248 + 197 + 390."""
    return [
        *unet_entries(architecture),
        *vae_entries(architecture),
        *_text_encoder_entries(architecture.text_encoder),
        *_text_encoder_2_entries(architecture.text_encoder_2),
    ]


def module_name(name: str) -> str:
    """A state dict's name without what wrappers and versions of transformers put in front of it."""
    return name.replace("_orig_mod.", "").removeprefix("module.").removeprefix("text_model.")


def _layer(part: PartName, name: str, module: str, *shape: int, bias: bool = True, pointwise: bool = False) -> Iterator[Entry]:
    """Weight and bias of a linear, convolution or norm layer; a pointwise one is a 1x1 convolution in the file, linear in the module."""
    name = PREFIXES[part] + name
    yield Entry(part, f"{name}.weight", (*shape, 1, 1) if pointwise else shape, (f"{module}.weight",), shape)
    if bias:
        yield Entry(part, f"{name}.bias", shape[:1], (f"{module}.bias",), shape[:1])


# U-Net


def unet_entries(architecture: Architecture) -> Iterator[Entry]:
    channels, depths = architecture.unet_channels, architecture.transformer_layers
    time_width = 4 * channels[0]
    size_width = architecture.text_encoder_2.projection + NUM_SIZE_IDS * architecture.size_embedding_width
    yield from _layer("unet", "time_embed.0", "time_embedding.linear_1", time_width, channels[0])
    yield from _layer("unet", "time_embed.2", "time_embedding.linear_2", time_width, time_width)
    yield from _layer("unet", "label_emb.0.0", "add_embedding.linear_1", time_width, size_width)
    yield from _layer("unet", "label_emb.0.2", "add_embedding.linear_2", time_width, time_width)
    yield from _layer("unet", "input_blocks.0.0", "conv_in", channels[0], LATENT_CHANNELS, 3, 3)
    yield from _unet_down(architecture)
    last = channels[-1]
    yield from _unet_resnet("middle_block.0", "mid_block.resnets.0", last, last, time_width)
    yield from _transformer("middle_block.1", "mid_block.attentions.0", last, depths[-1], architecture.context_width)
    yield from _unet_resnet("middle_block.2", "mid_block.resnets.1", last, last, time_width)
    yield from _unet_up(architecture)
    yield from _layer("unet", "out.0", "conv_norm_out", channels[0])
    yield from _layer("unet", "out.2", "conv_out", LATENT_CHANNELS, channels[0], 3, 3)


def _unet_down(architecture: Architecture) -> Iterator[Entry]:
    channels, depths = architecture.unet_channels, architecture.transformer_layers
    for i, width in enumerate(channels):
        for j in range(2):
            block, module = f"input_blocks.{3 * i + j + 1}", f"down_blocks.{i}"
            incoming = channels[max(i - 1, 0)] if j == 0 else width
            yield from _unet_resnet(f"{block}.0", f"{module}.resnets.{j}", incoming, width, 4 * channels[0])
            yield from _transformer(f"{block}.1", f"{module}.attentions.{j}", width, depths[i], architecture.context_width)
        if i < len(channels) - 1:
            yield from _layer("unet", f"input_blocks.{3 * i + 3}.0.op", f"down_blocks.{i}.downsamplers.0.conv", width, width, 3, 3)


def _unet_up(architecture: Architecture) -> Iterator[Entry]:
    channels, depths = architecture.unet_channels[::-1], architecture.transformer_layers[::-1]
    last = len(channels) - 1
    for i, width in enumerate(channels):
        for j in range(3):
            block, module = f"output_blocks.{3 * i + j}", f"up_blocks.{i}"
            below = channels[max(i - 1, 0)] if j == 0 else width
            skipped = channels[min(i + 1, last)] if j == 2 else width
            yield from _unet_resnet(f"{block}.0", f"{module}.resnets.{j}", below + skipped, width, 4 * channels[-1])
            yield from _transformer(f"{block}.1", f"{module}.attentions.{j}", width, depths[i], architecture.context_width)
        if i < last:
            place = 2 if depths[i] else 1
            upsampler = f"output_blocks.{3 * i + 2}.{place}.conv"
            yield from _layer("unet", upsampler, f"up_blocks.{i}.upsamplers.0.conv", width, width, 3, 3)


def _unet_resnet(name: str, module: str, incoming: int, width: int, time_width: int) -> Iterator[Entry]:
    yield from _layer("unet", f"{name}.in_layers.0", f"{module}.norm1", incoming)
    yield from _layer("unet", f"{name}.in_layers.2", f"{module}.conv1", width, incoming, 3, 3)
    yield from _layer("unet", f"{name}.emb_layers.1", f"{module}.time_emb_proj", width, time_width)
    yield from _layer("unet", f"{name}.out_layers.0", f"{module}.norm2", width)
    yield from _layer("unet", f"{name}.out_layers.3", f"{module}.conv2", width, width, 3, 3)
    if incoming != width:
        yield from _layer("unet", f"{name}.skip_connection", f"{module}.conv_shortcut", width, incoming, 1, 1)


def _transformer(name: str, module: str, width: int, depth: int, context_width: int) -> Iterator[Entry]:
    """Names inside are the same in file and module; nothing for depth 0."""
    if depth == 0:
        return
    yield from _layer("unet", f"{name}.norm", f"{module}.norm", width)
    yield from _layer("unet", f"{name}.proj_in", f"{module}.proj_in", width, width)
    for k in range(depth):
        for inner, shape, bias in _transformer_block(width, context_width):
            inner = f"transformer_blocks.{k}.{inner}"
            yield from _layer("unet", f"{name}.{inner}", f"{module}.{inner}", *shape, bias=bias)
    yield from _layer("unet", f"{name}.proj_out", f"{module}.proj_out", width, width)


def _transformer_block(width: int, context_width: int) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    for attention, source in (("attn1", width), ("attn2", context_width)):
        yield f"{attention}.to_q", (width, width), False
        yield f"{attention}.to_k", (width, source), False
        yield f"{attention}.to_v", (width, source), False
        yield f"{attention}.to_out.0", (width, width), True
    for norm in ("norm1", "norm2", "norm3"):
        yield norm, (width,), True
    yield "ff.net.0.proj", (8 * width, width), True  # gated: values and gates
    yield "ff.net.2", (width, 4 * width), True


# VAE


def vae_entries(architecture: Architecture) -> Iterator[Entry]:
    channels = architecture.vae_channels
    moments = 2 * LATENT_CHANNELS
    first, last = channels[0], channels[-1]
    yield from _layer("vae", "encoder.conv_in", "encoder.conv_in", first, 3, 3, 3)
    for i, width in enumerate(channels):
        for j in range(2):
            incoming = channels[max(i - 1, 0)] if j == 0 else width
            yield from _vae_resnet(f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}", incoming, width)
        if i < len(channels) - 1:
            sampler = f"encoder.down_blocks.{i}.downsamplers.0.conv"
            yield from _layer("vae", f"encoder.down.{i}.downsample.conv", sampler, width, width, 3, 3)
    yield from _vae_middle("encoder", last)
    yield from _layer("vae", "encoder.norm_out", "encoder.conv_norm_out", last)
    yield from _layer("vae", "encoder.conv_out", "encoder.conv_out", moments, last, 3, 3)
    yield from _layer("vae", "quant_conv", "quant_conv", moments, moments, 1, 1)
    yield from _layer("vae", "post_quant_conv", "post_quant_conv", LATENT_CHANNELS, LATENT_CHANNELS, 1, 1)
    yield from _layer("vae", "decoder.conv_in", "decoder.conv_in", last, LATENT_CHANNELS, 3, 3)
    yield from _vae_middle("decoder", last)
    for i, width in enumerate(reversed(channels)):
        level = len(channels) - 1 - i
        for j in range(3):
            incoming = channels[min(level + 1, len(channels) - 1)] if j == 0 else width
            yield from _vae_resnet(f"decoder.up.{level}.block.{j}", f"decoder.up_blocks.{i}.resnets.{j}", incoming, width)
        if level > 0:
            sampler = f"decoder.up_blocks.{i}.upsamplers.0.conv"
            yield from _layer("vae", f"decoder.up.{level}.upsample.conv", sampler, width, width, 3, 3)
    yield from _layer("vae", "decoder.norm_out", "decoder.conv_norm_out", first)
    yield from _layer("vae", "decoder.conv_out", "decoder.conv_out", 3, first, 3, 3)


def _vae_resnet(name: str, module: str, incoming: int, width: int) -> Iterator[Entry]:
    yield from _layer("vae", f"{name}.norm1", f"{module}.norm1", incoming)
    yield from _layer("vae", f"{name}.conv1", f"{module}.conv1", width, incoming, 3, 3)
    yield from _layer("vae", f"{name}.norm2", f"{module}.norm2", width)
    yield from _layer("vae", f"{name}.conv2", f"{module}.conv2", width, width, 3, 3)
    if incoming != width:
        yield from _layer("vae", f"{name}.nin_shortcut", f"{module}.conv_shortcut", width, incoming, 1, 1)


def _vae_middle(half: str, width: int) -> Iterator[Entry]:
    attention, module = f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0"
    yield from _vae_resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", width, width)
    yield from _layer("vae", f"{attention}.norm", f"{module}.group_norm", width)
    for name, inner in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        yield from _layer("vae", f"{attention}.{name}", f"{module}.{inner}", width, width, pointwise=True)
    yield from _vae_resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", width, width)


# Text encoders


def _text_encoder_entries(text: TextArchitecture) -> Iterator[Entry]:
    """TE1 has Hugging Face's names already."""
    part: PartName = "text_encoder"
    for name, size in (("token_embedding", VOCABULARY_SIZE), ("position_embedding", CONTEXT_LENGTH)):
        yield from _layer(part, f"embeddings.{name}", f"embeddings.{name}", size, text.width, bias=False)
    yield Entry(part, POSITION_IDS, (1, CONTEXT_LENGTH), (), ())
    for i in range(text.layers):
        layer = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _layer(part, f"{layer}.self_attn.{name}", f"{layer}.self_attn.{name}", text.width, text.width)
        yield from _layer(part, f"{layer}.layer_norm1", f"{layer}.layer_norm1", text.width)
        yield from _layer(part, f"{layer}.mlp.fc1", f"{layer}.mlp.fc1", text.mlp_width, text.width)
        yield from _layer(part, f"{layer}.mlp.fc2", f"{layer}.mlp.fc2", text.width, text.mlp_width)
        yield from _layer(part, f"{layer}.layer_norm2", f"{layer}.layer_norm2", text.width)
    yield from _layer(part, "final_layer_norm", "final_layer_norm", text.width)


def _text_encoder_2_entries(text: TextArchitecture) -> Iterator[Entry]:
    """TE2 has OpenCLIP's names."""
    part: PartName = "text_encoder_2"
    prefix = PREFIXES[part]
    yield from _layer(part, "token_embedding", "embeddings.token_embedding", VOCABULARY_SIZE, text.width, bias=False)
    positions = (CONTEXT_LENGTH, text.width)
    yield Entry(part, f"{prefix}positional_embedding", positions, ("embeddings.position_embedding.weight",), positions)
    for i in range(text.layers):
        block, layer = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind, inner in (("weight", (text.width,)), ("bias", ())):
            modules = tuple(f"{layer}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
            yield Entry(part, f"{prefix}{block}.attn.in_proj_{kind}", (3 * text.width, *inner), modules, (text.width, *inner))
        yield from _layer(part, f"{block}.attn.out_proj", f"{layer}.self_attn.out_proj", text.width, text.width)
        yield from _layer(part, f"{block}.ln_1", f"{layer}.layer_norm1", text.width)
        yield from _layer(part, f"{block}.mlp.c_fc", f"{layer}.mlp.fc1", text.mlp_width, text.width)
        yield from _layer(part, f"{block}.mlp.c_proj", f"{layer}.mlp.fc2", text.width, text.mlp_width)
        yield from _layer(part, f"{block}.ln_2", f"{layer}.layer_norm2", text.width)
    yield from _layer(part, "ln_final", "final_layer_norm", text.width)
    shape = (text.width, text.projection)
    yield Entry(part, f"{prefix}text_projection", shape, ("text_projection.weight",), shape[::-1], transposed=True)
    yield Entry(part, LOGIT_SCALE, (), (), ())
