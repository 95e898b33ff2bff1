"""How the pictures of a generating job lie: as files, in Parquet, in tars, as GenEval has them, or as OpenAI's Batch answers.

A layout says where a picture goes and what a unit writes in the worker; the driver calls `finish` once, when all units are done.
"""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from pipelines import manifest, openai_batch
from pipelines.output_store import Output
from pipelines.picture_jobs import Job
from pipelines.token_shards import READERS, parquet_bytes

SUFFIXES = {"png": "png", "jpeg": "jpg", "webp": "webp"}
PACKED = {"parquet": "parquet", "webdataset": "tar"}
"""Layouts that hold a unit's pictures in one file, by its suffix."""
LAYOUTS = ("files", "parquet", "webdataset", "geneval", "openai-batch")

Made = Sequence[tuple[Job, dict[str, Any], bytes]]
"""Pictures of a unit: jobs, their rows of the manifest, files."""


def place(layout: str, unit: str, job: Job) -> str:
    """The file that a picture goes to."""
    assert job.request is not None
    if layout in PACKED:
        return f"images/part-{unit}.{PACKED[layout]}"
    if layout == "geneval":
        return f"{job.row:05d}/samples/{job.index:04d}.png"
    return f"images/{job.name}.{SUFFIXES[job.request.output_format]}"


def write_picture(output: Output, layout: str, job: Job, file: str, data: bytes) -> None:
    """Put a picture in its place, where the layout has one for each."""
    if layout in PACKED:
        return
    output.write(file, data)
    if layout == "geneval" and job.index == 0 and job.request is not None:
        metadata = {"prompt": job.request.prompt} | job.extra
        output.write(f"{job.row:05d}/metadata.jsonl", json.dumps(metadata).encode())


def write_unit(output: Output, layout: str, unit: str, made: Made) -> None:
    """Put the pictures of a unit in their place, where the layout has one for all."""
    if layout in PACKED and made:
        data = _parquet(made) if layout == "parquet" else _tar(made)
        output.write(f"images/part-{unit}.{PACKED[layout]}", data)


def _parquet(made: Made) -> bytes:
    """The manifest's columns and `image`, {bytes, path}, as other tools' data sets of images have it."""
    image = pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    schema = manifest.SCHEMA.append(image)
    rows = [row | {"image": {"bytes": data, "path": _name(job)}} for job, row, data in made]
    return parquet_bytes(pa.Table.from_pylist(rows, schema=schema))


def _name(job: Job) -> str:
    assert job.request is not None
    return f"{job.name}.{SUFFIXES[job.request.output_format]}"


def _tar(made: Made) -> bytes:
    """A picture, its prompt (.txt) and its row of the manifest (.json), by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for job, row, data in made:
            suffix = _name(job).rsplit(".", 1)[1]
            for kind, content in ((suffix, data), ("txt", row["prompt"].encode()), ("json", json.dumps(row).encode())):
                entry = tarfile.TarInfo(f"{job.name}.{kind}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def picture(output: Output, row: dict[str, Any]) -> bytes:
    """The file of a picture, by its row of the manifest, out of any layout. Raises ValueError where it is not there."""
    data = output.read(row["file"])
    if data is None:
        raise ValueError(f"{output} has no {row['file']} any more")
    if row["file"].endswith(".parquet"):
        import pyarrow.parquet as pq

        table = pq.read_table(io.BytesIO(data), columns=["id", "image"], filters=[("id", "=", row["id"])])
        return table["image"][0].as_py()["bytes"]
    if row["file"].endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for number, name in enumerate(names := tar.getnames()):
                if name.endswith(".json") and json.load(tar.extractfile(name))["id"] == row["id"]:  # type: ignore[arg-type]
                    return tar.extractfile(names[number - 2]).read()  # type: ignore[union-attr]
    return data


def finish(output: Output, layout: str) -> None:
    """What is made of the whole: for openai-batch output.jsonl and, where there are errors, errors.jsonl."""
    if layout == "openai-batch":
        _stream(output, "output.jsonl", lambda: _answers(output))
        if any(row["status"] == "failed" for row in manifest.rows(output)):
            _stream(output, "errors.jsonl", lambda: _failures(output))


def _requests(output: Output) -> Iterator[list[dict[str, Any]]]:
    """The manifest's rows of each request, in their order."""
    for _, rows in itertools.groupby(manifest.rows(output), key=lambda row: row["row"]):
        yield list(rows)


def _custom_id(row: dict[str, Any]) -> str:
    return row["row_id"] or f"row-{row['row']}"


def _answers(output: Output) -> Iterator[bytes]:
    with ThreadPoolExecutor(READERS) as pool:
        for rows in _requests(output):
            if all(row["status"] == "made" for row in rows):
                files = list(pool.map(lambda row: picture(output, row), rows))
                yield openai_batch.answer(rows, files, _custom_id(rows[0]), f"req_{rows[0]['id']}")


def _failures(output: Output) -> Iterator[bytes]:
    for rows in _requests(output):
        failed = next((row for row in rows if row["status"] == "failed"), None)
        if failed is not None:
            why = failed["error"], failed["error_param"], failed["error_code"]
            yield openai_batch.failure(*why, _custom_id(failed), f"req_{failed['id']}")


def _stream(output: Output, name: str, lines: Callable[[], Iterable[bytes]]) -> None:
    """A file that grows line by line and appears when it is whole."""
    with output.growing(name) as file:
        for line in lines():
            file.write(line)
