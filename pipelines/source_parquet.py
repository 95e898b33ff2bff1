"""Parquet tables: with encoded images in a column (img2dataset's `parquet` output, others), or with URLs of images to fetch.

A unit is some rows of neighbouring row groups, so that no more of a file is read than it needs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import source_columns as columns
from pipelines.fetch import Request, fetch_all
from pipelines.img2dataset import failure, finished_shards
from pipelines.source_contract import Reject, Row, Sample, SourceConfig, Unit, Wanted
from pipelines.source_files import Tree, is_remote, open_native, stem, tail, unit_name, utf8
from pipelines.source_rows import captioned

THREADS = 32
"""Files whose footers are read at the same time."""
FOOTER_BYTES = 1 << 16
BATCH_ROWS = 16
"""Images held in memory at once."""
URL_UNITS_TOGETHER = 16
"""Units of one large row group of URLs that one reader fetches; others read the row group again, which is little beside it."""


@dataclass(frozen=True)
class Columns:
    """The columns of a file."""

    caption: str
    image: str | None
    url: str | None
    id: str | None
    status: bool
    """img2dataset's column of that name says which rows have no image."""
    meta: dict[str, list[str]]

    def all(self) -> list[str]:
        names = [self.caption, self.image, self.url, self.id, *(name for names in self.meta.values() for name in names)]
        status = ["status", "error_message"] if self.status else []
        return list(dict.fromkeys(name for name in [*names, *status] if name is not None))


@dataclass(frozen=True)
class RowSlice:
    """Rows start … stop of the row groups `groups` of a file."""

    uri: str
    name: str
    """Of the file below the source's root, without its suffix."""
    prefix: str
    groups: tuple[int, ...]
    first_row: int
    """Number in the file of the row groups' first row."""
    start: int
    stop: int
    columns: Columns


@dataclass(frozen=True)
class DamagedTable:
    """A file without a readable footer."""

    name: str
    detail: str


def find(tree: Tree, names: list[str], source: SourceConfig, rows_per_unit: int, kind: str) -> Iterator[Unit]:
    """Units of all finished tables, from their footers.

    Raises ValueError for a table without the columns that `kind` ("parquet" or "urls") needs.
    """
    shards = finished_shards(tree, names)

    def units(name: str) -> list[Unit]:
        return list(_units(tree, name, shards[name], source, rows_per_unit, kind))

    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(units, shards):
            yield from found


def kind_of(tree: Tree, names: list[str], source: SourceConfig) -> str | None:
    """What the first readable table holds: "parquet" with images, "urls", or None for neither. No row is read."""
    for name in names:
        try:
            metadata, _ = footer(tree.uri(name))
        except pa.ArrowInvalid:
            continue
        schema = metadata.schema.to_arrow_schema()
        if _image_column(schema, source) is not None:
            return "parquet"
        return "urls" if columns.find(schema.names, _names(source.url_column, columns.URL)) else None
    return None


def footer(uri: str) -> tuple[pq.FileMetaData, str]:
    """A table's metadata and their digest. Raises pyarrow.ArrowInvalid for a damaged file."""
    end = tail(uri, FOOTER_BYTES)
    needed = int.from_bytes(end[-8:-4], "little") + 8
    if needed > len(end):
        end = tail(uri, needed + 4)
    metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + end))
    return metadata, hashlib.sha256(end[-needed:]).hexdigest()


