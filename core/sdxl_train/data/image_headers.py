"""What a picture file says about itself, read without decoding it: format, size, orientation, frames, and whether its end is there.

Layouts: PNG (W3C PNG-3), JPEG (ITU-T T.81 annex B), WebP container (RFC 9649), BMP (BITMAPINFOHEADER), Exif 2.32 (orientation, tag 0x0112).
"""

import errno
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Literal

from sdxl_train.errors import DataError

PNG_CHUNK_LIMIT = 1 << 20  # bytes of one text or colour-profile chunk, unpacked; Pillow refuses larger ones
HEAD_BYTES, TAIL_BYTES = 1 << 14, 1 << 14


class BadImage(DataError):  # noqa: N818, a verdict on the picture
    """A picture that cannot be trained on; the message is the reason, and names the file where a path was given."""


@dataclass(frozen=True)
class JpegLayout:
    """How a JPEG holds its pixels.

    Attributes:
        names: the identifier of each component.
        sampling: (across, down) of each component, relative to the others.
        adobe_rgb: stored as RGB, not as luma and colour differences.
        scan_at: offset in bytes of the first scan's marker.
        one_scan: whether that scan holds all the pixels (neither progressive nor a scan a component).
    """

    names: tuple[int, ...]
    sampling: tuple[tuple[int, int], ...]
    adobe_rgb: bool
    scan_at: int
    one_scan: bool

    @property
    def grey(self) -> bool:
        return len(self.names) == 1

    @property
    def full_colour(self) -> bool:
        """Three components of one size (4:4:4)."""
        return len(self.names) == 3 and len(set(self.sampling)) == 1

    @property
    def half_colour(self) -> bool:
        """Colours of half the width and half the height (4:2:0)."""
        return self.sampling == ((2, 2), (1, 1), (1, 1)) and not self.adobe_rgb


@dataclass(frozen=True)
class ImageHeader:
    """
    Attributes:
        size: (w, h) in px as stored, before the orientation is applied.
        orientation: 1 ... 8 as in Exif; 1 is upright, 5 ... 8 swap the sides.
        frames: more than 1 for an animation.
        jpeg: of a JPEG only.
    """

    format: Literal["PNG", "JPEG", "WEBP", "BMP"]
    size: tuple[int, int]
    orientation: int = 1
    frames: int = 1
    jpeg: JpegLayout | None = None

    @property
    def upright_size(self) -> tuple[int, int]:
        """(w, h) in px as the picture is to be seen."""
        return self.size if self.orientation < 5 else (self.size[1], self.size[0])


def read_header(path: str) -> ImageHeader:
    """Read a picture's header and look for its end.

    Raises:
        BadImage: with the reason alone, for a file that is missing, unreadable, of another format, or incomplete.
        OSError: when the machine is at fault and not the file (too many open files).
    """
    with open_picture(path) as file:
        return parse_header(file)


