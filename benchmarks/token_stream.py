"""Reading tokens for training: how fast, how soon after a restart, and how well shuffled.

    python benchmarks/token_stream.py

Ratios come from one run on one dataset of 100,000 rows in 98 shards, in the page cache. Shuffling is judged on an order of 20 M
rows without reading any: rows carry their shard's number, and the means of batches scatter more the less shards are mixed.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.token_dataset import TokenDataset, TokenFormat
from pipelines.token_order import TokenOrder
from pipelines.token_stream import SHUFFLE_ROWS, TokenStream

ROWS, SHARD, SIDE, BATCH = 100_000, 1024, 16, 2048


def write(path: Path) -> str:
    rng = np.random.default_rng(0)
    schema = TokenFormat(grid_height=SIDE, grid_width=SIDE, codebook_size=8192, vqgan_digest="0").schema()
    shards = []
    for start in range(0, ROWS, SHARD):
        number = min(SHARD, ROWS - start)
        tokens = pa.array(rng.integers(8192, size=number * SIDE**2, dtype=np.uint16))
        columns = {
            "id": [f"{start + i:09d}" for i in range(number)],
            "tokens": pa.FixedSizeListArray.from_arrays(tokens, SIDE**2),
            "caption": [f"a caption of about the usual length, of image number {start + i}" for i in range(number)],
        }
        arrays = [
            pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(number, field.type)
            for field in schema
        ]
        name = f"part-{start:09d}.parquet"
        pq.write_table(pa.table(arrays, schema=schema), path / name)
        shards.append({"file": name, "rows": number})
    (path / "dataset.json").write_text(json.dumps({"shards": shards}))
    return str(path)


def rows_per_s(batches, num: int) -> float:
    began = time.perf_counter()
    for _ in itertools.islice(batches, num):
        pass
    return num * BATCH / (time.perf_counter() - began)


def first_batch_s(stream: TokenStream, step: int) -> float:
    began = time.perf_counter()
    batches = stream.batches(start_step=step)
    next(batches)
    seconds = time.perf_counter() - began
    batches.close()
    return seconds


def scatter(shuffle_rows: int, num_rows: int = 20_000_000, num_batches: int = 300) -> float:
    """Variance of the means of batches over that of a full shuffle, where each shard's rows are of one kind."""
    order = TokenOrder([SHARD] * (num_rows // SHARD), seed=0, global_batch_size=BATCH, shuffle_rows=shuffle_rows)
    share = BATCH // order.num_lanes
    lanes = []
    for lane in range(order.num_lanes):
        windows, kinds = order.windows(lane, 0), np.empty(0)
        while len(kinds) < share * num_batches:
            window = next(windows)
            shards = np.concatenate([np.full(piece.stop - piece.start, piece.shard) for piece in window.pieces])
            kinds = np.concatenate([kinds, shards[window.order] / len(order.rows)])
        lanes.append(kinds[: share * num_batches].reshape(num_batches, share))
    return float(np.concatenate(lanes, axis=1).mean(axis=1).var() / (1 / 12 / BATCH))


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        dataset = TokenDataset(write(Path(directory)))
        columns = dataset.columns()
        began = time.perf_counter()
        for file, _ in dataset.shards:
            pq.read_table(f"{directory}/{file}", columns=columns)
        plain = ROWS / (time.perf_counter() - began)
        stream = TokenStream([dataset], seed=0, global_batch_size=BATCH, shuffle_rows=20_000)
        rate = rows_per_s(stream.batches(), ROWS // BATCH - 1)
        start, late = (first_batch_s(stream, step) for step in (0, int(0.9 * ROWS / BATCH)))
    result = {
        "rows_per_s": round(rate),
        "of_plain_reading": round(rate / plain, 2),
        "first_batch_at_90_percent_over_first_at_0": round(late / start, 2),
        **{f"scatter_{rows}": round(scatter(rows), 1) for rows in (SHUFFLE_ROWS, 10 * SHUFFLE_ROWS)},
    }
    for name, value in result.items():
        print(f"{name:45} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
