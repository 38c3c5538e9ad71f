"""Shows what will be trained: a plain table, and HTML pages with one card for each sample, one page for each bucket.

The pictures lie in a folder whose name starts with a dot: the search for training data passes it by, wherever the pages are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

from sdxl_train.data.batches import pixels_of
from sdxl_train.data.buckets import Placement
from sdxl_train.data.images import load_image
from sdxl_train.errors import ConfigError
from sdxl_train.text_display import printable, shown

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdxl_train.data.index import Index
    from sdxl_train.preview import PreviewSample

PICTURE_FOLDER = ".pictures"
CAPTION_CELLS = 60
WHOLE_SIDE_PX = 384
FRAME_PX = 3

_NUMBERS = {"number", "micro-batch", "step", "occurrence", "timestep", "tokens"}  # set flush right

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
table { border-collapse: collapse; } th, td { padding: .2em .8em; text-align: left; border-bottom: 1px solid #8886; }
.cards { display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start; }
.card { border: 1px solid #8886; padding: .8em; width: 42em; max-width: 100%; box-sizing: border-box; }
.card h2 { font-size: 1em; margin: 0 0 .5em; overflow-wrap: anywhere; }
.card img, .box { width: 19em; max-width: 48%; height: auto; vertical-align: top; }
.box { display: inline-flex; align-items: center; justify-content: center; border: 1px dashed #888; }
.caption { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
dl { display: grid; grid-template-columns: repeat(3, max-content 1fr); gap: .1em .8em; margin: 0; font-size: .9em; }
dt { opacity: .7; } dd { margin: 0; }
"""

_LEGEND = (
    "Left: the picture as trained: resized, cropped and, where it says so, flipped. Right: the whole picture, upright and not flipped; the "
    "red frame is what is cut out. Crop is (top, left) in px of the resized and then flipped picture; sizes are width x height; steps and "
    "micro-batches are counted from 1, the occurrences of a picture in the epoch from 0. Invisible characters are written as escapes."
)
_CROP_OF_CACHE = "The crop is that of a cache made elsewhere; the picture is shown as this configuration crops it."


def preview_table(samples: Sequence[PreviewSample]) -> str:
    """One line for each sample below a line of headings, in aligned columns; long captions are cut."""
    rows = [{**sample_figures(sample), "caption": _shortened(shown(sample.caption))} for sample in samples]
    names = list(rows[0]) if rows else []
    lines = [dict(zip(names, names, strict=True)), *rows]
    widths = {name: max(cell_len(line[name]) for line in lines) for name in names}
    return "".join("  ".join(_aligned(name, line[name], widths[name]) for name in names).rstrip() + "\n" for line in lines)


def sample_figures(sample: PreviewSample) -> dict[str, str]:
    """Everything about a sample but its caption, as words on one line, by name."""
    return {
        "number": str(sample.number),
        "step": str(sample.step),
        "micro-batch": str(sample.micro_batch),
        "key": shown(sample.key),
        "occurrence": str(sample.occurrence),
        "bucket": _size(sample.bucket),
        "original": _size(sample.original_size),
        "crop": f"{sample.crop[0]},{sample.crop[1]}",
        "flip": "yes" if sample.flipped else "no",
        "timestep": str(sample.timestep),
        "text": sample.text,
        "tokens": str(sample.num_tokens),
        "cut": "yes" if sample.is_cut else "no",
    }


