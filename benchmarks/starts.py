"""C4, C5, C6: a large data set is indexed cold and warm, and what that costs in CPU time and memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from made_data import MetadataSet, metadata_set
from measuring import Goal, Line, PrivateMemory, Sizes, StepTimes, cpu_s, in_own_process, interleaved, private_memory

if TYPE_CHECKING:
    from sdxl_train.config import Settings
    from sdxl_train.data.index import Index

_SMALL = 1000  # rows of a data set that costs what every data set costs
_BATCH = 16
_WORKERS = 2
_OPENED = 10
_STEPS = ("_find", "_stamps", "_check_files")


@dataclass(frozen=True)
class Start:
    """What a start took.

    Attributes:
        rows: data in the index.
        cpu_s: in all; `of_steps` of its steps.
        memory: private bytes that it added to the process.
    """

    rows: int
    cpu_s: float
    of_steps: dict[str, float]
    memory: PrivateMemory


def cold_lines(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """C4."""
    made = metadata_set(folder, sizes.rows)
    yield _cold_line("JSON Lines", made, made.lines, 8, sizes.repeats)
    yield _cold_line("one JSON object", made, made.one_object, 15, sizes.repeats)


def _cold_line(name: str, made: MetadataSet, metadata: Path, limit: float, repeats: int) -> Line:
    ours, plain = interleaved(
        repeats, lambda: in_own_process(read_metadata, made, metadata), lambda: in_own_process(load_plainly, made, metadata)
    )
    what = f"index cold from {name}: metadata, search, look-up, columns"
    taken, plain_s = median(cpu for _, cpu in ours), median(plain)
    return Line("C4", what, ours[0][0], taken, "CPU s", plain_s, "json.load and os.walk alone", Goal(limit))


def start_lines(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """The rest of a cold start, C5, and C6 but for the workers."""
    made, small = metadata_set(folder, sizes.rows), metadata_set(folder, min(_SMALL, sizes.rows // 2))
    stat_s, header_s = in_own_process(stat_and_open_plainly, made)
    cold, records_s = in_own_process(cold_start, made, small)
    yield Line("", "of a cold start: stat of every picture", cold.rows, cold.of_steps["_stamps"], "CPU s", stat_s, "os.stat alone")
    what = "of a cold start: header of every picture"
    yield Line("", what, cold.rows, cold.of_steps["_check_files"], "CPU s", header_s, "Image.open alone")
    yield Line("", "of a cold start: records written", cold.rows, records_s, "CPU s")
    yield Line("", "cold start in all, without the records", cold.rows, cold.cpu_s, "CPU s")

    plain_s = in_own_process(load_plainly, made, made.lines)
    warm = [in_own_process(warm_start, made, small) for _ in range(sizes.repeats)]
    rows, in_all, of_stat = warm[0].rows, median(start.cpu_s for start in warm), median(start.of_steps["_stamps"] for start in warm)
    without = median(start.cpu_s - start.of_steps["_stamps"] for start in warm)
    loading = "json.loads and os.walk"
    yield Line("C5", "index warm: records mapped, inputs checked, buckets, repeats", rows, without, "CPU s", plain_s, loading, Goal(1))
    yield Line("C5", "the same with the stat of every picture, as every start does", rows, in_all, "CPU s", plain_s, loading, Goal(1))
    yield Line("", "of a warm start: stat of every picture", rows, of_stat, "CPU s", stat_s, "os.stat alone")

    plain_memory = in_own_process(memory_of_dicts, made.one_object).dirty / cold.rows
    dicts = "json.load: a dict a picture"
    for name, start in (("warm", warm[0]), ("cold", cold)):
        memory = start.memory
        yield Line("C6", f"private memory after a {name} start", rows, memory.dirty / rows, "B a datum", plain_memory, dicts, Goal(150))
    yield Line("", "pages of the mapped records after a warm start, which can be dropped", rows, warm[0].memory.clean / rows, "B a datum")


def worker_lines(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """C6, the loader processes. Needs the records that `start_lines` has written."""
    made, small = metadata_set(folder, sizes.rows), metadata_set(folder, min(_SMALL, sizes.rows // 2))
    rows, of_large = in_own_process(memory_of_workers, made, sizes.fetches)
    _, of_small = in_own_process(memory_of_workers, small, sizes.fetches)
    plain = max(in_own_process(memory_of_plain_workers, made.one_object, sizes.fetches))
    more = (max(of_large) - max(of_small)) / rows
    what = f"private memory a loader process has more than with {min(_SMALL, sizes.rows // 2)} data, after {sizes.fetches} batches"
    # 1 B a datum is below what two processes of equal work differ by.
    yield Line("C6", what, rows, more, "B a datum", plain / rows, "the same fetches from dicts", Goal(1))


# ---- each of these runs in a process of its own ----


def read_metadata(made: MetadataSet, metadata: Path) -> tuple[int, float]:
    """(data, CPU s) of everything up to the columns of the index."""
    from sdxl_train.data import indexing
    from sdxl_train.data.sources import find_candidates

    config, problems, found = _settings(made, metadata).config, [], []
    taken = cpu_s(lambda: found.append(indexing._from_candidates(find_candidates(config, problems))))
    assert not problems, problems[:3]
    return len(found[0]), taken


def load_plainly(made: MetadataSet, metadata: Path) -> float:
    """CPU s of the metadata as dicts and the names of all files."""
    return cpu_s(lambda: (_load_dicts(metadata), [names for _, _, names in os.walk(made.images)]))


def stat_and_open_plainly(made: MetadataSet) -> tuple[float, float]:
    """CPU s of os.stat, and of Pillow's Image.open, on every picture; the latter from every tenth of them."""
    from PIL import Image

    Image.init()
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(made.images) for name in names]

    def open_all() -> None:
        for path in paths[::_OPENED]:
            with Image.open(path) as image:
                assert image.size[0] > 0

    return cpu_s(lambda: [os.stat(path) for path in paths]), _OPENED * cpu_s(open_all)


