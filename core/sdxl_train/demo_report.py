"""The end of the demo: what was learned and forgotten, as numbers and as one sheet with the curve of the losses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from sdxl_train.atomic import atomic_file
from sdxl_train.demo_pictures import on_canvas, packaged_captions, packaged_picture, split_pictures
from sdxl_train.retrieval import retrieval_accuracy

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdxl_train.sample_benchmark import SampleEntry

SHEET = "demo.png"
MEAN_OVER_STEPS = 20
_PICTURE_PX = 128
_CURVE_PX = (600, 260)  # (w, h) at least
_MARGIN_PX = 44


def say_what_was_made(directory: Path, output_dir: str, samples: Sequence[SampleEntry]) -> None:
    """The closing words, after a training without mishap. A changed configuration may have saved or drawn nothing."""
    from sdxl_train.output_dir import matching_output_dirs
    from sdxl_train.sample_sheets import INDEX_NAME, SHEETS_FOLDER

    made = max(matching_output_dirs(output_dir), key=lambda path: (path / "logs").stat().st_mtime)
    models = sorted((made / "models").glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    losses = _losses(made)
    rounds = _first_and_last_round(made) if samples else None
    new, old = _references(directory) if rounds else ({}, {})
    print("\nThe demo is done. What it made:")
    if models:
        print(f"  model             {models[-1]}")
    if rounds:
        print(f"  before and after  {_write_sheet(directory / SHEET, new, rounds, samples, losses)}")
    if (pages := made / "samples" / SHEETS_FOLDER / INDEX_NAME).exists():
        print(f"  samples over time {pages}")
    if losses:
        first, last = fmean(losses[:MEAN_OVER_STEPS]), fmean(losses[-MEAN_OVER_STEPS:])
        print(f"  loss              {first:.3f} at first, {last:.3f} at the end (means of {min(MEAN_OVER_STEPS, len(losses))} steps)")
    print(f'  curves            {made / "logs"} (tensorboard --logdir "{made / "logs"}")')
    if rounds:
        print("What it learned: a drawn picture is recognised if the picture of its own prompt is the nearest one of all, in 16x16 px.")
        for name, references in (("new pictures", new), ("pictures that the base knew", old)):
            for line in _measured(name, references, rounds, samples):
                print(f"  {line}")
    print("What the base knew fades while it trains on nothing else; a lower rate, fewer steps or old pictures among the new keep more.")
    print(f'Try next: change {directory / "sdxl.toml"}, and run `sdxl-train demo "{directory}"` again to compare.')
    print("For pictures of your own copy that file, name an SDXL checkpoint and your folder in it, and run `sdxl-train FILE.toml`.")


def _losses(made: Path) -> list[float]:
    """The loss of each step of the last run; none where its configuration keeps no metrics.jsonl."""
    log = max((made / "logs").iterdir()) / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    return [line["loss/step"] for line in lines if line.get("loss/step") is not None]


def _first_and_last_round(made: Path) -> tuple[Path, Path] | None:
    """The folders of what was drawn before step 1 and last; None where nothing was drawn after it."""
    rounds = [path for path in (made / "samples").iterdir() if path.name.startswith(("epoch_", "step_"))]
    rounds.sort(key=lambda path: path.stat().st_mtime)
    before = made / "samples" / "step_0"
    return None if before not in rounds or rounds[-1] == before else (before, rounds[-1])


def _newest(folder: Path, i: int) -> Image | None:
    """The latest picture of benchmark entry i in a round's folder, to which each run of the demo adds its own."""
    from PIL import Image

    paths = sorted(folder.glob(f"*_{i:02d}.png"))
    return Image.open(paths[-1]) if paths else None


def _references(directory: Path) -> tuple[dict[str, Image], dict[str, Image]]:
    """By caption: the demo's own pictures that are still in its folder, and those that the base was trained on."""
    captions = packaged_captions()
    split = split_pictures(captions)
    new = [key for key in split.new if (directory / "images" / f"{key}.png").exists()]
    of_new, of_base = ({captions[key]: on_canvas(packaged_picture(key)) for key in keys} for keys in (new, split.base))
    return of_new, of_base


def _measured(name: str, references: dict[str, Image], rounds: tuple[Path, Path], samples: Sequence[SampleEntry]) -> list[str]:
    lines: list[str] = []
    for moment, folder in zip(("before", "after"), rounds, strict=True):
        drawn = [(entry.prompt, _newest(folder, i)) for i, entry in enumerate(samples) if entry.prompt in references]
        known = [(prompt, picture) for prompt, picture in drawn if picture is not None]
        if known:
            lines.append(f"{name}, {moment}: {retrieval_accuracy(known, references)}")
    return lines


def _write_sheet(
    path: Path, new: dict[str, Image], rounds: tuple[Path, Path], samples: Sequence[SampleEntry], losses: Sequence[float]
) -> Path:
    """Rows of (picture, drawn by the base, drawn by the fine-tune) of the new pictures, in two halves beside each other, and the losses."""
    from PIL import Image

    from sdxl_train.sample_files import comparison_sheet

    rows = [
        (entry.prompt.split(", no humans")[0], [new[entry.prompt], *(_newest(folder, i) for folder in rounds)])
        for i, entry in enumerate(samples)
        if entry.prompt in new
    ]
    half = (len(rows) + 1) // 2
    columns = ("the picture", "the base's drawing", "the fine-tune's drawing")
    parts = [comparison_sheet(columns, some, max_side_px=_PICTURE_PX) for some in (rows[:half], rows[half:]) if some]
    curve = loss_curve(losses, (max(_CURVE_PX[0], sum(part.width for part in parts)), _CURVE_PX[1]))
    sheet = Image.new("RGB", (curve.width, curve.height + max((part.height for part in parts), default=0)), "white")
    sheet.paste(curve, (0, 0))
    left = 0
    for part in parts:
        sheet.paste(part, (left, curve.height))
        left += part.width
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def loss_curve(losses: Sequence[float], size: tuple[int, int]) -> Image:
    """The losses over the steps, grey, and their mean over the last MEAN_OVER_STEPS, blue, above an axis from 0.

    Args:
        losses: of the steps from 1; nothing is drawn for fewer than two.
        size: (w, h) in px.
    """
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    if len(losses) < 2:
        return image
    right, bottom, top = size[0] - _MARGIN_PX, size[1] - _MARGIN_PX, max(losses)

    def point(i: int, loss: float) -> tuple[float, float]:
        across, up = (right - _MARGIN_PX) * i / (len(losses) - 1), (bottom - _MARGIN_PX) * loss / top
        return _MARGIN_PX + across, bottom - up

    for quarter in range(5):
        y = point(0, top * quarter / 4)[1]
        draw.line([(_MARGIN_PX, y), (right, y)], fill="lightgrey")
        draw.text((_MARGIN_PX - 6, y), f"{top * quarter / 4:.2f}", fill="black", font=font, anchor="rm")
    draw.text((_MARGIN_PX, bottom + 6), "step 1", fill="black", font=font, anchor="la")
    draw.text((right, bottom + 6), f"step {len(losses)}", fill="black", font=font, anchor="ra")
    draw.text((_MARGIN_PX, 14), f"loss of each step, and mean of {MEAN_OVER_STEPS}", fill="black", font=font, anchor="la")
    means = [fmean(losses[max(0, i + 1 - MEAN_OVER_STEPS) : i + 1]) for i in range(len(losses))]
    draw.line([point(i, loss) for i, loss in enumerate(losses)], fill="darkgrey")
    draw.line([point(i, mean) for i, mean in enumerate(means)], fill="royalblue", width=3)
    return image
