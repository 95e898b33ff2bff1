"""The manifest of a generating job: one row for each picture, made or failed, in Parquet parts, one for each finished unit."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from paella.requests import PictureRequest
from paella.sampler import SamplingConfig
from pipelines.output_store import Output
from pipelines.picture_jobs import SAMPLER, Job
from pipelines.token_shards import READERS, parquet_bytes

DIRECTORY = "manifest"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("order", pa.int64()),
        ("row", pa.int64()),
        ("index", pa.int32()),
        ("row_id", pa.string()),
        ("prompt", pa.string()),
        ("negative_prompt", pa.string()),
        ("seed", pa.int64()),
        ("mode", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("tokens", pa.int64()),
        ("num_inference_steps", pa.int32()),
        ("cfg", pa.list_(pa.float64())),
        ("temperature", pa.list_(pa.float64())),
        ("settings", pa.string()),
        ("images", pa.list_(pa.string())),
        ("mask", pa.string()),
        ("output_format", pa.string()),
        ("output_compression", pa.int32()),
        ("extra", pa.string()),
        ("bundle_digest", pa.string()),
        ("device", pa.string()),
        ("file", pa.string()),
        ("sha256", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("error_param", pa.string()),
        ("error_code", pa.string()),
        ("encode_ms", pa.float64()),
        ("sample_ms", pa.float64()),
        ("decode_ms", pa.float64()),
        ("finished_at", pa.int64()),
    ],
    metadata={
        "width": "pixels, as are `height`; `tokens` of the latent grid",
        "settings": "JSON: all that decides the picture besides prompt, seed, images and mask",
        "extra": "JSON: the columns of the prompts that are not settings",
        "device": "what it was computed on: bits are the same on the same only",
        "status": "made or failed",
        "finished_at": "seconds since 1970",
    },
)
TIMES = ("encode_ms", "sample_ms", "decode_ms", "finished_at")
"""What another run measures otherwise."""


def row_of(job: Job, **outcome: Any) -> dict[str, Any]:
    """A job's row with what became of it."""
    extra = dict(job.extra)
    row: dict[str, Any] = {"id": job.id, "order": job.order, "row": job.row, "index": job.index, "row_id": job.row_id}
    if (request := job.request) is None:
        row |= {"prompt": extra.pop("prompt", None)}
    else:
        row |= {name: getattr(request, name) for name in ("prompt", "negative_prompt", "mode", "output_format")}
        row |= {"seed": job.seed, "images": list(request.images), "mask": request.mask, "settings": json.dumps(request.settings)}
        row |= {name: getattr(request.sampling, name) for name in ("num_inference_steps", "cfg", "temperature")}
        row["output_compression"] = request.output_compression
    return row | {"extra": json.dumps(extra, default=str) if extra else None} | outcome


def request_of(row: dict[str, Any]) -> PictureRequest:
    """What a row of the manifest says was asked for; images are names."""
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(row["settings"]).items()
    }
    sampler: dict[str, Any] = {name: settings.pop(name) for name in [*settings] if name in SAMPLER}
    sampling = SamplingConfig(**sampler)
    form = {name: row[name] for name in ("prompt", "mask", "output_format", "output_compression")}
    return PictureRequest(**settings, **form, images=tuple(row["images"]), sampling=sampling)


def write(output: Output, part: str, rows: Sequence[dict[str, Any]]) -> None:
    """Put a part in its place: its unit is then finished."""
    output.write(f"{DIRECTORY}/{part}", parquet_bytes(pa.Table.from_pylist(list(rows), schema=SCHEMA)))


def parts(output: Output) -> set[str]:
    """Names of the parts that are there."""
    return {name for name in (output / DIRECTORY).names() if name.startswith("part-")}


def read(output: Output, names: Iterable[str], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The parts' tables, in order, a few in memory at a time."""

    def table(name: str) -> pa.Table:
        data = output.read(f"{DIRECTORY}/{name}")
        if data is None:
            raise ValueError(f"{output} has no {DIRECTORY}/{name} any more")
        return pq.read_table(io.BytesIO(data), columns=columns)

    waiting = list(names)
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(waiting), READERS):
            yield from pool.map(table, waiting[start : start + READERS])


def rows(output: Output) -> Iterator[dict[str, Any]]:
    """All rows, in order."""
    for table in read(output, sorted(parts(output))):
        yield from table.to_pylist()


def find(output: Output, identity: str) -> dict[str, Any] | None:
    """The row of a picture."""
    for table in read(output, sorted(parts(output))):
        if (found := table.filter(pc.equal(table["id"], identity))).num_rows:
            return found.to_pylist()[0]
    return None


def made(output: Output) -> list[dict[str, Any]]:
    """Rows of the pictures that were made, in order."""
    return [row for row in rows(output) if row["status"] == "made"]


def count(output: Output, names: Iterable[str]) -> dict[str, Any]:
    """How many pictures were made and failed, and the errors, the most frequent first."""
    found: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for table in read(output, names, ["status", "error"]):
        found.update(table["status"].to_pylist())
        errors.update(error for error in table["error"].to_pylist() if error)
    return {"made": found["made"], "failed": found["failed"], "errors": dict(errors.most_common(20))}
