"""JPEG (ITU-T T.81): decoded at the scale that is needed, and watched for pixels that are missing. Pillow and numpy only.

libjpeg-turbo, which Pillow decodes with, averages blocks of 2, 4 or 8 px when it decodes at reduced scale. That equals decoding in full and
averaging, but for two things: colours stored at half the size are smoothed by a full decode only, and a full decode clips each pixel to
0 ... 255 before they are averaged. The first is made up for, and where either would show (45 dB) the picture is decoded in full.
"""

import struct
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from sdxl_train.data.image_headers import BadImage, JpegLayout

Pixels = NDArray[np.uint8]  # [h, w, 3] RGB

_END = b"\xff\xd9"
_PAD = bytes(16)  # libjpeg looks up to 8 bytes ahead of what it decodes
_SPARE = 64  # bytes; a scan with more than that left over was not decoded as it was written
_SEARCHED = 1 << 16  # bytes at a time

# Thresholds in dB, set on photographs, 1/f noise, flat drawings, text, and noise at qualities 75 ... 95 so that 45 dB are held.
_SMOOTH_COLOURS = 48.0  # above: smoothing the colours would change nothing that shows
_SHARP_COLOURS = 34.0  # below: smoothing after the resize no longer equals smoothing before it
_BUSY, _CLIPPED = 8.0, 24.0
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as JFIF


def reduced_scale(layout: JpegLayout | None, factor: float) -> int:
    """1, 2, 4 or 8: how much smaller a JPEG can be decoded that is to be shrunk by `factor`; 1 where that would show."""
    if layout is None or not (layout.grey or layout.full_colour or layout.half_colour):
        return 1
    return next((scale for scale in (8, 4, 2) if factor >= scale), 1)


def mend(pixels: Pixels, layout: JpegLayout, factor: float) -> Pixels | None:
    """Make up for what decoding at reduced scale leaves out, on the picture as resized; None where it has to be decoded in full.

    Args:
        factor: how much smaller the picture is than it is stored.
    """
    if _clipping_shows(pixels):
        return None
    if not layout.half_colour:
        return pixels
    share = 0.125 / (factor / 2) ** 2  # of each neighbour: a full decode spreads colours by the weights 1/8, 3/4, 1/8 of their own px
    edges, _ = _edges(pixels)
    change = _decibel(share * share * (edges - (edges @ _LUMA)[..., None]) ** 2)
    if change >= _SMOOTH_COLOURS:
        return pixels
    return _smooth_colours(pixels, share) if change >= _SHARP_COLOURS else None


def _clipping_shows(pixels: Pixels) -> bool:
    """Whether a resized picture has so many hard edges, or edges at black, white or full colours, that its ringing was clipped much."""
    edges, centre = _edges(pixels)
    clipped = (centre <= 2) | (centre >= 253)
    return _decibel(edges * edges) < _BUSY or _decibel(np.where(clipped, edges * edges, 0)) < _CLIPPED


def _edges(pixels: Pixels) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """The Laplacian (sum of the four neighbours - 4 x the pixel) on every eighth row, and those pixels. [rows, w - 2, 3]"""
    rows = pixels[1:-1:8].astype(np.int16)
    edges = -4 * rows
    edges += pixels[:-2:8]
    edges += pixels[2::8]
    edges = edges[:, 1:-1] + rows[:, :-2] + rows[:, 2:]
    return edges.astype(np.float32), rows[:, 1:-1]


def _decibel(squares: NDArray[np.floating]) -> float:
    return float(10 * np.log10(255**2 / max(1e-6, squares.mean(dtype=np.float64))))


def _smooth_colours(pixels: Pixels, share: float) -> Pixels:
    """Take `share` of the colour (not of the brightness) from each of the four neighbours."""
    red, green, blue = (pixels[..., channel].astype(np.int16) for channel in range(3))
    luma = ((77 * red.view(np.uint16) + 150 * green.view(np.uint16) + 29 * blue.view(np.uint16)) >> 8).view(np.int16)  # of at most 65280
    weight = np.int16(round(64 * share))
    red_change, blue_change = (weight * _laplacian(channel - luma) for channel in (red, blue))  # in 1/64
    green_change = -((red_change >> 1) + 3 * (blue_change >> 4))  # 0.299 / 0.587 and 0.114 / 0.587: the luma stays
    changed = np.empty_like(pixels)
    for channel, (plane, change) in enumerate(((red, red_change), (green, green_change), (blue, blue_change))):
        plane += (change + 32) >> 6
        changed[..., channel] = np.clip(plane, 0, 255)
    return changed