def _units(tree: Tree, name: str, by_img2dataset: bool, source: SourceConfig, size: int, kind: str) -> Iterator[Unit]:
    uri, label = tree.uri(name), utf8(stem(name))
    try:
        metadata, digest = footer(uri)
    except pa.ArrowInvalid as error:
        digest = hashlib.sha256(f"{label} {tree.sizes[name]}".encode()).hexdigest()
        yield Unit(unit_name(f"{label}-damaged", 0, digest), 1, uri, source, DamagedTable(label, str(error)))
        return
    layout = _columns(metadata.schema.to_arrow_schema(), source, uri, kind, by_img2dataset)
    for number, (groups, first, start, stop) in enumerate(_slices(metadata, size)):
        own = hashlib.sha256(f"{label} {digest} {groups} {start} {stop}".encode()).hexdigest()
        together = number // URL_UNITS_TOGETHER if kind == "urls" else 0
        prefix = f"{label.rpartition('/')[0]}/".lstrip("/") if by_img2dataset else ""
        place = RowSlice(uri, label, prefix, groups, first, start, stop, layout)
        unit = unit_name(label, first + start, own)
        yield Unit(unit, stop - start, f"{uri}#{groups[0]}.{together}", source, place)


def _slices(metadata: pq.FileMetaData, size: int) -> Iterator[tuple[tuple[int, ...], int, int, int]]:
    """Row groups, their first row, and rows start … stop among theirs: small groups together, large ones in parts."""
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    first = group = 0
    while group < len(rows):
        stop, total = group + 1, rows[group]
        while stop < len(rows) and total + rows[stop] <= size:
            total += rows[stop]
            stop += 1
        for start in range(0, total, size):
            yield tuple(range(group, stop)), first, start, min(start + size, total)
        first, group = first + total, stop


