"""What tokenizing a whole input would take, from a sample of it: time, workers and storage."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray

from pipelines import cli
from pipelines.progress import duration
from pipelines.source_contract import Unit
from pipelines.token_shards import parquet_bytes
from pipelines.token_stages import Decode, DecodedUnit, Encode
from pipelines.tokenize_config import TokenizeConfig

SAMPLE_S = 30.0
"""The sample grows until this long has been spent on it."""
SAMPLE_UNITS = 8
SAMPLE_ROWS = 64
"""Of each unit that is looked at."""


@dataclass(frozen=True)
class Sampled:
    """Samples read, rows they gave and bytes of those in Parquet; seconds for reading and decoding, and for encoding."""

    read: int
    rows: int
    num_bytes: int
    decode_s: float
    encode_s: float
    device: str


def estimate(config: TokenizeConfig, units: Sequence[Unit]) -> str:
    """A few sentences. Raises ValueError where the sample gives no row."""
    cli.start_ray()
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    measured = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(sample)
    chosen = [units[i * len(units) // SAMPLE_UNITS] for i in range(min(SAMPLE_UNITS, len(units)))]
    return described(ray.get(measured.remote(config, chosen)), sum(unit.num_samples for unit in units), gpus, cpus)


def sample(config: TokenizeConfig, units: Sequence[Unit]) -> Sampled:
    """Tokenize the beginnings of units, and write nothing."""
    decode, encode = Decode(config), Encode(config)
    read = rows = num_bytes = 0
    decode_s = encode_s = 0.0
    first = True
    for unit in units:
        began = time.perf_counter()
        decoded = decode.beginning(unit, SAMPLE_ROWS)
        between = time.perf_counter()
        if first and decoded.rows:  # the first pass sets up what later ones find
            encode.table(DecodedUnit(unit.name, decoded.images[:1], decoded.rows[:1]))
            first, between = False, time.perf_counter()
        size = len(parquet_bytes(encode.table(decoded))) if decoded.rows else 0
        read, rows, num_bytes = read + len(decoded.rows) + len(decoded.rejects), rows + len(decoded.rows), num_bytes + size
        decode_s, encode_s = decode_s + between - began, encode_s + time.perf_counter() - between
        if decode_s + encode_s > SAMPLE_S:
            break
    return Sampled(read, rows, num_bytes, decode_s, encode_s, encode.device)


def described(sampled: Sampled, total: int, gpus: int, cpus: int) -> str:
    """The estimate in words, and its numbers as a last line of JSON."""
    if sampled.rows == 0:
        raise ValueError(f"none of the {sampled.read} samples looked at can be used: nothing can be estimated")
    kept = sampled.rows / sampled.read
    decode, encode = sampled.read / sampled.decode_s, sampled.rows / kept / sampled.encode_s
    workers = max(1, gpus or cpus)
    # with GPUs the stages overlap, and the slower one decides; a CPU does one after the other
    per_worker = encode if gpus else 1 / (1 / decode + 1 / encode)
    rate = min(gpus * encode, cpus * decode) if gpus else cpus * per_worker
    hours, storage = total / rate / 3600, total * kept * sampled.num_bytes / sampled.rows
    numbers = {
        "images": total,
        "images_per_s_per_worker": per_worker,
        "workers": workers,
        "hours": hours,
        "bytes": storage,
        "kept": kept,
    }
    lines = [
        f"a sample of {sampled.read} of {total} images: {decode:.1f} images/s decoded by a CPU, {encode:.1f} encoded by a "
        f"{'GPU' if gpus else 'CPU'}, {kept:.0%} kept",
        f"{per_worker:.1f} images/s per worker; {workers} workers here: {rate:.1f} images/s, {duration(hours * 3600)} for all",
        f"storage: {storage / 1e9:.2f} GB ({sampled.num_bytes / sampled.rows:.0f} bytes a row)",
        json.dumps(numbers),
    ]
    return "\n".join(lines)
