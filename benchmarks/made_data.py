"""Makes what is measured: a large data set of tiny pictures with metadata, photograph-like JPEGs, and plain pictures."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_PER_FOLDER = 1000
_TAGS = (
    "1girl", "blue hair", "solo", "looking at viewer", "long hair", "artist:someone", "best quality", "red dress", "outdoors", "night sky",
)  # fmt: skip
_DESCRIPTION = "A girl with blue hair stands on a hill and looks at the sky while the wind blows over the grass around her."
# A folder that changed less than two seconds before it is searched is searched again at the next start.
_SETTLED_S = 10


@dataclass(frozen=True)
class MetadataSet:
    """A data set with metadata.

    Attributes:
        images: the folder with the pictures, 1000 in a sub-folder.
        lines, one_object: the same metadata as JSON Lines and as one JSON object.
        config: a configuration without `metadata_files`.
        records: a folder for the records.
    """

    images: Path
    lines: Path
    one_object: Path
    config: Path
    records: Path


def metadata_set(folder: Path, rows: int) -> MetadataSet:
    """`rows` PNG files of some 70 bytes, with metadata of some 500 bytes each."""
    root = folder / f"rows-{rows}"
    made = MetadataSet(root / "images", root / "metadata.jsonl", root / "metadata.json", root / "sdxl.toml", root / "records")
    _make_once(root, lambda: _write_metadata_set(made, rows))
    return made


def _write_metadata_set(made: MetadataSet, rows: int) -> None:
    png = BytesIO()
    Image.new("L", (64, 48)).save(png, "PNG")
    choose = random.Random(0)
    write_config(made.config, [made.images])
    with open(made.lines, "w") as lines, open(made.one_object, "w") as one_object:
        for row in range(rows):
            key, part = f"picture_{row:07d}", made.images / f"part{row // _PER_FOLDER:04d}"
            if row % _PER_FOLDER == 0:
                part.mkdir(parents=True)
            path = f"{part}/{key}.png"
            with open(path, "wb", buffering=0) as file:
                file.write(png.getbuffer())
            text = json.dumps(_metadata(path, row, choose))
            lines.write(text + "\n")
            one_object.write(f'{"," if row else "{"}\n"{key}": {text}')
        one_object.write("\n}\n")
    settled = time.time() - _SETTLED_S
    for folder in (made.images, *made.images.iterdir()):
        os.utime(folder, (settled, settled))


def _metadata(path: str, row: int, choose: random.Random) -> dict[str, object]:
    return {
        "image_path": path,
        "caption": ", ".join(choose.choices(_TAGS, k=14)),
        "description": _DESCRIPTION,
        "artist": f"artist {row % 5000}",
        "characters": f"character {row % 9000}, someone {row % 77}",
        "styles": "anime",
        "quality": "best",
        "aesthetic_score": 5.125,
        "perceptual_hash": f"{choose.getrandbits(64):016x}",
        "safe_rating": 0.1,
        "safe_level": "g",
        "original_size": [1024, 1536],
    }


def write_config(path: Path, image_dirs: list[Path], base: str = "base.safetensors", **keys: object) -> None:
    """A configuration for the data commands."""
    values = {
        "pretrained_model_name_or_path": base,
        "image_dirs": list(map(str, image_dirs)),
        "output_dir": str(path.parent / "output"),
        "tokenizer_cache_dir": str(path.parent / "tokenizers"),
        "cpu": True,
        **keys,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))


def photographs(folder: Path, size: tuple[int, int], count: int, copies: int = 1) -> list[Path]:
    """JPEGs of (w, h) px at quality 90 that compress about as photographs do; each `copies` times under names of its own."""
    root = folder / f"photographs-{size[0]}x{size[1]}-{count}x{copies}"

    def write() -> None:
        for number in range(count):
            data = BytesIO()
            photograph(size, number).save(data, "JPEG", quality=90)
            for copy in range(copies):
                (root / f"{number:02d}-{copy:02d}.jpg").write_bytes(data.getbuffer())

    _make_once(root, write)
    return sorted(root.glob("*.jpg"))


def photograph(size: tuple[int, int], seed: int) -> Image.Image:
    """1/f noise, the spectrum of natural scenes (Field 1987), as a lens shows it, with shapes that have sharp edges."""
    width, height = size
    drawn = np.random.default_rng(seed)
    luma, reddish, bluish = (_pink_noise(*side, drawn) for side in ((height, width), (height // 4, width // 4), (height // 4, width // 4)))
    colours = (np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC)) for plane in (reddish, bluish))
    red, blue = (16 * plane for plane in colours)
    grey = 128 + 36 * luma
    pixels = np.stack([grey + red, grey - 0.5 * red - 0.2 * blue, grey + blue], axis=-1)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    shapes = Image.new("L", size)
    pen, fill = ImageDraw.Draw(shapes), ImageDraw.Draw(drawing := image.copy())
    for _ in range(12):
        corners = [tuple(point) for point in (drawn.random((3, 2)) * size).tolist()]
        pen.polygon(corners, fill=96)
        fill.polygon(corners, fill=tuple(drawn.integers(30, 226, 3).tolist()))
    return Image.composite(drawing, image, shapes)


def _pink_noise(height: int, width: int, drawn: np.random.Generator) -> NDArray[np.float32]:
    """Mean 0, standard deviation 1, amplitudes falling with 1 / frequency and by a lens that leaves 30 % at the highest one. [h, w]"""
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequencies[0, 0] = np.inf
    lens = np.exp(-1.2 * (frequencies / 0.5) ** 2)  # 0.3 at half a cycle a px
    spectrum = np.fft.rfft2(drawn.standard_normal((height, width), np.float32)) * lens / frequencies
    noise = np.fft.irfft2(spectrum, (height, width))
    return (noise / noise.std()).astype(np.float32)


def plain_pictures(folder: Path, size: tuple[int, int], count: int) -> Path:
    """A folder of PNG files of (w, h) px in one colour."""
    root = folder / f"plain-{size[0]}x{size[1]}-{count}"
    data = BytesIO()
    Image.new("RGB", size, (90, 120, 150)).save(data, "PNG")
    _make_once(root, lambda: [(root / f"picture_{number:05d}.png").write_bytes(data.getbuffer()) for number in range(count)])
    return root


def captioned_pictures(folder: Path, size: tuple[int, int], count: int) -> Path:
    """A folder of JPEGs of (w, h) px in one colour, no two files of one length, with a caption of 30 tags beside each."""
    root = folder / f"captioned-{size[0]}x{size[1]}-{count}"
    data = BytesIO()
    Image.new("RGB", size, (90, 120, 150)).save(data, "JPEG", quality=90)
    start, rest = data.getvalue()[:2], data.getvalue()[2:]

    def write() -> None:
        choose = random.Random(0)
        for number in range(count):
            comment = b"\xff\xfe" + struct.pack(">H", 2 + number) + bytes(number)
            (root / f"picture_{number:05d}.jpg").write_bytes(start + comment + rest)
            (root / f"picture_{number:05d}.txt").write_text(", ".join(choose.choices(_TAGS, k=30)))

    _make_once(root, write)
    return root


def _make_once(root: Path, write: Callable[[], object]) -> None:
    """Fill a folder, unless an earlier run has finished that."""
    done = root / ".complete"
    if done.exists():
        return
    if root.exists():
        raise SystemExit(f"{root}: it was left half made; remove it")
    root.mkdir(parents=True)
    write()
    done.touch()
