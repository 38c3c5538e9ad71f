"""Which pictures the demo's base knows and which are new, and how they are put on white."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_train import ConfigError, demo_pictures
from sdxl_train.data.buckets import choose_buckets


def captions_of(num_groups: int, num_each: int) -> dict[str, str]:
    return {f"key{g}_{i}": f"thing {i}, group {g}, no humans" for g in range(num_groups) for i in range(num_each)}


def test_each_picture_is_in_one_part_and_new_ones_come_from_all_groups() -> None:
    captions = captions_of(num_groups=12, num_each=20)
    split = demo_pictures.split_pictures(captions)
    assert sorted(split.base + split.new + split.unseen) == sorted(captions)
    assert (len(split.base), len(split.new), len(split.unseen)) == (144, 24, 72)
    assert Counter(captions[key].split(", ")[1] for key in split.new) == {f"group {g}": 2 for g in range(12)}


def test_the_split_does_not_depend_on_the_order_of_the_file() -> None:
    captions = captions_of(num_groups=5, num_each=30)
    one = demo_pictures.split_pictures(captions)
    other = demo_pictures.split_pictures(dict(reversed(captions.items())))
    assert [set(one.base), set(one.new), set(one.unseen)] == [set(other.base), set(other.new), set(other.unseen)]


def test_the_split_of_the_shipped_pictures_is_what_it_was() -> None:
    split = demo_pictures.split_pictures(demo_pictures.packaged_captions())
    assert (len(split.base), len(split.new), len(split.unseen)) == (200, 24, 72)
    assert split.new[:3] == ("raccoon", "rat", "hatching_chick") and split.unseen[:3] == ("monkey_face", "monkey", "dog2")


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 pictures cannot be split: 3 new and 2 unseen ones leave none"):
        demo_pictures.split_pictures(captions_of(1, 5), num_new=3, num_unseen=2)


@pytest.mark.parametrize("content", ["", "[1]", '{"a": {"caption": 3}}', '{"a": {}}', '{"a": {"caption": "one tag"}}'])
def test_metadata_of_another_kind_is_refused_by_its_path(tmp_path: Path, content: str) -> None:
    (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(ConfigError, match=r"metadata\.json: "):
        demo_pictures.read_captions(tmp_path)


@pytest.mark.parametrize(
    ("size", "canvas"), [((100, 100), (128, 128)), ((240, 100), (160, 96)), ((90, 200), (96, 160)), ((128, 100), (128, 128))]
)
def test_a_picture_is_put_on_white_in_the_canvas_nearest_to_its_shape(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    done = demo_pictures.on_canvas(Image.new("RGBA", size, (0, 0, 255, 255)))
    assert (done.mode, done.size) == ("RGB", canvas)
    assert done.getpixel((0, 0)) == (255, 255, 255)
    assert done.getpixel((canvas[0] // 2, canvas[1] // 2)) == (0, 0, 255)


def test_the_colour_of_what_is_transparent_does_not_bleed_into_edges() -> None:
    picture = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    picture.paste((255, 255, 255, 255), (16, 16, 48, 48))
    assert demo_pictures.on_canvas(picture).getcolors() == [(128 * 128, (255, 255, 255))]


def test_the_canvases_are_buckets_of_the_trainer() -> None:
    sizes = np.array(demo_pictures.CANVASES)
    assert choose_buckets(sizes, 128, 32).tolist() == sizes.tolist()
