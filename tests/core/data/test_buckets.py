import json
import math
from pathlib import Path

import numpy as np
import pytest

from sdxl_train.data.buckets import bucket_list, choose_buckets, cover, place

ORACLES = json.loads((Path(__file__).parents[2] / "oracles.json").read_text(encoding="utf-8"))


def cases(group):
    return list(zip(ORACLES[group]["inputs"], ORACLES[group]["expected"], strict=True))


def placed(given):
    return place((given["width"], given["height"]), given["resolution"], given["bucket_reso_step"])


def expected_bucket(width, height, resolution, step):
    """The rule written out for one picture, without any of the shortcuts."""
    cap = resolution**2
    far = {size: round(abs(math.log(size[0] / size[1]) - math.log(width / height)), 12) for size in bucket_list(resolution, step)}
    nearest = min(far, key=lambda size: (far[size], -size[0] * size[1], size))
    if nearest[0] <= width and nearest[1] <= height:
        return nearest
    if width * height > cap:
        width, height = math.isqrt(cap * width // height), math.isqrt(cap * height // width)
    width, height = max(step, width // step * step), max(step, height // step * step)
    if width * height > cap:
        if width > height:
            width = cap // height // step * step
        else:
            height = cap // width // step * step
    return width, height


@pytest.mark.parametrize(("given", "expected"), cases("bucket_grid"))
def test_bucket_list_is_the_published_grid(given, expected):
    buckets = bucket_list(given["resolution"], given["bucket_reso_step"])
    assert [list(size) for size in buckets] == expected["buckets"]
    assert len(buckets) == expected["count"]


@pytest.mark.parametrize(("given", "expected"), cases("bucket_place"))
def test_pictures_are_placed_as_published(given, expected):
    placement = placed(given)
    assert [list(placement.bucket), list(placement.resized), list(placement.crop)] == [
        expected["bucket"],
        expected["resized"],
        expected["crop_left_top"],
    ]


@pytest.mark.parametrize(("given", "expected"), cases("size_conditioning"))
def test_flipping_tells_what_was_cut_on_the_right(given, expected):
    placement = placed(given)
    assert [placement.crop[1], placement.crop[0]] == expected["crop_top_left"]
    assert [placement.flipped_crop[1], placement.flipped_crop[0]] == expected["crop_top_left_flipped"]


def test_a_picture_without_crop_has_none_after_flipping_either():
    assert cover((1024, 1024), (1024, 1024)).flipped_crop == (0, 0)


@pytest.mark.parametrize(("resolution", "step"), [(1024, 32), (1024, 64), (512, 64), (768, 8), (64, 32), (100, 64)])
def test_choice_follows_the_rule_for_any_size(resolution, step):
    random = np.random.default_rng(0)
    exponents = random.uniform(0, 13, (400, 2))
    sizes = np.concatenate([np.floor(2**exponents).astype(np.int64), np.array(bucket_list(resolution, step)) * 3])
    expected = [expected_bucket(width, height, resolution, step) for width, height in sizes.tolist()]
    assert choose_buckets(sizes, resolution, step).tolist() == [list(size) for size in expected]


@pytest.mark.parametrize("size", [(1, 1), (4000, 1), (1, 4000), (200_000_000, 1), (14142, 14142), (31, 33), (5000, 31)])
@pytest.mark.parametrize(("resolution", "step"), [(1024, 32), (512, 64), (64, 64)])
def test_no_shape_breaks_area_sides_or_cover(size, resolution, step):
    placement = place(size, resolution, step)
    (width, height), (resized_width, resized_height) = placement.bucket, placement.resized
    assert width * height <= resolution**2
    assert width >= step and height >= step and width % step == 0 and height % step == 0
    assert resized_width >= width and resized_height >= height
    assert width == resized_width or height == resized_height
    if min(size) >= step:
        assert resized_width <= size[0] and resized_height <= size[1], "enlarged although no side is below the step"
