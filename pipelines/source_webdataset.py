"""webdataset tars: of img2dataset, whose `_stats.json` counts a finished tar's samples, and others, whose headers are counted.

A tar's rows are its samples in the tar's order and, of img2dataset's tars, then the rows of its Parquet table that are not in the
tar: those that are lost, and those it could not fetch or resize.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipelines.img2dataset import STATS, failures, finished_shards, read_stats
from pipelines.source_contract import Reject, Row, SourceConfig, Unit, Wanted
from pipelines.source_files import IMAGE_SUFFIXES, Tree, is_remote, stem, unit_name, utf8
from pipelines.source_rows import MAX_TEXT_BYTES, row_of
from pipelines.tar_walk import DamagedTar, Group, walk

THREADS = 32
"""Tars that are looked into at the same time, to list them."""


@dataclass(frozen=True)
class TarSlice:
    """Some rows of a tar: samples start … stop of it, and some rows of its table that are not in it."""

    uri: str
    name: str
    """Of the tar below the source's root, without its suffix."""
    prefix: str
    """Put before a key to make an id that is unique in the whole set."""
    start: int
    stop: int
    is_last: bool
    """It reads on to the tar's end, and says what is damaged or missing there."""
    offset: int | None = None
    """Byte of the tar where sample `start` begins (for `is_last`, one before it may); None where its headers were not read."""
    damage: str | None = None
    """What was found at the end of those headers."""
    repeated: frozenset[int] = frozenset()
    """Samples whose keys others before `start` have."""
    version: str = ""
    """Of a tar whose headers were not read: what is once known of it holds as long as this stays."""
    table: str | None = None
    """img2dataset's Parquet table of the tar."""
    failed: tuple[int, int | None] = (0, 0)
    """Which of the table's rows without an image; None: to the end."""


def find(tree: Tree, source: SourceConfig, rows_per_unit: int) -> Iterator[Unit]:
    """Units of all finished tars. Those of img2dataset are not opened for it."""
    shards = finished_shards(tree, tree.named(".tar"))

    def slices(tar: str) -> list[tuple[TarSlice, int, str]]:
        return list((_listed if shards[tar] else _counted)(tree, tar, rows_per_unit))

    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(slices, shards):
            for number, (place, num_samples, digest) in enumerate(found):
                name = unit_name(place.name, number * rows_per_unit, digest)
                yield Unit(name, num_samples, place.uri, source, place)


def _listed(tree: Tree, tar: str, size: int) -> Iterator[tuple[TarSlice, int, str]]:
    """Slices of a tar of img2dataset's, with the numbers of their rows and digests."""
    name = stem(tar)
    stats, table = read_stats(tree.uri(f"{name}{STATS}")), f"{name}.parquet"
    directory = name.rpartition("/")[0]
    prefix = f"{directory}/" if directory else ""
    in_tar = stats.successes
    total = stats.count if table in tree.sizes else in_tar
    for start in range(0, total, size):
        stop = min(start + size, total)
        place = TarSlice(
            uri=tree.uri(tar),
            name=name,
            prefix=prefix,
            start=min(start, in_tar),
            stop=min(stop, in_tar),
            is_last=start < in_tar <= stop or (start == in_tar == 0),
            version=f"{tree.sizes[tar]} {stats.digest}",
            table=tree.uri(table) if table in tree.sizes else None,
            failed=(max(0, start - in_tar), None if stop == total else max(0, stop - in_tar)),
        )
        yield place, stop - start, _digest(tar, tree.sizes[tar], stats.digest, start, stop)


def _counted(tree: Tree, tar: str, size: int) -> Iterator[tuple[TarSlice, int, str]]:
    """Slices of a tar of which nothing is known: its headers are read, here, from S3 with a request for each sample.

    That takes minutes for millions of samples on a disk and hours on S3, where img2dataset's counts take seconds.
    """
    offsets: list[int] = []
    contents: list[Any] = []
    first: list[int] = []
    seen: dict[str, int] = {}
    damage: str | None = None
    try:
        for group in walk(tree.uri(tar), 0, 1 << 16 if tree.remote else 1 << 12, lambda *_: -1):
            first.append(seen.setdefault(group.key, len(first)))
            offsets.append(group.offset)
            contents.append([group.key, [[member.suffix, member.size] for member in group.members], group.problem])
    except DamagedTar as error:
        damage = str(error)
        contents.append(damage)
    for start in range(0, len(contents), size):
        stop = min(start + size, len(contents))
        place = TarSlice(
            uri=tree.uri(tar),
            name=stem(tar),
            prefix=f"{stem(tar)}/",
            start=start,
            stop=stop,
            is_last=stop == len(contents),
            offset=offsets[start] if start < len(offsets) else tree.sizes[tar],
            damage=damage if stop == len(contents) else None,
            repeated=frozenset(number for number in range(start, min(stop, len(first))) if first[number] < start),
        )
        yield place, stop - start, _digest(tar, contents[start:stop])


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def read(units: Sequence[Unit], wanted: Wanted | None, rows: Collection[int] | None) -> Iterator[tuple[Unit, Row]]:
    """The rows of units of one tar, in one pass where its samples' places are not known; `rows` of the only unit, or all."""
    in_one = units[0].place.offset is None
    for together in [sorted(units, key=lambda unit: unit.place.start)] if in_one else [[unit] for unit in units]:
        yield from _Pass(together, wanted, rows).rows()


