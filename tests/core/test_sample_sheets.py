import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from sdxl_train.sample_benchmark import SampleEntry
from sdxl_train.sample_files import parameters_text, round_directory, training_picture_name, write_png
from sdxl_train.sample_sheets import drawn_pictures, evenly_chosen, update_sheets

SAMPLER = "euler_a"


def entry(**fields) -> SampleEntry:
    given = {
        "prompt": "a cat", "negative_prompt": "", "steps": 28, "batch_size": 1, "batch_count": 1, "scale": 7.5, "seed": 42, "width": 832,
        "height": 1216, "original_width": None, "original_height": None, "original_scale_factor": 1.0, "save_latents": False,
    }  # fmt: skip
    return SampleEntry(**{**given, **fields})


def draw(samples: Path, entries: list[SampleEntry], step: int, *, epoch: int = 1, moment: str = "step", stamp: str = "20240412205011") -> None:
    """A round as a training writes it, with pictures of one colour, and its sheets."""
    paths = []
    for i, one in enumerate(entries):
        for b in range(one.num_pictures):
            path = samples / round_directory(moment, epoch, step) / training_picture_name(moment, epoch, step, stamp, i, b)
            seed = 7 if one.seed is None else one.seed
            write_png(path, Image.new("RGB", (832, 1216), (i * 50, b * 50, step % 256)), parameters_text(one, seed + b, SAMPLER, epoch=epoch, step=step))
            paths.append(path)
    update_sheets(samples, paths, entries, SAMPLER)


class Page(HTMLParser):
    """The columns of the table, and the pictures of each of its rows, by file; None where a cell is empty."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.columns, self.rows, self.links, self.tags = "", [], [], [], []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        for link in self.links:
            assert (path.parent / link).exists(), link

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append(tag)
        self.links += [named[name] for name in ("href", "src") if name in named]
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append(None)
        elif tag == "img" and "td" in self.tags:
            self.rows[-1][-1] = named["src"]

    def handle_data(self, data):
        self.text += data


def columns(page: Page) -> list[int]:
    return [int(step) for step in re.findall(r"step (\d+), epoch \d+</a></th>", page.source)]


def test_a_round_has_a_page_with_each_picture_and_what_it_was_made_from(tmp_path) -> None:
    draw(tmp_path, [entry(prompt="一只猫 <b>&", batch_count=2), entry(prompt="a dog", seed=None, negative_prompt="blurry")], 30, epoch=2)
    page = Page(tmp_path / "sheets" / "step_30.html")
    for said in ("step 30, epoch 2", "一只猫 <b>&", "Seed: 42", "Seed: 43", "a dog\nNegative prompt: blurry", "Sampler: euler_a"):
        assert said in page.text
    assert [link for link in page.links if link.endswith(".png")] == [
        f"../step_30/sample_20240412205011_000030_{name}.png" for name in ("00", "00-1", "01")
    ]
    assert "<b>" not in page.source.replace("&lt;b&gt;", "")


def test_small_copies_are_shown_and_no_further_png_is_written(tmp_path) -> None:
    draw(tmp_path, [entry()], 30)
    (small,) = tmp_path.rglob("*.jpg")
    with Image.open(small) as image:
        assert image.size == (175, 256)
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_over_time_each_fixed_seed_has_a_row_and_each_round_a_column_in_the_order_of_steps(tmp_path) -> None:
    entries = [entry(batch_size=2), entry(prompt="random", seed=None), entry(prompt="a dog", seed=1)]
    for step in (100, 20, 3):  # as names they sort otherwise
        draw(tmp_path, entries, step)
    draw(tmp_path, entries, 100, epoch=4, moment="epoch", stamp="20240412205099")
    page = Page(tmp_path / "sheets" / "index.html")
    assert columns(page) == [3, 20, 100]
    _, *rows = page.rows
    assert rows == [
        [f"thumbnails/step_{step}/sample_20240412205011_{step:06d}_{name}.jpg" for step in (3, 20, 100)] for name in ("00", "00-1", "02")
    ]
    assert "seed 42" in page.text and "seed 43" in page.text and "seed 1" in page.text and "random seed" in page.text


def test_after_a_resume_what_was_drawn_again_counts_and_what_lies_ahead_does_not(tmp_path) -> None:
    for step in (0, 10, 20, 30):
        draw(tmp_path, [entry()], step)
    draw(tmp_path, [entry()], 20, stamp="20240413000000")
    page = Page(tmp_path / "sheets" / "index.html")
    assert columns(page) == [0, 10, 20]
    assert page.rows[1][-1] == "thumbnails/step_20/sample_20240413000000_000020_00.jpg"
    assert [picture.name for picture in drawn_pictures(tmp_path, "step_20")] == ["sample_20240413000000_000020_00"]


def test_an_entry_that_was_changed_begins_a_new_row_and_lost_pictures_leave_gaps(tmp_path) -> None:
    draw(tmp_path, [entry(prompt="old"), entry(prompt="kept")], 10)
    draw(tmp_path, [entry(prompt="new"), entry(prompt="kept")], 20)
    (tmp_path / "step_20" / "sample_20240412205011_000020_01.png").unlink()
    draw(tmp_path, [entry(prompt="new"), entry(prompt="kept")], 30)
    (tmp_path / "step_30" / "sample_20240412205011_000030_00.png").write_bytes(b"no picture")
    update_sheets(tmp_path, [tmp_path / "step_30" / "sample_20240412205011_000030_01.png"], [entry(prompt="new"), entry(prompt="kept")], SAMPLER)
    page = Page(tmp_path / "sheets" / "index.html")
    assert [[cell is not None for cell in row] for row in page.rows[1:]] == [[False, True, False], [True, False, True]]


def test_many_rounds_are_thinned_out_evenly_with_the_first_and_the_last(tmp_path) -> None:
    assert evenly_chosen([0, 5, 9], 24) == [0, 5, 9]
    assert evenly_chosen(list(range(100)), 4) == [0, 33, 66, 99]
    assert len(set(evenly_chosen(list(range(25)), 24))) == 24
    for step in range(30):
        draw(tmp_path, [entry()], step)
    page = Page(tmp_path / "sheets" / "index.html")
    assert len(columns(page)) == 24 and columns(page)[0] == 0 and columns(page)[-1] == 29
    assert "24 of 30 rounds are shown" in page.text and "step_28.html" in page.links


@pytest.mark.parametrize("prompt", ["\x1b[31m\r", "w" * 1_000_000, "猫" * 200_000, "</p><script>alert(1)</script>"])
def test_any_prompt_can_be_shown(tmp_path, prompt: str) -> None:
    draw(tmp_path, [entry(prompt=prompt)], 1)
    for name in ("index.html", "step_1.html"):
        page = Page(tmp_path / "sheets" / name)
        assert "\x1b" not in page.source and "script" not in page.tags and len(page.source) < 30_000
