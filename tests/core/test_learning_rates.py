"""Which part of the model gets which learning rate."""

from collections import Counter
from pathlib import Path

import pytest

from sdxl_train.keys import Config
from sdxl_train.learning_rates import NUM_BLOCKS, block_of, block_rates, text_encoder_rates, trains_unet
from sdxl_train.model.architecture import SDXL
from sdxl_train.model.key_names import PREFIXES, file_entries
from sdxl_train.model.single_file import open_checkpoint
from sdxl_train.networks import load_networks

# Tensors and parameters of each block of SDXL, counted on the official file.
OFFICIAL = [
    (8, 7_296_000), (2, 11_840), (10, 2_255_040), (10, 2_255_040), (2, 921_920), (58, 27_390_080), (56, 29_028_480), (2, 3_687_040),
    (218, 375_425_280), (216, 381_978_880), (10, 31_138_560), (206, 350_840_320), (10, 31_138_560), (218, 400_005_120), (218, 400_005_120),
    (220, 406_558_720), (58, 37_633_280), (58, 33_536_000), (60, 35_174_400), (12, 4_407_040), (12, 3_382_400), (12, 3_382_400), (4, 12_164),
]  # fmt: skip


def keys(**changed) -> Config:
    return Config(**({"pretrained_model_name_or_path": "base", "image_dirs": ["images"], "output_dir": "out"} | changed))


def test_the_blocks_of_the_official_unet_have_their_tensors_and_parameters() -> None:
    tensors, parameters = Counter(), Counter()
    for entry in file_entries(SDXL):
        if entry.part == "unet":
            block = block_of(entry.name.removeprefix(PREFIXES["unet"]))
            size = 1
            for length in entry.shape:
                size *= length
            tensors[block] += len(entry.modules)
            parameters[block] += size
    assert [(tensors[block], parameters[block]) for block in range(NUM_BLOCKS)] == OFFICIAL


@pytest.mark.parametrize("given", [[1e-5] * 23, ",".join(["1e-5"] * 23), 1e-5])
def test_a_list_a_string_and_one_number_give_23_rates(given) -> None:
    assert block_rates(given) == [1e-5] * 23


@pytest.mark.parametrize(
    ("given", "said"),
    [([1e-5] * 22, "got 22"), (",".join(["1e-5"] * 24), "got 24"), ("1e-5", "got 1"), ("a,b", "a"), ([-1.0] * 23, "-1"), ([float("nan")] * 23, "nan")],
)
def test_other_numbers_of_rates_and_what_is_no_rate_are_refused(given, said) -> None:
    with pytest.raises(ValueError, match=said):
        block_rates(given)


def test_a_text_encoder_without_a_rate_of_its_own_has_the_common_one() -> None:
    assert text_encoder_rates(keys(learning_rate_te1=1e-6)) == (0, 0)
    assert text_encoder_rates(keys(train_text_encoder=True, learning_rate_te1=1e-6)) == (1e-6, 1e-5)
    assert text_encoder_rates(keys(train_text_encoder=True, learning_rate_te2=0.0)) == (1e-5, 0)


def test_rates_of_0_in_all_blocks_freeze_the_unet() -> None:
    assert not trains_unet(keys(block_lr=[0.0] * 23)) and trains_unet(keys(block_lr=[0.0] * 22 + [1.0])) and not trains_unet(keys(learning_rate=0.0))


def test_every_trained_parameter_is_in_one_group_and_nothing_else_has_a_gradient(tiny_base: Path) -> None:
    rates = [0.0 if block in (0, 5, 22) else 1e-5 * (block + 1) for block in range(23)]
    made = load_networks(open_checkpoint(str(tiny_base), None), keys(block_lr=rates, train_text_encoder=True, learning_rate_te2=0.0))
    assert [group["name"] for group in made.param_groups] == [f"block{b}" for b in range(23) if rates[b]] + ["text_encoder1"]
    assert [group["lr"] for group in made.param_groups] == [rate for rate in rates if rate] + [1e-5]
    grouped = [id(parameter) for group in made.param_groups for parameter in group["params"]]
    with_gradient = [id(p) for network in made.parts.values() for p in network.parameters() if p.requires_grad]
    assert len(set(grouped)) == len(grouped) and sorted(grouped) == sorted(with_gradient)
    names = [name for group in made.param_groups for name in group["param_names"]]
    assert len(set(names)) == len(names) and all(len(group["params"]) == len(group["param_names"]) for group in made.param_groups)
    assert not any(name.startswith(("unet.time_embedding", "unet.conv_out", "text_encoder.final_layer_norm")) for name in names)
    assert [network.training for network in made.parts.values()] == [True, True, False]
