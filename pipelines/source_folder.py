"""Folders: images with `.txt` captions (and `.json`) of the same name; img2dataset's `files` output is such folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, TypeVar

from pipelines.img2dataset import STATS, failures, read_stats
from pipelines.source_contract import Reject, Row, SourceConfig, Unit, Wanted
from pipelines.source_files import IMAGE_SUFFIXES, SourceFile, Tree, is_remote, join, list_tree, unit_name, utf8
from pipelines.source_rows import MAX_TEXT_BYTES, Member, row_of

T = TypeVar("T")
R = TypeVar("R")

THREADS = 16
"""Samples read at the same time from S3."""
SUFFIXES = (*IMAGE_SUFFIXES, ".txt", ".json")


@dataclass(frozen=True)
class FolderSlice:
    """Samples of a folder tree."""

    root: str
    samples: tuple[tuple[str, tuple[str, ...]], ...]
    """Key, which is the path below the root without suffix, and suffixes as written."""


@dataclass(frozen=True)
class LostSlice:
    """Rows start … stop (None: the end) of those in an img2dataset table that have no image among the files of its shard."""

    table: str
    folder: str | None
    """None: there are no images."""
    prefix: str
    start: int
    stop: int | None


def find(tree: Tree, names: Collection[str], source: SourceConfig, rows_per_unit: int) -> Iterator[Unit]:
    """Units of the samples among the files `names`. Texts without an image (README.txt, prompts) are no samples.

    Raises ValueError where no image has a caption.
    """
    shards = {name.removesuffix(STATS) for name in tree.sizes if name.endswith(STATS)}
    parents = {shard.rpartition("/")[0] for shard in shards}
    folders: dict[str, dict[str, list[str]]] = {}
    for name in names:
        path = PurePosixPath(name)
        if path.suffix.lower() in SUFFIXES:
            folder = _shard_folder(path, parents)
            if not folder or folder in shards:  # those of img2dataset only once it has finished them
                folders.setdefault(folder, {}).setdefault(str(path.with_suffix("")), []).append(path.suffix)
    with_image = {key: kinds for files in folders.values() for key, kinds in files.items() if _has(kinds, IMAGE_SUFFIXES)}
    everything = len(names) == len(tree.sizes)
    if everything and with_image and not any(_has(kinds, (".txt", ".json")) for kinds in with_image.values()):
        raise ValueError(f"the input {tree.root} has no captions: each image needs a .txt file of the same name")
    for folder in sorted({*folders, *(shard for shard in shards if f"{shard}.parquet" in tree.sizes)}):
        suffixes = folders.get(folder, {})
        keys = [key for key in sorted(suffixes) if key in with_image]
        yield from _units(tree, folder, [(key, tuple(sorted(suffixes[key]))) for key in keys], source, rows_per_unit)
        if folder and f"{folder}.parquet" in tree.sizes:
            yield from _lost(tree, folder, len(keys), source, rows_per_unit)


def _has(suffixes: Sequence[str], kinds: tuple[str, ...]) -> bool:
    return any(suffix.lower() in kinds for suffix in suffixes)


def _shard_folder(path: PurePosixPath, parents: set[str]) -> str:
    """The folder of img2dataset's in which a file lies: one beside `_stats.json` files. "" for others."""
    return next((folder for folder in map(str, path.parents) if folder != "." and folder.rpartition("/")[0] in parents), "")


def _units(
    tree: Tree, folder: str, samples: list[tuple[str, tuple[str, ...]]], source: SourceConfig, size: int
) -> Iterator[Unit]:
    for start in range(0, len(samples), size):
        part = tuple(samples[start : start + size])
        sizes = [[key, [[suffix, tree.sizes[key + suffix]] for suffix in suffixes]] for key, suffixes in part]
        name = unit_name(folder, start, _digest(sizes))
        yield Unit(name, len(part), name, source, FolderSlice(tree.root, part))