@functools.lru_cache(maxsize=8)
def _index(uri: str, version: str) -> dict[int, tuple[int, str]]:
    """Offset and key of a tar's first samples, as far as this process has walked: whoever comes again need not walk so far."""
    return {}


class _Pass:
    """One pass through a tar, for units that follow one another; `chosen` are numbers of samples in the tar, or None for all."""

    def __init__(self, units: list[Unit], wanted: Wanted | None, rows: Collection[int] | None) -> None:
        self.units, self.wanted, self.source = units, wanted, units[0].source
        self.place: TarSlice = units[0].place
        self.asked = None if rows is None else sorted(rows)
        self.chosen = None if rows is None else {self.place.start + row for row in rows}
        self.index, self.base, self.offset = {}, self.place.start, self.place.offset or 0
        if self.place.offset is None:
            self.index = _index(self.place.uri, self.place.version)
            self.base = min(self.place.start, max(0, len(self.index) - 1))
            self.offset = self.index[self.base][0] if self.index else 0
        self.keys = {self.index[number][1] for number in range(self.base)} if self.index else set()

    def rows(self) -> Iterator[tuple[Unit, Row]]:
        if self.asked is not None:
            yield from self._asked(self.units[0], self.asked)
            return
        in_tar = [unit for unit in self.units if unit.place.start < unit.place.stop or unit.place.is_last]
        for unit, _, row in self._samples(in_tar):
            yield unit, row
        for unit in self.units:
            for row in self._outside(unit.place):
                yield unit, row

    def _asked(self, unit: Unit, rows: list[int]) -> Iterator[tuple[Unit, Row]]:
        """Exactly a row for each number, ascending."""
        place, left = self.place, list(rows)
        for _, number, row in self._samples([unit]):
            if number == place.start + left[0]:
                left.pop(0)
                yield unit, row
            if not left:
                return
        outside = list(self._outside(dataclasses.replace(place, is_last=False))) if left else []
        lost = Reject(utf8(f"{place.name}.tar"), "read", "missing-sample", "the tar ends before this row")
        for number in left:
            index = number - (place.stop - place.start)
            yield unit, outside[index] if 0 <= index < len(outside) else lost

    def _samples(self, units: list[Unit]) -> Iterator[tuple[Unit, int, Row]]:
        """Unit, number and row of each sample in the tar; the last unit's go on to the end, and damage is its last row."""
        waiting, number = list(units), self.base
        if not waiting:
            return
        buffer_bytes = 8 << 20 if is_remote(self.place.uri) else 1 << 18
        try:
            for group in walk(self.place.uri, self.offset, buffer_bytes, self._max_bytes):
                self.index[number] = group.offset, group.key
                while waiting and number >= waiting[0].place.stop and not waiting[0].place.is_last:
                    waiting.pop(0)
                if not waiting:
                    return
                if number >= waiting[0].place.start and (self.chosen is None or number in self.chosen):
                    yield waiting[0], number, self._row(group, number)
                self.keys.add(group.key)
                number += 1
        except DamagedTar as damage:
            while waiting and number >= waiting[0].place.stop and not waiting[0].place.is_last:
                waiting.pop(0)
            if waiting and number >= waiting[0].place.start:
                detail = waiting[0].place.damage or str(damage)
                yield waiting[0], number, Reject(utf8(f"{self.place.name}.tar"), "read", "damaged-shard", utf8(detail))

    def _max_bytes(self, index: int, suffix: str) -> int:
        number = self.base + index
        if number < self.place.start or not (self.chosen is None or number in self.chosen):
            return -1
        return self.source.max_image_bytes if suffix in IMAGE_SUFFIXES else MAX_TEXT_BYTES

    def _row(self, group: Group, number: int) -> Row:
        id = utf8(self.place.prefix + group.key)
        if group.key in self.keys or number in self.place.repeated:
            return Reject(id, "read", "duplicate-key", "an earlier sample of the tar has the same key")
        return row_of(id, group.members, group.problem, self.source, self.wanted)

    def _outside(self, place: TarSlice) -> Iterator[Row]:
        """The rows of img2dataset's table that are not in the tar."""
        if place.table is None or (place.failed == (0, 0) and not place.is_last):
            return
        failed, successes = failures(place.table)
        if place.is_last:
            for key in successes:
                if key not in self.keys:
                    detail = "it is in the Parquet table, but not in the tar"
                    yield Reject(place.prefix + key, "read", "missing-sample", detail)
        for key, reason, detail in failed[slice(*place.failed)]:
            yield Reject(place.prefix + key, "source", reason, detail)
