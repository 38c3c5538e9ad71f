"""Makes the trained base of the demo, in the real SDXL layout, from a set of pictures: see docs/demo.md.

python tools/make_demo_base.py core/sdxl_train/demo_data WORK

It trains a VAE, then the U-Net by `sdxl-train` itself, and writes WORK/base.safetensors. After an interrupt the same command goes on where
it was. With --measure it then draws prompts of the base, and says how many are recognised; new pictures are the demo's own matter.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from demo_base.runs import NUM_STEPS, configuration, draw, train, write_text
from demo_base.untrained import base_architecture, write_untrained_base
from demo_base.vae import VaeSettings, load_pixels, psnr_db, to_sdxl_scale, train_vae
from PIL import Image

from sdxl_train.atomic import atomic_file
from sdxl_train.demo_pictures import NUM_NEW, NUM_UNSEEN, Split, benchmark_of, prepare_pictures, read_captions, split_pictures
from sdxl_train.errors import SdxlTrainError
from sdxl_train.testing import retrieval_accuracy

NUM_MEASURED = 40  # prompts of the base


class Log:
    """Says lines on stderr and adds them to a file, with the time since the start of this process in minutes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = time.monotonic()

    def __call__(self, line: str) -> None:
        text = f"{(time.monotonic() - self._start) / 60:6.1f} min  {line}"
        print(text, file=sys.stderr, flush=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def make_base(source: Path, work: Path, split: Split, captions: Mapping[str, str], options: argparse.Namespace, say: Log) -> Path:
    """Pictures, VAE, the file without a trained U-Net, and its training. Returns WORK/base.safetensors."""
    for part in ("base", "new", "unseen"):
        prepare_pictures(source, work / "pictures" / part, getattr(split, part), captions)
    say(f"pictures: {len(split.base)} of the base, {len(split.new)} new, {len(split.unseen)} unseen")
    untrained = work / "untrained.safetensors"
    if not untrained.exists():
        pictures = load_pixels([work / "pictures" / "base" / f"{key}.png" for key in split.base])
        unseen = load_pixels([work / "pictures" / "unseen" / f"{key}.png" for key in split.unseen])
        vae = train_vae(base_architecture(), pictures, VaeSettings(num_steps=options.vae_steps), work / "vae.pt", say)
        to_sdxl_scale(vae, pictures)
        say(f"vae: {psnr_db(vae, unseen):.1f} dB on {len(unseen)} unseen pictures")
        write_untrained_base(untrained, vae, [captions[key] for key in split.base])
    output, benchmark = work / "base_training", work / "base.json"
    sizes = {key: Image.open(work / "pictures" / "base" / f"{key}.png").size for key in _measured(split)}
    write_text(benchmark, benchmark_of((captions[key], size) for key, size in sizes.items()))
    text = configuration(untrained, work / "pictures" / "base", output, benchmark, options.steps)
    trained = train(work / "base.toml", text, output, options.steps, say)
    with atomic_file(work / "base.safetensors") as temporary:
        shutil.copyfile(trained, temporary)
    say(f"{work / 'base.safetensors'}: {trained.stat().st_size / 1e6:.1f} MB")
    return work / "base.safetensors"


def measure(work: Path, base: Path, split: Split, captions: Mapping[str, str], say: Log) -> None:
    """What the base recognises among all its pictures. Writes WORK/retrieval.json."""
    folder = work / "pictures" / "base"
    references = {captions[key]: Image.open(folder / f"{key}.png") for key in split.base}
    paths = draw(work / "base.toml", base, work / "base.json", work / "drawn", say)
    samples = [(captions[key], Image.open(path)) for key, path in zip(_measured(split), paths, strict=True)]
    found = retrieval_accuracy(samples, references)
    say(f"base: {found}")
    write_text(work / "retrieval.json", json.dumps({"accuracy": found.accuracy, "chance": found.chance}) + "\n")


def _measured(split: Split) -> Sequence[str]:
    return split.base[:: max(1, len(split.base) // NUM_MEASURED)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Makes the trained base of the demo; see docs/demo.md.")
    parser.add_argument("pictures", type=Path, metavar="PICTURES", help="folder with images/*.webp and metadata.json")
    parser.add_argument("work", type=Path, metavar="WORK", help="where everything is written")
    parser.add_argument("--measure", action="store_true", help="then measure it")
    parser.add_argument("--vae-steps", type=int, default=VaeSettings().num_steps)
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="of the U-Net")
    parser.add_argument("--new", type=int, default=NUM_NEW, help="pictures kept for the demo's fine-tune")
    parser.add_argument("--unseen", type=int, default=NUM_UNSEEN, help="pictures kept out of everything")
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    try:
        work.mkdir(parents=True, exist_ok=True)
        say = Log(work / "build.log")
        captions = read_captions(options.pictures)
        split = split_pictures(captions, options.new, options.unseen)
        base = make_base(options.pictures, work, split, captions, options, say)
        if options.measure:
            measure(work, base, split, captions, say)
    except SdxlTrainError as error:
        sys.exit(f"make_demo_base: {error}")


if __name__ == "__main__":
    main()
