"""Which SDXL: the sizes that distinguish one model of the family from another. Derived from tensor shapes; needs no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

METADATA_KEY = "sdxl_train.architecture"

LATENT_CHANNELS = 4
PX_PER_LATENT = 8  # in each direction
VOCABULARY_SIZE = 49408
CONTEXT_LENGTH = 77
HEAD_CHANNELS = 64  # SDXL's channels per attention head, in the U-Net and in both text encoders
NORM_GROUPS = 32
NUM_SIZE_IDS = 6  # original, crop and target size, two numbers each


@dataclass(frozen=True, slots=True)
class TextArchitecture:
    """A CLIP text encoder: width, MLP width, number of layers and attention heads; projection 0 where there is none."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    projection: int = 0


@dataclass(frozen=True, slots=True)
class Architecture:
    """Everything needed to build the four networks.

    `transformer_layers` has one number per U-Net level, 0 for a level without attention; the middle block has as many as the last level.
    Levels have two ResNet blocks downwards and three upwards, in U-Net and VAE, as in every SDXL.
    """

    unet_channels: tuple[int, ...]
    transformer_layers: tuple[int, ...]
    unet_heads: tuple[int, ...]
    unet_norm_groups: int
    size_embedding_width: int  # of one number
    vae_channels: tuple[int, ...]
    vae_norm_groups: int
    text_encoder: TextArchitecture
    text_encoder_2: TextArchitecture

    def __post_init__(self) -> None:
        for channels, groups, what in (
            (self.unet_channels, self.unet_norm_groups, "U-Net"),
            (self.vae_channels, self.vae_norm_groups, "VAE"),
        ):
            if any(count % groups for count in channels):
                raise ValueError(f"{what} channels {channels} cannot be normalised in {groups} groups")
        if len(self.unet_heads) != len(self.unet_channels) or any(c % h for c, h in zip(self.unet_channels, self.unet_heads, strict=True)):
            raise ValueError(f"U-Net channels {self.unet_channels} cannot be split into {self.unet_heads} attention heads")
        for text in (self.text_encoder, self.text_encoder_2):
            if text.width % text.heads:
                raise ValueError(f"a text encoder {text.width} wide cannot be split into {text.heads} attention heads")

    @property
    def context_width(self) -> int:
        """Width of the text embedding that the U-Net reads: both encoders side by side."""
        return self.text_encoder.width + self.text_encoder_2.width

    def to_metadata(self) -> str | None:
        """What tensor shapes do not tell, as JSON for the file metadata; None where it is SDXL's own."""
        hidden = _hidden_sizes(self)
        own = _own_hidden_sizes(self.unet_channels, self.text_encoder.width, self.text_encoder_2.width)
        return None if hidden == own else json.dumps(hidden)

    def to_diffusers_configs(self) -> dict[str, dict[str, Any]]:
        """Constructor arguments by part: UNet2DConditionModel, AutoencoderKL, and CLIPTextConfig for both text encoders."""
        levels, vae_levels = len(self.unet_channels), len(self.vae_channels)
        with_attention = [layers > 0 for layers in self.transformer_layers]
        unet = {
            "sample_size": 128,
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "block_out_channels": list(self.unet_channels),
            "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in with_attention],
            "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(with_attention)],
            "layers_per_block": 2,
            "transformer_layers_per_block": [max(1, layers) for layers in self.transformer_layers],
            "attention_head_dim": list(self.unet_heads),  # in diffusers this is the number of heads
            "norm_num_groups": self.unet_norm_groups,
            "cross_attention_dim": self.context_width,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": self.size_embedding_width,
            "projection_class_embeddings_input_dim": self.text_encoder_2.projection + NUM_SIZE_IDS * self.size_embedding_width,
        }
        vae = {
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": list(self.vae_channels),
            "down_block_types": ["DownEncoderBlock2D"] * vae_levels,
            "up_block_types": ["UpDecoderBlock2D"] * vae_levels,
            "layers_per_block": 2,
            "latent_channels": LATENT_CHANNELS,
            "norm_num_groups": self.vae_norm_groups,
            "sample_size": 1024,
            "scaling_factor": 0.13025,
        }
        assert levels == len(self.transformer_layers)
        return {
            "unet": unet,
            "vae": vae,
            "text_encoder": _clip_config(self.text_encoder, "quick_gelu"),
            "text_encoder_2": _clip_config(self.text_encoder_2, "gelu"),
        }


