"""Files of prompts, one row after the other: parquet, jsonl, csv, tsv, txt and OpenAI Batch jsonl, on a path or `s3://`.

No more than a few rows are in memory at a time. What the columns mean says `pipelines.picture_jobs`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from paella.storage import first_line

PARQUET_ROWS = 1024
NEEDED = ("prompt", "caption", "image", "images")
"""Columns of which a table has one at least."""


@dataclass(frozen=True)
class PromptRow:
    """One row of a file: its values by column, in lower case and without those that are not there, or why it cannot be read."""

    number: int
    """In the file, from 0; blank lines do not count."""
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def read(uri: str) -> Iterator[PromptRow]:
    """The rows of a file. Raises ValueError for an unknown format, a file that cannot be read, and columns without prompts."""
    suffix = PurePosixPath(uri).suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"the prompts {uri} have an unknown format; known are {', '.join(READERS)}")
    try:
        with fsspec.open(uri, "rb") as file:
            for number, row in enumerate(READERS[suffix](file)):
                if isinstance(row, str):
                    yield PromptRow(number, error=row)
                else:
                    yield PromptRow(number, {key.lower(): value for key, value in row.items() if value not in (None, "")})
    except FileNotFoundError as error:
        raise ValueError(f"there is no file of prompts {uri}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompts {uri} are not UTF-8 text") from error
    except (OSError, pa.ArrowException, csv.Error, _NoPrompts) as error:
        raise ValueError(f"the prompts {uri} cannot be read: {first_line(error)}") from error


class _NoPrompts(Exception):
    """A table without a column of prompts."""


def _require_prompts(columns: list[str]) -> None:
    if not {column.lower() for column in columns} & set(NEEDED):
        raise _NoPrompts(f"they have no column prompt or caption, but {', '.join(columns)}")


def _text(file: BinaryIO) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _lines(file: BinaryIO) -> Iterator[dict[str, Any]]:
    for line in _text(file):
        if line.strip():
            yield {"prompt": line.strip()}


def _json_lines(file: BinaryIO) -> Iterator[dict[str, Any] | str]:
    for line in _text(file):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"not a line of JSON: {first_line(error)}"
            continue
        yield values if isinstance(values, dict) else "not a JSON object"


def _separated(delimiter: str) -> Callable[[BinaryIO], Iterator[dict[str, Any] | str]]:
    def rows(file: BinaryIO) -> Iterator[dict[str, Any] | str]:
        reader = csv.DictReader(_text(file), delimiter=delimiter)
        _require_prompts(list(reader.fieldnames or []))
        for row in reader:
            yield "more values than columns" if None in row else row

    return rows


def _parquet(file: BinaryIO) -> Iterator[dict[str, Any]]:
    table = pq.ParquetFile(file)
    _require_prompts(table.schema_arrow.names)
    for batch in table.iter_batches(PARQUET_ROWS):
        yield from batch.to_pylist()


READERS: dict[str, Callable[[BinaryIO], Iterator[dict[str, Any] | str]]] = {
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
