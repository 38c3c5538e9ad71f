"""The retrieval measure: nearest by the mean squared difference of 16 x 16 pixels on white."""

import pytest
from PIL import Image

from sdxl_train.testing import retrieval_accuracy

RED, GREEN, BLUE = (Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue"))


def test_the_share_of_samples_nearest_to_the_reference_of_their_prompt_is_counted() -> None:
    dark_red, dark_blue = Image.new("RGB", (16, 16), (200, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 200))
    found = retrieval_accuracy([("r", dark_red), ("b", dark_blue), ("g", dark_red)], {"r": RED, "g": GREEN, "b": BLUE})
    assert found.nearest == (("r", "r"), ("b", "b"), ("g", "r"))
    assert (found.accuracy, found.chance) == (2 / 3, 1 / 3)
    assert str(found) == "2 of 3 samples recognised among 3 pictures: 66.7% (chance 33.3%)"


def test_a_prompt_may_come_with_several_seeds_and_references_without_samples_count() -> None:
    found = retrieval_accuracy([("r", RED), ("r", GREEN)], {"r": RED, "g": GREEN})
    assert (found.accuracy, found.chance) == (0.5, 0.5)


def test_the_distance_is_the_mean_squared_difference_not_the_absolute_one() -> None:
    """Against black: half the pixels off by 200 against all off by 120. Means 100 and 120; mean squares 20,000 and 14,400."""
    half, grey = Image.new("RGB", (32, 32), "black"), Image.new("RGB", (32, 32), (120, 120, 120))
    half.paste((200, 200, 200), (0, 0, 32, 16))
    black = Image.new("RGB", (32, 32), "black")
    assert retrieval_accuracy([("grey", black)], {"half": half, "grey": grey}).accuracy == 1


def test_details_smaller_than_a_pixel_of_the_reduced_picture_do_not_count() -> None:
    """A board of single pixels is the grey that it averages to; taking every nth pixel would find white or black."""
    board = Image.new("L", (64, 64))
    board.putdata([255 * ((x + y) % 2) for y in range(64) for x in range(64)])
    references = {name: Image.new("L", (64, 64), value) for name, value in (("black", 0), ("grey", 128), ("white", 255))}
    assert retrieval_accuracy([("grey", board)], references).accuracy == 1


def test_what_is_transparent_is_white_and_shapes_may_differ() -> None:
    clear = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    references = {"red": RED, "white": Image.new("RGB", (96, 160), "white")}
    assert retrieval_accuracy([("white", clear)], references).accuracy == 1


def test_pictures_and_mappings_are_left_as_they_are() -> None:
    sample, references = Image.new("P", (8, 8)), {"r": RED}
    retrieval_accuracy([("r", sample)], references)
    assert (sample.mode, sample.size, list(references)) == ("P", (8, 8), ["r"])


@pytest.mark.parametrize(
    ("samples", "references", "said"),
    [
        ([], {"r": RED}, "got 0 and 1"),
        ([("r", RED)], {}, "got 1 and 0"),
        ([("g", GREEN), ("r", RED)], {"r": RED}, "1 samples have a prompt without a reference, such as 'g'"),
    ],
)
def test_what_cannot_be_measured_is_refused(samples: list, references: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        retrieval_accuracy(samples, references)