def _clip_config(text: TextArchitecture, activation: str) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY_SIZE,
        "max_position_embeddings": CONTEXT_LENGTH,
        "hidden_size": text.width,
        "intermediate_size": text.mlp_width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "projection_dim": text.projection or text.width,
        "hidden_act": activation,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
    }


SDXL = Architecture(
    unet_channels=(320, 640, 1280),
    transformer_layers=(0, 2, 10),
    unet_heads=(5, 10, 20),
    unet_norm_groups=NORM_GROUPS,
    size_embedding_width=256,
    vae_channels=(128, 256, 512, 512),
    vae_norm_groups=NORM_GROUPS,
    text_encoder=TextArchitecture(width=768, mlp_width=3072, layers=12, heads=12),
    text_encoder_2=TextArchitecture(width=1280, mlp_width=5120, layers=32, heads=20, projection=1280),
)


def architecture_from_shapes(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> Architecture:
    """Derives the architecture from a few tensors of the single-file layout; the others are for the caller to compare.

    Raises:
        ValueError: a tensor that is needed is missing or cannot be one of SDXL, or the metadata entry is damaged.
    """
    unet, vae = "model.diffusion_model.", "first_stage_model.encoder.down."
    te1, te2 = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
    levels = range(_count(shapes, unet + "input_blocks.{}.0.in_layers.2.weight", first=1, stride=3))
    unet_channels = tuple(_size(shapes, f"{unet}input_blocks.{3 * i + 1}.0.in_layers.2.weight", 0) for i in levels)
    depths = tuple(_count(shapes, f"{unet}input_blocks.{3 * i + 1}.1.transformer_blocks.{{}}.norm1.weight") for i in levels)
    vae_levels = range(_count(shapes, vae + "{}.block.0.conv1.weight"))
    width, width_2 = _size(shapes, te1 + "embeddings.token_embedding.weight", 1), _size(shapes, te2 + "token_embedding.weight", 1)
    projection = _size(shapes, te2 + "text_projection", 1)
    size_ids = _size(shapes, unet + "label_emb.0.0.weight", 1) - projection
    if size_ids <= 0 or size_ids % NUM_SIZE_IDS or not levels or not vae_levels or not depths[-1]:
        raise ValueError("its U-Net or VAE is not built like SDXL's")
    hidden = _own_hidden_sizes(unet_channels, width, width_2)
    if METADATA_KEY in metadata:
        hidden |= _parse_hidden_sizes(metadata[METADATA_KEY])
    return Architecture(
        unet_channels=unet_channels,
        transformer_layers=depths,
        unet_heads=tuple(hidden["unet_heads"]),
        unet_norm_groups=hidden["unet_norm_groups"],
        size_embedding_width=size_ids // NUM_SIZE_IDS,
        vae_channels=tuple(_size(shapes, f"{vae}{i}.block.0.conv1.weight", 0) for i in vae_levels),
        vae_norm_groups=hidden["vae_norm_groups"],
        text_encoder=TextArchitecture(
            width=width,
            mlp_width=_size(shapes, te1 + "encoder.layers.0.mlp.fc1.weight", 0),
            layers=_count(shapes, te1 + "encoder.layers.{}.mlp.fc1.weight"),
            heads=hidden["text_encoder_heads"],
        ),
        text_encoder_2=TextArchitecture(
            width=width_2,
            mlp_width=_size(shapes, te2 + "transformer.resblocks.0.mlp.c_fc.weight", 0),
            layers=_count(shapes, te2 + "transformer.resblocks.{}.mlp.c_fc.weight"),
            heads=hidden["text_encoder_2_heads"],
            projection=projection,
        ),
    )


def architecture_from_configs(configs: Mapping[str, Mapping[str, Any]]) -> Architecture:
    """Reads the architecture from the config.json of a diffusers directory's unet, vae, text_encoder and text_encoder_2.

    Raises:
        ValueError: an entry is missing or cannot be one of SDXL.
    """
    unet, vae = configs["unet"], configs["vae"]
    try:
        channels = tuple(unet["block_out_channels"])
        layers = unet.get("transformer_layers_per_block", 1)
        layers = [layers] * len(channels) if isinstance(layers, int) else layers
        heads = unet.get("num_attention_heads") or unet["attention_head_dim"]
        heads = [heads] * len(channels) if isinstance(heads, int) else heads
        size_ids = unet["projection_class_embeddings_input_dim"] - configs["text_encoder_2"]["projection_dim"]
        found = Architecture(
            unet_channels=channels,
            transformer_layers=tuple(
                count if "CrossAttn" in kind else 0 for count, kind in zip(layers, unet["down_block_types"], strict=True)
            ),
            unet_heads=tuple(heads),
            unet_norm_groups=unet.get("norm_num_groups", NORM_GROUPS),
            size_embedding_width=size_ids // NUM_SIZE_IDS,
            vae_channels=tuple(vae["block_out_channels"]),
            vae_norm_groups=vae.get("norm_num_groups", NORM_GROUPS),
            text_encoder=_text_architecture(configs["text_encoder"], projection=0),
            text_encoder_2=_text_architecture(configs["text_encoder_2"], projection=configs["text_encoder_2"]["projection_dim"]),
        )
        _require_counts([*found.unet_channels, *found.unet_heads, *found.vae_channels, found.size_embedding_width])
        _require_counts([*asdict(found.text_encoder_2).values(), found.unet_norm_groups, found.vae_norm_groups])
        _require_counts([count + 1 for count in (*found.transformer_layers, *asdict(found.text_encoder).values())])
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"its config.json files are not those of SDXL ({type(error).__name__}: {error})") from error
    return found


