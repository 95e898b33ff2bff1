"""Folders with one `metadata.jsonl` or `metadata.csv` (Hugging Face's imagefolder): rows with `file_name` and a caption."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pipelines import source_columns as columns
from pipelines.source_contract import Reject, Row, SourceConfig, Unit, Wanted
from pipelines.source_files import SourceFile, Tree, is_remote, join, unit_name, utf8
from pipelines.source_folder import in_threads, read_member
from pipelines.source_rows import captioned

NAMES = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"


@dataclass(frozen=True)
class MetadataSlice:
    """Rows of a metadata file, which lie in its bytes start … stop."""

    uri: str
    folder: str
    """Of the metadata file, below the source's root `root`."""
    root: str
    start: int
    stop: int
    first_line: int
    header: tuple[str, ...]
    """The columns of a .csv."""
    caption: str
    repeated: frozenset[int]
    """Rows whose file an earlier row names."""


@dataclass(frozen=True)
class _Line:
    """A row of a metadata file: its values, or what is wrong with it."""

    stop: int
    """The byte after it."""
    values: dict[str, Any] | None
    problem: str = ""


def find(tree: Tree, source: SourceConfig, rows_per_unit: int) -> tuple[list[Unit], set[str]]:
    """Units of all metadata files, and the files that their rows name."""
    units: list[Unit] = []
    named: set[str] = set()
    for name in tree.sizes:
        if PurePosixPath(name).name in NAMES:
            units += _units(tree, name, source, rows_per_unit, named)
            named.add(name)
    return units, named


def _units(tree: Tree, name: str, source: SourceConfig, size: int, named: set[str]) -> Iterator[Unit]:
    folder, uri = name.rpartition("/")[0], tree.uri(name)
    header, start, lines = _open(uri)
    caption: str | None = None
    part: list[tuple[_Line, str | None]] = []
    repeated: set[int] = set()
    first_line = 0
    for line in lines:
        if line.values is not None and caption is None:
            caption = _caption_column(line.values, source, uri)
        file = _file(folder, line)
        if file in named:
            repeated.add(len(part))
        elif file is not None:
            named.add(file)
        part.append((line, file))
        if len(part) == size:
            yield _unit(tree, uri, folder, start, first_line, header, caption or "", part, repeated, source)
            start, first_line, part, repeated = line.stop, first_line + size, [], set()
    if part:
        yield _unit(tree, uri, folder, start, first_line, header, caption or "", part, repeated, source)


def _unit(
    tree: Tree,
    uri: str,
    folder: str,
    start: int,
    first_line: int,
    header: tuple[str, ...],
    caption: str,
    part: list[tuple[_Line, str | None]],
    repeated: set[int],
    source: SourceConfig,
) -> Unit:
    place = MetadataSlice(uri, folder, tree.root, start, part[-1][0].stop, first_line, header, caption, frozenset(repeated))
    contents = [folder, caption, [[line.values, tree.sizes.get(file or "")] for line, file in part]]
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True, default=str).encode()).hexdigest()
    name = unit_name(f"{folder or 'folder'}-metadata", first_line, digest)
    return Unit(name, len(part), name, source, place)


def _caption_column(values: dict[str, Any], source: SourceConfig, uri: str) -> str:
    """Raises ValueError where there are no file names or captions."""
    caption = columns.find(values, [source.caption_column.lower()] if source.caption_column else columns.CAPTION)
    if caption is None or FILE_NAME not in values:
        wanted = source.caption_column or " or ".join(columns.CAPTION)
        raise ValueError(f"{uri} needs columns {FILE_NAME} and {wanted}, but has {', '.join(values)}")
    return caption


def _open(uri: str) -> tuple[tuple[str, ...], int, Iterator[_Line]]:
    """The columns of a .csv, the first byte after them, and all lines."""
    if uri.endswith(".jsonl"):
        return (), 0, _json_lines(uri, 0, None)
    lines = _csv_rows(uri, 0, None)
    first = next(lines, ([], 0, ""))
    header = tuple(first[0])
    return header, first[1], _csv_lines(uri, first[1], None, header)


