"""A draw depends on the seed and its place in the run, and on nothing else."""

import random

import numpy as np
import pytest
import torch

from sdxl_train.randomness import (
    FetchRandom,
    StepRandom,
    generator,
    kept_global_generators,
    sample_place,
    seed_global_generators,
    stream_key,
)

PLACES = [sample_place(42, 1, key, 0) for key in ("a", "b", "c")]


def test_a_row_depends_on_its_sample_alone() -> None:
    together = StepRandom(PLACES, "noise").normal(4, 2, 3)
    alone = StepRandom(PLACES[1:2], "noise").normal(4, 2, 3)
    assert together.shape == (3, 4, 2, 3) and together.dtype == torch.float32
    assert torch.equal(together[1:2], alone)


def test_every_part_of_the_place_changes_the_draw() -> None:
    places = [
        sample_place(42, 1, "a", 0),
        sample_place(43, 1, "a", 0),
        sample_place(42, 2, "a", 0),
        sample_place(42, 1, "b", 0),
        sample_place(42, 1, "a", 1),
    ]
    assert len({float(StepRandom([place], "noise").normal(1)[0, 0]) for place in places}) == 5


def test_parts_of_a_place_do_not_run_into_each_other() -> None:
    assert stream_key("ab", "c") != stream_key("a", "bc") != stream_key("abc")
    assert stream_key(b"1") == stream_key(1) == stream_key("1")


def test_keys_with_bytes_that_are_no_utf8_have_a_place() -> None:
    assert sample_place(1, 1, "caf\udce9", 0) != sample_place(1, 1, "caf", 0)


def test_purposes_have_independent_streams() -> None:
    first, second = StepRandom(PLACES, "noise").normal(1000), StepRandom(PLACES, "offset").normal(1000)
    assert abs(float((first * second).mean())) < 0.06  # 3 x 1000 draws: standard error 0.018


def test_a_stream_goes_on_and_its_name_gives_it_back() -> None:
    one = StepRandom(PLACES, "step")
    first, second = one.stream("x").normal(2), one.stream("x").normal(2)
    whole = StepRandom(PLACES, "step").stream("x").normal(4)
    assert torch.equal(torch.cat([first, second], dim=1), whole)
    assert not torch.equal(one.stream("y").normal(2), first)


def test_one_sample_of_a_batch_goes_on_in_the_same_stream() -> None:
    one = StepRandom(PLACES, "step")
    assert torch.equal(one[1].uniform(2), StepRandom(PLACES[1:2], "step").uniform(2))
    assert not torch.equal(one[1].uniform(2), StepRandom(PLACES[1:2], "step").uniform(2))


def test_integers_and_uniforms_keep_their_range_and_dtype() -> None:
    drawn = StepRandom(PLACES, "t").integers(5, 8, 1000)
    assert drawn.dtype == torch.int64 and set(drawn.flatten().tolist()) == {5, 6, 7}
    uniform = StepRandom(PLACES, "u").uniform(1000)
    assert uniform.dtype == torch.float32 and float(uniform.min()) >= 0 and float(uniform.max()) < 1


def test_normal_draws_have_mean_0_and_variance_1() -> None:
    drawn = StepRandom(PLACES, "n").normal(20_000)
    assert drawn.mean(dim=1).abs().max() < 0.03 and (drawn.var(dim=1) - 1).abs().max() < 0.05


def test_known_values_do_not_change() -> None:
    """A resumed run draws what the interrupted one would have drawn, also after an update of this program."""
    place = sample_place(42, 1, "a", 0)
    assert place.hex() == "de4ef3a08dc6a17bd68ee07f7c515c5b"
    assert generator(place, "noise").bit_generator.random_raw(2).tolist() == [4878258110070858634, 4079681189904666883]


def test_a_stream_is_philox_keyed_with_its_place() -> None:
    keyed = np.random.Generator(np.random.Philox(key=np.frombuffer(stream_key("place", 7), np.uint64)))
    assert generator("place", 7).standard_normal(9).tolist() == keyed.standard_normal(9).tolist()


def test_a_fetch_has_its_own_random_and_streams() -> None:
    assert FetchRandom("f", 1).random() == FetchRandom("f", 1).random() != FetchRandom("f", 2).random()
    fetch = FetchRandom("f", 1)
    before = fetch.stream("x").random()
    fetch.random()
    assert fetch.stream("x").random() == before


def global_draws() -> tuple[float, float]:
    return random.random(), np.random.rand()


def test_global_generators_are_put_back_also_after_an_exception() -> None:
    random.seed(3)
    np.random.seed(3)
    np.random.normal()  # numpy keeps the second normal number of a pair for the next call
    python_twin, numpy_twin = random.Random(3), np.random.RandomState(3)
    numpy_twin.normal()
    with pytest.raises(KeyError), kept_global_generators():
        seed_global_generators("outer")
        outer = random.random(), np.random.normal()
        with kept_global_generators():
            seed_global_generators("inner")
            global_draws()
        assert global_draws() != outer
        raise KeyError
    assert (random.random(), np.random.normal()) == (python_twin.random(), numpy_twin.normal())


def test_seeded_global_generators_go_on_after_others_inside_were_put_back() -> None:
    with kept_global_generators():
        seed_global_generators("outer")
        first, second = global_draws(), global_draws()
        seed_global_generators("outer")
        assert global_draws() == first
        with kept_global_generators():
            seed_global_generators("inner")
            assert global_draws() not in (first, second)
        assert global_draws() == second


def test_the_two_global_generators_draw_different_numbers_from_one_place() -> None:
    """Both are Mersenne twisters of 53-bit numbers, so with one seed they would give the same ones."""
    with kept_global_generators():
        seed_global_generators("place")
        draws = np.array([global_draws() for _ in range(1000)])
    assert not np.isin(draws[:, 0], draws[:, 1]).any()
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.15  # standard error 0.03


def test_what_the_python_generator_draws_at_a_place_stays() -> None:
    with kept_global_generators():
        seed_global_generators("place")
        assert random.random() == random.Random(int.from_bytes(stream_key("place"), "little")).random()


def test_drawing_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(0)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # pyright: ignore[reportAttributeAccessIssue]
    StepRandom(PLACES, "noise").normal(3)
    FetchRandom("x").random()
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(states[2], torch.get_rng_state())
