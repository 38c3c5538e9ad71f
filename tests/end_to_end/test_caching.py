"""Latent caches seen from outside: the files, which pictures are encoded and when, and what is left when it is ended in between."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_files import cache_arrays, noise, overwritten
from cache_runs import PLACED, SIZES, caches, identities, opened_files, rewritten
from command_runs import contents, run_command, write_config
from safetensors.torch import load_file, save_file

from sdxl_train.model.weight_file import WeightFile

# ---- what is written ----


def test_the_command_writes_the_documented_arrays_beside_the_pictures_and_nothing_else(
    cached, data: Path, tmp_path: Path, encodes: list[int]
) -> None:
    before = contents(data)
    cached(output_dir=None)
    after = contents(data)
    assert {path: after[path] for path in before} == before
    assert {os.path.basename(path).decode() for path in after.keys() - before.keys()} == {f"{key}.npz" for key in SIZES}
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["sdxl.toml"], "no project folder and no records"
    assert encodes == [1] * 10, "each picture in both orientations"
    for key, size in SIZES.items():
        with np.load(data / f"{key}.npz", allow_pickle=False) as arrays:
            assert set(arrays) >= {"latents", "latents_flipped", "original_size", "crop_ltrb", "source", "source_digest", "vae_digest"}
            for name in ("latents", "latents_flipped"):
                assert arrays[name].dtype == np.float32 and np.isfinite(arrays[name]).all()
            assert not np.array_equal(arrays["latents"], arrays["latents_flipped"][..., ::-1]), (
                "flipped pixels are encoded, not latents flipped"
            )
            assert arrays["original_size"].dtype == arrays["crop_ltrb"].dtype == arrays["source"].dtype == np.int64
            assert arrays["original_size"].tolist() == list(size)
            status = (data / f"{key}.png").stat()
            assert arrays["source"].tolist() == [status.st_size, status.st_mtime_ns]
            digest = blake2b((data / f"{key}.png").read_bytes(), digest_size=16).digest()
            assert arrays["source_digest"].dtype == np.uint8 and arrays["source_digest"].tobytes() == digest
            assert arrays["vae_digest"].dtype == np.uint8 and arrays["vae_digest"].shape == (16,)
            if key in PLACED:
                (width, height), resized, (left, top) = PLACED[key]
                assert arrays["latents"].shape == arrays["latents_flipped"].shape == (4, height // 8, width // 8)
                cut = resized[0] - width - left, resized[1] - height - top
                assert arrays["crop_ltrb"].tolist() == [left, top, width - cut[0], height - cut[1]]


def test_members_are_stored_uncompressed(cached, data: Path) -> None:
    import zipfile

    cached()
    with zipfile.ZipFile(data / "square0.npz") as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}


def test_flipped_latents_are_there_only_with_flip_aug(cached, data: Path, encodes: list[int]) -> None:
    cached(flip_aug=False)
    assert all("latents_flipped" not in np.load(path) for path in data.glob("*.npz"))
    assert encodes == [1] * 5


def test_the_command_writes_caches_whatever_the_cache_keys_say(cached, data: Path) -> None:
    cached(cache_latents=False, cache_latents_to_disk=False)
    assert set(identities(data)) == set(SIZES)


def test_the_command_writes_records_only_where_a_folder_for_them_is_named(cached, tmp_path: Path) -> None:
    cached(records_cache_dir=str(tmp_path / "records"))
    assert {"image_size.json", "num_repeats.json", "counter.json"} <= {path.name for path in (tmp_path / "records").iterdir()}
    sizes = json.loads((tmp_path / "records" / "image_size.json").read_text())
    assert {key: tuple(entry["size"]) for key, entry in sizes.items()} == SIZES
    assert not (tmp_path / "cache" / "out").exists()


def test_dropped_data_get_no_cache(cached, data: Path, tmp_path: Path) -> None:
    (tmp_path / "getter.py").write_text("def squares(img_key, img_md, **kwargs):\n    return 3 * img_key.startswith('square') + 0\n")
    cached(num_repeats_getter=f"{tmp_path}/getter.py:squares")
    assert set(identities(data)) == {"square0", "square1", "square2"}


def test_pictures_of_one_bucket_share_encodes_and_latents_do_not_depend_on_it(cached, data: Path, encodes: list[int]) -> None:
    cached()
    alone = {path.name: dict(np.load(path)) for path in data.glob("*.npz")}
    encodes.clear()
    for path in data.glob("*.npz"):
        path.unlink()
    cached(vae_batch_size=2)
    assert sorted(encodes) == [1, 1, 2, 2, 2, 2], "3 of one bucket and 2 of another, by two, in both orientations"
    for name, arrays in alone.items():
        together = np.load(data / name)
        for key in ("latents", "latents_flipped"):
            np.testing.assert_allclose(together[key], arrays[key], rtol=1e-4, atol=1e-4)


def test_encodes_are_the_sum_over_buckets_of_pictures_by_vae_batch_size_rounded_up(cached, data: Path, encodes: list[int]) -> None:
    in_buckets = (3, 2)  # squares and wide ones
    for size in (1, 2, 3, 8):
        for path in data.glob("*.npz"):
            path.unlink()
        encodes.clear()
        cached(vae_batch_size=size, flip_aug=False)
        assert len(encodes) == sum(math.ceil(count / size) for count in in_buckets) and sum(encodes) == sum(in_buckets)


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"mixed_precision": "bf16"}, "bfloat16"),
        ({"mixed_precision": "bf16", "no_half_vae": True}, "float32"),
        ({"mixed_precision": "no"}, "float32"),
    ],
)
@pytest.mark.parametrize("command", ["cache", "train"])
def test_the_vae_computes_in_the_precision_that_the_cache_names(
    cached, trained, data: Path, monkeypatch: pytest.MonkeyPatch, keys: dict, dtype: str, command: str
) -> None:
    computed: set[str] = set()
    forward = torch.nn.Conv2d.forward

    def noting(self: torch.nn.Conv2d, pixels: torch.Tensor) -> torch.Tensor:
        answer = forward(self, pixels)
        if is_encoding:
            computed.add(str(answer.dtype).removeprefix("torch."))
        return answer

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    is_encoding, encode = [], AutoencoderKL.encode

    def encoding(self: AutoencoderKL, *arguments: object, **named: object) -> object:
        is_encoding.append(True)
        try:
            return encode(self, *arguments, **named)
        finally:
            is_encoding.clear()

    monkeypatch.setattr(torch.nn.Conv2d, "forward", noting)
    monkeypatch.setattr(AutoencoderKL, "encode", encoding)
    (cached if command == "cache" else trained)(**keys)
    assert computed == {dtype}
    assert {str(np.load(path)["vae_precision"]) for path in data.glob("*.npz")} == {dtype}


def test_the_command_reads_the_weights_of_the_vae_only(cached, monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()
    read = WeightFile.read

    def noting(self: WeightFile, name: str) -> torch.Tensor:
        names.add(name)
        return read(self, name)

    monkeypatch.setattr(WeightFile, "read", noting)
    cached()
    assert names and {name.partition(".")[0] for name in names} == {"first_stage_model"}


def test_caches_written_in_the_background_have_the_same_bytes(cached, data: Path) -> None:
    cached(async_cache=False)
    synchronous = caches(data)
    for path in data.glob("*.npz"):
        path.unlink()
    cached(async_cache=True)
    assert caches(data) == synchronous


def test_another_seed_gives_other_latents(cached, data: Path) -> None:
    cached(seed=1)
    first = caches(data)
    for path in data.glob("*.npz"):
        path.unlink()
    cached(seed=2)
    assert all(caches(data)[name] != first[name] for name in first)


def test_memory_only_caching_writes_nothing(trained, data: Path, encodes: list[int]) -> None:
    before = contents(data)
    trained(cache_latents_to_disk=False)
    assert contents(data) == before and encodes == [1] * 10


# ---- what is encoded again ----


def test_training_after_the_command_encodes_nothing(cached, trained, data: Path, encodes: list[int]) -> None:
    cached()
    encodes.clear()
    before = identities(data)
    _, seen = trained()
    assert not encodes and not rewritten(before, data) and len(seen) == len(SIZES)


def test_a_later_start_opens_neither_pictures_nor_caches_before_the_first_fetch(trained, data: Path, tmp_path: Path) -> None:
    keys = {"keep_cached_latents_in_memory": False}
    trained(**keys)
    # Nothing has changed for a while: a folder that changed a moment ago may do so again under the same time, and is read again.
    os.utime(data, ns=(0, time.time_ns() - 3600 * 10**9))
    trained(**keys)
    with opened_files() as opened:
        trained(**keys)
    of_data = [Path(path) for path in opened if Path(path).is_relative_to(data)]
    assert not [path for path in of_data if path.suffix == ".png"]
    first = next(place for place, path in enumerate(opened) if Path(path).is_relative_to(data) and path.endswith(".npz"))
    started = next(place for place, path in enumerate(opened) if path.endswith("metrics.jsonl"))
    assert started < first, "caches are opened only by the fetches"
    assert len([path for path in of_data if path.suffix == ".npz"]) == len(SIZES), "each is read once an epoch"
    assert not [path for path in of_data if path.suffix == ".txt"], "captions are known too"


def test_a_start_right_after_caches_were_written_reads_no_captions(trained, data: Path) -> None:
    trained()
    with opened_files() as opened:
        _, seen = trained()
    assert not [path for path in opened if path.endswith(".txt") and Path(path).is_relative_to(data)]
    assert {sample["key"]: sample["caption"] for sample in seen} == {key: f"picture {key}" for key in SIZES}


@pytest.mark.parametrize("in_memory", [True, False])
def test_latents_in_memory_are_read_once_and_others_at_every_fetch(trained, data: Path, in_memory: bool) -> None:
    trained()
    with opened_files() as opened:
        _, seen = trained(num_train_epochs=3, keep_cached_latents_in_memory=in_memory)
    assert len(seen) == 3 * len(SIZES)
    reads = [path for path in opened if Path(path).is_relative_to(data) and path.endswith(".npz")]
    assert len(reads) == len(SIZES) * (1 if in_memory else 3), "both orientations at once, or one at each fetch"


def test_only_a_changed_picture_is_encoded_again(trained, data: Path, encodes: list[int]) -> None:
    trained()
    before = identities(data)
    encodes.clear()
    noise(99, SIZES["square1"]).save(data / "square1.png")
    trained()
    assert encodes == [1, 1] and rewritten(before, data) == {"square1"}


def test_a_picture_with_other_pixels_but_the_same_length_and_time_of_day_is_seen(cached, data: Path, encodes: list[int]) -> None:
    cached()
    before = identities(data)
    encodes.clear()
    path = data / "square0.png"
    status, length = path.stat(), path.stat().st_size
    shutil.copyfile(data / "square2.png", path)
    with open(path, "ab") as file:
        file.write(bytes(max(0, length - path.stat().st_size)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    cached()
    assert rewritten(before, data) == {"square0"} and encodes == [1, 1]


def test_a_touched_but_unchanged_picture_is_not_encoded_again(trained, cached, data: Path, encodes: list[int]) -> None:
    trained()
    before = identities(data)
    encodes.clear()
    for path in data.glob("*.png"):
        os.utime(path)
    cached()
    trained()
    assert not encodes and not rewritten(before, data)


def test_another_vae_encodes_everything_again(trained, tiny_base: Path, data: Path, tmp_path: Path, encodes: list[int]) -> None:
    trained()
    before, old = identities(data), caches(data)
    encodes.clear()
    prefix = "first_stage_model."
    vae = {name.removeprefix(prefix): tensor for name, tensor in load_file(tiny_base).items() if name.startswith(prefix)}
    save_file(vae, tmp_path / "same.safetensors")
    trained("same", vae=str(tmp_path / "same.safetensors"))
    assert not encodes and not rewritten(before, data), "another file with the same weights is the same VAE"
    vae["encoder.conv_in.weight"] = vae["encoder.conv_in.weight"] * 1.01
    save_file(vae, tmp_path / "other.safetensors")
    trained(vae=str(tmp_path / "other.safetensors"))
    assert len(encodes) == 10 and rewritten(before, data) == set(SIZES)
    assert all(caches(data)[name] != old[name] for name in old)


def damage(data: Path) -> dict[str, str]:
    """Makes the caches of three pictures bad; {key: how}."""
    path = data / "square0.npz"
    whole = path.read_bytes()
    latents = np.load(path)["latents"]
    at = whole.index(latents.tobytes()[:64]) + 8
    path.write_bytes(overwritten(whole, at, bytes([whole[at] ^ 1])))
    arrays = dict(np.load(data / "square1.npz"))
    arrays["latents"][0, 0, 0] = np.nan
    np.savez(data / "square1.npz", **arrays)
    arrays = dict(np.load(data / "wide0.npz"))
    np.savez(
        data / "wide0.npz", **{**arrays, "latents": arrays["latents"].swapaxes(1, 2), "latents_flipped": arrays["latents"].swapaxes(1, 2)}
    )
    return {"square0": "a bit", "square1": "NaN", "wide0": "shape"}


def test_bad_caches_are_encoded_again_and_counted_and_no_other_is_touched(trained, data: Path, encodes: list[int]) -> None:
    trained()
    good = caches(data)
    bad = damage(data)
    before = identities(data)
    encodes.clear()
    ended, _ = trained()
    assert rewritten(before, data) == set(bad) and len(encodes) == 6
    assert caches(data) == good
    assert re.search(r"\b3\b[^\n]*not valid", ended.err) and all(f"{key}.npz" in ended.err for key in bad)


def test_caches_without_flipped_latents_are_encoded_again_once_flips_are_wanted(trained, data: Path, encodes: list[int]) -> None:
    trained(flip_aug=False)
    encodes.clear()
    trained(flip_aug=True)
    assert len(encodes) == 10
    before = identities(data)
    trained(flip_aug=False)
    assert not rewritten(before, data), "flipped latents that are not wanted do no harm"


def test_only_caches_of_another_bucket_are_encoded_again_at_another_resolution(trained, data: Path, encodes: list[int]) -> None:
    trained()
    before = identities(data)
    encodes.clear()
    _, seen = trained(resolution=96)
    assert len(encodes) == 4 and rewritten(before, data) == {"wide0", "wide1"}, "at 96 the squares are as small as before"
    assert {sample["key"]: sample["target_size"] for sample in seen}["wide0"] == [32, 128]


def test_without_the_validity_check_caches_are_trusted(trained, data: Path, encodes: list[int]) -> None:
    trained()
    before = identities(data)
    encodes.clear()
    noise(99, SIZES["square1"]).save(data / "square1.png")
    arrays = cache_arrays(64, 32)
    np.savez(data / "wide0.npz", **arrays)
    before["wide0"] = identities(data)["wide0"]
    _, seen = trained("trusting", check_cache_validity=False)
    assert not encodes and not rewritten(before, data)
    assert {tuple(sample["target_size"]) for sample in seen if sample["key"] == "wide0"} == {(32, 64)}, "the stored size decides"


def test_without_the_validity_check_a_missing_orientation_is_still_an_error_or_made(trained, data: Path, encodes: list[int]) -> None:
    trained(flip_aug=False)
    encodes.clear()
    _, seen = trained(check_cache_validity=False, flip_aug=True, num_train_epochs=2)
    assert len(encodes) == 10 and any(sample["flipped"] for sample in seen)


# ---- several data for one cache ----


def test_a_picture_under_two_keys_is_encoded_once_and_two_pictures_for_one_cache_are_refused(
    trained, data: Path, tiny_base: Path, tmp_path: Path, encodes: list[int]
) -> None:
    rows = {key: {"image_path": f"{data}/square0.png", "caption": key} for key in ("first", "second")}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    keys = {"metadata_files": [str(tmp_path / "rows.json")]}
    _, seen = trained(**keys)
    assert encodes == [1, 1] and {sample["key"] for sample in seen} == set(rows) and set(identities(data)) == {"square0"}
    with opened_files() as opened:
        trained(keep_cached_latents_in_memory=False, **keys)
    assert encodes == [1, 1] and not [path for path in opened if path.endswith("square0.png")]
    noise(9, SIZES["square0"]).save(data / "square0.bmp")
    rows["third"] = {"image_path": f"{data}/square0.bmp", "caption": "third"}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    message = f"{data}/square0.png and {data}/square0.bmp would share the cache {data}/square0.npz; rename one"
    for command, more in (("check", {}), ("train", {}), ("cache", {"cache_latents": False})):
        ended = run_command(command, write_config(tmp_path / command, tiny_base, [data], **keys, **more))
        assert ended.code == 2 and message in ended.out + ended.err, ended.err
    trained("in memory", cache_latents_to_disk=False, **keys)


# ---- folders that cannot be written, and ends in between ----


def test_a_folder_that_cannot_be_written_is_found_before_encoding_with_the_remedies(
    tiny_base: Path, data: Path, tmp_path: Path, encodes: list[int]
) -> None:
    data.chmod(0o555)
    if os.access(data, os.W_OK):
        pytest.skip("root may write everywhere; see the test with a read-only mount")
    try:
        ended = run_command("cache", write_config(tmp_path / "cache", tiny_base, [data]))
    finally:
        data.chmod(0o755)
    assert ended.code == 2 and not encodes
    assert str(data) in ended.err and "cache_latents_to_disk" in ended.err


@pytest.mark.slow
def test_a_read_only_disk_is_found_before_encoding_with_the_remedies(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    mount = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"'
    alone = ["unshare", "--mount", "--map-root-user", "sh", "-c"] if os.geteuid() else ["unshare", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*alone, mount, "sh", data], capture_output=True).returncode:
        pytest.skip("no mount name spaces here")
    file = write_config(tmp_path / "cache", tiny_base, [data])
    command = [*alone, mount + ' && shift && exec "$@"', "sh", data, sys.executable, "-m", "sdxl_train.cli", "cache", file]
    before = contents(data)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr[-3000:]
    assert str(data) in ended.stderr and "cache_latents_to_disk" in ended.stderr and "encoding" not in ended.stderr
    assert contents(data) == before


SLOW_ENCODES = """
import sys, time
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from sdxl_train.cli import main