def _json_lines(uri: str, start: int, stop: int | None) -> Iterator[_Line]:
    for line, end in _raw_lines(uri, start, stop):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            problem = "" if isinstance(values, dict) else "it is no JSON object"
        except (ValueError, RecursionError) as error:
            values, problem = None, str(error)
        yield _Line(end, values if isinstance(values, dict) else None, problem)


def _csv_lines(uri: str, start: int, stop: int | None, header: tuple[str, ...]) -> Iterator[_Line]:
    for row, end, problem in _csv_rows(uri, start, stop):
        if not problem and len(row) != len(header):
            problem = f"it has {len(row)} fields, but there are {len(header)} columns"
        if row or problem:
            yield _Line(end, None if problem else dict(zip(header, row, strict=True)), problem)


def _csv_rows(uri: str, start: int, stop: int | None) -> Iterator[tuple[list[str], int, str]]:
    """Fields, the byte after them, and what is wrong with them."""
    place = [start]

    def texts() -> Iterator[str]:
        for line, end in _raw_lines(uri, start, stop):
            place[0] = end
            yield line.decode("utf-8-sig" if end == len(line) else "utf-8", errors="surrogateescape")

    reader = csv.reader(texts(), strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield [], place[0], str(error)
            continue
        yield row, place[0], ""


def _raw_lines(uri: str, start: int, stop: int | None) -> Iterator[tuple[bytes, int]]:
    with SourceFile(uri, 1 << 18) as file:
        file.seek(start)
        while (stop is None or file.tell() < stop) and (line := file.readline()):
            yield line, file.tell()


def _file(folder: str, line: _Line) -> str | None:
    """The file a row names, below the source's root; None for none, and for one that would lie outside."""
    name = (line.values or {}).get(FILE_NAME)
    if not isinstance(name, str) or not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return None
    return str(PurePosixPath(folder) / name)


def read(units: Sequence[Unit], wanted: Wanted | None, rows: Collection[int] | None) -> Iterator[tuple[Unit, Row]]:
    """The rows of units, or `rows` of the only unit."""
    for unit in units:
        place: MetadataSlice = unit.place
        if place.header:
            lines = _csv_lines(place.uri, place.start, place.stop, place.header)
        else:
            lines = _json_lines(place.uri, place.start, place.stop)
        numbered = ((number, line) for number, line in enumerate(lines) if rows is None or number in rows)

        def one(item: tuple[int, _Line], unit: Unit = unit) -> Row:
            return _row(*item, unit, wanted)

        found = in_threads(one, numbered, is_remote(place.uri))
        for row in found:
            yield unit, row


def _row(number: int, line: _Line, unit: Unit, wanted: Wanted | None) -> Row:
    place: MetadataSlice = unit.place
    file = _file(place.folder, line)
    id = utf8(file or f"{place.folder or '.'}/metadata#{place.first_line + number}")
    if line.values is None:
        return Reject(id, "read", "metadata-not-readable", line.problem)
    if file is None:
        return Reject(id, "read", "unsafe-member", f"{FILE_NAME} is {line.values.get(FILE_NAME)!r}: no file below the folder")
    if number in place.repeated:
        return Reject(id, "read", "duplicate-key", "an earlier row names the same file")
    try:
        member = read_member(join(place.root, file), "", unit.source.max_image_bytes)
    except FileNotFoundError as error:
        return Reject(id, "read", "no-image", utf8(str(error)))
    except OSError as error:
        if is_remote(place.uri):
            raise
        return Reject(id, "read", "unreadable-file", utf8(str(error)))
    if member.data is None:
        return Reject(id, "read", "too-large", f"the image has {member.size} bytes")
    return captioned(id, member.data, line.values.get(place.caption), columns.meta_of(line.values), place.caption, wanted)
