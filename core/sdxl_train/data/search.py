"""The files below `image_dirs`.

Left out and counted: names that start with a dot, and folders of training runs, whose samples would become data.
"""

import os
from dataclasses import dataclass, field

from sdxl_train.data.latent_file import cache_key, cache_path_of
from sdxl_train.data.names import IMAGE_EXTENSIONS, split_name
from sdxl_train.errors import Problem
from sdxl_train.text_display import shown


@dataclass
class FoundFiles:
    """
    Attributes:
        images: path of every picture, sorted.
        caches: path of every .npz file, sorted.
        texts: path of every .txt file.
        hidden: names left out because they start with a dot; a folder counts once.
        run_folders: folders left out because they hold a training run.
        folders: every folder that was searched, with its mtime_ns and ctime_ns from before.
    """

    images: list[str] = field(default_factory=list)
    caches: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    hidden: int = 0
    run_folders: list[str] = field(default_factory=list)
    folders: dict[str, list[int]] = field(default_factory=dict)

    def images_by_key(self) -> dict[str, list[str]]:
        """The pictures of each key, each list sorted."""
        found: dict[str, list[str]] = {}
        for path in self.images:
            found.setdefault(split_name(path)[0], []).append(path)
        return found

    def caches_by_key(self) -> dict[str, list[str]]:
        """The caches of each key: those named after it, if there are any, else those with a size in their name; each list sorted."""
        plain: dict[str, list[str]] = {}
        sized: dict[str, list[str]] = {}
        beside = {cache_path_of(path) for path in self.images} if self.caches else set()
        for path in self.caches:
            key, has_size = cache_key(os.path.basename(path))
            if has_size and path in beside:  # the name of its picture only looks like a cache's
                key, has_size = split_name(path)[0], False
            (sized if has_size else plain).setdefault(key, []).append(path)
        return sized | plain


def find_files(image_dirs: list[str], problems: list[Problem]) -> FoundFiles:
    """Search all folders, following links; a folder reachable in several ways is searched once.

    Args:
        problems: gets every folder that is missing or cannot be read.
    """
    found, visited = FoundFiles(), set()
    for root in image_dirs:
        if not os.path.isdir(root):
            problems.append(Problem("data", f"image_dirs: there is no folder {shown(root)}", path=root))
    waiting = [root for root in reversed(image_dirs) if os.path.isdir(root)]
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as scan:
                entries = list(scan)
        except OSError as error:
            message = f"image_dirs: the folder {shown(folder)} cannot be read: {error.strerror or error}"
            problems.append(Problem("data", message, path=folder))
            continue
        if holds_a_run(entries):
            found.run_folders.append(folder)
        else:
            found.folders[folder] = [status.st_mtime_ns, status.st_ctime_ns]
            waiting += sorted(_sort_entries(entries, found), reverse=True)
    found.images.sort()
    found.caches.sort()
    return found


def holds_a_run(entries: list[os.DirEntry[str]]) -> bool:
    """A run's folder holds its lock, `.lock`, and its logs from the first moment on; `models` and `samples` come later."""
    return any(entry.name == ".lock" for entry in entries) and any(entry.name == "logs" and entry.is_dir() for entry in entries)


def _sort_entries(entries: list[os.DirEntry[str]], found: FoundFiles) -> list[str]:
    """Note the folder's files and answer its sub-folders."""
    folders = []
    for entry in entries:
        if entry.name.startswith("."):
            found.hidden += 1
        elif entry.is_dir():
            folders.append(entry.path)
        else:
            extension = os.path.splitext(entry.name)[1].lower()
            if extension in IMAGE_EXTENSIONS:
                found.images.append(entry.path)
            elif extension == ".npz":
                found.caches.append(entry.path)
            elif entry.name.endswith(".txt"):
                found.texts.add(entry.path)
    return folders
