"""Where captioned images come from, on a local disk or s3://: img2dataset's three layouts, other webdataset tars and Parquet
tables, folders, and tables of URLs.

    units = find_units("s3://laion/shards")       # from listings, headers and footers
    for together in by_shard(units):
        for unit, row in read_units(together):    # a Sample, a Reject or a Filtered

Each kind of source is a file: source_webdataset, source_parquet (URLs too), source_folder, source_metadata; what they give is in
source_contract.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence

from pipelines import source_folder, source_metadata, source_parquet, source_webdataset
from pipelines.source_contract import Row, SourceConfig, Unit, Wanted
from pipelines.source_files import IMAGE_SUFFIXES, Tree, list_tree

_READERS = {
    source_webdataset.TarSlice: source_webdataset.read,
    source_parquet.RowSlice: source_parquet.read,
    source_parquet.DamagedTable: source_parquet.read,
    source_folder.FolderSlice: source_folder.read,
    source_folder.LostSlice: source_folder.read,
    source_metadata.MetadataSlice: source_metadata.read,
}


def find_units(path: str, rows_per_unit: int = 1024, source: SourceConfig | None = None) -> list[Unit]:
    """All units below `path`, in stable order, of at most `rows_per_unit` rows each.

    Raises ValueError where there is nothing to read at `path`, or not what `source` names.
    """
    source = source or SourceConfig()
    tree = list_tree(path)
    kind = _detected(tree, source) if source.format == "auto" else source.format
    units = list(_units(tree, kind, source, rows_per_unit))
    if not units:
        raise ValueError(f"the input {path} has no images for format {kind}: {_NEEDS[kind]}")
    return units


_NEEDS = {
    "webdataset": "finished .tar shards with samples",
    "parquet": "finished .parquet tables with rows",
    "urls": "finished .parquet tables with rows",
    "folder": f"images ({', '.join(IMAGE_SUFFIXES)}) with .txt captions, a metadata.jsonl or a metadata.csv",
}


def _detected(tree: Tree, source: SourceConfig) -> str:
    if tree.named(".tar"):
        return "webdataset"
    tables = tree.named(".parquet")
    if tree.named(*IMAGE_SUFFIXES):
        return "folder"
    kind = source_parquet.kind_of(tree, tables, source) if tables else None
    if kind is not None:
        return kind
    what = "neither image bytes nor URLs in its .parquet tables" if tables else "no images"
    raise ValueError(f"the input {tree.root} has {what} ({', '.join(IMAGE_SUFFIXES)}, .tar and .parquet are read)")


def _units(tree: Tree, kind: str, source: SourceConfig, size: int) -> Iterator[Unit]:
    if kind == "webdataset":
        yield from source_webdataset.find(tree, source, size)
    elif kind == "folder":
        listed, named = source_metadata.find(tree, source, size)
        yield from listed
        yield from source_folder.find(tree, [name for name in tree.sizes if name not in named], source, size)
    else:
        yield from source_parquet.find(tree, tree.named(".parquet"), source, size, kind)


def by_shard(units: Iterable[Unit]) -> list[list[Unit]]:
    """Units that are best read together, by one call of `read_units`."""
    return [list(together) for _, together in itertools.groupby(units, key=lambda unit: unit.shard)]


def read_units(units: Sequence[Unit], wanted: Wanted | None = None) -> Iterator[tuple[Unit, Row]]:
    """Each row of units of one shard, unit after unit; the shard is read once.

    What has no usable image or caption comes as a Reject, what `wanted` turns down as a Filtered. Raises OSError where the store
    fails, which is worth another attempt.
    """
    return _READERS[type(units[0].place)](units, wanted, None)


def read_unit(unit: Unit, rows: Collection[int] | None = None, wanted: Wanted | None = None) -> Iterator[Row]:
    """As `read_units`, of one unit: all its rows or, ascending, exactly one for each number in `rows`."""
    return (row for _, row in _READERS[type(unit.place)]([unit], wanted, rows))
