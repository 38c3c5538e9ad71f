"""G10: pictures decoded and encoded into cache files by the VAE, with random weights in bf16."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from gpu_figures import Figure, Levels
from gpu_steps import Bench
from made_data import photographs, write_config
from made_model import made_checkpoint

from sdxl_train import build
from sdxl_train.config import load_settings
from sdxl_train.data.caching import Work, prepare_latents
from sdxl_train.data.indexing import build_index

_DIFFERENT = 8  # pictures; the others are copies of them


def caching_figures(bench: Bench, folder: Path) -> Iterator[Figure]:
    """Pictures a second from JPEG to cache file, after a few that warm up."""
    scale, side = bench.scale, bench.scale.side * 5 // 4
    bench.free()
    copies = max(1, scale.photographs // _DIFFERENT)
    rates = []
    for num_copies in (1, copies):
        paths = photographs(folder, (side, side), min(_DIFFERENT, scale.photographs), num_copies)
        for path in paths:
            path.with_suffix(".npz").unlink(missing_ok=True)
        toml = folder / "caching.toml"
        keys = {"mixed_precision": "bf16", "vae_batch_size": 8, "flip_aug": False}
        write_config(toml, [paths[0].parent], **{**keys, "cpu": scale.device.type == "cpu", "resolution": scale.side})
        settings, problems = load_settings(toml, needs=("data",)), []
        index = build_index(settings.config, settings.plugins, None, lambda text: None, problems).index
        assert not problems, problems[:3]
        with patch.object(build, "vae_encoder_digest", lambda checkpoint: bytes(16)):
            vae = build.load_vae_in_use(made_checkpoint(scale.architecture), settings.config, scale.device)
        work = Work(lambda text: None, lambda: None, lambda label, total: lambda done, total: None)
        start = time.perf_counter()
        prepared = prepare_latents(index, vae, settings.config, work, to_disk=True, in_memory=False)
        rates.append(prepared.num_encoded / (time.perf_counter() - start))
    what = f"VAE caching of JPEGs {side}x{side}, bf16, {os.cpu_count()} cores"
    yield Figure("G10", what, rates[-1], "img/s", Levels(40, 65, device="H100"))