real = AutoencoderKL.encode

def encode(self, *arguments, **named):
    time.sleep(0.25)
    return real(self, *arguments, **named)

AutoencoderKL.encode = encode
main()
"""


def start_slow_caching(tmp_path: Path, file: Path) -> subprocess.Popen[str]:
    (tmp_path / "slow.py").write_text(SLOW_ENCODES)
    command = [sys.executable, tmp_path / "slow.py", "cache", file]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_caches(data: Path, number: int, child: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while len(list(data.glob("*.npz"))) < number:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_what_is_finished_stays_when_caching_is_ended_and_is_used_at_the_next_start(
    tiny_base: Path, data: Path, tmp_path: Path, encodes: list[int], signum: int
) -> None:
    before = contents(data)
    file = write_config(tmp_path / "cache", tiny_base, [data])
    child = start_slow_caching(tmp_path, file)
    try:
        wait_for_caches(data, 2, child)
        child.send_signal(signum)
        _, err = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == (143 if signum == signal.SIGTERM else -signal.SIGKILL), err[-3000:]
    finished = identities(data)
    assert 2 <= len(finished) < len(SIZES)
    for key in finished:
        with np.load(data / f"{key}.npz", allow_pickle=False) as arrays:
            assert all(np.isfinite(arrays[name]).all() for name in ("latents", "latents_flipped"))
    if signum == signal.SIGTERM:
        assert {os.path.basename(path) for path in contents(data).keys() - before.keys()} == {f"{key}.npz".encode() for key in finished}
    ended = run_command("cache", file)
    assert ended.code == 0, ended.err[-3000:]
    assert len(encodes) == 2 * (len(SIZES) - len(finished)) and rewritten(finished, data) == SIZES.keys() - finished.keys()
    after = contents(data)
    assert {path: after[path] for path in before} == before
