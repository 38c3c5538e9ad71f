"""Pictures as trained: upright, on white, sRGB, resized to cover their bucket and cropped to it. Pillow and numpy only."""

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from sdxl_train.data.buckets import Placement, cover
from sdxl_train.data.image_headers import BadImage, ImageHeader, check_png_sums, open_picture, parse_header, unreadable
from sdxl_train.data.jpeg import mend, open_jpeg, reduced_scale
from sdxl_train.text_display import shown

__all__ = ["BadImage", "SourceFile", "image_header", "load_image", "load_pixels", "load_pixels_and_source"]

Pixels = NDArray[np.uint8]  # [h, w, 3] RGB
Window = tuple[float, float, float, float]  # left, top, right, bottom in px of the picture as stored

IN_MEMORY_BYTES = 1 << 30  # a larger file is decoded from the disk, and read a second time for its digest

# By class and not by Image.open: that has a pixel limit of its own in a global variable, below what max_image_pixels may allow.
_READERS: dict[str, type[ImageFile]] = {"PNG": PngImageFile, "JPEG": JpegImageFile, "WEBP": WebPImageFile, "BMP": BmpImageFile}
# What Pillow raises for damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,  # WebP's reader keeps to Pillow's own limit of 179 megapixels
)
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class SourceFile:
    """The file that a picture was decoded from.

    Attributes:
        size: bytes.
        mtime_ns: time of its last change, in ns.
        digest: BLAKE2b of its bytes, 16 bytes.
        ignored_profile: whether it holds a colour profile that is broken or made for another kind of colours.
    """

    size: int
    mtime_ns: int
    digest: bytes
    ignored_profile: bool


def image_header(path: str, max_pixels: int) -> tuple[int, int]:
    """(w, h) in px of the upright picture, from its header and the end of its file; nothing is decoded.

    Raises:
        BadImage: unreadable, of another format, incomplete, with several frames, or of more than `max_pixels` px.
    """
    with _naming(path), open_picture(path) as file:
        return _checked_header(file, max_pixels).upright_size


def load_image(path: str, max_pixels: int) -> Image.Image:
    """Decode a picture in full: upright, transparency on white, colours as sRGB, 16 bits scaled to 8. Mode RGB.

    Raises:
        BadImage: as `image_header`, or damaged or missing pixels.
    """
    with _naming(path), open_picture(path) as file:
        header = _checked_header(file, max_pixels)
        image = _decoded(_in_memory(file), header).rgb
    return image if header.orientation == 1 else image.transpose(_TO_UPRIGHT[header.orientation])


def load_pixels(path: str, placement: Placement, max_pixels: int) -> Pixels:
    """A picture as it fills its bucket: resized to `placement.resized` and cropped. [bucket h, bucket w, 3] uint8.

    Raises:
        BadImage: as `load_image`; also when the picture no longer has the shape it was indexed with.
    """
    with _naming(path), open_picture(path) as file:
        return _fill(file, placement, max_pixels)[0]


def load_pixels_and_source(path: str, placement: Placement, max_pixels: int) -> tuple[Pixels, SourceFile]:
    """As `load_pixels`, with the size, time and digest of the bytes that were decoded.

    Raises:
        BadImage: as `load_pixels`.
    """
    with _naming(path), open_picture(path) as file:
        status = os.fstat(file.fileno())
        pixels, source, ignored_profile = _fill(file, placement, max_pixels)
        return pixels, SourceFile(status.st_size, status.st_mtime_ns, _digest(source), ignored_profile)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Put the file's name before what is said about it."""
    try:
        yield
    except BadImage as problem:
        raise BadImage(f"{shown(path)}: {problem}") from problem


def _checked_header(file: BinaryIO, max_pixels: int) -> ImageHeader:
    header = parse_header(file)
    width, height = header.size
    if header.frames > 1:
        raise BadImage(f"it has {header.frames} frames")
    if width * height > max_pixels:
        raise BadImage(f"it has {width}x{height} = {width * height} px, above max_image_pixels = {max_pixels}")
    return header


def _in_memory(file: BinaryIO) -> BinaryIO:
    """The whole file, read once; the file itself where it is too large for that."""
    if file.seek(0, os.SEEK_END) > IN_MEMORY_BYTES:
        return file
    file.seek(0)
    return BytesIO(file.read())


def _digest(source: BinaryIO) -> bytes:
    if isinstance(source, BytesIO):
        return blake2b(source.getbuffer(), digest_size=16).digest()
    digest = blake2b(digest_size=16)
    source.seek(0)
    while part := source.read(1 << 20):
        digest.update(part)
    return digest.digest()


def _fill(file: BinaryIO, placement: Placement, max_pixels: int) -> tuple[Pixels, BinaryIO, bool]:
    """The picture in its bucket, the bytes it was decoded from, and whether a colour profile was ignored."""
    header = _checked_header(file, max_pixels)
    if cover(header.upright_size, placement.bucket) != placement:
        width, height = header.upright_size
        raise BadImage(f"it has changed since the data set was indexed; it has {width}x{height} px now")
    source = _in_memory(file)
    size, window = _stored_window(header, placement)
    factor = _factor(size, window)
    decoded = _decoded(source, header, reduced_scale(header.jpeg, factor))
    pixels = _resized(decoded, size, window)
    if header.jpeg is not None and decoded.scale > 1:
        mended = mend(pixels, header.jpeg, factor)
        pixels = _resized(_decoded(source, header), size, window) if mended is None else mended
    if header.orientation > 1:
        pixels = np.array(Image.fromarray(pixels).transpose(_TO_UPRIGHT[header.orientation]))
    return pixels, source, decoded.ignored_profile


