"""Arrays of an `.npz` file from anywhere: judged by the headers, read in pieces, never unpickled; and such a file made of arrays."""

import errno
import io
import math
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from sdxl_train.data.image_headers import concerns_the_file
from sdxl_train.errors import DataError
from sdxl_train.text_display import shown

PIECE_BYTES = 1 << 20  # what is unpacked at a time; a multiple of every item size
DIRECTORY_BYTES = 1 << 20  # of the zip directory; a cache has some ten entries of about 60 bytes
SMALL_BYTES = 1 << 12  # of a small array, and of any array's header
# Latents hardly shrink when packed: those of more than 16 MiB (8192x8192 px) that shrink to less than an eighth are no latents.
UNPACKED_BYTES, UNPACKED_RATIO = 1 << 24, 8

_DTYPE = re.compile(rb"""['"]descr['"]\s*:\s*['"]([<>|=]?[A-Za-z][0-9]*)['"]""")
_ORDER = re.compile(rb"""['"]fortran_order['"]\s*:\s*(True|False)""")
_SHAPE = re.compile(rb"""['"]shape['"]\s*:\s*\(([0-9,\s]*)\)""")
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: lengths of name and extra field, which follow
_ENCRYPTED = 0x1
# What zipfile, zlib, struct and numpy raise on damaged bytes, beside OSError.
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError, NotImplementedError)


class BadCache(DataError):  # noqa: N818, a verdict on the file
    """A cache that cannot be used; the message names the file and gives the reason."""

    @classmethod
    def of(cls, path: str, reason: str) -> "BadCache":
        return cls(f"{shown(path)}: {reason}")


