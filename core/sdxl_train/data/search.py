"""The files below `image_dirs`.

Left out and counted: names that start with a dot, and folders of training runs, whose samples would become data.
"""

import os
from dataclasses import dataclass, field

from sdxl_train.data.names import IMAGE_EXTENSIONS, split_name
from sdxl_train.errors import DataError
from sdxl_train.text_display import shown


@dataclass
class FoundFiles:
    """
    Attributes:
        images: path of every picture, sorted.
        texts: path of every .txt file.
        hidden: names left out because they start with a dot; a folder counts once.
        run_folders: folders left out because they hold a training run.
    """

    images: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    hidden: int = 0
    run_folders: list[str] = field(default_factory=list)

    def by_key(self) -> dict[str, list[str]]:
        """The pictures of each key, each list sorted."""
        found: dict[str, list[str]] = {}
        for path in self.images:
            found.setdefault(split_name(path)[0], []).append(path)
        return found


def find_files(image_dirs: list[str]) -> FoundFiles:
    """Search all folders, following links; a folder reachable in several ways is searched once.

    Raises:
        DataError: naming every folder that is missing or cannot be read.
    """
    found, problems, visited = FoundFiles(), [], set()
    for root in image_dirs:
        if not os.path.isdir(root):
            problems.append(f"image_dirs: there is no folder {shown(root)}")
    waiting = [root for root in reversed(image_dirs) if os.path.isdir(root)]
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
            waiting += reversed(_sort_entries(folder, entries, found))
        except OSError as error:
            problems.append(f"image_dirs: the folder {shown(folder)} cannot be read: {error.strerror or error}")
    if problems:
        raise DataError("\n".join(problems))
    found.images.sort()
    return found


def _sort_entries(folder: str, entries: list[os.DirEntry[str]], found: FoundFiles) -> list[str]:
    """Note the folder's files and answer its sub-folders."""
    folders = []
    if _holds_a_run(entries):
        found.run_folders.append(folder)
        return folders
    for entry in entries:
        if entry.name.startswith("."):
            found.hidden += 1
        elif entry.is_dir():
            folders.append(entry.path)
        else:
            extension = split_name(entry.name)[1]
            if extension in IMAGE_EXTENSIONS:
                found.images.append(entry.path)
            elif entry.name.endswith(".txt"):
                found.texts.add(entry.path)
    return folders


def _holds_a_run(entries: list[os.DirEntry[str]]) -> bool:
    """A run's folder holds its lock, `.lock`, and its logs from the first moment on; `models` and `samples` come later."""
    names = {entry.name for entry in entries}
    return ".lock" in names and any(entry.name == "logs" and entry.is_dir() for entry in entries)
