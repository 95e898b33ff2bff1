"""Where captioned images come from: a folder of images with `.txt` captions, or img2dataset's webdataset tars.

A unit is a slice of one shard, small enough to hold in memory; its name is stable, so that one unit becomes one output shard.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from paella.images import center_crop, decode_image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Sample:
    """An encoded image and its caption."""

    id: str
    image: bytes
    caption: str


@dataclass(frozen=True)
class Reject:
    """A sample that cannot be used: in which stage, why (a short word to count by), and the details."""

    id: str
    stage: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Unit:
    """Samples start … stop of one shard (a tar, or the sorted images of a folder tree)."""

    shard: str
    start: int
    stop: int
    name: str


def find_units(path: str, rows_per_unit: int = 1024) -> list[Unit]:
    """All units below `path`, in stable order, from names and headers alone.

    Raises ValueError where there is no such directory, no image in it, or no caption to any image.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"the input {path} is not a directory")
    shards: list[tuple[Path, int]] = []
    has_caption = False
    for tar in _finished_tars(root):
        keys = _tar_index(tar)
        shards.append((tar, len(keys)))
        has_caption = has_caption or any(".txt" in members for members in keys.values())
    if not shards:
        images = _folder_images(root)
        shards.append((root, len(images)))
        has_caption = any(image.with_suffix(".txt").exists() for image in images)
    if not any(count for _, count in shards):
        raise ValueError(f"the input {path} has no images ({', '.join(IMAGE_SUFFIXES)}, in folders or in .tar shards)")
    if not has_caption:
        raise ValueError(f"the input {path} has no captions: each image needs a .txt file of the same name")
    return [
        Unit(str(shard), start, min(start + rows_per_unit, count), f"{shard.stem}-{start:08d}")
        for shard, count in shards
        for start in range(0, count, rows_per_unit)
    ]


def read_unit(unit: Unit) -> Iterator[Sample | Reject]:
    """The unit's samples; what has no usable image or caption comes as a Reject."""
    rows = _read_tar(unit) if unit.shard.endswith(".tar") else _read_folder(unit)
    for key, image, caption, problem in rows:
        if problem:
            yield Reject(key, "read", *problem)
        elif image is None:
            yield Reject(key, "read", "no-image", "a caption without an image")
        elif caption is None:
            yield Reject(key, "read", "no-caption", "an image without a .txt caption")
        else:
            yield _checked(key, image, caption)


def _checked(key: str, image: bytes, caption: bytes) -> Sample | Reject:
    try:
        text = caption.decode().strip()
    except UnicodeDecodeError as error:
        return Reject(key, "read", "caption-not-utf8", str(error))
    return Sample(key, image, text) if text else Reject(key, "read", "empty-caption", "")


Row = tuple[str, bytes | None, bytes | None, tuple[str, str] | None]


def _folder_images(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and "_tmp" not in p.parts)


def _read_folder(unit: Unit) -> Iterator[Row]:
    root = Path(unit.shard)
    for image in _folder_images(root)[unit.start : unit.stop]:
        caption = image.with_suffix(".txt")
        text = caption.read_bytes() if caption.exists() else None
        yield image.relative_to(root).with_suffix("").as_posix(), image.read_bytes(), text, None


def _finished_tars(root: Path) -> list[Path]:
    """img2dataset writes `NAME_stats.json` after a tar is complete; a set without any such file is taken as it is."""
    tars = sorted(tar for tar in root.rglob("*.tar") if "_tmp" not in tar.parts)
    finished = [tar for tar in tars if tar.with_name(f"{tar.stem}_stats.json").exists()]
    return finished or tars


def _tar_index(path: Path) -> dict[str, dict[str, list[tarfile.TarInfo]]]:
    """Members by key and suffix. Raises ValueError for a damaged tar."""
    keys: dict[str, dict[str, list[tarfile.TarInfo]]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if member.isfile() and name.suffix.lower() in (*IMAGE_SUFFIXES, ".txt"):
                    keys.setdefault(str(name.with_suffix("")), {}).setdefault(name.suffix.lower(), []).append(member)
    except tarfile.TarError as error:
        raise ValueError(f"the shard {path} is damaged: {error}") from error
    return keys


def _read_tar(unit: Unit) -> Iterator[Row]:
    index = _tar_index(Path(unit.shard))
    with tarfile.open(unit.shard) as tar:
        for key in sorted(index)[unit.start : unit.stop]:
            members = index[key]
            images = [member for suffix in IMAGE_SUFFIXES for member in members.get(suffix, [])]
            texts = members.get(".txt", [])
            if len(images) > 1 or len(texts) > 1:
                yield key, None, None, ("duplicate-key", f"{len(images)} images, {len(texts)} captions")
            else:
                yield key, _bytes(tar, images), _bytes(tar, texts), None


def _bytes(tar: tarfile.TarFile, members: list[tarfile.TarInfo]) -> bytes | None:
    if not members:
        return None
    file = tar.extractfile(members[0])
    return file.read() if file else None


def decode_all(path: str, side: int, max_images: int) -> np.ndarray:
    """Images as (N,side,side,3) uint8 for training that holds them in memory; an even selection of a larger set.

    Captions do not matter here beyond their presence. Raises ValueError where no image can be read.
    """
    units = find_units(path)
    every = max(1, -(-sum(unit.stop - unit.start for unit in units) // max_images))
    images: list[np.ndarray] = []
    number = 0
    for unit in units:
        for row in read_unit(unit):
            number += 1
            if isinstance(row, Sample) and number % every == 0:
                try:
                    images.append(center_crop(decode_image(row.image), side))
                except ValueError:
                    continue  # tokenizing counts and names what cannot be read
    if not images:
        raise ValueError(f"none of the images in {path} can be read")
    return np.stack(images)


def captions(path: str, num: int) -> list[str]:
    """The first `num` captions."""
    found: list[str] = []
    for unit in find_units(path, rows_per_unit=max(1, num)):
        found += [row.caption for row in read_unit(unit) if isinstance(row, Sample)]
        if len(found) >= num:
            break
    return found[:num]
