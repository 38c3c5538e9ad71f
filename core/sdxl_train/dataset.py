"""The data set of a run: read with what earlier starts know of it, its latents made ready, what was found out kept for the next start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_train.console import Console
from sdxl_train.data.caching import PreparedLatents, VaeInUse, Work, complete_report, prepare_latents, prepare_pictures
from sdxl_train.data.captions import TokenReport, token_report
from sdxl_train.data.index import Index
from sdxl_train.data.indexing import Indexed, build_index, warn_of_silent_data
from sdxl_train.data.records import INDEX_NAME, Records, read_records, write_records
from sdxl_train.errors import DataError, Problem
from sdxl_train.output_dir import matching_output_dirs

if TYPE_CHECKING:
    from sdxl_train.config import Settings
    from sdxl_train.keys import Config

_FOLDER = "records"


def records_dir(config: Config, output_dir: Path) -> Path:
    """Where a run writes its records."""
    return Path(config.records_cache_dir) if config.records_cache_dir else output_dir / _FOLDER


def known_records(config: Config) -> Records | None:
    """What an earlier start found out: in `records_cache_dir`, else in the newest folder that `output_dir` can have stood for."""
    if config.records_cache_dir:
        return read_records(Path(config.records_cache_dir))
    folders = [directory / _FOLDER for directory in matching_output_dirs(config.output_dir)]
    written = {folder: (folder / INDEX_NAME).stat().st_mtime_ns for folder in folders if (folder / INDEX_NAME).is_file()}
    return read_records(max(written, key=lambda folder: written[folder])) if written else None


def read_dataset(settings: Settings, warn: Callable[[str], None], problems: list[Problem]) -> Indexed:
    """Find and index the data as the configuration says. Nothing is written.

    Args:
        problems: gets everything that is wrong with the data.
    Raises:
        PluginError: from `count_repeats`.
    """
    return build_index(settings.config, settings.plugins, known_records(settings.config), warn, problems)


class Dataset:
    """The data of a run that trains or caches.

    Args:
        records: the folder to keep the records in; None keeps nothing.
    """

    def __init__(self, settings: Settings, records: Path | None, console: Console, check_stop: Callable[[], None]) -> None:
        """Read it.

        Raises:
            DataError: everything that is wrong with the data, in one message.
            PluginError: from `count_repeats`.
        """
        self._config = settings.config
        self._records = records
        self._console = console
        self._work = Work(console.warn, check_stop, console.watch)
        problems: list[Problem] = []
        indexed = read_dataset(settings, console.warn, problems)
        self.index: Index = indexed.index
        self._inputs = indexed.inputs
        try:
            complete_report(self.index, self._config, self._work, problems)
        finally:
            console.end_progress()
        if self._config.bad_images == "error":
            warn_of_silent_data(self.index, console.warn)
        if records is not None and (indexed.is_new or not (records / INDEX_NAME).exists()):
            self.keep_records()
            self._map_records(records)

    def prepare_latents(self, vae: VaeInUse, to_disk: bool, in_memory: bool) -> PreparedLatents:
        """See `caching.prepare_latents`. What was found out until then is kept also when it fails or is interrupted."""
        with self._kept():
            return prepare_latents(self.index, vae, self._config, self._work, to_disk, in_memory)

    def prepare_pictures(self) -> None:
        """See `caching.prepare_pictures`."""
        with self._kept():
            prepare_pictures(self.index, self._config, self._work)

    def count_long_captions(self, count_tokens: Callable[[str], int]) -> TokenReport:
        """See `captions.token_report`."""
        with self._kept():
            return token_report(self.index, self._config.max_token_length, count_tokens)

    def _map_records(self, records: Path) -> None:
        """Go on with the columns as they lie in the file: the memory in which they were put together is free again."""
        written = read_records(records)
        if written is not None and written.index is not None:
            self.index = written.index

    def keep_records(self) -> None:
        """Write the records, if they are wanted.

        Raises:
            DataError: the folder cannot be written.
        """
        if self._records is None:
            return
        try:
            write_records(self._records, self.index, self._inputs)
        except OSError as error:
            raise DataError(f"the data set's records cannot be written into {self._records}: {error.strerror or error}") from error

    @contextmanager
    def _kept(self) -> Iterator[None]:
        before = _found_out(self.index)
        try:
            yield
        finally:
            self._console.end_progress()
            if _found_out(self.index) != before:
                self.keep_records()


def _found_out(index: Index) -> tuple[bytes | str, ...]:
    """What changes when something new is found out about pictures, captions and caches."""
    columns = (index.num_tokens, index.is_decoded, index.is_bad, index.caches.stamps, index.caches.is_verified, index.caches.has_flipped)
    return index.vae_digest, *(column.tobytes() for column in columns)
