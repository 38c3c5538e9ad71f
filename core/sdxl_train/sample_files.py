"""Rendered pictures on disk: their names, the text inside the PNG, and sheets that show several pictures with their captions."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_train.atomic import atomic_file
from sdxl_train.sample_benchmark import SampleEntry

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

PNG_TEXT_KEY = "parameters"  # what other programs read prompt and seed from

MARGIN_PX = 8
LINE_PX = 18
FONT_PX = 14
MIN_COLUMN_PX = 160
MAX_CAPTION_LINES = 4


def round_directory(moment: str, epoch: int, step: int) -> str:
    """The folder of a training round below `samples/`: `epoch_{E}` at the end of an epoch, else `step_{S}`."""
    return f"epoch_{epoch}" if moment == "epoch" else f"step_{step}"


def training_picture_name(moment: str, epoch: int, step: int, stamp: str, i: int, b: int) -> str:
    """The file name of picture b of benchmark entry i, both counted from 0; `stamp` is the round's time, YYYYmmddHHMMSS."""
    place = f"e{epoch:06d}" if moment == "epoch" else f"{step:06d}"
    return f"sample_{stamp}_{place}_{i:02d}{f'-{b}' if b else ''}.png"


def evaluation_picture_name(i: int, b: int) -> str:
    """The file name of picture b of entry i where pictures are rendered without training."""
    return f"{i:04d}-{b}.png"


def latents_picture_name(i: int, b: int, timestep: float, step: int) -> str:
    """The file name of picture b of entry i as decoded after denoising step `step`, counted from 0, which was at `timestep`."""
    return f"{i:04d}-{b}-t={round(timestep)}-i={step}.png"


def parameters_text(entry: SampleEntry, seed: int, sampler: str, *, epoch: int | None = None, step: int | None = None) -> str:
    """What a picture was made from, as it stands in the PNG.

    Args:
        seed: of this picture.
        sampler: the value of `sample_sampler`.
        epoch, step: where the training was; None outside of a training.
    """
    original_width, original_height = entry.original_size
    lines = [entry.prompt]
    if entry.negative_prompt:
        lines.append(f"Negative prompt: {entry.negative_prompt}")
    settings = [
        f"Steps: {entry.steps}",
        f"Sampler: {sampler}",
        f"CFG scale: {entry.scale}",
        f"Seed: {seed}",
        f"Size: {entry.width}x{entry.height}",
        f"Original size: {original_width}x{original_height}",
    ]
    if epoch is not None:
        settings.append(f"Epoch: {epoch}")
    if step is not None:
        settings.append(f"Step: {step}")
    return "\n".join([*lines, ", ".join(settings)])


def write_png(path: Path, image: Image, parameters: str) -> None:
    """Write a picture with its `parameters`, whole or not at all; makes the folder. Text that is not Latin-1 becomes an iTXt chunk.

    Raises:
        OSError: from the file system.
    """
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text(PNG_TEXT_KEY, parameters)  # falls back to iTXt by itself
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def contact_sheet(images: Sequence[Image], captions: Sequence[str], *, max_side_px: int = 384) -> Image:
    """All pictures in a near-square grid, each above its caption.

    Captions are cut to a few lines; characters outside printable Latin-1, which Pillow's own font lacks, are shown as escapes.

    Args:
        images: at least one, of any sizes.
        captions: one for each picture.
        max_side_px: larger pictures are shown reduced to it.
    """
    cells = [_Cell(_reduced(image, max_side_px), caption) for image, caption in zip(images, captions, strict=True)]
    columns = math.ceil(math.sqrt(len(cells)))
    return _sheet([cells[i : i + columns] for i in range(0, len(cells), columns)])


def comparison_sheet(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Image | None]]], *, max_side_px: int = 384) -> Image:
    """Pictures of one row beside each other, such as before and after a training, under the titles of their columns.

    Args:
        columns: titles, such as "before" and "after".
        rows: a label, such as the prompt, and one picture for each column; None where there is none.
        max_side_px: larger pictures are shown reduced to it.
    """
    sheet = [[_Cell(None, ""), *(_Cell(None, title) for title in columns)]]
    for label, images in rows:
        shown = [
            _Cell(None, "(no picture)") if image is None else _Cell(_reduced(image, max_side_px), "")
            for image, _ in zip(images, columns, strict=True)
        ]
        sheet.append([_Cell(None, label), *shown])
    return _sheet(sheet)


@dataclass(frozen=True)
class _Cell:
    image: Image | None
    text: str

    @property
    def image_size(self) -> tuple[int, int]:
        return self.image.size if self.image else (0, 0)


def _sheet(rows: list[list[_Cell]]) -> Image:
    """Cells in rows and columns: the columns as wide as their widest picture, the rows as high as their highest cell."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(FONT_PX)
    columns = [[row[column] for row in rows if column < len(row)] for column in range(max(map(len, rows)))]
    widths = [max(MIN_COLUMN_PX, *(cell.image_size[0] for cell in column)) for column in columns]
    texts = [[_wrapped(cell.text, font, width) for cell, width in zip(row, widths, strict=False)] for row in rows]
    heights = [
        max(cell.image_size[1] + LINE_PX * len(lines) for cell, lines in zip(row, row_texts, strict=True))
        for row, row_texts in zip(rows, texts, strict=True)
    ]
    size = (sum(widths) + MARGIN_PX * (len(widths) + 1), sum(heights) + MARGIN_PX * (len(heights) + 1))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    top = MARGIN_PX
    for row, row_texts, height in zip(rows, texts, heights, strict=True):
        left = MARGIN_PX
        for cell, lines, width in zip(row, row_texts, widths, strict=False):
            if cell.image:
                sheet.paste(cell.image, (left, top))
            _draw_lines(draw, lines, font, left, top + cell.image_size[1])
            left += width + MARGIN_PX
        top += height + MARGIN_PX
    return sheet


def _draw_lines(draw: ImageDraw, lines: list[str], font: FreeTypeFont | ImageFont, left: int, top: int) -> None:
    for i, line in enumerate(lines):
        draw.text((left, top + i * LINE_PX), line, fill="black", font=font)


def _wrapped(text: str, font: FreeTypeFont | ImageFont, width_px: int) -> list[str]:
    """The text in lines of at most `width_px`, broken at spaces where there are any, the last one ending in ... where more follows."""
    rest = " ".join(_drawable(text[: MAX_CAPTION_LINES * width_px]).split())
    lines: list[str] = []
    while rest and len(lines) < MAX_CAPTION_LINES:
        lengths = range(min(len(rest), width_px) + 1)  # no character is narrower than a pixel
        fits = max(1, bisect_right(lengths, width_px, key=lambda n, rest=rest: font.getlength(rest[:n])) - 1)
        if fits < len(rest) and " " in rest[: fits + 1]:
            fits = rest[: fits + 1].rindex(" ")
        lines.append(rest[:fits])
        rest = rest[fits:].lstrip()
    if rest:
        lines[-1] = lines[-1][:-3] + "..."
    return lines


def _drawable(text: str) -> str:
    return "".join(
        char if char.isspace() or (char.isprintable() and ord(char) < 256) else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def _reduced(image: Image, max_side_px: int) -> Image:
    """The picture in RGB, at most `max_side_px` wide and high."""
    reduced = image.convert("RGB")
    reduced.thumbnail((max_side_px, max_side_px))
    return reduced
