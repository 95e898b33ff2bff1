"""De-duplication: of samples with the same bytes, or that look alike, the first one stays.

First comes all of the input into `staged/`, every shard with its rows' digests. Once that is complete, which rows stay is a
pure function of the digests in the order of the units: rows in the dataset already, then the staged ones. So a kill at any
instant, and shards that are added later, change nothing about what stays. Then each staged shard moves into its place without
its duplicates.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from pipelines.output_store import Output
from pipelines.token_format import shard_name
from pipelines.token_shards import write_unit

STAGED = "staged"
READERS = 16
REASONS = ("", "exact-duplicate", "near-duplicate")


def perceptual_hash(image: np.ndarray) -> int:
    """64 bits that say what an image (H,W,3) uint8 looks like: which of its lowest frequencies are above their median.

    Zauner 2010 (pHash). Copies that are scaled or compressed again mostly have the same bits; see benchmarks/results.
    """
    import scipy.fft  # takes half a second, and few jobs need it

    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    small = F.interpolate(pixels, size=(32, 32), mode="bilinear", antialias=True)[0].float()
    grey = torch.tensor([0.299, 0.587, 0.114]) @ small.reshape(3, -1)
    lowest = scipy.fft.dctn(grey.reshape(32, 32).numpy(), norm="ortho")[:8, :8].ravel()
    bits = lowest > np.median(lowest[1:])
    return int.from_bytes(np.packbits(bits).tobytes())


def first_ones(hashes: np.ndarray) -> np.ndarray:
    """Which of hashes (N,) uint64 are not there before: (N,) bool."""
    first = np.zeros(len(hashes), dtype=bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    return first


def verdicts(output: Output, finished: Sequence[str], staged: Sequence[str], perceptual: bool) -> Iterator[tuple[str, bytes]]:
    """Of each staged unit the verdict on its rows, a byte each: an index into REASONS, 0 for those that stay.

    Memory: 8 bytes for each row of the dataset and kind of hash, and about twice as much to sort them. Of the SHA-256 64 bits
    are compared, which among 100 million images takes two different ones for the same with a probability of 0.0003.
    """
    files = [(output, name) for name in finished] + [(output / STAGED, name) for name in staged]
    with ThreadPoolExecutor(READERS) as pool:
        hashes = list(pool.map(lambda file: _hashes(file[0], file[1], perceptual), files))
    columns = np.concatenate(hashes).T
    verdict = np.zeros(columns.shape[1], dtype=np.uint8)
    if perceptual:
        verdict[~first_ones(columns[1])] = 2
    verdict[~first_ones(columns[0])] = 1
    parts = np.split(verdict, np.cumsum([len(rows) for rows in hashes])[:-1])
    yield from zip(staged, (part.tobytes() for part in parts[len(finished) :]), strict=True)


def _hashes(output: Output, unit: str, perceptual: bool) -> np.ndarray:
    """The hashes of a shard's rows: (rows, 1 or 2) uint64."""
    table = _table(output, unit, ["sha256", "phash"] if perceptual else ["sha256"])
    exact = np.array([int(digest[:16], 16) for digest in table["sha256"].to_pylist()], dtype=np.uint64)
    return np.stack([exact, table["phash"].to_numpy()] if perceptual else [exact], axis=1)


def _table(output: Output, unit: str, columns: list[str] | None = None) -> pa.Table:
    data = output.read(shard_name(unit))
    assert data is not None, f"{output} has lost {shard_name(unit)}"
    return pq.read_table(io.BytesIO(data), columns=columns)


def move_into_place(output: Output, unit: str, verdict: bytes) -> dict[str, int]:
    """Write a staged unit without its duplicates, then forget the staged one. Returns rows written and filtered."""
    staged = output / STAGED
    table = _table(staged, unit)
    duplicates = [
        {"id": id, "stage": "filter", "reason": REASONS[why], "detail": "a sample before it has the same image"}
        for id, why in zip(table["id"].to_pylist(), verdict, strict=True)
        if why
    ]
    rejects = pq.read_table(io.BytesIO(staged.read(f"rejects/{shard_name(unit)}") or b""))
    kept = table.filter(pa.array(np.frombuffer(verdict, dtype=np.uint8) == 0))
    write_unit(output, unit, kept, rejects.to_pylist() + duplicates)
    forget(output, unit)
    return {"written": len(kept), "filtered": len(duplicates)}


def forget(output: Output, unit: str) -> None:
    """Remove what is staged of a unit whose shard is in its place."""
    for name in (shard_name(unit), f"rejects/{shard_name(unit)}"):
        (output / STAGED).delete(name)
