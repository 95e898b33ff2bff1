"""What img2dataset leaves beside its shards: `NAME_stats.json` when a shard is finished, and a table with every row's fate."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import pyarrow.parquet as pq

from pipelines.source_files import Tree, open_native, read_bytes, stem

STATS = "_stats.json"


@dataclass(frozen=True)
class Stats:
    """How many rows a finished shard has, how many of them images, and a digest that another writing of it would change."""

    count: int
    successes: int
    digest: str


def finished_shards(tree: Tree, names: list[str]) -> dict[str, bool]:
    """The shards that may be read, and whether img2dataset wrote them: then only those with their `_stats.json`.

    Directories without any such file hold other shards, which are taken as they are.
    """
    ends = {name.removesuffix(STATS) for name in tree.sizes if name.endswith(STATS)}
    directories = {name.rpartition("/")[0] for name in ends}
    finished = {}
    for name in names:
        written = name.rpartition("/")[0] in directories
        if not written or stem(name) in ends:
            finished[name] = written
    return finished


def read_stats(uri: str) -> Stats:
    """Raises ValueError for a damaged file."""
    content = read_bytes(uri)
    try:
        values = json.loads(content)
        count, successes = int(values["count"]), int(values["successes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{uri} is not one of img2dataset's: {error!r}") from error
    return Stats(max(count, successes), successes, hashlib.sha256(content).hexdigest())


def failures(table_uri: str) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Of a shard's Parquet table: key, reason and detail of the rows without an image, and the keys of the others."""
    with open_native(table_uri) as file:
        rows = pq.read_table(file, columns=["key", "status", "error_message"]).to_pylist()
    failed = [failure(row["key"], row["status"], row["error_message"]) for row in rows if row["status"] != "success"]
    return failed, [row["key"] for row in rows if row["status"] == "success"]


def failure(key: str, status: str | None, message: str | None) -> tuple[str, str, str]:
    """Key, reason and detail of a row without an image."""
    return key, (status or "no-status").replace("_", "-"), message or "img2dataset gives no reason"
