"""What is in a token dataset, and whether it is whole.

    python -m pipelines.inspect_tokens runs/demo/tokens
    python -m pipelines.inspect_tokens s3://me/tokens --vqgan bundle --sheet tokens.png

Reads every shard once, a row group at a time, and compares it with what `dataset.json` says. Exit code 2 where anything is wrong.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro

from paella import command_line
from paella.bundle import load_vqgan, vqgan_digests
from paella.images import contact_sheet, to_uint8
from paella.storage import first_line
from pipelines import cli
from pipelines.output_store import Output
from pipelines.token_dataset import require_vqgan
from pipelines.token_format import TokenFormat, unit_name
from pipelines.token_shards import LEFT_OUT, Counts, left_out
from pipelines.token_sheet import decode, first_rows

READERS = 8
IDS_AT_ONCE = 2**25
"""Hashes of ids that are held and sorted at once: 256 MB, and as much again to sort them."""
MAX_SAID = 10


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What to look at."""

    uri: tyro.conf.Positional[str]
    """The token dataset: a directory or s3://."""
    vqgan: str | None = None
    """Bundle with the VQGAN that made the tokens; only with one are pictures drawn."""
    sheet: str = "tokens.png"
    """File of the contact sheet."""
    num_images: int = 32
    """Pictures on the sheet."""


@dataclass
class ShardReport:
    """What reading a shard has shown."""

    file: str
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def run(config: InspectConfig) -> None:
    """Print what is there. Raises ValueError where there is no dataset, or where it is not whole."""
    output = Output(cli.absolute(config.uri))
    kept = output.read("dataset.json")
    if kept is None or not (info := json.loads(kept))["shards"]:
        raise ValueError(f"{config.uri} is not a finished token dataset: it has no dataset.json")
    with output.open(info["shards"][0]["file"]) as file:
        format = TokenFormat.of(pq.read_schema(file), config.uri)
    print("\n".join(_described(info, format)))
    if config.vqgan is not None:
        require_vqgan(format, vqgan_digests(config.vqgan), config.uri)
        _draw(config, output, info, format)
    problems = [*_check(output, info, format), *_repeated_ids(output, info)]
    for problem in problems[:MAX_SAID]:
        print(f"  {problem}")
    if problems:
        raise ValueError(f"{config.uri} is not whole: {len(problems)} problems, the first: {problems[0]}")
    print(f"whole: {len(info['shards'])} shards read, {info['rows']} rows, ids unique, tokens below the codebook's size")


def _described(info: dict[str, Any], format: TokenFormat) -> Iterator[str]:
    yield f"rows      {info['rows']} in {len(info['shards'])} shards"
    yield f"grid      {format.grid_height}x{format.grid_width} of {format.codebook_size} codes"
    yield f"vqgan     {format.vqgan_digest}"
    for name, width, digest in (("clip", format.clip_embd, format.clip), ("byt5", format.byt5_embd, format.byt5)):
        if width is not None:
            columns = f" ({', '.join(format.clip_columns)})" if name == "clip" else ""
            yield f"{name}      {digest or 'of unknown name'}, width {width}{columns}"
    for title, total, reasons in (("filtered", "filtered", "filters"), ("rejected", "rejected", "rejects")):
        counts = ", ".join(f"{reason} {number}" for reason, number in info.get(reasons, {}).items())
        yield f"{title}  {info.get(total, 0)}{': ' if counts else ''}{counts}"
    yield f"config    {json.dumps(info.get('config', {}))}"