def _text_architecture(config: Mapping[str, Any], projection: int) -> TextArchitecture:
    return TextArchitecture(
        width=config["hidden_size"],
        mlp_width=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        projection=projection,
    )


def _hidden_sizes(architecture: Architecture) -> dict[str, Any]:
    return {
        "unet_heads": list(architecture.unet_heads),
        "unet_norm_groups": architecture.unet_norm_groups,
        "vae_norm_groups": architecture.vae_norm_groups,
        "text_encoder_heads": architecture.text_encoder.heads,
        "text_encoder_2_heads": architecture.text_encoder_2.heads,
    }


def _own_hidden_sizes(unet_channels: Sequence[int], width: int, width_2: int) -> dict[str, Any]:
    return {
        "unet_heads": [max(1, channels // HEAD_CHANNELS) for channels in unet_channels],
        "unet_norm_groups": NORM_GROUPS,
        "vae_norm_groups": NORM_GROUPS,
        "text_encoder_heads": max(1, width // HEAD_CHANNELS),
        "text_encoder_2_heads": max(1, width_2 // HEAD_CHANNELS),
    }


def _parse_hidden_sizes(text: str) -> dict[str, Any]:
    known = {"unet_heads", "unet_norm_groups", "vae_norm_groups", "text_encoder_heads", "text_encoder_2_heads"}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata entry {METADATA_KEY} is not JSON") from error
    if not isinstance(found, dict) or not set(found) <= known or not isinstance(found.get("unet_heads", []), list):
        raise ValueError(f"its metadata entry {METADATA_KEY} is not a table of {', '.join(sorted(known))}")
    _require_counts([*found.get("unet_heads", []), *(value for key, value in found.items() if key != "unet_heads")])
    return found


def _require_counts(values: Sequence[Any]) -> None:
    if not all(type(value) is int and 1 <= value < 2**20 for value in values):
        raise ValueError("a size of its architecture is not a count")


def _size(shapes: Mapping[str, tuple[int, ...]], name: str, axis: int) -> int:
    shape = shapes.get(name)
    if shape is None:
        raise ValueError(f"it has no tensor {name}")
    if len(shape) <= axis or shape[axis] < 1:
        raise ValueError(f"its tensor {name} has the shape {shape}")
    return shape[axis]


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str, first: int = 0, stride: int = 1) -> int:
    number = 0
    while pattern.format(first + stride * number) in shapes:
        number += 1
    return number
