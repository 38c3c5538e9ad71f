"""After a resume the sheet over time goes on, and each start has its own record; a fresh start begins both anew."""

import json
import re
from pathlib import Path


def shown_steps(folder: Path) -> list[int]:
    page = (folder / "samples" / "sheets" / "index.html").read_text("utf-8")
    return [int(step) for step in re.findall(r"step (\d+), epoch \d+</a></th>", page)]


def started_at(folder: Path) -> list[int]:
    return [json.loads(path.read_text("utf-8"))["step"] for path in sorted(folder.glob("logs/*/run.json"))]


def test_sheets_and_records_over_a_resume_and_a_fresh_start(cli, config, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps([{"prompt": "一只猫", "width": 64, "height": 64, "steps": 1}]), "utf-8")
    file = config(sample_benchmark=str(tmp_path / "bench.json"), sample_every_n_steps=1)
    for change, steps, starts in (
        (("max_train_steps=2",), [0, 1, 2], [0]),
        (("max_train_steps=3", "resume_from=latest"), [0, 1, 2, 3], [0, 2]),
        (("max_train_steps=1",), [0, 1], [0, 2, 0]),
    ):
        ended = cli(file, *(part for setting in change for part in ("--set", setting)))
        assert ended.code == 0, ended.err
        assert shown_steps(tmp_path / "out") == steps and started_at(tmp_path / "out") == starts
    (kept,) = (tmp_path / "out" / "samples").glob("sheets.old-*")
    assert (kept / "index.html").exists() and "一只猫" in (kept / "index.html").read_text("utf-8")
