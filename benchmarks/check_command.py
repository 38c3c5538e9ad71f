"""C14: `sdxl-train check` as a user runs it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

from made_data import captioned_pictures, write_config
from measuring import Goal, Line, Sizes, in_own_process, interleaved

_SIZE = (832, 1216)

_CHECK = """
import sys
from sdxl_train.cli import main
try:
    main()
finally:
    print("torch:", "torch" in sys.modules, file=sys.stderr)
"""
_PLAIN = """
import sys
from pathlib import Path
from PIL import Image
for path in Path(sys.argv[1]).glob("*.jpg"):
    with Image.open(path) as image:
        assert image.size
    assert path.with_suffix(".txt").read_text()
"""


def check_lines(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """The part of C14 that has to do with data."""
    images = captioned_pictures(folder, _SIZE, sizes.checked)
    base, toml = folder / "base.safetensors", folder / "check.toml"
    in_own_process(_write_base, base)
    write_config(toml, [images], str(base))
    ours, plain = interleaved(2 * sizes.repeats - 1, partial(_check, toml), partial(_Ended, _PLAIN, str(images)))
    assert all(json.loads(one.out)["images"] == sizes.checked for one in ours), ours[0].out[:300]
    what = f"sdxl-train check on {sizes.checked} pictures {_SIZE[0]}x{_SIZE[1]} with captions"
    alone = "start Python, open each with Pillow, read each text"
    count, wall_s = sizes.checked, median(one.wall_s for one in ours)
    yield Line("C14", what, count, wall_s, "wall s", median(one.wall_s for one in plain), alone, Goal(3))
    yield Line("", "the same", count, median(one.cpu_s for one in ours), "CPU s", median(one.cpu_s for one in plain), alone)
    imports = sum("torch: True" in one.err for one in ours)
    assert all("torch: " in one.err for one in ours)
    yield Line("C14", "runs of it that import torch", len(ours), imports, "runs", goal=Goal(0))


class _Ended:
    """A command that ended well, with what it wrote and took."""

    def __init__(self, code: str, *arguments: str) -> None:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        self.wall_s = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.out, self.err = done.stdout, done.stderr
        assert done.returncode == 0, done.stdout + done.stderr


def _check(toml: Path) -> _Ended:
    return _Ended(_CHECK, "check", str(toml), "--json")


def _write_base(path: Path) -> None:
    from sdxl_train.model.tiny import write_tiny_sdxl

    if not path.exists():
        write_tiny_sdxl(path)
