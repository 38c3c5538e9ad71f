"""Which data a configuration names, and what is known about them: by metadata files, or all pictures and caches below `image_dirs`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdxl_train.data.columns import TextColumn
from sdxl_train.data.file_stamps import file_stamp, file_stamps
from sdxl_train.data.latent_file import cache_path_of
from sdxl_train.data.metadata import read_caption_file
from sdxl_train.data.metadata_files import read_metadata_files
from sdxl_train.data.names import split_name
from sdxl_train.data.rows import Rows, rows_of_captions
from sdxl_train.data.search import FoundFiles, find_files, holds_a_run
from sdxl_train.data.sharing import is_named_by, rows_with_one_cache
from sdxl_train.errors import DataError, Problem
from sdxl_train.text_display import shown

if TYPE_CHECKING:
    from sdxl_train.data.records import Records
    from sdxl_train.keys import Config

# A folder that changed so shortly before it was read may change again without another time stamp.
_UNSURE_NS = 2_000_000_000


@dataclass
class Candidates:
    """The data in order of their keys, before any picture or cache is opened.

    Attributes:
        rows: what is known of each datum.
        image_paths: its picture; '' where there is only a cache.
        cache_paths: its cache, where that does not have the picture's name beside the picture; else ''.
        shares: see `Index`.
        missing: keys of the metadata for which there is no file.
        doubtful: pictures that share their key with others; they are no data, but may be bad too.
        hidden, run_folders: what the search left out, see `FoundFiles`.
        inputs: what all this was read from.
    """

    rows: Rows
    image_paths: TextColumn
    cache_paths: TextColumn
    shares: NDArray[np.int32]
    missing: list[str]
    doubtful: list[str]
    hidden: int
    run_folders: list[str]
    inputs: Inputs


@dataclass(frozen=True)
class Inputs:
    """What decides which data there are. While it is the same, nothing needs to be searched or parsed again.

    Attributes:
        keys: `image_dirs` and `metadata_files`, with the working directory.
        files: stamp of each metadata file.
        captions: digest of the stamps of all caption files (`captions_digest`); '' where captions come from metadata files.
        folders: mtime_ns and ctime_ns of each folder that was searched; empty where they cannot tell whether it has changed.
        run_folders: folders left out because they hold a run.
        absent: pictures named by the metadata that are not there, or their folders where those are not there.
    """

    keys: list[list[str]]
    files: dict[str, list[int]] = field(default_factory=dict)
    captions: str = ""
    folders: dict[str, list[int]] = field(default_factory=dict)
    run_folders: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def still_hold(self, config: Config) -> bool:
        """Whether a search now would find the same files; captions beside pictures are looked at by `captions_digest`."""
        return (
            self.keys == _input_keys(config)
            and all(stamp == _folder_stamp(folder) for folder, stamp in self.folders.items())
            and all(list(file_stamp(path) or ()) == stamp for path, stamp in self.files.items())
            and all(map(_is_run_folder, self.run_folders))
            and not any(map(os.path.exists, self.absent))
        )


def captions_digest(keys: TextColumn, sources: Iterable[str]) -> str:
    """Changes when a caption file comes, goes or changes. `sources` are the pictures or caches, beside which the captions are."""
    stamps = file_stamps(map(_caption_path, keys, sources))
    return blake2b(stamps.tobytes(), digest_size=16).hexdigest()


def _caption_path(key: str, source: str) -> str:
    return os.path.join(os.path.dirname(source), key + ".txt")


def find_candidates(config: Config, problems: list[Problem], known: Records | None = None) -> Candidates:
    """All data of the data set.

    Args:
        problems: gets every problem of folders, metadata and caption files, and every name that stands for several files.
        known: what an earlier start found out; captions that have not changed since are not read.
    """
    now = time.time_ns()
    files = find_files(config.image_dirs, problems)
    found = _from_metadata(config, files, problems) if config.metadata_files else _from_folders(config, files, problems, known)
    found.inputs.folders.update({path: times if now - times[0] > _UNSURE_NS else [] for path, times in files.folders.items()})
    return found


def _from_metadata(config: Config, files: FoundFiles, problems: list[Problem]) -> Candidates:
    inputs = Inputs(_input_keys(config), run_folders=files.run_folders)
    for path in config.metadata_files:  # before they are read: a file that changes meanwhile is read again at the next start
        inputs.files[path] = list(file_stamp(path) or ())
    rows = read_metadata_files(config.metadata_files, problems)
    lookup = _Lookup(files)
    images: list[str] = []
    caches: list[str] = []
    kept: list[int] = []
    missing: list[str] = []
    absent: set[str] = set()
    are_renamed = False
    for i, (key, named) in enumerate(zip(rows.keys, rows.image_paths, strict=True)):
        is_there = bool(named) and lookup.is_image(named)
        image = named if is_there else lookup.image(key, named, problems)
        if named and not is_there:
            absent.add(lookup.absent_part(named))
        cache = lookup.cache(key, image, problems)
        if image or cache:
            kept.append(i)
            images.append(image or "")
            caches.append(cache or "")
            are_renamed |= bool(image) and not is_named_by(key, image)
        elif image is not None and cache is not None:
            missing.append(key)
    inputs.absent.extend(sorted(absent))
    if len(kept) < len(rows.keys):
        rows = _take(rows, np.array(kept, np.int64))
    shares = rows_with_one_cache(images) if are_renamed else None
    return _candidates(rows, images, caches, missing, [], files, inputs, shares)


def _from_folders(config: Config, files: FoundFiles, problems: list[Problem], known: Records | None) -> Candidates:
    images_by_key = files.images_by_key()
    only_caches = files.caches_by_key()
    lookup = _Lookup(files)
    keys: list[str] = []
    images: list[str] = []
    caches: list[str] = []
    doubtful: list[str] = []
    for key in sorted(images_by_key.keys() | only_caches.keys()):
        paths = images_by_key.get(key) or only_caches[key]
        if len(paths) > 1:
            what = "pictures" if key in images_by_key else "caches"
            problems.append(Problem("name", f"{shown(key)}: several {what}: {', '.join(map(shown, paths))}", path=paths[0], key=key))
            doubtful += images_by_key.get(key, [])
            continue
        image = paths[0] if key in images_by_key else ""
        keys.append(key)
        images.append(image)
        caches.append(lookup.cache(key, image, problems) or "" if image else paths[0])
    sources = [image or cache for image, cache in zip(images, caches, strict=True)]
    # The digest first: a caption that changes while it is read is read again at the next start.
    column = TextColumn.of(keys)
    inputs = Inputs(_input_keys(config), captions=captions_digest(column, sources), run_folders=files.run_folders)
    captions = (_caption(_caption_path(key, source), files, problems) for key, source in zip(keys, sources, strict=True))
    rows = _known_rows(known, column, inputs) or rows_of_captions(zip(keys, captions, strict=True))
    return _candidates(rows, images, caches, [], doubtful, files, inputs)


def _known_rows(known: Records | None, keys: TextColumn, inputs: Inputs) -> Rows | None:
    """The captions of an earlier start, where the files are the same: mostly only caches have come, which changes the folders."""
    if known is None or known.index is None or not inputs.captions or known.inputs.captions != inputs.captions:
        return None
    return known.index.rows() if known.index.keys == keys else None


def _caption(path: str, files: FoundFiles, problems: list[Problem]) -> str | None:
    if path not in files.texts:
        return None
    try:
        return read_caption_file(path)
    except DataError as error:
        problems.append(Problem("caption", str(error), path=path))
        return None


class _Lookup:
    """Finds the picture and the cache of a datum by its key, where they are not where they are expected."""

    def __init__(self, files: FoundFiles) -> None:
        self._files = files
        self._images = set(files.images)
        self._is_folder: dict[str, bool] = {}
        self._caches = set(files.caches)
        self._images_by_key: dict[str, list[str]] | None = None
        self._caches_by_key: dict[str, list[str]] | None = None

    def is_image(self, named: str) -> bool:
        return named in self._images or os.path.isfile(named)

    def absent_part(self, named: str) -> str:
        """What has to come for this picture to be there: its folder, which stands for many, or itself."""
        folder = os.path.dirname(named)
        if folder not in self._is_folder:
            self._is_folder[folder] = not folder or os.path.isdir(folder)
        return named if self._is_folder[folder] else folder

    def image(self, key: str, named: str, problems: list[Problem]) -> str | None:
        """The picture of that key below `image_dirs`, the named one's extension preferred; '' if there is none, None if several fit."""
        if self._images_by_key is None:  # only a data set that was moved, or one of caches, needs it
            self._images_by_key = self._files.images_by_key()
        matching = self._images_by_key.get(key, [])
        same_extension = [path for path in matching if split_name(path)[1] == split_name(named)[1]]
        return _only(key, same_extension or matching, "pictures", problems)

    def cache(self, key: str, image: str | None, problems: list[Problem]) -> str | None:
        """A cache of that key elsewhere than beside the picture; '' if there is none or one is beside, None if several fit."""
        beside = cache_path_of(image) if image else ""
        if not self._caches or beside in self._caches:
            return ""
        if self._caches_by_key is None:
            self._caches_by_key = self._files.caches_by_key()
        matching = self._caches_by_key.get(key, [])
        if image:
            folder = os.path.dirname(image)
            if any(os.path.dirname(path) == folder for path in matching):
                return ""
            if len(matching) > 1 and os.path.isfile(beside):  # outside of `image_dirs`; one elsewhere is kept for when it goes
                return ""
        return _only(key, matching, "caches", problems)


