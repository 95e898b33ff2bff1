"""Where captioned images come from: a folder of images with `.txt` captions, or webdataset tars as img2dataset writes them."""

from __future__ import annotations

import hashlib
import itertools
import os
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from paella.images import center_crop, decode_image
from pipelines.source_contract import Filtered, Reject, Row, Sample, SourceConfig, Unit, Wanted

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class _Slice:
    """Samples start … stop of a tar, or of the root of a folder tree, in the order of their keys."""

    path: str
    start: int
    stop: int
    prefix: str
    """Put before a key to make an id that is unique in the whole set."""
    files: tuple[str, ...]
    """The files of a folder's unit, below `path`; a tar's members are in its headers."""


@dataclass
class _Members:
    """Where the images and captions of one key lie: names below a folder, or members of a tar."""

    images: list[Any] = field(default_factory=list)
    captions: list[Any] = field(default_factory=list)


def find_units(path: str, rows_per_unit: int = 1024, source: SourceConfig | None = None) -> list[Unit]:
    """All units below `path`, in stable order, from listings, headers and footers alone.

    Raises ValueError where there is no such directory, no image in it, or no caption to any image.
    """
    source = source or SourceConfig()
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"the input {path} is not a directory")
    units: list[Unit] = []
    num_images = num_captioned = 0
    tars = _finished_tars(root)
    for shard, prefix in (tars or {root: ""}).items():
        index = _tar_index(shard) if tars else _folder_index(root)
        num_images += sum(bool(members.images) for members in index.values())
        num_captioned += sum(bool(members.images and members.captions) for members in index.values())
        units += _slices(root, shard, prefix, index, rows_per_unit, source)
    if not num_images:
        raise ValueError(f"the input {path} has no images ({', '.join(IMAGE_SUFFIXES)}, in folders or in .tar shards)")
    if not num_captioned:
        raise ValueError(f"the input {path} has no captions: each image needs a .txt file of the same name")
    return units


def by_shard(units: Iterable[Unit]) -> list[list[Unit]]:
    """Units that are best read together, by one call of `read_units`."""
    return [list(together) for _, together in itertools.groupby(units, key=lambda unit: unit.shard)]


def read_units(units: Sequence[Unit], wanted: Wanted | None = None) -> Iterator[tuple[Unit, Row]]:
    """Each row of units of one shard, unit after unit in the order given; the shard is read once."""
    for unit in units:
        for row in read_unit(unit, wanted=wanted):
            yield unit, row


def read_unit(unit: Unit, rows: Collection[int] | None = None, wanted: Wanted | None = None) -> Iterator[Row]:
    """The unit's rows, all, or one for each number in `rows`, ascending.

    What has no usable image or caption comes as a Reject, what `wanted` turns down as a Filtered. Raises OSError where the store
    fails, which is worth another attempt.
    """
    place: _Slice = unit.place
    chosen = range(unit.num_samples) if rows is None else sorted(rows)
    if place.files:
        index = _group((name, name) for name in place.files)
        keys = sorted(index)
        for row in chosen:
            read = _read(place, keys[row], index[keys[row]], lambda name: (Path(place.path) / name).read_bytes())
            yield _unless_unwanted(read, wanted)
        return
    index = _tar_index(Path(place.path))
    keys = sorted(index)[place.start : place.stop]
    with open(place.path, "rb") as tar:
        for row in chosen:
            read = _read(place, keys[row], index[keys[row]], lambda member: _member_bytes(tar, member))
            yield _unless_unwanted(read, wanted)


def _unless_unwanted(row: Row, wanted: Wanted | None) -> Row:
    reason = wanted(row.caption, row.meta) if wanted and isinstance(row, Sample) else None
    return row if reason is None else Filtered(row.id, reason)


def _member_bytes(tar: BinaryIO, member: tarfile.TarInfo) -> bytes:
    tar.seek(member.offset_data)
    return tar.read(member.size)


def _read(place: _Slice, key: str, members: _Members, read: Callable[[Any], bytes]) -> Sample | Reject:
    # file names need not be UTF-8, but ids are
    id = (place.prefix + key).encode(errors="surrogateescape").decode(errors="backslashreplace")
    if len(members.images) > 1 or len(members.captions) > 1:
        detail = f"{len(members.images)} images, {len(members.captions)} captions"
        return Reject(id, "read", "duplicate-key", detail)
    if not members.images:
        return Reject(id, "read", "no-image", "a caption without an image")
    if not members.captions:
        return Reject(id, "read", "no-caption", "an image without a .txt caption")
    try:
        image, caption = read(members.images[0]), read(members.captions[0]).decode().strip()
    except OSError as error:
        return Reject(id, "read", "unreadable-file", str(error))
    except UnicodeDecodeError as error:
        return Reject(id, "read", "caption-not-utf8", str(error))
    return Sample(id, image, caption) if caption else Reject(id, "read", "empty-caption", "the .txt caption is empty")


