"""Metadata in Parquet files: each row becomes the JSON text that a line of JSON Lines would be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from sdxl_train.data.metadata_json import Piece
from sdxl_train.errors import DataError
from sdxl_train.text_display import shown

if TYPE_CHECKING:
    import pyarrow as pa

_READ = 1 << 13  # rows that are read at a time
_BATCH = 512  # rows that exist as Python objects at a time


class NotParquetError(ValueError):
    """A file that cannot be read as metadata."""


def parquet_rows(path: str) -> Iterator[Piece]:
    """The rows of a Parquet file, counted from 1. A null is a field that is absent; a number that is not finite is null.

    Dates, times and decimals become text; lists and structs stay what they are.

    Raises:
        DataError: pyarrow is not installed.
        NotParquetError: it is not Parquet, is damaged, names a column twice, or has one that JSON cannot hold, such as binary data.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f'{shown(path)}: Parquet files need pyarrow: pip install "sdxl-train[parquet]"') from error
    try:
        with pq.ParquetFile(path) as file:
            types = _json_types(file.schema_arrow)
            row = 1
            for batch in file.iter_batches(_READ, use_threads=False):
                columns = [column.cast(kind) for column, kind in zip(batch.columns, types.values(), strict=True)]
                for at in range(0, len(batch), _BATCH):
                    values = zip(*(column.slice(at, _BATCH).to_pylist() for column in columns), strict=True)
                    texts = [msgspec.json.encode(_given(types, of_row)) for of_row in values]
                    yield Piece(list(range(row, row + len(texts))), texts)
                    row += len(texts)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise NotParquetError(f"it cannot be read as Parquet: {error}") from error


def _given(names: Iterable[str], values: Iterable[Any]) -> dict[str, Any]:
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def _json_types(schema: pa.Schema) -> dict[str, pa.DataType]:
    """{column: the type to which it is cast}."""
    types: dict[str, pa.DataType] = {}
    for column in schema:
        if column.name in types:
            raise NotParquetError(f"it has two columns {shown(column.name)}")
        found = _json_type(column.type)
        if found is None:
            raise NotParquetError(
                f"its column {shown(column.name)} is {column.type}, which JSON cannot hold; leave it out or cast it to text"
            )
        types[column.name] = found
    return types


def _json_type(kind: pa.DataType) -> pa.DataType | None:
    """A type whose values JSON has; None where there is none."""
    import pyarrow as pa
    from pyarrow import types

    texts = (types.is_string, types.is_large_string, types.is_string_view)
    if any(fits(kind) for fits in (types.is_null, types.is_boolean, types.is_integer, types.is_floating, *texts)):
        return kind
    if types.is_decimal(kind):
        return pa.float64()
    if types.is_timestamp(kind) or types.is_date(kind) or types.is_time(kind):
        return pa.string()
    if types.is_dictionary(kind):
        return _json_type(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _json_type(kind.value_type)
        return kind if inner == kind.value_type else inner and pa.list_(inner)
    if types.is_struct(kind):
        inner = [(field.name, _json_type(field.type)) for field in kind]
        return None if any(found is None for _, found in inner) else pa.struct(inner)
    return None