def _laplacian(plane: NDArray[np.int16]) -> NDArray[np.int16]:
    """Sum of the four neighbours - 4 x the pixel; what lies outside equals the edge."""
    result = -4 * plane
    for axis in (0, 1):
        before, after = (slice(None),) * axis + (slice(None, -1),), (slice(None),) * axis + (slice(1, None),)
        first, last = (slice(None),) * axis + (slice(None, 1),), (slice(None),) * axis + (slice(-1, None),)
        result[after] += plane[before]
        result[before] += plane[after]
        result[first] += plane[first]
        result[last] += plane[last]
    return result


def open_jpeg(data: bytes, layout: JpegLayout) -> JpegImageFile:
    """A JPEG that cannot be decoded when some of its pixels are missing; libjpeg would make them up and only warn.

    A scan that holds all the picture is given to it without the end marker, so it asks for more where the data are short: OSError. Of
    several scans (progressive) all must be there, but the last one may be cut unseen: libjpeg shows no row before the end.

    Raises:
        BadImage: with the reason alone, for scans that are missing.
    """
    if layout.one_scan:
        return _OneScan(data, layout.scan_at)
    _check_scans(data, layout)
    return JpegImageFile(BytesIO(data))


class _OneScan(JpegImageFile):
    """A JPEG with padding for its end marker. To load it raises BadImage where its last row comes before the end of the data."""

    def __init__(self, data: bytes, scan_at: int) -> None:
        start = scan_at + 2 + struct.unpack_from(">H", data, scan_at + 2)[0]
        end = _next_marker(data, start)
        spare = data[max(start, end - _SPARE) : end]
        # Equal bytes are padding, which some cameras write.
        self._must_be_read = len(spare) == _SPARE and len(set(spare)) > 1
        self._source = _InTwoParts(data[:end] + _PAD, end - len(spare))
        super().__init__(self._source)

    def load(self) -> "Image.core.PixelAccess | None":  # only known to type checkers
        access = super().load()
        if self._must_be_read and self._source.tell() <= self._source.first_part:
            raise BadImage("its pixels are damaged: the last row comes before the end of the data")
        return access


class _InTwoParts(BytesIO):
    """No read goes beyond the first part and into the second one, so the position tells whether that was wanted."""

    def __init__(self, data: bytes, first_part: int) -> None:
        super().__init__(data)
        self.first_part = first_part

    def read(self, size: int | None = -1, /) -> bytes:
        left = self.first_part - self.tell()
        return super().read(size if left <= 0 else left if size is None or size < 0 else min(size, left))


def _next_marker(data: bytes, start: int) -> int:
    """The offset of the first marker from `start` on, or the length of the data. Within a scan FF 00 is a byte, FF D0 ... D7 a restart."""
    whole = np.frombuffer(data, np.uint8)
    for at in range(start, len(data), _SEARCHED):
        part = whole[at : at + _SEARCHED + 1]
        found = np.flatnonzero(part[:-1] == 0xFF)
        kind = part[found + 1]
        found = found[(kind != 0) & (kind != 0xFF) & (kind & 0xF8 != 0xD0)]
        if len(found):
            return at + int(found[0])
    return len(data)


def _check_scans(data: bytes, layout: JpegLayout) -> None:
    """Each of the 64 coefficients of each component must have been sent to its last bit (T.81, G.1.1)."""
    missing = {(name, coefficient) for name in layout.names for coefficient in range(64)}
    at = layout.scan_at
    while data[at : at + 2] not in (_END, b""):
        length = struct.unpack_from(">H", data, at + 2)[0]
        after = at + 2 + length
        if data[at + 1] == 0xDA:
            count = data[at + 4]
            first, last, bits = data[at + 5 + 2 * count : at + 8 + 2 * count]
            if bits & 15 == 0:
                missing -= {(data[at + 5 + 2 * i], coefficient) for i in range(count) for coefficient in range(first, last + 1)}
        at = _next_marker(data, after)
    if missing:
        raise BadImage("it is cut or damaged: a JPEG without its last scans")
