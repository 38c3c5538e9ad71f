"""A package written against the public API alone, with a wrapper on every hook, sees every call and changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_train.plugins import HOOK_NAMES


@pytest.mark.slow
def test_wrappers_on_every_hook_see_every_call_and_change_no_loss(config, metrics, tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "observer-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: observer\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sdxl_train.plugins]\nobserver = observer:Observer\n")
    wrappers = "".join(
        f"    @hookimpl(wrapper=True)\n    def {hook}(self):\n        self.seen.append('{hook}')\n        return (yield)\n" for hook in HOOK_NAMES
    )
    (site / "observer.py").write_text(
        "import json, os\nfrom sdxl_train import hookimpl\nclass Observer:\n    def __init__(self): self.seen = []\n" + wrappers.replace(
            "self.seen.append('on_train_end')", "self.seen.append('on_train_end'); json.dump(self.seen, open(os.environ['SEEN'], 'w'))"
        )
    )  # fmt: skip
    descriptions = {f"square{i}": {"description": "words"} for i in range(3)} | {f"wide{i}": {"caption": "tags"} for i in range(3)}
    (tmp_path / "meta.json").write_text(json.dumps(descriptions))
    (tmp_path / "bench.json").write_text(json.dumps([{"prompt": "x", "width": 64, "height": 64, "steps": 1}]))
    keys = {"metadata_files": [str(tmp_path / "meta.json")], "sample_benchmark": str(tmp_path / "bench.json"), "sample_every_n_epochs": 1}
    environment = {**os.environ, "PYTHONPATH": str(site), "SEEN": str(tmp_path / "seen.json"), "OMP_NUM_THREADS": "1"}
    for name, plugins in (("plain", []), ("observed", ["observer"])):
        file = config(f"{name}.toml", output_dir=str(tmp_path / name), plugins=plugins, **keys)
        done = subprocess.run([sys.executable, "-m", "sdxl_train.cli", str(file)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "seen.json").read_text())) == set(HOOK_NAMES)
    plain, observed = ([line["loss/step"] for line in metrics(tmp_path / name)] for name in ("plain", "observed"))
    assert plain and plain == observed
