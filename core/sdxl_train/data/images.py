"""Pictures as trained: upright, on white, sRGB, resized to cover their bucket and cropped to it. Pillow and numpy only."""

import struct
import zlib
from io import BytesIO
from typing import Any, cast

import numpy as np
from PIL import Image, ImageCms
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from sdxl_train.data.buckets import Placement, cover
from sdxl_train.data.image_headers import BadImage, ImageHeader, check_png_sums, concerns_the_file, read_header
from sdxl_train.text_display import shown

__all__ = ["BadImage", "image_header", "load_image", "load_pixels"]

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


def image_header(path: str, max_pixels: int) -> tuple[int, int]:
    """(w, h) in px of the upright picture, from its header and the end of its file; nothing is decoded.

    Raises:
        BadImage: unreadable, of another format, incomplete, with several frames, or of more than `max_pixels` px.
    """
    return _checked_header(path, max_pixels).upright_size


def load_image(path: str, max_pixels: int) -> Image.Image:
    """Decode a picture in full: upright, transparency on white, colours as sRGB, 16 bits scaled to 8. Mode RGB.

    Raises:
        BadImage: as `image_header`, or damaged pixels.
    """
    return _load(path, max_pixels)


def load_pixels(path: str, placement: Placement, max_pixels: int) -> np.ndarray:
    """A picture as it fills its bucket: resized to `placement.resized` and cropped. [bucket h, bucket w, 3] uint8.

    Raises:
        BadImage: as `load_image`; also when the picture no longer has the shape it was indexed with.
    """
    image = _load(path, max_pixels, placement)
    (width, height), (left, top) = placement.bucket, placement.crop
    across, down = image.width / placement.resized[0], image.height / placement.resized[1]
    # The window alone gives the same pixels as resizing all and cropping, without a huge picture for extreme shapes. When shrinking,
    # whole blocks are averaged first (reducing_gap) and Lanczos does the rest: half the time of Lanczos alone.
    window = (left * across, top * down, (left + width) * across, (top + height) * down)
    return np.array(image.resize((width, height), Image.Resampling.LANCZOS, window, reducing_gap=1.0))


def _checked_header(path: str, max_pixels: int) -> ImageHeader:
    try:
        header = read_header(path)
    except BadImage as problem:
        raise BadImage(f"{shown(path)}: {problem}") from problem
    width, height = header.size
    if header.frames > 1:
        raise BadImage(f"{shown(path)}: it has {header.frames} frames")
    if width * height > max_pixels:
        raise BadImage(f"{shown(path)}: it has {width}x{height} = {width * height} px, above max_image_pixels = {max_pixels}")
    return header


def _load(path: str, max_pixels: int, placement: Placement | None = None) -> Image.Image:
    header = _checked_header(path, max_pixels)
    if placement is not None and cover(header.upright_size, placement.bucket) != placement:
        width, height = header.upright_size
        raise BadImage(f"{shown(path)}: it has changed since the data set was indexed; it has {width}x{height} px now")
    try:
        if header.format == "PNG":
            check_png_sums(path)
        with _READERS[header.format](path) as image:
            if image.size != header.size:
                raise BadImage(f"its header gives two sizes, {header.size} and {image.size}")
            rgb = _to_rgb_on_white(image)
    except BadImage as problem:
        raise BadImage(f"{shown(path)}: {problem}") from problem
    except _DAMAGE as error:
        if isinstance(error, OSError) and not concerns_the_file(error):
            raise
        raise BadImage(f"{shown(path)}: it cannot be decoded: {error}") from error
    return rgb if header.orientation == 1 else rgb.transpose(_TO_UPRIGHT[header.orientation])


def _to_rgb_on_white(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    colour, alpha = _split_alpha(image)
    rgb = _to_srgb(colour, profile) if profile else colour.convert("RGB")
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


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


def _to_srgb(colour: Image.Image, profile: bytes) -> Image.Image:
    """Convert by the embedded profile. One that is broken, or made for another kind of colours, is left aside."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = cast(Any, source.profile).xcolor_space.strip()
        if space == "RGB" and ImageCms.getProfileDescription(source).startswith("sRGB"):
            return colour.convert("RGB")
        if space == "RGB" and colour.mode == "L":
            colour = colour.convert("RGB")
        if {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(space) != colour.mode:
            return colour.convert("RGB")
        converted = ImageCms.profileToProfile(colour, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return colour.convert("RGB")
    return converted if converted is not None else colour.convert("RGB")