def _draw(config: InspectConfig, output: Output, info: dict[str, Any], format: TokenFormat) -> None:
    """A sheet of pictures decoded from rows evenly chosen over the shards; and their captions."""
    model, _ = load_vqgan(str(config.vqgan))
    files = [shard["file"] for shard in info["shards"] if shard["rows"]]
    chosen = [files[i * len(files) // config.num_images] for i in range(config.num_images)]
    rows = [row for file in sorted(set(chosen)) for row in first_rows(output, unit_name(file), chosen.count(file))]
    images = to_uint8(decode(model, [row["tokens"] for row in rows], format.grid_height))
    contact_sheet(list(images), [row["caption"] for row in rows], scale=1).save(config.sheet)
    print("captions  " + "\n          ".join(row["caption"] for row in rows[:8]))
    print(f"sheet     {config.sheet}")


def _check(output: Output, info: dict[str, Any], format: TokenFormat) -> Iterator[str]:
    """What is wrong with the shards, one sentence each."""
    counts = Counts()
    with ThreadPoolExecutor(READERS) as pool:
        for report in pool.map(lambda shard: _read(output, shard["file"], shard["rows"], format), info["shards"]):
            yield from report.problems
            counts.shards.append({"file": report.file, "rows": report.rows})
            counts.left_out.update(report.left_out)
    for name, said, found in (
        ("rows", info.get("rows"), counts.written),
        ("filters", info.get("filters", {}), counts.filtered),
        ("rejects", info.get("rejects", {}), counts.rejected),
        ("rows_in", info.get("rows_in"), counts.rows_in),
    ):
        if said != found:
            yield f"dataset.json says {name} {said}, the shards {found}"


def _read(output: Output, file: str, rows: int, format: TokenFormat) -> ShardReport:
    report = ShardReport(file)
    try:
        with output.open(file) as opened:
            shard = pq.ParquetFile(opened)
            for batch in shard.iter_batches(batch_size=8192):
                report.rows += len(batch)
                report.problems += _check_batch(file, batch, format)
        if (own := TokenFormat.of(shard.schema_arrow, file)) != format:
            report.problems.append(f"{file} has another format than the first shard: {own}")
        if report.rows != rows:
            report.problems.append(f"{file} has {report.rows} rows, dataset.json says {rows}")
        with output.open(f"rejects/{file}") as opened:
            report.left_out = left_out(pq.read_table(opened).to_pylist())
        said = (shard.metadata.metadata or {}).get(LEFT_OUT)
        if said is not None and json.loads(said) != report.left_out:
            report.problems.append(f"{file} says that {json.loads(said)} were left out, rejects/{file} {dict(report.left_out)}")
    except (OSError, ValueError, pa.ArrowException) as error:
        report.problems.append(f"{file} cannot be read: {first_line(error)}")
    return report


def _check_batch(file: str, batch: pa.RecordBatch, format: TokenFormat) -> Iterator[str]:
    if len(batch) == 0:
        return
    highest = pc.max(batch["tokens"].flatten()).as_py()
    if highest >= format.codebook_size:
        yield f"{file} has a token {highest}, the codebook has {format.codebook_size} codes"
    for name in ("id", "tokens", "caption"):
        if batch[name].null_count:
            yield f"{file} has rows without {name}"


def _repeated_ids(output: Output, info: dict[str, Any]) -> Iterator[str]:
    """Ids that are there twice: hashes of ids, a share of all hashes at a time, sorted; then the ids themselves of equal hashes.

    Memory is bounded by IDS_AT_ONCE; a larger dataset's ids are read once for each share.
    """
    files = [shard["file"] for shard in info["shards"]]
    shares = -(-info["rows"] // IDS_AT_ONCE)
    suspects: set[int] = set()
    for share in range(shares):
        parts = [hashes[hashes % np.uint64(shares) == share] for hashes in map(_hashes, (_ids(output, file) for file in files))]
        ordered = np.sort(np.concatenate(parts))
        suspects.update(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    wanted, seen = np.fromiter(suspects, dtype=np.uint64), dict[str, str]()
    for file in files if suspects else ():
        ids = _ids(output, file)
        for id in ids[np.isin(_hashes(ids), wanted)].tolist():
            if id in seen:
                yield f"the id {id!r} is in {seen[id]} and in {file}"
            seen[id] = file


def _ids(output: Output, file: str) -> np.ndarray:
    """A shard's ids; none of one that cannot be read, which is said already."""
    try:
        with output.open(file) as opened:
            return pq.read_table(opened, columns=["id"])["id"].to_numpy()
    except (OSError, ValueError, pa.ArrowException):
        return np.empty(0, dtype=object)


def _hashes(ids: np.ndarray) -> np.ndarray:
    return pd.util.hash_array(ids, categorize=False)


if __name__ == "__main__":
    from pipelines.inspect_tokens import InspectConfig as _Config
    from pipelines.inspect_tokens import run as _run

    command_line.main(_run, _Config, __doc__)
