"""Units of a generating job put in place, whoever made the pictures: files, what the gallery shows, last the manifest's part."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import fsspec

from paella.pictures import MAX_IMAGE_BYTES, InputError, image_bytes
from paella.requests import PictureRequest
from pipelines import gallery, layouts, manifest
from pipelines.generate_config import GenerateConfig
from pipelines.output_store import Output
from pipelines.picture_jobs import Job, Unit
from pipelines.source_files import is_remote

ATTEMPTS = 5
"""How often an input is read, or a picture written, while the store fails."""

T = TypeVar("T")
Row = dict[str, Any]


def put_picture(output: Output, layout: str, unit: Unit, job: Job, data: bytes, **outcome: Any) -> Row:
    """Put a picture in its place; returns its row of the manifest."""
    file = layouts.place(layout, unit.name, job)
    retried(lambda: layouts.write_picture(output, layout, job, file, data))
    sha256, now = hashlib.sha256(data).hexdigest(), int(time.time())
    return manifest.row_of(job, file=file, sha256=sha256, status="made", finished_at=now, **outcome)


def failed(job: Job, error: ValueError, digest: str) -> Row:
    """The row of a picture that could not be made."""
    param, code = (error.param, error.code) if isinstance(error, InputError) else (None, "invalid_value")
    why = {"error": str(error), "error_param": param, "error_code": code}
    return manifest.row_of(job, status="failed", bundle_digest=digest, finished_at=int(time.time()), **why)


def put_unit(
    output: Output, layout: str, unit: Unit, jobs: Sequence[Job], rows: Mapping[str, Row], files: Mapping[str, bytes]
) -> list[Row]:
    """Put in place what belongs to a whole unit, of rows and files by the ids of its jobs; returns its rows in order."""
    made = [(job, rows[job.id], files[job.id]) for job in jobs if job.id in files]
    in_order = [rows[job.id] for job in jobs]
    retried(lambda: layouts.write_unit(output, layout, unit.name, made))
    shown = gallery.chunk(unit.name, in_order, files if layout in layouts.PACKED else {})
    retried(lambda: output.write(f"{gallery.DIRECTORY}/{unit.name}.js", shown))
    retried(lambda: manifest.write(output, unit.part, in_order))
    return in_order


def with_inputs(request: PictureRequest, config: GenerateConfig) -> PictureRequest:
    """A request with the bytes of its images in place of their names. Raises InputError, also where the store fails."""
    if not request.images:
        return request
    try:
        images = tuple(_input(image, "image", config) for image in request.images)
        mask = None if request.mask is None else _input(request.mask, "mask", config)
    except OSError as error:
        raise InputError(f"an image cannot be read: {error}", "image", "io_error") from error
    return dataclasses.replace(request, images=images, mask=mask)


def _input(name: bytes | str, param: str, config: GenerateConfig) -> bytes:
    """An image's bytes. Raises InputError for one that is missing, too large or no image."""
    assert isinstance(name, str)
    uri = config.input_uri(name)
    if uri.startswith("data:"):
        return image_bytes(uri, param)
    if is_remote(uri) and not uri.startswith("s3://"):
        raise InputError(f"{param} {name} is not allowed: a path, s3:// or a data URL", param)
    try:
        return image_bytes(retried(lambda: _read(uri)), param)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(f"there is no {param} {name} that can be read", param) from error


def _read(uri: str) -> bytes:
    filesystem, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    with filesystem.open(path, "rb") as file:
        return file.read(MAX_IMAGE_BYTES + 1)


def retried(do: Callable[[], T]) -> T:
    """What `do` gives, asked again while the store fails; what is not there stays away."""
    for attempt in range(ATTEMPTS):
        try:
            return do()
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            raise
        except OSError:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(2**attempt)
    raise AssertionError
