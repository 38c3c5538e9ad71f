"""Makes pictures, captions and caches that must be refused."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture that does not compress, so that each part of its file matters."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def blank_png(width: int, height: int) -> bytes:
    """A black 1-bit PNG of any size in a few kB."""
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    """The PNG with one more chunk behind its header."""
    return png[:33] + png_chunk(kind, body) + png[33:]


def overwritten(data: bytes, at: int, by: bytes) -> bytes:
    """The bytes with some of them replaced."""
    return data[:at] + by + data[at + len(by) :]


def poison_pictures() -> dict[str, tuple[bytes, str]]:
    """{file name: (its bytes, a word that the report must say about it)}. The words are in lower case."""
    made: dict[str, tuple[bytes, str]] = {}
    for kind, options in (("jpg", {"quality": 90}), ("png", {}), ("webp", {"lossless": True})):
        whole = encoded(noise(1), {"jpg": "JPEG"}.get(kind, kind.upper()), **options)
        for percent in (10, 50, 99):
            made[f"{kind}_cut{percent}.{kind}"] = (whole[: len(whole) * percent // 100], "")
    png, jpeg = encoded(noise(2), "PNG"), encoded(noise(3), "JPEG", quality=90)
    soft = Image.fromarray(np.random.default_rng(7).integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
        (256, 256), Image.Resampling.BICUBIC
    )
    smooth = encoded(soft, "JPEG", quality=90)
    middle = len(smooth) // 2
    frames = [noise(4), noise(5), noise(6)]
    huge = b"note\0" + b"x" * (2 << 20)
    made |= {
        "empty.png": (b"", "0 bytes"),
        "empty2.webp": (b"", "0 bytes"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", ""),
        "really_gif.png": (encoded(noise(7), "GIF"), ""),
        "animated.webp": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "3 frames"),
        "animated2.png": (encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), "3 frames"),
        "mega108.png": (blank_png(12000, 9000), "max_image_pixels"),
        "mega400.png": (blank_png(20000, 20000), "max_image_pixels"),
        "huge_text.png": (with_chunk(png, b"tEXt", huge), "text"),
        "packed_text.png": (with_chunk(png, b"zTXt", b"note\0\0" + zlib.compress(bytes(64 << 20))), "ztxt"),
        "damaged_middle.jpg": (overwritten(jpeg, len(jpeg) // 2, b"\xff" * 200), ""),
        "closed_early.jpg": (smooth[:middle] + b"\xff\xd9", ""),
        "zeros_inside.jpg": (overwritten(smooth, middle, bytes(middle // 2)), ""),
        "piece_missing.jpg": (smooth[:middle] + smooth[middle + middle // 2 :], ""),
        "wrong_sum.png": (overwritten(png, png.index(b"IDAT") + 1000, bytes([png[png.index(b"IDAT") + 1000] ^ 0x10])), "checksum"),
        "no_header.png": (png[:8] + png[33:], "ihdr"),
        "zero_size.png": (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", bytes(8) + b"\x08\2\0\0\0") + png[33:], "0x0"),
        "bmp_cut.bmp": (encoded(noise(8), "BMP")[:5000], "cut"),
        "only_magic.jpeg": (b"\xff\xd8\xff", ""),
    }
    return made


def poison_captions() -> dict[str, bytes]:
    """{name of a picture that is good: the bytes of its caption, which is not}."""
    return {
        "says_utf16": "a cat on a mat".encode("utf-16"),
        "says_utf16le": "a cat on a mat".encode("utf-16-le"),
        "says_latin1": "un café".encode("latin-1"),
        "says_shift_jis": "猫がいる".encode("shift-jis"),
        "says_nul": b"a cat\0on a mat",
    }


def write_good(folder: Path, number: int = 3) -> list[str]:
    """Good pictures with captions; their keys."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        noise(100 + i).save(folder / f"fine{i}.png")
        (folder / f"fine{i}.txt").write_text(f"fine, number {i}")
    return [f"fine{i}" for i in range(number)]


def write_poison(folder: Path) -> dict[str, str]:
    """All poison pictures, a pipe and a link to nowhere; {file name: a word that the report must say about it}."""
    folder.mkdir(parents=True, exist_ok=True)
    words: dict[str, str] = {}
    for name, (data, word) in poison_pictures().items():
        (folder / name).write_bytes(data)
        words[name] = word
    os.mkfifo(folder / "pipe.png")
    (folder / "nowhere.jpg").symlink_to(folder / "there is no such file.jpg")
    return words | {"pipe.png": "regular", "nowhere.jpg": ""}


