"""Token shards as files: written whole, and counted from their footers.

A shard's own footer says how many samples of its unit were left out, by stage and reason, so that counting a dataset reads one
footer for each shard.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output_store import Output
from pipelines.token_format import REJECTS, shard_name

LEFT_OUT = b"paella.left_out"
READERS = 32


def parquet_bytes(table: pa.Table) -> bytes:
    """A Parquet file of a table."""
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return file.getvalue()


def left_out(rejects: Sequence[dict]) -> Counter[str]:
    """How many rows there are of each "stage/reason"."""
    return Counter(f"{row['stage']}/{row['reason']}" for row in rejects)


def write_unit(output: Output, unit: str, table: pa.Table, rejects: Sequence[dict]) -> None:
    """Write what became of a unit; its shard last, since a shard that exists is a finished unit."""
    output.write(f"rejects/{shard_name(unit)}", parquet_bytes(pa.Table.from_pylist(list(rejects), schema=REJECTS)))
    metadata = {**(table.schema.metadata or {}), LEFT_OUT: json.dumps(left_out(rejects), sort_keys=True).encode()}
    output.write(shard_name(unit), parquet_bytes(table.replace_schema_metadata(metadata)))


@dataclass
class Counts:
    """What became of samples: written, or left out by "stage/reason"; stage `filter` is what was not wanted."""

    shards: list[dict] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def written(self) -> int:
        return sum(shard["rows"] for shard in self.shards)

    @property
    def filtered(self) -> dict[str, int]:
        """Samples that were not wanted, by reason, most first."""
        return {key.split("/", 1)[1]: number for key, number in self.left_out.most_common() if key.startswith("filter/")}

    @property
    def rejected(self) -> dict[str, int]:
        """Samples that could not be used, by reason, most first."""
        reasons: Counter[str] = Counter()
        for key, number in self.left_out.items():
            stage, reason = key.split("/", 1)
            if stage != "filter":
                reasons[reason] += number
        return dict(reasons.most_common())

    @property
    def rows_in(self) -> int:
        return self.written + self.left_out.total()

    def __str__(self) -> str:
        return (
            f"rows in {self.rows_in} = written {self.written} + filtered {sum(self.filtered.values())} "
            f"+ rejected {sum(self.rejected.values())}"
        )


def count(output: Output, units: Sequence[str]) -> Counts:
    """What the shards' footers say."""

    def footer(unit: str) -> pq.FileMetaData:
        with output.open(shard_name(unit)) as file:
            return pq.read_metadata(file)

    counts = Counts()
    with ThreadPoolExecutor(READERS) as pool:
        for unit, metadata in zip(units, pool.map(footer, units), strict=True):
            counts.shards.append({"file": shard_name(unit), "rows": metadata.num_rows})
            counts.left_out.update(json.loads((metadata.metadata or {}).get(LEFT_OUT, b"{}")))
    return counts
