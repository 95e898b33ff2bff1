"""Writes samples in the layouts that img2dataset leaves: webdataset tars, or folders of files.

A dataset appears whole or not at all; a finished one is recognised and kept.
"""

import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.scenes import Scene, caption

_METADATA = pa.schema(
    [("caption", pa.string()), ("key", pa.string()), ("status", pa.string()), ("error_message", pa.string())]
    + [(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")]
    + [("exif", pa.string()), ("sha256", pa.string())]
)

Samples = Iterable[tuple[Scene, np.ndarray]]
ShardFile = tuple[str, bytes]


def write_folder(path: str | os.PathLike, samples: Samples, shard_size: int = 1000) -> Path:
    """Write samples as img2dataset's `files` output: `00000/000000000.{jpg,txt,json}`, then `00001/`.

    As there, `00000.parquet` and `00000_stats.json` lie beside each folder. The dataset appears whole or not
    at all; a finished one at `path` is kept as it is, and anything else there is a ValueError.
    """
    return _write_dataset(Path(path), samples, shard_size, _write_shard_folder)


def write_webdataset(path: str | os.PathLike, samples: Samples, shard_size: int = 1000) -> Path:
    """Write samples as img2dataset's `webdataset` output: `00000.tar`, `00000.parquet`, `00000_stats.json`.

    The dataset appears whole or not at all; a finished one at `path` is kept as it is, and anything else
    there is a ValueError.
    """
    return _write_dataset(Path(path), samples, shard_size, _write_shard_tar)


def _write_shard_folder(shard: Path, files: list[ShardFile]) -> None:
    shard.mkdir()
    for name, data in files:
        (shard / name).write_bytes(data)


def _write_shard_tar(shard: Path, files: list[ShardFile]) -> None:
    with tarfile.open(shard.with_suffix(".tar"), "w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)  # its time stays 0: the same samples give the same bytes
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def _write_dataset(path: Path, samples: Samples, shard_size: int, write_shard: Callable) -> Path:
    if not 1 <= shard_size <= 10_000:
        raise ValueError(f"shard_size is {shard_size}; keys have four digits within a shard: 1 to 10000.")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        _check_finished(path, samples, shard_size, write_shard)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial-{uuid.uuid4().hex}"
    partial.mkdir()
    try:
        for number, shard in enumerate(_batches(samples, shard_size)):
            _write_one(partial, number, shard, write_shard)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing to remove once it was renamed
    return path


def _batches(samples: Samples, size: int) -> Iterator[list[tuple[Scene, np.ndarray]]]:
    rest = iter(samples)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def _write_one(root: Path, number: int, samples: Samples, write_shard: Callable) -> None:
    """One shard and, last, its `_stats.json`, the sign of a finished shard."""
    start = time.time()
    rows, files = [], []
    for index, (scene, image) in enumerate(samples):
        row, jpeg = _metadata(scene, image, key=f"{number:05d}{index:04d}")
        rows.append(row)
        files.append((f"{row['key']}.jpg", jpeg))
        files.append((f"{row['key']}.txt", row["caption"].encode()))
        files.append((f"{row['key']}.json", json.dumps(row, indent=4).encode()))
    write_shard(root / f"{number:05d}", files)
    pq.write_table(pa.Table.from_pylist(rows, schema=_METADATA), root / f"{number:05d}.parquet")
    stats: dict[str, Any] = {"count": len(rows), "successes": len(rows), "failed_to_download": 0, "failed_to_resize": 0}
    end = time.time()
    stats |= {
        "duration": end - start,
        "start_time": start,
        "end_time": end,
        "status_dict": {"success": len(rows)},
    }
    (root / f"{number:05d}_stats.json").write_text(json.dumps(stats, indent=4))


def _metadata(scene: Scene, image: np.ndarray, key: str) -> tuple[dict, bytes]:
    """A sample's row as img2dataset writes it, and its JPEG, which is the original that `sha256` is of."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    jpeg = buffer.getvalue()
    height, width = image.shape[:2]
    row = {"caption": caption(scene), "key": key, "status": "success", "error_message": None}
    row |= {"width": width, "height": height, "original_width": width, "original_height": height}
    return row | {"exif": "{}", "sha256": hashlib.sha256(jpeg).hexdigest()}, jpeg


def _check_finished(path: Path, samples: Samples, shard_size: int, write_shard: Callable) -> None:
    """ValueError unless `path` is a finished dataset with these samples, by its size and first rows."""
    other = f"{path} exists and is not the finished dataset asked for; remove it or name another path."
    if not path.is_dir():
        raise ValueError(other)
    shards = sorted(path.glob("*_stats.json"))
    names = [stats.name.removesuffix("_stats.json") for stats in shards]
    suffix = ".tar" if write_shard is _write_shard_tar else ""
    if not names or not all((path / f"{n}{suffix}").exists() and (path / f"{n}.parquet").exists() for n in names):
        raise ValueError(other)
    counts = [json.loads(stats.read_text())["count"] for stats in shards]
    expected = len(samples) if isinstance(samples, Sequence) else sum(counts)
    first = pq.read_table(path / f"{names[0]}.parquet", columns=["caption", "width"]).slice(0, 8).to_pylist()
    wanted = [{"caption": caption(scene), "width": image.shape[1]} for scene, image in itertools.islice(samples, len(first))]
    if sum(counts) != expected or max(counts) > shard_size or first != wanted:
        raise ValueError(other)