def cache_arrays(width: int = 64, height: int = 64, seed: int = 0) -> dict[str, Any]:
    """The arrays of a valid cache of a picture of that size, which is also its bucket."""
    draws = np.random.default_rng(seed)
    latents, flipped = (draws.standard_normal((4, height // 8, width // 8), np.float32) for _ in range(2))
    sizes = {"original_size": np.array([width, height]), "crop_ltrb": np.array([0, 0, width, height])}
    return {"latents": latents, "latents_flipped": flipped, **sizes}


def write_cache(path: Path, **arrays: Any) -> None:
    """A cache as other programs write it."""
    np.savez(path, **arrays)


def write_bomb(path: Path, arrays: dict[str, Any]) -> None:
    """A cache of some 300 kB whose latents are 256 MiB of zeros; they are never all in memory here."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in arrays.keys() - {"latents"}:
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, arrays[name])
        with archive.open("latents.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (4, 4096, 4096)})
            for _ in range(256):
                file.write(bytes(1 << 20))


class Payload:
    """Pickled, it writes a marker file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._marker),)


def write_poison_caches(folder: Path, marker: Path) -> dict[str, str]:
    """Caches without a picture, each with one defect; {file name: a word that the report must say about it}.

    Args:
        marker: is made when something in them is run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    good = cache_arrays()

    def save(name: str, **changes: Any) -> Path:
        arrays = {key: value for key, value in {**good, **changes}.items() if value is not None}
        np.savez(folder / name, **arrays)
        return folder / name

    holed = good["latents"].copy()
    holed[1, 2, 3] = np.nan
    endless = good["latents_flipped"].copy()
    endless[0, 0, 0] = np.inf
    save("has_nan.npz", latents=holed)
    save("has_infinity.npz", latents_flipped=endless)
    save("five_channels.npz", latents=np.zeros((5, 8, 8), np.float32))
    save("of_integers.npz", latents=np.zeros((4, 8, 8), np.int64))
    save("no_latents.npz", latents=None)
    save("not_flipped.npz", latents_flipped=None)
    save("other_flipped.npz", latents_flipped=np.zeros((4, 4, 16), np.float32))
    save("of_objects.npz", latents=np.array([Payload(marker)], object))
    write_bomb(folder / "bomb.npz", good)
    whole = save("cut.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    flipped_bit = whole.index(good["latents"].tobytes()[:64]) + 100
    (folder / "one_bit.npz").write_bytes(overwritten(whole, flipped_bit, bytes([whole[flipped_bit] ^ 1])))
    (folder / "empty.npz").write_bytes(b"")
    (folder / "page.npz").write_bytes(b"<!DOCTYPE html><html></html>")
    for path in folder.glob("*.npz"):
        path.with_suffix(".txt").write_text("a caption")
    words = {"has_nan": "nan", "has_infinity": "inf", "five_channels": "shape", "of_integers": "int64", "no_latents": "latents"}
    words |= {
        "not_flipped": "flipped",
        "other_flipped": "flipped",
        "of_objects": "",
        "bomb": "",
        "cut": "",
        "one_bit": "",
        "empty": "",
        "page": "",
    }
    return {f"{name}.npz": word for name, word in words.items()}


def write_metadata_problems(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Metadata files, each but the first with one fault; (the files, {file name: line of the fault})."""
    folder.mkdir(parents=True, exist_ok=True)
    row = '{"caption": "x"}'
    faulty = {
        "nan.json": ('{\n"a": {\n"aesthetic_score": NaN}}', 3),
        "infinity.json": ('{"a": {"aesthetic_score":\n-Infinity}}', 2),
        "equal_keys.json": (f'{{\n"a": {row},\n"b": {row},\n"a": {row}\n}}', 4),
        "equal_fields.json": ('{\n"a": {"caption": "x",\n"caption": "y"}}', 3),
        "wrong_type.json": (f'{{"a": {row},\n"b": {{"caption": 5}}}}', 2),
        "wrong_size.json": ('{\n\n"a": {"original_size": [640.5, "480"]}}', 3),
        "row_is_text.json": (f'{{"a": {row},\n"b": "text"}}', 2),
        "cut.json": (f'{{"a": {row},\n"b": {{"capt', 2),
        "a_list.json": (f"[{row}]", 1),
        "deep.json": ('{\n"a": {"x": ' + "[" * 20000 + "]" * 20000 + "}}", 2),
        "digits.json": ('{\n"a": {"aesthetic_score": ' + "7" * 5000 + "}}", 2),
        "latin1.json": (f'{{"a": {row},\n"b": {{"caption": "café"}}}}', 2),
        "lines.jsonl": (f'{{"key": "a", "caption": "x"}}\n\n{{"key": "b", "caption": ["x"]}}\n{row[:-1]}, "key": "c"}}\n', 3),
    }
    first = folder / "with_bom.json"
    first.write_bytes(b"\xef\xbb\xbf" + b'{"fine0": {"caption": "said by the first file"}}')
    for name, (text, _) in faulty.items():
        (folder / name).write_bytes(text.encode("latin-1"))
    return [first, *(folder / name for name in faulty)], {name: line for name, (_, line) in faulty.items()}