class PreviewPages:
    """The pages in a folder: `index.html`, a page for each bucket, and the pictures. Other files in the folder are left alone.

    Args:
        folder: made if it is absent.
    Raises:
        ConfigError: from any method, where `folder` cannot be written.
    """

    def __init__(self, folder: Path, index: Index, max_image_pixels: int) -> None:
        self.index_page = folder / "index.html"
        self._folder = folder
        self._index = index
        self._max_image_pixels = max_image_pixels
        self._drawn: set[int] = set()  # data whose whole picture is written
        with _writing(folder):
            (folder / PICTURE_FOLDER).mkdir(parents=True, exist_ok=True)

    def draw(self, sample: PreviewSample) -> None:
        """Write the pictures of a sample, where it has any.

        Raises:
            DataError: the picture can no longer be read.
        """
        from PIL import Image

        path = self._index.image_path(sample.datum)
        if path is None:
            return
        pixels = pixels_of(self._index, sample.datum, self._max_image_pixels)
        self._save(Image.fromarray(pixels[:, ::-1] if sample.flipped else pixels), _trained_name(sample))
        if sample.datum not in self._drawn:
            whole = framed(load_image(path, self._max_image_pixels), self._index.placement(sample.datum), WHOLE_SIDE_PX)
            self._save(whole, _whole_name(sample))
            self._drawn.add(sample.datum)

    def write(self, samples: Sequence[PreviewSample], title: str) -> None:
        """Write the pages of samples whose pictures are drawn."""
        of_bucket: dict[tuple[int, int], list[PreviewSample]] = {}
        for sample in samples:
            of_bucket.setdefault(sample.bucket, []).append(sample)
        links = []
        for bucket, members in sorted(of_bucket.items()):
            name = f"bucket-{_size(bucket)}.html"
            cards = "\n".join(self._card(sample) for sample in members)
            heading = f"Bucket {_size(bucket)}"
            body = f'<p><a href="index.html">All buckets</a>. {_html(title)}</p>\n<p>{_LEGEND}</p>\n<div class="cards">\n{cards}\n</div>'
            self._write_page(name, heading, body)
            links.append(f'<tr><td><a href="{name}">{_size(bucket)}</a></td><td>{len(members)}</td></tr>')
        table = f"<table>\n<tr><th>bucket</th><th>samples</th></tr>\n{''.join(links)}\n</table>"
        self._write_page(self.index_page.name, "What will be trained", f"<p>{_html(title)}</p>\n{table}")

    def _card(self, sample: PreviewSample) -> str:
        heading = f"<h2>{sample.number}. {_html(sample.key)}</h2>"
        figures = "".join(f"<dt>{_html(name)}</dt><dd>{_html(value)}</dd>" for name, value in sample_figures(sample).items())
        parts = (heading, f"<p>{self._pictures(sample)}</p>", f'<p class="caption">{_html(sample.caption)}</p>', f"<dl>{figures}</dl>")
        return f'<article class="card" id="sample-{sample.number}">\n' + "\n".join(parts) + "\n</article>"

    def _pictures(self, sample: PreviewSample) -> str:
        if self._index.image_path(sample.datum) is None:
            width, height = sample.bucket
            return f'<span class="box" style="aspect-ratio: {width} / {height}">no picture, only its latents</span>'
        pictures = " ".join(
            f'<a href="{PICTURE_FOLDER}/{name}"><img src="{PICTURE_FOLDER}/{name}" alt="{words}" loading="lazy"></a>'
            for name, words in ((_trained_name(sample), "as trained"), (_whole_name(sample), "whole picture"))
        )
        placement = self._index.placement(sample.datum)
        left, top = placement.flipped_crop if sample.flipped else placement.crop
        return pictures if sample.crop == (top, left) else f"{pictures}<br>{_CROP_OF_CACHE}"

    def _save(self, image: Image, name: str) -> None:
        path = self._folder / PICTURE_FOLDER / name
        with _writing(path):
            image.save(path, quality=92, subsampling=0)

    def _write_page(self, name: str, heading: str, body: str) -> None:
        path = self._folder / name
        head = f'<meta charset="utf-8">\n<title>{heading}</title>\n<style>{_STYLE}</style>'
        page = f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n<h1>{heading}</h1>\n{body}\n</body>\n</html>\n'
        with _writing(path):
            path.write_text(page, encoding="utf-8")


def framed(image: Image, placement: Placement, max_side_px: int) -> Image:
    """A whole picture, reduced to at most `max_side_px` wide and high, with a red frame around what `placement` cuts out of it."""
    from PIL import ImageDraw

    reduced = image.copy()
    reduced.thumbnail((max_side_px, max_side_px))
    (left, top), (width, height) = placement.crop, placement.bucket
    across, down = reduced.width / placement.resized[0], reduced.height / placement.resized[1]
    x0, y0 = int(left * across), int(top * down)
    x1, y1 = max(x0, round((left + width) * across) - 1), max(y0, round((top + height) * down) - 1)
    ImageDraw.Draw(reduced).rectangle((x0, y0, x1, y1), outline=(255, 0, 0), width=FRAME_PX)
    return reduced


# The bucket is part of the names, so that a page which an earlier preview left behind keeps its own pictures.
def _trained_name(sample: PreviewSample) -> str:
    return f"{_size(sample.bucket)}-{sample.number:06d}.jpg"


def _whole_name(sample: PreviewSample) -> str:
    return f"{_size(sample.bucket)}-whole-{sample.datum:06d}.jpg"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _shortened(text: str) -> str:
    return text if cell_len(text) <= CAPTION_CELLS else set_cell_size(text, CAPTION_CELLS - 3).rstrip() + "..."


def _aligned(name: str, text: str, width: int) -> str:
    padding = " " * (width - cell_len(text))
    return padding + text if name in _NUMBERS else text + padding


def _html(text: str) -> str:
    return escape(printable(text))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out: {shown(str(path))} cannot be written: {error.strerror or error}") from error
