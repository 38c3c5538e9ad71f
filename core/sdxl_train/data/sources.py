"""Which pictures a configuration names, and what is known about them: by metadata files, or all pictures below `image_dirs`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdxl_train.data.metadata import fields_from_tags, problem_list, read_caption_file, read_metadata_files
from sdxl_train.data.names import split_name
from sdxl_train.data.search import FoundFiles, find_files
from sdxl_train.errors import DataError
from sdxl_train.text_display import shown

if TYPE_CHECKING:
    from sdxl_train.keys import Config


@dataclass
class Candidates:
    """Pictures in order of their keys, before any file is opened.

    Attributes:
        keys, image_paths, rows: of each picture its key, its file and its fields as JSON text.
        missing: keys of the metadata for which there is no file.
        hidden, run_folders: what the search left out, see `FoundFiles`.
    """

    keys: list[str] = field(default_factory=list)
    image_paths: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    hidden: int = 0
    run_folders: list[str] = field(default_factory=list)

    def add(self, key: str, image_path: str, row: str) -> None:
        """Append one picture."""
        self.keys.append(key)
        self.image_paths.append(image_path)
        self.rows.append(row)


def find_candidates(config: Config) -> Candidates:
    """All pictures of the data set.

    Raises:
        DataError: every problem of metadata and caption files, or every name that stands for several files.
    """
    if config.metadata_files:
        rows = read_metadata_files(config.metadata_files)
        return _from_metadata(rows, find_files(config.image_dirs))
    return _from_folders(find_files(config.image_dirs))


def _from_metadata(rows: dict[str, str], files: FoundFiles) -> Candidates:
    candidates = Candidates(hidden=files.hidden, run_folders=files.run_folders)
    by_key: dict[str, list[str]] | None = None
    ambiguous = []
    for key in sorted(rows):
        named = (json.loads(rows[key]).get("image_path") or "").replace("\\", "/")
        if named and os.path.isfile(named):
            candidates.add(key, named, rows[key])
            continue
        if by_key is None:  # only a data set that was moved needs it
            by_key = files.by_key()
        matching = by_key.get(key, [])
        same_extension = [path for path in matching if split_name(path)[1] == split_name(named)[1]]
        choice = same_extension or matching
        if len(choice) > 1:
            ambiguous.append(f"{shown(key)}: {', '.join(map(shown, choice))}")
        elif choice:
            candidates.add(key, choice[0], rows[key])
        else:
            candidates.missing.append(key)
    if ambiguous:
        raise DataError(problem_list("keys of metadata_files that fit several pictures; give image_path or rename the pictures", ambiguous))
    return candidates


def _from_folders(files: FoundFiles) -> Candidates:
    candidates = Candidates(hidden=files.hidden, run_folders=files.run_folders)
    by_key = files.by_key()
    same_name = [f"{shown(key)}: {', '.join(map(shown, paths))}" for key, paths in sorted(by_key.items()) if len(paths) > 1]
    problems = [problem_list("pictures with one name, which is their key; rename them", same_name)] if same_name else []
    unreadable = []
    for key in sorted(by_key):
        path = by_key[key][0]
        text_path = os.path.splitext(path)[0] + ".txt"
        fields: dict[str, Any] = {}
        if text_path in files.texts:
            try:
                fields = fields_from_tags(read_caption_file(text_path))
            except DataError as error:
                unreadable.append(str(error))
        candidates.add(key, path, json.dumps(fields, ensure_ascii=False))
    if unreadable:
        problems.append(problem_list("caption files that cannot be used", unreadable))
    if problems:
        raise DataError("\n".join(problems))
    return candidates
