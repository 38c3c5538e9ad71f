"""`sdxl-train cache`: makes the latent caches and nothing else; only the VAE is loaded."""

from __future__ import annotations

from pathlib import Path

from sdxl_train.config import Settings
from sdxl_train.console import Console
from sdxl_train.stopping import StopRequest, ending_with_its_code


def run_cache(settings: Settings) -> None:
    """Encode every datum that has repeats and no valid cache, and leave the process with the code that says how it ended.

    Raises:
        SdxlTrainError: the configuration, the data or the VAE are wrong, or a cache cannot be written.
    """
    console = Console()
    for warning in settings.warnings:
        console.warn(warning)
    with ending_with_its_code() as stop:
        _cache(settings, console, stop)


def _cache(settings: Settings, console: Console, stop: StopRequest) -> None:
    from sdxl_train.build import load_vae_in_use, pick_device
    from sdxl_train.dataset import Dataset
    from sdxl_train.model.single_file import open_checkpoint

    keys = settings.config
    device = pick_device(keys)
    base = open_checkpoint(keys.pretrained_model_name_or_path, keys.vae)
    records = Path(keys.records_cache_dir) if keys.records_cache_dir else None
    dataset = Dataset(settings, records, console, stop.check)
    stop.check()
    prepared = dataset.prepare_latents(load_vae_in_use(base, keys, device), to_disk=True, in_memory=False)
    check, counts = prepared.check, dataset.index.summary
    console.line(
        f"caches: {prepared.num_encoded} written ({len(check.invalid)} of them in place of one that was not valid), "
        f"{check.num_unchanged + check.num_checked} were there; "
        f"{counts.missing} pictures missing, {counts.dropped} dropped, {counts.bad} bad"
    )
    if prepared.num_ignored_profiles:
        console.warn(f"{prepared.num_ignored_profiles} pictures have a colour profile that cannot be used; they were taken as sRGB")