@dataclass(frozen=True)
class NpzArray:
    """What zip directory and array header say about an array.

    Attributes:
        start: where the array's header begins in the file, in bytes; only as it is in the file, when the member is stored uncompressed.
        head_bytes: length of the array's header.
    """

    key: str
    member: zipfile.ZipInfo
    start: int
    head_bytes: int
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool

    @property
    def num_bytes(self) -> int:
        """Of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored(self) -> bool:
        return self.member.compress_type == zipfile.ZIP_STORED

    @property
    def raw_offset(self) -> int:
        """Where the values begin in the file as little-endian float32 in C order; -1 when they are not there in this form."""
        raw = self.stored and self.dtype == np.dtype("<f4") and not self.fortran_order
        return self.start + self.head_bytes if raw else -1


class NpzFile:
    """An open `.npz` file; made by `opened`, which turns what damaged bytes make others raise into BadCache.

    Attributes:
        status: of the file that is open.
        keys: names of the arrays.
    """

    def __init__(self, path: str, file: "_BoundedFile", archive: zipfile.ZipFile) -> None:
        self.status = os.fstat(file.fileno())
        self._path, self._file, self._zip = path, file, archive
        self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        self.keys = list(self._members)

    def array(self, key: str) -> NpzArray:
        """The array of this name, after all that can be checked without reading it.

        Raises:
            BadCache: it is missing, has no readable header, or holds objects, or has sizes that contradict each other, the file, or sense.
        """
        member = self._members.get(key)
        if member is None:
            raise BadCache.of(self._path, f"it has no array {key}")
        array = self._header(key, member)
        if array is None:
            raise BadCache.of(self._path, f"its array {key} has no header that can be read")
        if array.dtype.hasobject:
            raise BadCache.of(self._path, f"its array {key} holds pickled objects, which are never read")
        if array.head_bytes + array.num_bytes != member.file_size or (array.stored and member.compress_size != member.file_size):
            raise BadCache.of(self._path, f"its array {key} of {array.dtype} {array.shape} has {member.file_size} bytes")
        if not array.stored and array.num_bytes > max(UNPACKED_BYTES, UNPACKED_RATIO * member.compress_size):
            raise BadCache.of(self._path, f"its array {key} would unpack from {member.compress_size} to {member.file_size} bytes")
        if array.start + member.compress_size > self.status.st_size:
            raise BadCache.of(self._path, f"it is cut in the array {key}")
        return array

    def pieces(self, array: NpzArray) -> Iterator[NDArray[np.float32]]:
        """The values as they follow each other in the file, as float32; at the end the checksum is compared."""
        left = array.num_bytes
        with self._zip.open(array.member) as stream:
            stream.read(array.head_bytes)
            while left:
                data = stream.read(min(left, PIECE_BYTES))
                left -= len(data)
                if not data or len(data) % array.dtype.itemsize:
                    raise BadCache.of(self._path, f"it is cut in the array {array.key}")
                with np.errstate(over="ignore"):  # too large for float32 is infinity, which the caller can find
                    values = np.frombuffer(data, array.dtype).astype(np.float32, copy=False)
                yield values

    def small(self, key: str, shape: tuple[int, ...], kinds: str) -> NDArray | None:
        """A small array; None where it is missing, large, pickled, of another shape, or of no dtype of these kinds (numpy's letters)."""
        member = self._members.get(key)
        if member is None or member.file_size > SMALL_BYTES:
            return None
        array = self._header(key, member)
        if array is None or array.shape != shape or array.dtype.kind not in kinds:
            return None
        with self._zip.open(member) as stream:
            data = stream.read()[array.head_bytes :]  # to the end, so that the checksum is compared
        return np.frombuffer(data, array.dtype).reshape(shape) if len(data) == array.num_bytes else None

    def _header(self, key: str, member: zipfile.ZipInfo) -> NpzArray | None:
        """The header of the `.npy` format, versions 1 ... 3 (numpy.lib.format); None for another one, such as a structured array's.

        numpy's own reader evaluates it as Python literals of any length and nesting; a plain array needs three fields.
        """
        if member.flag_bits & _ENCRYPTED or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadCache.of(self._path, f"its array {key} is encrypted, or packed by a method that numpy does not write")
        with self._zip.open(member) as stream:  # compares the name in the member's own header with the directory's
            text, head_bytes = _header_text(stream)
        dtype, order, shape = (pattern.search(text) for pattern in (_DTYPE, _ORDER, _SHAPE))
        if not (dtype and order and shape):
            return None
        # The member's own header may be longer than the directory's copy: numpy writes an extra field only there.
        self._file.seek(member.header_offset)
        name_bytes, extra_bytes = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        try:
            return NpzArray(
                key=key,
                member=member,
                start=member.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes,
                head_bytes=head_bytes,
                shape=tuple(int(side) for side in shape[1].split(b",") if side.strip()),
                dtype=np.dtype(dtype[1].decode()),
                fortran_order=order[1] == b"True",
            )
        except (TypeError, ValueError):  # a dtype that numpy does not know, or a side like "1 2"
            return None


class _BoundedFile(io.FileIO):
    """A file that refuses to be read in large parts: zipfile takes a directory of any size into memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > max(DIRECTORY_BYTES, PIECE_BYTES):
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        return super().read(size) or b""


@contextmanager
def opened(path: str) -> Iterator[NpzFile]:
    """The `.npz` file at `path`, closed in any case.

    Raises:
        BadCache: unreadable, no regular file, no zip archive, cut or damaged; also for what is found within the block.
        OSError: when the machine is at fault and not the file (too many open files).
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadCache.of(path, "it is not a regular file")
        if not status.st_size:
            raise BadCache.of(path, "it is empty (0 bytes)")
        with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
            yield NpzFile(path, file, archive)
    except DAMAGE as error:
        raise BadCache.of(path, f"it is cut, damaged or no .npz file: {shown(str(error))}") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # zipfile seeks wherever the bytes say
            raise BadCache.of(path, "it is cut, damaged or no .npz file: it refers to bytes outside of it") from error
        raise unreadable(path, error) from error


def unreadable(path: str, error: OSError) -> Exception:
    """The BadCache for a file that could not be opened or read; the error itself when the machine is at fault."""
    return BadCache.of(path, f"it cannot be read: {error.strerror or error}") if concerns_the_file(error) else error


def packed(arrays: Mapping[str, NDArray]) -> memoryview:
    """The `.npz` file of these arrays, uncompressed. Without times, so that equal arrays make equal files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980-01-01
            member.create_system = 3  # Unix, on every system
            with archive.open(member, "w") as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
    return buffer.getbuffer()


def _header_text(stream: IO[bytes]) -> tuple[bytes, int]:
    """(the text in an array's header, bytes up to its end); the text is empty where there is none of a sensible length."""
    magic = stream.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        return b"", 0
    length_bytes = 2 if magic[6] == 1 else 4
    length = int.from_bytes(stream.read(length_bytes), "little")
    text = stream.read(length) if length <= SMALL_BYTES else b""
    return (text, len(magic) + length_bytes + length) if len(text) == length else (b"", 0)
