"""Which pictures the demo's base knows and which are new to it, and how they are made ready: on white, in one of three shapes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_train.atomic import atomic_file
from sdxl_train.errors import ConfigError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from PIL.Image import Image

SEED = 1  # of the split
NUM_NEW = 24
NUM_UNSEEN = 72
CANVASES = ((128, 128), (160, 96), (96, 160))  # (w, h) in px: three of the trainer's buckets at resolution 128
FILLED = 0.94  # of the canvas, by the longer side of a picture that is cropped to its content


@dataclass(frozen=True)
class Split:
    """Keys of metadata.json, each in one part, in the order of the file.

    Attributes:
        base: the base is trained on them.
        new: the demo's fine-tune is.
        unseen: nothing is; they are for tests.
    """

    base: tuple[str, ...]
    new: tuple[str, ...]
    unseen: tuple[str, ...]


def split_pictures(captions: Mapping[str, str], num_new: int = NUM_NEW, num_unseen: int = NUM_UNSEEN) -> Split:
    """Divide the pictures by a rule that depends on their keys and captions alone.

    Each picture's rank is a hash of its key. New ones are taken from the groups in turn, so that they are varied: of each group the first,
    then of each the second, and so on. Of what is left the first are unseen, and the rest is the base. A group is what the second tag
    of a caption names.

    Args:
        captions: by key; tags with commas between them.
    Raises:
        ConfigError: too few pictures.
    """
    if len(captions) <= num_new + num_unseen:
        raise ConfigError(f"{len(captions)} pictures cannot be split: {num_new} new and {num_unseen} unseen ones leave none to train on")
    ranked = sorted(captions, key=lambda key: hashlib.sha256(f"{SEED}:{key}".encode()).digest())
    groups: dict[str, list[str]] = {}
    for key in ranked:
        groups.setdefault(captions[key].split(", ")[1], []).append(key)
    turns = sorted((turn, group, key) for group, keys in groups.items() for turn, key in enumerate(keys))
    new = {key for _, _, key in turns[:num_new]}
    unseen = set([key for key in ranked if key not in new][:num_unseen])
    return Split(
        base=tuple(key for key in captions if key not in new | unseen),
        new=tuple(key for key in captions if key in new),
        unseen=tuple(key for key in captions if key in unseen),
    )


def packaged_captions() -> dict[str, str]:
    """The captions of the pictures that come with the trainer, by key."""
    return read_captions(_packaged())


def packaged_picture(key: str) -> Image:
    """A picture that comes with the trainer, with transparency, as it is before `on_canvas`."""
    from PIL import Image

    with (_packaged() / "images" / f"{key}.webp").open("rb") as file:
        picture = Image.open(file)
        picture.load()
    return picture


def _packaged() -> Traversable:
    return resources.files("sdxl_train") / "demo_data"


def read_captions(source: Traversable) -> dict[str, str]:
    """The captions of a picture set, by key, in the order of its metadata.json.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    path = source / "metadata.json"
    try:
        captions = {key: fields["caption"] for key, fields in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: expected an object of objects with a caption each: {type(error).__name__}: {error}") from error
    if odd := [key for key, caption in captions.items() if not isinstance(caption, str) or caption.count(", ") < 1]:
        raise ConfigError(f"{path}: the caption of {odd[0]} must hold two tags at least, as in 'lemon, fruit'")
    return captions


def canvas_of(size: tuple[int, int]) -> tuple[int, int]:
    """The (w, h) of CANVASES whose aspect is nearest to that of `size`, (w, h) too, on a logarithmic scale."""
    return min(CANVASES, key=lambda canvas: abs(math.log(size[0] / size[1] * canvas[1] / canvas[0])))


def on_canvas(picture: Image) -> Image:
    """A picture on white, centred in the canvas nearest to its shape. RGB."""
    from PIL import Image

    canvas = canvas_of(picture.size)
    factor = FILLED * min(canvas[0] / picture.width, canvas[1] / picture.height)
    size = (round(picture.width * factor), round(picture.height * factor))
    # Resized with premultiplied alpha: otherwise the colour of what is transparent bleeds into the edges.
    resized = picture.convert("RGBA").convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    white = Image.new("RGBA", canvas, "white")
    white.alpha_composite(resized, ((canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2))
    return white.convert("RGB")


def benchmark_of(pictures: Iterable[tuple[str, tuple[int, int]]]) -> str:
    """The text of a benchmark that draws each caption once, in the size (w, h) in px, with seeds from 1."""
    entries = [
        json.dumps({"prompt": caption, "width": width, "height": height, "seed": seed})
        for seed, (caption, (width, height)) in enumerate(pictures, start=1)
    ]
    return "[\n  " + ",\n  ".join(entries) + "\n]\n"


def prepare_pictures(source: Path, folder: Path, keys: Iterable[str], captions: Mapping[str, str]) -> None:
    """Write `folder`/KEY.png and KEY.txt for each key; what is there already is kept.

    Raises:
        ConfigError: a picture is missing or damaged.
    """
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for key in keys:
        path = folder / f"{key}.png"
        if not path.exists():
            original = source / "images" / f"{key}.webp"
            try:
                with Image.open(original) as picture, atomic_file(path) as temporary:
                    on_canvas(picture).save(temporary, format="PNG")
            except OSError as error:
                raise ConfigError(f"{original}: {error}") from error
        if not path.with_suffix(".txt").exists():
            with atomic_file(path.with_suffix(".txt")) as temporary:
                temporary.write_text(captions[key], "utf-8")
