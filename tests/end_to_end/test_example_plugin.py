"""The example distribution is installed as a user would, offline, and selected by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "docs" / "example-plugin"


def test_a_separate_distribution_trains_by_entry_point_name(config, tmp_path: Path) -> None:
    import shutil

    source = shutil.copytree(EXAMPLE, tmp_path / "source")
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--target", str(site), str(source)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    (tmp_path / "watch.py").write_text(
        "import json\nfrom sdxl_train import hookimpl\nclass W:\n    def __init__(self): self.seen = []\n"
        "    @hookimpl(wrapper=True)\n    def compute_loss(self, batch, timesteps):\n"
        "        self.seen += zip(batch.captions, timesteps.tolist())\n        return (yield)\n"
        f"    @hookimpl\n    def on_train_end(self, run): json.dump(self.seen, open({str(tmp_path / 'seen.json')!r}, 'w'))\n"
    )
    import tomli

    points = tomli.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"]
    (caption,), (sampler,) = points["sdxl_train.caption_processor"], points["sdxl_train.timestep_sampler_type"]
    file = config(caption_processor=caption, timestep_sampler_type=sampler, plugins=[f"{tmp_path}/watch.py:W"])
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "sdxl_train.cli", str(file)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert len(seen) == 20 and all(0 <= timestep < 1000 for _, timestep in seen)
    orders = {caption.split(", ")[1] for caption, _ in seen}
    assert len(orders) > 1, "the tags are shuffled behind the first"