@contextmanager
def open_picture(path: str) -> Iterator[BinaryIO]:
    """Open a regular file to be read.

    Raises:
        BadImage: with the reason alone, for a file that is missing or unreadable, also when that shows while it is read.
        OSError: when the machine is at fault and not the file.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened: a pipe would wait for its writer
            raise BadImage("it is not a regular file")
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise unreadable(error) from error


def parse_header(file: BinaryIO) -> ImageHeader:
    """As `read_header`, of a file that is open; its position changes.

    Raises:
        BadImage: with the reason alone, for another format or an incomplete file.
    """
    try:
        return _parse(_Bytes(file))
    except (struct.error, zlib.error) as error:
        raise BadImage(f"its header cannot be read: {error}") from error


def check_png_sums(file: BinaryIO) -> None:
    """Compare the checksums of a PNG's pixel chunks; Pillow does not, and decodes many a flipped bit into a wrong picture.

    Raises:
        BadImage: with the reason alone.
    """
    file_length = file.seek(0, os.SEEK_END)
    file.seek(8)
    while len(prefix := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", prefix)
        body, stored = file.read(min(length, file_length)), file.read(4)
        if kind == b"IDAT" and zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(stored, "big"):
            raise BadImage("its pixels are damaged: the checksum of a PNG chunk (IDAT) does not fit")
        if kind == b"IEND":
            return


def unreadable(error: OSError) -> Exception:
    """The BadImage for a file that could not be opened or read; the error itself when the machine is at fault."""
    return BadImage(f"it cannot be read: {error.strerror or error}") if concerns_the_file(error) else error


def concerns_the_file(error: OSError) -> bool:
    """False for what says nothing about the file: no memory, too many open files."""
    return error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class _Bytes:
    """Random access to an open file, its first bytes kept."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.length = file.seek(0, os.SEEK_END)
        file.seek(0)
        self._head = file.read(HEAD_BYTES)

    def at(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes; fewer at the end of the file."""
        if offset + count <= len(self._head) or len(self._head) == self.length:
            return self._head[offset : offset + count]
        self._file.seek(offset)
        return self._file.read(count)


def _parse(data: _Bytes) -> ImageHeader:
    start = data.at(0, 16)
    if not start:
        raise BadImage("it is empty (0 bytes)")
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        header = _png(data)
    elif start.startswith(b"\xff\xd8\xff"):
        header = _jpeg(data)
    elif start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        header = _webp(data)
    elif start.startswith(b"BM"):
        header = _bmp(data)
    else:
        raise BadImage("it is no PNG, JPEG, WebP or BMP picture")
    if min(header.size) < 1:
        raise BadImage(f"its header gives the size {header.size[0]}x{header.size[1]}")
    return header


def _png(data: _Bytes) -> ImageHeader:
    size, orientation, frames = (0, 0), 1, 1
    tail = data.at(max(0, data.length - TAIL_BYTES), TAIL_BYTES)
    # Walking all chunks would touch the whole file: do it only where something may follow the pixels, or the end is not at the end.
    walk_all = not tail.endswith(b"\0\0\0\0IEND\xaeB`\x82") or any(kind in tail for kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"))
    offset = 8
    while True:
        prefix = data.at(offset, 8)
        if len(prefix) < 8:
            raise BadImage("it is cut: a PNG without its end (IEND)")
        length, kind = struct.unpack(">I4s", prefix)
        if offset == 8 and kind != b"IHDR":
            raise BadImage("it is a PNG without a header (IHDR)")
        if kind == b"IHDR":
            size = struct.unpack(">II", data.at(offset + 8, 8))
        elif kind == b"acTL":
            (frames,) = struct.unpack(">I", data.at(offset + 8, 4))
        elif kind == b"eXIf":
            orientation = exif_orientation(data.at(offset + 8, length))
        elif kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            _check_png_chunk(kind, length, data, offset + 8)
        elif kind == b"IEND" or (kind == b"IDAT" and not walk_all):
            return ImageHeader("PNG", size, orientation, max(1, frames))
        offset += length + 12


def _check_png_chunk(kind: bytes, length: int, data: _Bytes, offset: int) -> None:
    """Refuse a text or profile chunk above the limit, also one that only unpacks to that size."""
    too_large = length > PNG_CHUNK_LIMIT
    if not too_large and kind != b"tEXt":
        body = data.at(offset, length)
        packed = _packed_part(kind, body)
        too_large = packed is not None and len(zlib.decompressobj().decompress(packed, PNG_CHUNK_LIMIT + 1)) > PNG_CHUNK_LIMIT
    if too_large:
        raise BadImage(f"it holds a {kind.decode()} chunk of more than {PNG_CHUNK_LIMIT >> 20} MiB")


def _packed_part(kind: bytes, body: bytes) -> bytes | None:
    """The zlib stream in a chunk: after `name NUL method`, for iTXt after `name NUL flag method language NUL translated name NUL`."""
    _, _, rest = body.partition(b"\0")
    if kind != b"iTXt":
        return rest[1:]
    return rest[2:].split(b"\0", 2)[-1] if rest[:1] == b"\1" else None


def _jpeg(data: _Bytes) -> ImageHeader:
    size, orientation, offset = None, 1, 2
    names, sampling, sequential, adobe_rgb = (), (), False, False
    while True:
        prefix = data.at(offset, 4)
        if len(prefix) < 4 or prefix[0] != 0xFF:
            raise BadImage("it is a cut or damaged JPEG: no pixels follow its header")
        marker = prefix[1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:  # fill byte, or a marker without a segment
            offset += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(prefix[2:], "big")
        if marker == 0xDA:  # start of scan
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header; the excepted are tables
            height, width = struct.unpack(">HH", data.at(offset + 5, 4))
            size = width, height
            sequential = marker in (0xC0, 0xC1)  # Huffman coded
            fields = data.at(offset + 9, length - 7)
            names, sampling = tuple(fields[1::3]), tuple((byte >> 4, byte & 15) for byte in fields[2::3])
        elif marker == 0xEE and data.at(offset + 4, 5) == b"Adobe":
            adobe_rgb = data.at(offset + 15, 1) == b"\0"
        elif marker == 0xE1 and data.at(offset + 4, 6) == b"Exif\0\0":
            orientation = exif_orientation(data.at(offset + 10, length - 8))
        offset += 2 + length
    if size is None:
        raise BadImage("it is a JPEG without a frame header")
    tail = data.at(max(offset, data.length - 64), 64)
    # Within the scans FF D9 can only be the end of the image, so a thumbnail's end or bytes behind the picture do not mislead.
    if not tail.rstrip(b"\0").endswith(b"\xff\xd9") and b"\xff\xd9" not in data.at(offset, data.length - offset):
        raise BadImage("it is cut: a JPEG without its end (EOI)")
    # Further pictures of a Multi-Picture file (previews, gain maps) are no frames: the first one is the picture by definition.
    one_scan = sequential and data.at(offset + 4, 1) == bytes([len(names)])
    layout = JpegLayout(names, sampling, adobe_rgb or names == tuple(b"RGB"), offset, one_scan)
    return ImageHeader("JPEG", size, orientation, jpeg=layout)


def _webp(data: _Bytes) -> ImageHeader:
    (riff_length,) = struct.unpack("<I", data.at(4, 4))
    end = riff_length + 8
    if end > data.length:
        raise BadImage(f"it is cut: a WebP of {end} bytes by its header, {data.length} on disk")
    kind = data.at(12, 4)
    if kind == b"VP8 ":
        mark, width, height = struct.unpack("<3sHH", data.at(23, 7))
        if mark != b"\x9d\x01\x2a":
            raise BadImage("it is a damaged WebP: no start code")
        return ImageHeader("WEBP", (width & 0x3FFF, height & 0x3FFF))
    if kind == b"VP8L":
        mark, bits = struct.unpack("<BI", data.at(20, 5))
        if mark != 0x2F:
            raise BadImage("it is a damaged WebP: no start code")
        return ImageHeader("WEBP", ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1))
    if kind != b"VP8X":
        raise BadImage("it is a damaged WebP: it starts with no picture chunk")
    canvas = data.at(24, 6)
    size = int.from_bytes(canvas[:3], "little") + 1, int.from_bytes(canvas[3:], "little") + 1
    orientation, frames, offset = 1, 0, 30
    while offset + 8 <= end:
        chunk, length = struct.unpack("<4sI", data.at(offset, 8))
        if chunk == b"ANMF":
            frames += 1
        elif chunk == b"EXIF":
            orientation = exif_orientation(data.at(offset + 8, length))
        offset += 8 + length + (length & 1)
    return ImageHeader("WEBP", size, orientation, max(1, frames))


def _bmp(data: _Bytes) -> ImageHeader:
    pixels_at, header_length = struct.unpack("<II", data.at(10, 8))
    if header_length == 12:
        width, height, _, bits = struct.unpack("<HHHH", data.at(18, 8))
        packing = 0
    else:
        width, height, _, bits, packing = struct.unpack("<iiHHI", data.at(18, 16))
    height = abs(height)  # negative: stored from the top
    row = (width * bits + 31) // 32 * 4
    if packing in (0, 3) and pixels_at + row * height > data.length:  # uncompressed
        raise BadImage(f"it is cut: a BMP of {pixels_at + row * height} bytes by its header, {data.length} on disk")
    return ImageHeader("BMP", (width, height))


def exif_orientation(exif: bytes) -> int:
    """The orientation in an Exif block, 1 ... 8; 1 where it says nothing sensible."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return 1
    (entries,) = struct.unpack_from(order + "H", tiff, start)
    for entry in range(start + 2, min(start + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
        if tag == 0x0112:
            return value if 1 <= value <= 8 else 1
    return 1
