"""The networks of a run: read from the base model, in the dtypes they train in, and what of them is trained at which rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdxl_train.learning_rates import NUM_BLOCKS, block_of, block_rates, text_encoder_rates, trains_unet
from sdxl_train.model.architecture import Architecture
from sdxl_train.model.blank import blank_text_encoder, blank_text_encoder_2, blank_unet
from sdxl_train.model.key_names import PREFIXES, TRAINABLE_PARTS, PartName, module_name, unet_entries
from sdxl_train.model.single_file import Checkpoint, load_text_encoders, load_unet
from sdxl_train.model.text import freeze_unused_layers
from sdxl_train.precision import Precision

if TYPE_CHECKING:
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import Tensor, nn
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from sdxl_train.keys import Config

_GROUP_NAMES = {"unet": "unet", "text_encoder": "text_encoder1", "text_encoder_2": "text_encoder2"}


@dataclass
class Networks:
    """
    Attributes:
        unet, text_encoders: as they were made. Only parameters that are trained require gradients.
        param_groups: those parameters, with the rates they begin with; see `param_groups`.
    """

    unet: UNet2DConditionModel
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    param_groups: list[dict[str, Any]]

    @property
    def parts(self) -> dict[PartName, nn.Module]:
        """The networks by the names that single files and saving use."""
        return dict(zip(TRAINABLE_PARTS, (self.unet, *self.text_encoders), strict=True))


def load_networks(base: Checkpoint, keys: Config) -> Networks:
    """Read U-Net and text encoders. What is not trained is frozen and in evaluation mode, the rest in training mode.

    Inside a trained network, too, what is not trained has no gradient: blocks at rate 0, layers of text encoder 1 that nobody reads.
    """
    unet_dtype, *text_dtypes = _dtypes(keys)
    return _networks(base.architecture, load_unet(base, unet_dtype), load_text_encoders(base, *text_dtypes), keys)


def blank_networks(architecture: Architecture, keys: Config) -> Networks:
    """As `load_networks`, on the meta device, without values."""
    unet_dtype, dtype, dtype_2 = _dtypes(keys)
    text_encoders = blank_text_encoder(architecture, dtype), blank_text_encoder_2(architecture, dtype_2)
    return _networks(architecture, blank_unet(architecture, unet_dtype), text_encoders, keys)


def _dtypes(keys: Config) -> list[torch.dtype]:
    """In which U-Net and text encoders are held."""
    precision = Precision.of(keys)
    return [precision.held(is_trained) for is_trained in (trains_unet(keys), *(rate > 0 for rate in text_encoder_rates(keys)))]


def _networks(
    architecture: Architecture,
    unet: UNet2DConditionModel,
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    keys: Config,
) -> Networks:
    networks = Networks(unet, text_encoders, [])
    for network in networks.parts.values():
        network.requires_grad_(False).eval()
    networks.param_groups = list(_param_groups(architecture, networks, keys))
    for group in networks.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    for network in networks.parts.values():
        network.train(any(parameter.requires_grad for parameter in network.parameters()))
    return networks


def _param_groups(architecture: Architecture, networks: Networks, keys: Config) -> Iterator[dict[str, Any]]:
    """What is trained: dicts of `name`, `params`, `param_names` ("unet.conv_in.weight") and `lr`."""
    if keys.block_lr is None:
        if keys.learning_rate > 0:
            yield _group("unet", "unet", networks.unet.named_parameters(), keys.learning_rate)
    else:
        blocks = _blocks(architecture, networks.unet)
        for block, rate in enumerate(block_rates(keys.block_lr)):
            if rate > 0:
                yield _group("unet", f"block{block}", iter(blocks[block]), rate)
    for part, encoder, rate in zip(TRAINABLE_PARTS[1:], networks.text_encoders, text_encoder_rates(keys), strict=True):
        if rate > 0:
            encoder.requires_grad_(True)
            if part == "text_encoder":
                freeze_unused_layers(encoder, keys.clip_skip)
            trained = ((name, parameter) for name, parameter in encoder.named_parameters() if parameter.requires_grad)
            yield _group(part, _GROUP_NAMES[part], trained, rate)


def _group(part: PartName, name: str, parameters: Iterator[tuple[str, Tensor]], rate: float) -> dict[str, Any]:
    named = [(f"{part}.{module_name(name)}", parameter) for name, parameter in parameters]
    return {"name": name, "params": [parameter for _, parameter in named], "param_names": [name for name, _ in named], "lr": rate}


def _blocks(architecture: Architecture, unet: nn.Module) -> list[list[tuple[str, Tensor]]]:
    """The U-Net's parameters by block."""
    entries = unet_entries(architecture)
    block_by_name = {name: block_of(entry.name.removeprefix(PREFIXES["unet"])) for entry in entries for name in entry.modules}
    blocks: list[list[tuple[str, Tensor]]] = [[] for _ in range(NUM_BLOCKS)]
    for name, parameter in unet.named_parameters():
        blocks[block_by_name[module_name(name)]].append((name, parameter))
    return blocks


def trained_values(parts: Mapping[PartName, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """The parameters that are trained, by part and name: what a saved model takes from the run and not from the base."""
    return {
        part: {module_name(name): parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        for part, network in parts.items()
    }


def trained_by_name(parts: Mapping[PartName, nn.Module]) -> dict[str, Tensor]:
    """The parameters that are trained, by "part.name", as train states name them."""
    return {f"{part}.{name}": value for part, values in trained_values(parts).items() for name, value in values.items()}
