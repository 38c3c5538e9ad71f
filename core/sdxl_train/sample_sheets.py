"""Contact sheets of a training's samples: a page for each round, and one that shows what each prompt became over time.

They are web pages, since those show prompts of any script and lead to the full pictures. They lie with small copies of the pictures in
`samples/sheets/`, beside the folders of the rounds, and are made from the written pictures, so they go on after a training is resumed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from sdxl_train.atomic import atomic_file
from sdxl_train.sample_benchmark import SampleEntry
from sdxl_train.sample_files import PNG_TEXT_KEY, parameters_text
from sdxl_train.text_display import printable

SHEETS_FOLDER = "sheets"
THUMBNAILS_FOLDER = "thumbnails"
INDEX_NAME = "index.html"
THUMBNAIL_PX = 256
MAX_COLUMNS = 24
MAX_PROMPT_CHARS = 240
MAX_TEXT_CHARS = 4000

_PLACE_IN_TEXT = re.compile(r", Epoch: (\d+), Step: (\d+)\Z")
_PLACE_IN_NAME = re.compile(r"_(\d+)(?:-(\d+))?\Z")
_ROUND_NAME = re.compile(r"(epoch|step)_(\d+)")
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
img { max-width: 256px; height: auto; vertical-align: top; }
table { border-collapse: collapse; } th, td { padding: .3em; text-align: left; vertical-align: top; }
thead th { position: sticky; top: 0; background: Canvas; }
tbody th { width: 14em; min-width: 14em; position: sticky; left: 0; background: Canvas; }
th { font-weight: normal; overflow-wrap: anywhere; } .small { opacity: .7; font-size: .9em; }
.cards { display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start; } .card { width: 256px; overflow-wrap: anywhere; }
.text { white-space: pre-wrap; font-size: .9em; margin: .3em 0; }
"""


@dataclass(frozen=True)
class DrawnPicture:
    """A picture that a round has written.

    Attributes:
        round: the name of the round's folder.
        name: the file name, without its ending.
        settings: the text in the PNG up to the place in the training: equal for pictures that only the weights make different.
        epoch, step: where the training was.
    """

    round: str
    name: str
    settings: str
    epoch: int
    step: int


def update_sheets(samples: Path, paths: Sequence[Path], entries: Sequence[SampleEntry], sampler: str) -> None:
    """Make the page of a round, and the one over time anew.

    Args:
        samples: the folder of all rounds.
        paths: the pictures of this round, at least one, in its folder.
        entries: of the benchmark. A row over time shows one picture of one of them; those with a random seed have none.
        sampler: the value of `sample_sampler`.
    Raises:
        OSError, ValueError: a picture cannot be read or a file cannot be written.
    """
    sheets, round_name = samples / SHEETS_FOLDER, paths[0].parent.name
    (sheets / THUMBNAILS_FOLDER / round_name).mkdir(parents=True, exist_ok=True)
    for path in paths:
        _write_thumbnail(path, sheets / THUMBNAILS_FOLDER / round_name / f"{path.stem}.jpg")
    drawn = drawn_pictures(samples, round_name)
    _write_page(sheets / f"{round_name}.html", *_round_page(drawn))
    rounds = _rounds_until(samples, drawn[0].step)
    _write_page(sheets / INDEX_NAME, *_page_over_time(samples, rounds, entries, sampler))


def drawn_pictures(samples: Path, round_name: str) -> list[DrawnPicture]:
    """The pictures of a round that still exist, by entry and number; of those that a later start has drawn again only the last."""
    found: dict[tuple[int, int], DrawnPicture] = {}
    for path in _thumbnails(samples, round_name):
        place = _PLACE_IN_NAME.search(path.stem)
        picture = _drawn(samples / round_name / f"{path.stem}.png")
        if place and picture:
            found[int(place[1]), int(place[2] or 0)] = picture
    return [picture for _, picture in sorted(found.items())]