def _names(given: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    return default if given is None else (given.lower(),)


def _image_column(schema: pa.Schema, source: SourceConfig) -> str | None:
    """The first candidate that holds bytes."""
    for candidate in _names(source.image_column, columns.IMAGE):
        name = columns.find(schema.names, [candidate])
        if name is not None and _holds_bytes(schema.field(name).type):
            return name
    return None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _holds_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _columns(schema: pa.Schema, source: SourceConfig, uri: str, kind: str, by_img2dataset: bool) -> Columns:
    """Raises ValueError that names the columns found where one is missing or of another type."""
    caption = columns.find(schema.names, _names(source.caption_column, columns.CAPTION))
    image = _image_column(schema, source) if kind == "parquet" else None
    url = columns.find(schema.names, _names(source.url_column, columns.URL)) if kind == "urls" else None
    id = columns.find(schema.names, _names(source.id_column, columns.KEY if by_img2dataset else ()))
    texts = {"caption": caption, "url": url} if kind == "urls" else {"caption": caption}
    wrong = [f"a {what} column of text" for what, name in texts.items() if not (name and _holds_text(schema.field(name).type))]
    wrong += ["an image column of bytes"] if kind == "parquet" and image is None else []
    wrong += [f"the id column {source.id_column}"] if source.id_column and id is None else []
    if wrong or caption is None:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(f"{uri} needs {' and '.join(wrong)}, but its columns are {found}")
    meta = columns.known(schema.names)
    return Columns(caption, image, url, id, by_img2dataset and {"status", "error_message"} <= set(schema.names), meta)


def read(units: Sequence[Unit], wanted: Wanted | None, rows: Collection[int] | None) -> Iterator[tuple[Unit, Row]]:
    """The rows of units of one shard, or `rows` of the only unit; their row groups are read once."""
    if isinstance(units[0].place, DamagedTable):
        damaged = units[0].place
        yield units[0], Reject(f"{damaged.name}.parquet", "read", "damaged-shard", damaged.detail)
        return
    if units[0].place.columns.url is None:
        for unit, values, id in _values(units, rows):
            yield unit, _image_row(values, id, unit, wanted)
        return
    requests = ((unit, _to_fetch(values, id, unit, wanted)) for unit, values, id in _values(units, rows))
    yield from fetch_all(requests, units[0].source)


def _values(units: Sequence[Unit], rows: Collection[int] | None) -> Iterator[tuple[Unit, dict[str, Any] | None, str]]:
    """Unit, values (None: damaged) and id of each row, in order."""
    units = sorted(units, key=lambda unit: unit.place.start)
    place: RowSlice = units[0].place
    chosen = None if rows is None else {place.start + row for row in rows}
    waiting = list(units)
    for number, values in enumerate(_table_rows(place, units[-1].place.stop)):
        while number >= waiting[0].place.stop:
            waiting.pop(0)
        if number >= waiting[0].place.start and (chosen is None or number in chosen):
            yield waiting[0], values, _id(waiting[0].place, values or {}, number)


def _table_rows(place: RowSlice, stop: int) -> Iterator[dict[str, Any] | None]:
    """The first `stop` rows of the row groups; None for each that a damaged row group has lost."""
    left = stop
    with open_native(place.uri) as file:
        table = pq.ParquetFile(file, buffer_size=8 << 20 if is_remote(place.uri) else 1 << 18)
        for group in place.groups:
            rows = min(left, table.metadata.row_group(group).num_rows)
            yield from _group_rows(table, group, rows, place.columns)
            left -= rows


def _group_rows(table: pq.ParquetFile, group: int, num_rows: int, layout: Columns) -> Iterator[dict[str, Any] | None]:
    done = 0
    try:
        for batch in table.iter_batches(BATCH_ROWS if layout.image else 1024, row_groups=[group], columns=layout.all()):
            for values in _rows_of(batch.slice(0, num_rows - done)):
                yield values
                done += 1
            if done == num_rows:
                return
    except (OSError, pa.ArrowInvalid) as error:
        if "AWS Error" in str(error):  # the store, which may do better the next time
            raise
    yield from [None] * (num_rows - done)


def _rows_of(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """As dictionaries, in which text that is no UTF-8 stays bytes."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [{name: _value(batch[name][row]) for name in batch.schema.names} for row in range(len(batch))]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()


def _id(place: RowSlice, values: dict[str, Any], number: int) -> str:
    given = values.get(place.columns.id) if place.columns.id else None
    return f"{place.name}/{place.first_row + number:08d}" if given is None else f"{place.prefix}{given}"


def _rejected(values: dict[str, Any] | None, id: str, unit: Unit) -> Reject | None:
    if values is None:
        return Reject(id, "read", "damaged-shard", "the row group is damaged")
    if unit.place.columns.status and values["status"] != "success":
        return Reject(id, "source", *failure(id, values["status"], values["error_message"])[1:])
    return None


def _image_row(values: dict[str, Any] | None, id: str, unit: Unit, wanted: Wanted | None) -> Row:
    rejected = _rejected(values, id, unit)
    if rejected is not None or values is None:
        return rejected  # type: ignore[return-value]
    place: RowSlice = unit.place
    image = values[place.columns.image or ""]
    image = image.get("bytes") if isinstance(image, dict) else image
    if image is None:
        return Reject(id, "read", "no-image", f"{place.columns.image} is null")
    if len(image) > unit.source.max_image_bytes:
        return Reject(id, "read", "too-large", f"the image has {len(image)} bytes")
    meta = columns.values(values, place.columns.meta)
    meta.pop("md5", None)
    return captioned(id, image, values[place.columns.caption], meta, place.columns.caption, wanted)


def _to_fetch(values: dict[str, Any] | None, id: str, unit: Unit, wanted: Wanted | None) -> Row | Request:
    rejected = _rejected(values, id, unit)
    if rejected is not None or values is None:
        return rejected  # type: ignore[return-value]
    place: RowSlice = unit.place
    meta = columns.values(values, place.columns.meta)
    hashes: dict[str, str] = {name: meta[name] for name in ("md5", "sha256") if name in meta}
    meta.pop("md5", None)
    row = captioned(id, b"", values[place.columns.caption], meta, place.columns.caption, wanted)
    url = values[place.columns.url or ""]
    if isinstance(row, Sample) and not (isinstance(url, str) and url):
        return Reject(id, "read", "bad-url", f"{place.columns.url} is {url!r}")
    return Request(id, url, row.caption, meta, hashes) if isinstance(row, Sample) else row
