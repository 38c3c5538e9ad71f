"""Files that are no safetensors, or crafted ones, are refused fast, in little memory, and run no code."""

import json
import os
import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdxl_train.errors import CheckpointError
from sdxl_train.model.safetensors_header import read_header


def write(path: Path, header: bytes | dict, data: bytes = b"") -> str:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return str(path)


def f32(begin: int, end: int, *shape: int) -> dict:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


def test_a_file_of_the_safetensors_library_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7), "c": torch.zeros(0), "d": torch.ones(3, dtype=torch.bfloat16)}
    save_file(tensors, path, metadata={"x": "y"})
    header = read_header(str(path))
    assert header.metadata == {"x": "y"}
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("I64", ()),
        "c": ("F32", (0,)),
        "d": ("BF16", (3,)),
    }
    info = header.tensors["a"]
    assert path.read_bytes()[info.begin : info.end] == tensors["a"].numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": f32(0, 8, 2), "b": f32(4, 12, 2)}, b"\0" * 12, "overlaps"),
        ({"a": f32(0, 8, 2), "b": f32(12, 20, 2)}, b"\0" * 20, "hole"),
        ({"a": f32(4, 12, 2)}, b"\0" * 12, "hole"),
        ({"a": f32(0, 8, 3)}, b"\0" * 8, "takes 8 bytes"),
        ({"a": f32(8, 0, 2)}, b"\0" * 8, "takes -8 bytes"),
        ({"a": f32(0, 8, 2)}, b"\0" * 4, "cut off"),
        ({"a": f32(0, 8, 2)}, b"\0" * 9, "appended"),
        ({"a": f32(0, 8, -1, -2)}, b"\0" * 8, "counts"),
        ({"a": f32(0, 8, True, 2)}, b"\0" * 8, "counts"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8]}}, b"\0" * 8, "two counts"),
        ({"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8, "unknown dtype"),
        ({"a": [1]}, b"", "entry of 'a'"),
        ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8, "unknown dtype"),
        ({"a": f32(0, 0, *[2**62] * 16, 0)}, b"", "counts"),
        ({"__metadata__": {"x": 1}}, b"", "strings"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {}}', b"\0" * 4, "'a' occurs twice"),
        (b'{"a": ' + b"[" * 100_000, b"", "nested|JSON|Expecting"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "damaged"),
        (b'{"\xff": 1}', b"", "damaged"),
        (b"[]", b"", "not a safetensors file"),
    ],
)
def test_an_inconsistent_header_is_refused(tmp_path: Path, header: bytes | dict, data: bytes, reason: str) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_header(path)
    assert path in str(caught.value)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("how", ["pickle 0", "pickle 2", "pickle 4", "torch zip", "torch legacy"])
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_pickle_is_refused_unread_whatever_its_name(tmp_path: Path, how: str, name: str) -> None:
    path, marker = tmp_path / name, tmp_path / "ran"
    if how.startswith("torch"):
        torch.save(Payload(marker), path, _use_new_zipfile_serialization=how == "torch zip")
    else:
        path.write_bytes(pickle.dumps(Payload(marker), protocol=int(how[-1])))
    with pytest.raises(CheckpointError, match=r"pickles .* are not read"):
        read_header(str(path))
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, b"<html></html>", struct.pack("<Q", 1000) + b"{}"])
def test_other_content_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(str(tmp_path / "x"))


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=str(path)):
            read_header(str(path))


LIMIT = 8 * 2**20  # the header is read up to here
HOSTILE_HEADERS: dict[str, Callable[[], bytes]] = {
    "over 100 MB": lambda: b"{" + b" " * (101 * 10**6) + b"}",
    "a million tensors": lambda: (
        b"{" + b",".join(b'"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6)) + b"}"
    ),
    "empty lists": lambda: b'{"a":[' + b"[]," * ((LIMIT - 20) // 3) + b"[]]}",
    "empty tables": lambda: b'{"a":[' + b"{}," * ((LIMIT - 20) // 3) + b"{}]}",
    "deep lists": lambda: b'{"a":' + b"[" * (LIMIT - 20),
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_a_hostile_header_takes_little_time_and_memory(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "x.safetensors", HOSTILE_HEADERS[name]())
    script = (
        "import resource, sys\n"
        "from sdxl_train.errors import CheckpointError\n"
        "from sdxl_train.model.safetensors_header import read_header\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    read_header(sys.argv[1])\n"
        "except CheckpointError:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 'torch' in sys.modules)\n"
    )
    start = time.monotonic()
    output = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True).stdout.split()
    assert time.monotonic() - start < 5
    assert int(output[0]) < 256 * 1024 and output[1] == "False"
