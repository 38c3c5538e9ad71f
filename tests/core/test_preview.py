"""Which samples a preview shows, and how its table and pages show them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_train.config import Settings, load_settings
from sdxl_train.data.buckets import Placement
from sdxl_train.errors import ConfigError, DataError
from sdxl_train.preview import PreviewSample, run_preview
from sdxl_train.preview_pages import PreviewPages, framed, preview_table

SAMPLE = PreviewSample(
    number=1,
    micro_batch=1,
    step=1,
    datum=0,
    key="cat",
    occurrence=0,
    bucket=(96, 32),
    original_size=(128, 48),
    crop=(2, 0),
    flipped=False,
    timestep=500,
    text="caption",
    caption="a cat",
    num_tokens=2,
    is_cut=False,
)


class OneDatum:
    """An index of one datum; path None is a cache without a picture."""

    def __init__(self, path: Path | None) -> None:
        self.image_paths = ["" if path is None else str(path)]

    def image_path(self, i: int) -> str | None:
        return self.image_paths[i] or None

    def placement(self, _: int) -> Placement:
        return Placement((96, 32), (96, 36), (0, 2))


@pytest.fixture
def preview(config, tmp_path: Path, capsys):
    """Runs a preview with these keys and gives back the lines of its table, each as a dict, and what it told on stderr."""

    def running(epoch: int = 1, num: int = 100, **keys) -> tuple[list[dict[str, str]], str]:
        run_preview(settings_of(config(**keys)), epoch, num, tmp_path / "sheet")
        told = capsys.readouterr()
        head, *lines = told.out.splitlines()
        names = head.split()
        return [dict(zip(names, line.split(maxsplit=len(names) - 1), strict=False)) for line in lines], told.err

    return running


def settings_of(file: Path) -> Settings:
    return load_settings(file, (), needs=("data",))


def page_of(sample: PreviewSample, folder: Path, path: Path | None = None) -> str:
    pages = PreviewPages(folder, OneDatum(path), 10**6)  # pyright: ignore[reportArgumentType]
    pages.draw(sample)
    pages.write([sample], "one sample")
    return (folder / "bucket-96x32.html").read_text(encoding="utf-8")


def test_the_first_samples_of_an_epoch_are_shown_or_all_where_it_has_fewer(preview) -> None:
    whole, _ = preview(num=100)
    assert [line["number"] for line in whole] == [str(i) for i in range(1, 11)]
    assert preview(num=5)[0] == whole[:5]  # in the middle of a batch
    assert sorted(line["key"] for line in whole) == sorted([f"square{i}" for i in range(6)] + [f"wide{i}" for i in range(4)])


def test_micro_batches_count_from_the_epoch_and_steps_from_the_run(preview) -> None:
    lines, _ = preview(epoch=2, batch_size=2, gradient_accumulation_steps=2)  # 3 + 2 micro-batches: 3 steps an epoch
    assert [line["micro-batch"] for line in lines] == [str(i) for i in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5)]
    assert [line["step"] for line in lines] == [str(i) for i in (4, 4, 4, 4, 5, 5, 5, 5, 6, 6)]


def test_what_max_train_steps_leaves_untrained_is_not_shown(preview) -> None:
    keys = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 5}
    assert [line["step"] for line in preview(epoch=2, **keys)[0]] == ["4"] * 4 + ["5"] * 4
    with pytest.raises(ConfigError, match="max_train_steps = 3"):
        preview(epoch=2, **(keys | {"max_train_steps": 3}))


def test_tokens_are_counted_before_the_cut(preview, pictures: Path) -> None:
    (pictures / "square0.txt").write_text("dog " * 76)
    (pictures / "square1.txt").write_text("dog " * 75)
    lines = {line["key"]: line for line in preview()[0]}
    assert (lines["square0"]["tokens"], lines["square0"]["cut"]) == ("76", "yes")
    assert (lines["square1"]["tokens"], lines["square1"]["cut"]) == ("75", "no")


def test_it_is_told_which_text_was_chosen(preview, pictures: Path, tmp_path: Path) -> None:
    entries = {"square0": {"caption": "tags"}, "square1": {"description": "prose"}, "square2": {}, "square3": {"caption": " "}}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    lines, _ = preview(metadata_files=[str(tmp_path / "meta.json")])
    assert {line["key"]: line["text"] for line in lines} == {"square0": "caption", "square1": "description", "square2": "none", "square3": "none"}


def test_pictures_that_training_leaves_out_are_left_out_here(preview, pictures: Path) -> None:
    whole = (pictures / "square3.png").read_bytes()
    middle = len(whole) // 2
    (pictures / "square3.png").write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    lines, told = preview(bad_images="skip")
    assert "square3" not in {line["key"] for line in lines} and "left out" in told and "square3.png" in told
    (pictures / "square3.png").unlink()
    assert preview(bad_images="skip")[0] == lines


def test_a_picture_that_cannot_be_decoded_is_an_error_that_names_it(preview, pictures: Path) -> None:
    whole = (pictures / "square3.png").read_bytes()
    middle = len(whole) // 2
    (pictures / "square3.png").write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with pytest.raises(DataError, match=r"square3\.png"):
        preview()


def test_an_absent_epoch_is_refused_before_torch_is_loaded(config) -> None:
    code = (
        "import sys; from pathlib import Path; from sdxl_train.config import load_settings; from sdxl_train.preview import run_preview\n"
        f"try: run_preview(load_settings(Path({str(config())!r}), (), needs=('data',)), 3, 1, Path('never'))\n"
        "except Exception as error: print(type(error).__name__, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ConfigError", "False"]


def test_the_columns_of_the_table_are_aligned_also_under_wide_characters() -> None:
    samples = [SAMPLE, replace(SAMPLE, number=12, key="一只猫", crop=(0, 120), caption="一只猫, wide")]
    head, first, second = preview_table(samples).splitlines()
    assert first.index("0  96x32") == head.index("occurrence") + len("occurrence") - 1  # numbers end with their heading
    assert second.index("0  96x32") == first.index("0  96x32") - 3  # three characters, six cells
    assert first.startswith("     1  ") and second.startswith("    12  ")


def test_the_table_escapes_control_bytes_and_cuts_long_captions_which_the_page_holds_in_full(tmp_path: Path) -> None:
    sample = replace(SAMPLE, key="red\x1b[31m", caption="one\ntwo\x07 " + "word " * 100)
    _, line = preview_table([sample]).splitlines()
    assert "red\\x1b[31m" in line and "one\\ntwo\\x07 word" in line and line.endswith("word...")
    page = page_of(sample, tmp_path)
    assert "one\ntwo\\x07 " + "word " * 100 in page and "\x1b" not in page and "\x07" not in page


def test_pages_take_no_text_for_markup_and_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> \" ' & \ud800"
    page = page_of(replace(SAMPLE, key=evil, caption=evil), tmp_path)
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; &quot; &#x27; &amp; \\ud800") == 3  # heading, caption, figures
    assert "<script" not in page and "http" not in page


def test_a_datum_without_a_picture_gets_a_box(tmp_path: Path) -> None:
    page = page_of(SAMPLE, tmp_path)
    assert "no picture" in page and "<img" not in page and "aspect-ratio: 96 / 32" in page
    assert not list((tmp_path / ".pictures").iterdir())


def test_the_picture_is_shown_as_trained_and_whole_with_its_crop(tmp_path: Path) -> None:
    left_black = np.full((48, 128, 3), 255, np.uint8)
    left_black[:, :64] = 0
    Image.fromarray(left_black).save(tmp_path / "cat.png")
    for flipped in (False, True):
        page = page_of(replace(SAMPLE, flipped=flipped), tmp_path, tmp_path / "cat.png")
        trained = np.asarray(Image.open(tmp_path / ".pictures" / "96x32-000001.jpg"))
        assert trained.shape == (32, 96, 3) and (trained[:, 20].mean() > 200) == flipped
        assert page.count("<img") == 2 and "cache" not in page
    whole = Image.open(tmp_path / ".pictures" / "96x32-whole-000000.jpg")
    assert whole.size == (128, 48)


def test_the_frame_is_around_what_is_cut_out() -> None:
    image = Image.new("RGB", (400, 200))
    shown = np.asarray(framed(image, Placement((64, 64), (128, 64), (32, 0)), 200))  # reduced to 200 x 100; the middle half is kept
    red = (shown == (255, 0, 0)).all(axis=2)
    rows, columns = np.nonzero(red)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 99, 50, 149)
    assert red[0, 50:150].all() and not red[10:90, 60:140].any()
    assert framed(Image.new("RGB", (4000, 3)), Placement((64, 8), (10667, 8), (5301, 0)), 100).size == (100, 1)


def test_a_crop_that_is_not_this_configurations_is_said_to_come_from_a_cache(tmp_path: Path) -> None:
    Image.new("RGB", (128, 48)).save(tmp_path / "cat.png")
    assert "cache made elsewhere" in page_of(replace(SAMPLE, crop=(0, 0)), tmp_path, tmp_path / "cat.png")


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "bucket-64x64.html").write_text("of an earlier preview")
    page_of(SAMPLE, tmp_path)
    page_of(SAMPLE, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".pictures", "bucket-64x64.html", "bucket-96x32.html", "index.html", "mine.html"]
    index = (tmp_path / "index.html").read_text()
    assert 'href="bucket-96x32.html"' in index and "bucket-64x64" not in index and (tmp_path / "mine.html").read_text() == "mine"