def _stored_window(header: ImageHeader, placement: Placement) -> tuple[tuple[int, int], Window]:
    """The size (w, h) of the bucket and the window of the picture that fills it, both as the file lies: not turned upright yet.

    Turning the result is cheaper, and at reduced scale it keeps the last block, which may be cut, at the right and bottom.
    """
    (width, height), (left, top) = placement.bucket, placement.crop
    upright_width, upright_height = header.upright_size
    across, down = upright_width / placement.resized[0], upright_height / placement.resized[1]
    x, y = (left * across, (left + width) * across), (top * down, (top + height) * down)
    size = width, height
    if header.orientation >= 5:  # the sides are swapped
        x, y, size = y, x, (height, width)
    if header.orientation in (2, 3, 7, 8):
        x = header.size[0] - x[1], header.size[0] - x[0]
    if header.orientation in (3, 4, 6, 7):
        y = header.size[1] - y[1], header.size[1] - y[0]
    return size, (x[0], y[0], x[1], y[1])


def _factor(size: tuple[int, int], window: Window) -> float:
    """How much smaller the window becomes."""
    return min((window[2] - window[0]) / size[0], (window[3] - window[1]) / size[1])


@dataclass(frozen=True)
class _Decoded:
    """
    Attributes:
        rgb: mode RGB, on white, not turned upright yet.
        scale: how much smaller it was decoded.
        ignored_profile: the file's profile is broken or made for another kind of colours.
    """

    rgb: Image.Image
    scale: int
    ignored_profile: bool


def _resized(decoded: _Decoded, size: tuple[int, int], window: Window) -> Pixels:
    """The window of a picture, resized: the same pixels as resizing all and cropping, without a huge picture for extreme shapes.

    Shrinking averages areas: blocks of 2, 4, 8, ... px first, so a JPEG decoded at reduced scale gives what it gives when decoded in full.
    Enlarging is Lanczos.
    """
    image, factor = decoded.rgb, _factor(size, window)
    blocks = 1 << max(0, int(factor).bit_length() - 1)
    if blocks > decoded.scale:
        image = image.reduce(blocks // decoded.scale)
    left, top = max(0, window[0] / blocks), max(0, window[1] / blocks)
    right, bottom = min(window[2] / blocks, image.width), min(window[3] / blocks, image.height)  # whatever the rounding did
    # Hamming is Pillow's area filter without the jitter of Box: its weights fall off at the edges of the area that a pixel covers.
    resample = Image.Resampling.HAMMING if factor >= 1 else Image.Resampling.LANCZOS
    return np.array(image.resize(size, resample, (left, top, right, bottom)))


def _decoded(source: BinaryIO, header: ImageHeader, scale: int = 1) -> _Decoded:
    """Decode all of a picture; a JPEG whose colours need no conversion to 1 / `scale` of its size."""
    try:
        if header.format == "PNG":
            check_png_sums(source)
        source.seek(0)
        with _open(source, header) as image:
            if image.size != header.size:
                raise BadImage(f"its header gives two sizes, {header.size} and {image.size}")
            if (profile := image.info.get("icc_profile")) and not _is_srgb(profile):
                scale = 1  # converting is not linear: averages would get other colours
            if scale > 1:
                cast(JpegImageFile, image).draft(cast(str, None), (image.width // scale, image.height // scale))
            rgb, ignored_profile = _to_rgb_on_white(image)
            return _Decoded(rgb, scale, ignored_profile)
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(error) from error
        raise BadImage(f"it cannot be decoded: {error}") from error


def _open(source: BinaryIO, header: ImageHeader) -> ImageFile:
    if header.jpeg is not None and isinstance(source, BytesIO):
        return open_jpeg(source.getvalue(), header.jpeg)
    return _READERS[header.format](source)


def _to_rgb_on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """Mode RGB, and whether a colour profile was ignored."""
    colour, alpha = _split_alpha(image)
    rgb, ignored = _to_srgb(colour, image.info.get("icc_profile"))
    if alpha is not None:
        white = Image.new("RGB", rgb.size, "white")
        white.paste(rgb, mask=alpha)
        rgb = white
    return rgb, ignored


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours (mode L, RGB or CMYK) and the opacity (mode L), or None where all is opaque."""
    if image.mode.startswith("I"):
        return _split_deep_grey(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("L" if image.mode in ("1", "L", "LA") else "RGB"), rgba.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _split_deep_grey(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey scaled to 8 bits; Pillow's own conversion would clip it at 255."""
    deep = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
    clear = image.info.get("transparency")  # PNG: the one grey that is transparent
    return grey, None if clear is None else Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8))


def _to_srgb(colour: Image.Image, profile: bytes | None) -> tuple[Image.Image, bool]:
    """Convert by the embedded profile, if any. One that is broken, or made for another kind of colours, is ignored: then True."""
    if not profile or (colour.mode in ("L", "RGB") and _is_srgb(profile)):
        return colour.convert("RGB"), False
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = _colour_space(source)
        if space == "RGB" and colour.mode == "L":
            colour = colour.convert("RGB")
        if {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(space) != colour.mode:
            return colour.convert("RGB"), True
        converted = ImageCms.profileToProfile(colour, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return colour.convert("RGB"), True
    return (colour.convert("RGB"), True) if converted is None else (converted, False)


def _is_srgb(profile: bytes) -> bool:
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        return _colour_space(source) == "RGB" and ImageCms.getProfileDescription(source).startswith("sRGB")
    except (ImageCms.PyCMSError, OSError):
        return False


def _colour_space(profile: ImageCms.ImageCmsProfile) -> str:
    return cast(Any, profile.profile).xcolor_space.strip()