def evenly_chosen(steps: Sequence[int], most: int = MAX_COLUMNS) -> list[int]:
    """At most `most` of some sorted steps, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _rounds_until(samples: Path, last_step: int) -> dict[int, str]:
    """A round for each step at which there was one, in order. Those after the last are of an earlier start that went further."""
    rounds: dict[int, str] = {}
    for folder in sorted((samples / SHEETS_FOLDER / THUMBNAILS_FOLDER).iterdir()):
        name = _ROUND_NAME.fullmatch(folder.name)
        if name and name[1] == "step":
            rounds[int(name[2])] = folder.name
        elif name:  # the step of an epoch stands in its pictures
            rounds.update({picture.step: folder.name for picture in drawn_pictures(samples, folder.name)[:1]})
    return {step: rounds[step] for step in sorted(rounds) if step <= last_step}


def _thumbnails(samples: Path, round_name: str) -> list[Path]:
    """Of all starts, the latest last: names begin with the time."""
    return sorted((samples / SHEETS_FOLDER / THUMBNAILS_FOLDER / round_name).glob("*.jpg"))


def _drawn(path: Path) -> DrawnPicture | None:
    """What a picture says of itself; None where it is gone or is not one of a training."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = str(image.info.get(PNG_TEXT_KEY, ""))
    except OSError:
        return None
    place = _PLACE_IN_TEXT.search(text)
    return DrawnPicture(path.parent.name, path.stem, text[: place.start()], int(place[1]), int(place[2])) if place else None


def _write_thumbnail(picture: Path, path: Path) -> None:
    from PIL import Image

    with Image.open(picture) as image:
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        with atomic_file(path) as temporary:
            image.convert("RGB").save(temporary, format="JPEG", quality=90)


def _round_page(pictures: Sequence[DrawnPicture]) -> tuple[str, str]:
    """Title and body: a card for each picture with everything it was made from."""
    first = pictures[0]
    cards = "\n".join(
        f'<div class="card">{_link(picture)}<p class="text">{_html(picture.settings, MAX_TEXT_CHARS)}</p></div>' for picture in pictures
    )
    return f"{_words(first)}: samples", f'<p><a href="{INDEX_NAME}">Over time</a></p>\n<div class="cards">\n{cards}\n</div>'


def _page_over_time(samples: Path, rounds: dict[int, str], entries: Sequence[SampleEntry], sampler: str) -> tuple[str, str]:
    """Title and body: a row for each picture with a fixed seed, a column for each round, at most `MAX_COLUMNS` of them."""
    columns = [drawn_pictures(samples, rounds[step]) for step in evenly_chosen(list(rounds))]
    columns = [column for column in columns if column]
    by_settings = [{picture.settings: picture for picture in column} for column in columns]
    head = "".join(f'<th><a href="{column[0].round}.html">{_words(column[0])}</a></th>' for column in columns)
    rows = []
    for entry, seed in _fixed(entries):
        settings = parameters_text(entry, seed, sampler)
        cells = (_link(column[settings]) if settings in column else "" for column in by_settings)
        label = f'{_html(entry.prompt, MAX_PROMPT_CHARS)}<br><span class="small">seed {seed}</span>'
        rows.append(f"<tr><th>{label}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    table = f"<table>\n<thead><tr><th></th>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>"
    links = " ".join(f'<a href="{name}.html">{name}</a>' for name in rounds.values())
    left_out = f" {len(columns)} of {len(rounds)} rounds are shown." if len(columns) < len(rounds) else ""
    legend = f"<p>Pictures with a random seed are only on the pages of their rounds.{left_out}</p>"
    return "Samples over time", f"{legend}\n{table}\n<details><summary>All rounds</summary>{links}</details>"


def _fixed(entries: Sequence[SampleEntry]) -> Iterator[tuple[SampleEntry, int]]:
    """Each picture whose seed is the same in every round."""
    for entry in entries:
        if entry.seed is not None:
            yield from ((entry, entry.seed + b) for b in range(entry.num_pictures))


def _link(picture: DrawnPicture) -> str:
    place = f"{picture.round}/{picture.name}"
    return f'<a href="../{place}.png"><img src="{THUMBNAILS_FOLDER}/{place}.jpg" alt="{_words(picture)}" loading="lazy"></a>'


def _words(picture: DrawnPicture) -> str:
    return f"step {picture.step}, epoch {picture.epoch}"


def _html(text: str, most: int) -> str:
    return escape(printable(text[:most])) + ("..." if len(text) > most else "")


def _write_page(path: Path, title: str, body: str) -> None:
    head = f'<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n'
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