def _lost(tree: Tree, folder: str, num_images: int, source: SourceConfig, size: int) -> Iterator[Unit]:
    stats = read_stats(tree.uri(f"{folder}{STATS}"))
    total = max(0, stats.count - num_images)
    for start in range(0, total, size):
        stop = min(start + size, total)
        name = unit_name(f"{folder}-lost", start, _digest([folder, stats.digest, num_images, start, stop]))
        images = tree.uri(folder) if num_images else None
        place = LostSlice(tree.uri(f"{folder}.parquet"), images, f"{folder}/", start, None if stop == total else stop)
        yield Unit(name, stop - start, name, source, place)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def read(units: Sequence[Unit], wanted: Wanted | None, rows: Collection[int] | None) -> Iterator[tuple[Unit, Row]]:
    """The rows of units, or `rows` of the only unit."""
    for unit in units:
        if isinstance(unit.place, LostSlice):
            yield from ((unit, row) for row in picked(_lost_rows(unit.place), rows))
            continue
        place: FolderSlice = unit.place
        samples = place.samples if rows is None else [place.samples[row] for row in sorted(rows)]

        def one(sample: tuple[str, tuple[str, ...]], root: str = place.root, source: SourceConfig = unit.source) -> Row:
            return _sample(root, *sample, source, wanted)

        for row in in_threads(one, samples, is_remote(place.root)):
            yield unit, row


def picked(rows: Iterator[Row], numbers: Collection[int] | None) -> Iterator[Row]:
    """All rows, or exactly one for each of the numbers, ascending."""
    if numbers is None:
        yield from rows
        return
    every = dict(enumerate(rows))
    for number in sorted(numbers):
        yield every.get(number) or Reject(f"row {number}", "read", "missing-sample", "the source has changed since it was listed")


def in_threads(function: Callable[[T], R], items: Iterable[T], remote: bool) -> Iterator[R]:
    """`map`, of which a few go on at the same time where each waits for a network."""
    if not remote:
        yield from map(function, items)
        return
    rest = iter(items)
    with ThreadPoolExecutor(THREADS) as pool:
        ahead = [pool.submit(function, item) for item in islice(rest, THREADS)]
        while ahead:
            result = ahead.pop(0).result()
            ahead += [pool.submit(function, item) for item in islice(rest, 1)]
            yield result


def _sample(root: str, key: str, suffixes: tuple[str, ...], source: SourceConfig, wanted: Wanted | None) -> Row:
    id = utf8(key)
    members, kinds = [], [suffix.lower() for suffix in suffixes]
    try:
        for suffix, kind in zip(suffixes, kinds, strict=True):
            limit = source.max_image_bytes if kind in IMAGE_SUFFIXES else MAX_TEXT_BYTES
            members.append(read_member(join(root, key + suffix), kind, limit))
    except FileNotFoundError as error:
        return Reject(id, "read", "unreadable-file", utf8(str(error)))
    except OSError as error:
        if is_remote(root):
            raise
        return Reject(id, "read", "unreadable-file", utf8(str(error)))
    return row_of(id, members, None, source, wanted)


def read_member(uri: str, suffix: str, max_bytes: int) -> Member:
    """A file, whose data is None where it is larger than allowed. Raises OSError where it cannot be read."""
    with SourceFile(uri, 1 << 16) as file:
        large = file.num_bytes > max_bytes
        return Member(suffix, file.num_bytes, None if large else file.read(max_bytes))


def _lost_rows(place: LostSlice) -> Iterator[Row]:
    failed, successes = failures(place.table)
    there = {PurePosixPath(name).stem for name in list_tree(place.folder).named(*IMAGE_SUFFIXES)} if place.folder else set()
    lost = [
        Reject(place.prefix + key, "read", "missing-sample", "it is in the Parquet table, but has no image")
        for key in successes
        if key not in there
    ]
    lost += [Reject(place.prefix + key, "source", reason, detail) for key, reason, detail in failed]
    yield from lost[place.start : place.stop]
