"""Stochastic rounding keeps the mean, leaves alone what needs no rounding, and draws bits that follow from name, step and place."""

import torch

from sdxl_train_plugins.stochastic_rounding import keys_of_step, name_keys, next_words, random_words, rounded_to_bfloat16

STEP, NEXT_STEP = bytes(range(16)), bytes(range(1, 17))
N = 1 << 16


def words(names: list[str], num_elements: int = N, step_key: bytes = STEP) -> torch.Tensor:
    return random_words(keys_of_step(name_keys(names, torch.device("cpu")), step_key), num_elements)


def test_rounding_keeps_the_mean() -> None:
    lower, upper = 1.0, 1.0 + 2**-7  # neighbours in bfloat16
    for share in (0.0001, 0.1, 0.5, 0.9):
        values = torch.full((1, N), lower + share * (upper - lower))
        for sign in (1, -1):
            rounded = rounded_to_bfloat16(sign * values, words(["a"])).float() * sign
            assert set(rounded.unique().tolist()) <= {lower, upper}
            went_up = (rounded == upper).float().mean().item()
            assert abs(went_up - share) < 5 * (share * (1 - share) / N) ** 0.5 + 2**-16


def test_values_that_are_exact_are_kept() -> None:
    exact = torch.randn(1, N, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact[0, :4] = torch.tensor([0.0, -0.0, torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).tiny])
    assert torch.equal(rounded_to_bfloat16(exact.float(), words(["a"])).view(torch.int16), exact.view(torch.int16))


def test_nan_and_inf_are_kept_whatever_their_bits() -> None:
    bits = torch.tensor([0x7F800000, 0x7FC00000, 0x7FFFFFFF, -0x00000001, 0x7F800001], dtype=torch.int32)  # inf, and NaNs
    values = torch.cat([bits.view(torch.float32), -bits[:1].view(torch.float32)])
    all_ones = torch.full(values.shape, -1, dtype=torch.int32)
    rounded = rounded_to_bfloat16(values, all_ones)
    assert rounded[[0, 5]].tolist() == [torch.inf, -torch.inf] and rounded[1:5].isnan().all()


def test_bits_follow_from_name_step_and_place_alone() -> None:
    together = words(["a", "b", "c"])
    assert torch.equal(words(["b"])[0], together[1])
    assert torch.equal(words(["b"], 100)[0], together[1, :100])
    for other in (words(["b"], step_key=NEXT_STEP)[0], together[0], together[2], next_words(together[1])):
        assert (other == together[1]).sum() <= 2


def test_bits_are_even_and_do_not_depend_on_each_other() -> None:
    """Each of the upper 16 bits is set half the time, and pairs of bits, places, names, steps and draws agree half the time."""
    first = words(["a"])[0]
    others = [first.roll(1), first.roll(320), words(["b"])[0], words(["a"], step_key=NEXT_STEP)[0], next_words(first)]
    bits = [torch.stack([(word >> i) & 1 for i in range(16, 32)]).double() * 2 - 1 for word in (first, *others)]  # [16, N] of -1 and 1
    limit = 5.5 / N**0.5
    for one in bits:
        assert one.mean(1).abs().max() < limit
    own = bits[0] @ bits[0].T / N - torch.eye(16)
    assert own.abs().max() < limit
    for other in bits[1:]:
        assert (bits[0] @ other.T / N).abs().max() < limit


def test_hash_is_the_same_on_every_machine() -> None:
    """Resumed runs draw the same bits: the numbers are computed here with Python's integers."""

    def mixed(word: int) -> int:
        word = (word ^ word >> 16) * 0x7FEB352D % 2**32
        word = (word ^ word >> 15) * 0x846CA68B % 2**32
        return word ^ word >> 16

    first, second = (word % 2**32 for word in name_keys(["unet.conv_in.weight"], torch.device("cpu"))[0].tolist())
    step = [int.from_bytes(STEP[i : i + 4], "little") for i in range(0, 16, 4)]
    first = mixed((mixed(first ^ step[0]) + step[1]) % 2**32)
    second = mixed((mixed(second ^ step[2]) + step[3]) % 2**32)
    for place, word in enumerate(words(["unet.conv_in.weight"], 50)[0].tolist()):
        expected = place ^ first
        expected = ((expected ^ expected >> 16) * 0x7FEB352D + second) % 2**32
        expected = (expected ^ expected >> 15) * 0x846CA68B % 2**32
        assert word % 2**32 == expected ^ expected >> 16