def cold_start(made: MetadataSet, small: MetadataSet) -> tuple[Start, float]:
    """Everything that a start without records does, and the CPU s of writing the records after it."""
    from sdxl_train.data.records import write_records

    _, indexed = _start(small, from_records=False)  # what is imported and kept by any start is not counted
    write_records(small.records, indexed.index, indexed.inputs)
    start, indexed = _start(made, from_records=False)
    return start, cpu_s(lambda: write_records(made.records, indexed.index, indexed.inputs))


def warm_start(made: MetadataSet, small: MetadataSet) -> Start:
    """Everything that a start with records does, the stat of every picture included."""
    _start(small, from_records=True)
    return _start(made, from_records=True)[0]


def memory_of_dicts(metadata: Path) -> PrivateMemory:
    """What a dict for each picture takes."""
    before = private_memory()
    rows = _load_dicts(metadata)
    added = private_memory() - before
    assert rows
    return added


def memory_of_workers(made: MetadataSet, fetches: int) -> tuple[int, list[int]]:
    """Data, and bytes that each forked loader process has for itself after all have fetched so many batches together."""
    from sdxl_train.data.batches import FetchedBatch, Fetcher
    from sdxl_train.data.epoch_plan import epoch_plan
    from sdxl_train.data.loader_processes import LoaderProcesses
    from sdxl_train.model.tokenizer import PromptTokenizer

    settings = _settings(made, made.lines)
    _, indexed = _start(made, from_records=True)
    index: Index = indexed.index
    epoch = list(epoch_plan(index, seed=0, epoch=1, batch_size=_BATCH)[:fetches])
    plan = [epoch[i % len(epoch)] for i in range(fetches)]
    fetcher = Fetcher(index, settings.plugins, PromptTokenizer(), settings.config, seed=0, with_pixels=False)
    processes = LoaderProcesses(fetcher, _WORKERS, stay_alive=True)
    try:
        assert all(isinstance(fetched, FetchedBatch) for fetched in processes.fetch(plan))
        return len(index), [private_memory(pid).dirty for pid in processes.pids]
    finally:
        processes.end()


def memory_of_plain_workers(metadata: Path, fetches: int) -> list[int]:
    """Bytes that each of two forked processes adds to its own by reading its share of the batches from dicts."""
    rows = _load_dicts(metadata)
    context = multiprocessing.get_context("fork")
    answers: list[int] = []
    for worker in range(_WORKERS):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_fetch_from_dicts, args=(rows, fetches * _BATCH // _WORKERS, worker, sender))
        process.start()
        answers.append(receiver.recv())
        process.join()
    return answers


def _fetch_from_dicts(rows: list[dict[str, Any]], count: int, seed: int, sender: Connection) -> None:
    before = private_memory().dirty
    texts = ""
    for row in random.Random(seed).choices(range(len(rows)), k=count):
        texts = f"{rows[row]['caption']}. {rows[row]['description']}"
    assert texts
    sender.send(private_memory().dirty - before)


def _start(made: MetadataSet, from_records: bool) -> tuple[Start, Any]:
    from sdxl_train.data import indexing
    from sdxl_train.data.records import read_records

    settings, steps, problems, found = _settings(made, made.lines), StepTimes(), [], []

    def start() -> None:
        known = read_records(made.records) if from_records else None
        found.append(indexing.build_index(settings.config, settings.plugins, known, lambda text: None, problems))

    before = private_memory()
    with steps.of(indexing, *_STEPS):
        taken = cpu_s(start)
    assert not problems, problems[:3]
    assert found[0].is_new != from_records, "the records were not used"
    return Start(len(found[0].index), taken, steps.cpu_s, private_memory() - before), found[0]


def _settings(made: MetadataSet, metadata: Path) -> Settings:
    from sdxl_train.config import load_settings

    return load_settings(made.config, [f"metadata_files={json.dumps([str(metadata)])}"], needs=("data",))


def _load_dicts(metadata: Path) -> list[dict[str, Any]]:
    with open(metadata, "rb") as file:
        return [json.loads(line) for line in file] if metadata.suffix == ".jsonl" else list(json.load(file).values())