def _slices(root: Path, shard: Path, prefix: str, index: dict[str, _Members], size: int, source: SourceConfig) -> Iterator[Unit]:
    keys = sorted(index)
    place = shard.relative_to(root)
    for start in range(0, len(keys), size):
        part = keys[start : start + size]
        digest = hashlib.sha256("\n".join([str(place), *part]).encode(errors="surrogateescape")).hexdigest()[:8]
        name = f"{place.stem or 'folder'}-{start:08d}-{digest}"
        files: tuple[str, ...] = ()
        if shard == root:
            files = tuple(name for key in part for name in index[key].images + index[key].captions)
        yield Unit(name, len(part), str(shard), source, _Slice(str(shard), start, start + len(part), prefix, files))


def _group(files: Iterable[tuple[str, Any]]) -> dict[str, _Members]:
    """Images and captions by key, which is the name without its suffix."""
    index: dict[str, _Members] = {}
    for name, place in files:
        path = PurePosixPath(name)
        suffix = path.suffix.lower()
        if suffix in (*IMAGE_SUFFIXES, ".txt"):
            members = index.setdefault(str(path.with_suffix("")), _Members())
            (members.captions if suffix == ".txt" else members.images).append(place)
    return index


def _folder_index(root: Path) -> dict[str, _Members]:
    """Texts without an image (README.txt, a list of prompts) are no samples in a user's own folder."""
    names: list[str] = []
    for directory, folders, files in os.walk(root):
        folders[:] = [folder for folder in folders if folder != "_tmp"]
        below = Path(directory).relative_to(root)
        names += [(below / file).as_posix() for file in files]
    index = _group((name, name) for name in sorted(names))
    return {key: members for key, members in index.items() if members.images}


def _finished_tars(root: Path) -> dict[Path, str]:
    """Finished tars, and the prefix that makes the ids of each unique in the whole set.

    img2dataset writes `NAME_stats.json` when a tar is complete, and numbers samples over all tars of a directory. A
    directory without any such file holds other tars: they are taken as they are, and each may start at 0 again.
    """
    tars = sorted(tar for tar in root.rglob("*.tar") if "_tmp" not in tar.relative_to(root).parts)
    by_img2dataset = {folder for folder in {tar.parent for tar in tars} if any(folder.glob("*_stats.json"))}
    finished: dict[Path, str] = {}
    for tar in tars:
        place = tar.relative_to(root)
        if tar.parent not in by_img2dataset:
            finished[tar] = f"{place.with_suffix('').as_posix()}/"
        elif tar.with_name(f"{tar.stem}_stats.json").exists():
            finished[tar] = "" if tar.parent == root else f"{place.parent.as_posix()}/"
    return finished


def _tar_index(path: Path) -> dict[str, _Members]:
    """Members by key, from headers alone. Raises ValueError for a damaged tar."""
    try:
        with tarfile.open(path, "r:") as tar:  # uncompressed, so that a header says where its bytes lie
            return _group((member.name, member) for member in tar if member.isfile())
    except tarfile.TarError as error:
        raise ValueError(f"the shard {path} is damaged: {error}") from error


def decode_all(path: str, side: int, max_images: int) -> np.ndarray:
    """The images of `decode_captioned`."""
    return decode_captioned(path, side, max_images)[0]


def decode_captioned(path: str, side: int, max_images: int) -> tuple[np.ndarray, list[str]]:
    """Images as (N,side,side,3) uint8, for training that holds them in memory, and their captions.

    An even selection of a larger set. What tokenizing would reject is left out and counted. Raises ValueError where no image
    can be read.
    """
    units = find_units(path)
    total = sum(unit.num_samples for unit in units)
    num = min(total, max_images)
    wanted = np.arange(num) * total // num
    images: list[np.ndarray] = []
    captions: list[str] = []
    first = 0
    for unit in units:
        rows = (wanted[(wanted >= first) & (wanted < first + unit.num_samples)] - first).tolist()
        first += unit.num_samples
        for sample in read_unit(unit, rows) if rows else ():
            try:
                if isinstance(sample, Sample):
                    images.append(center_crop(decode_image(sample.image), side))
                    captions.append(sample.caption)
            except ValueError:
                continue  # tokenizing says by name and reason what cannot be read
    if not images:
        raise ValueError(f"none of the images in {path} can be read")
    if len(images) < num:
        print(f"{num - len(images)} of {num} images in {path} cannot be used and are left out", flush=True)
    return np.stack(images), captions


def captions(path: str, num: int) -> list[str]:
    """The first `num` captions."""
    found: list[str] = []
    for unit in find_units(path, rows_per_unit=max(1, num)):
        found += [row.caption for row in read_unit(unit) if isinstance(row, Sample)]
        if len(found) >= num:
            break
    return found[:num]