def _only(key: str, paths: list[str], what: str, problems: list[Problem]) -> str | None:
    if len(paths) <= 1:
        return paths[0] if paths else ""
    problems.append(Problem("name", f"{shown(key)}: several {what}: {', '.join(map(shown, paths))}", path=paths[0], key=key))
    return None


def _take(rows: Rows, kept: NDArray[np.int64]) -> Rows:
    taken: dict[str, Any] = {}
    for one in fields(rows):
        column = getattr(rows, one.name)
        taken[one.name] = column[kept] if isinstance(column, np.ndarray) else column.take(kept)
    return Rows(**taken)


def _candidates(
    rows: Rows,
    images: Iterable[str],
    caches: Iterable[str],
    missing: list[str],
    doubtful: list[str],
    files: FoundFiles,
    inputs: Inputs,
    shares: NDArray[np.int32] | None = None,
) -> Candidates:
    shares = np.full(len(rows), -1, np.int32) if shares is None else shares
    paths = TextColumn.of(images), TextColumn.of(caches)
    return Candidates(rows, *paths, shares, missing, doubtful, files.hidden, files.run_folders, inputs)


def _input_keys(config: Config) -> list[list[str]]:
    return [config.image_dirs, config.metadata_files, [os.getcwd()]]


def _folder_stamp(path: str) -> list[int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_mtime_ns, status.st_ctime_ns]  # the latter too: whoever unpacks or copies files sets the first one back


def _is_run_folder(path: str) -> bool:
    try:
        with os.scandir(path) as scan:
            return holds_a_run(list(scan))
    except OSError:
        return False
