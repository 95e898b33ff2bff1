"""What a worker of a generating job does: units of jobs become pictures in their places, and then a part of the manifest.

Several units are under way in a worker at a time: while one's last pictures are sampled, the next one's prompts and images are
encoded and fill the batch, and pictures that are done are decoded, written and sent off.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from paella.bundle import load_bundle
from paella.pictures import MAX_IMAGE_BYTES, InputError, image_bytes
from paella.requests import PictureRequest, Plan, plan
from paella.sampler import Canvas
from pipelines import gallery, layouts, manifest
from pipelines.generate_config import GenerateConfig
from pipelines.output_store import Output
from pipelines.picture_jobs import Job, Unit
from pipelines.sampling_loop import Made, SamplingLoop
from pipelines.source_files import is_remote

ATTEMPTS = 5
"""How often an input is read, or a picture written, while the store fails."""
THREADS = 8
"""Inputs that are read, and pictures that are written, at a time."""

T = TypeVar("T")
Row = dict[str, Any]


class GeneratePictures:
    """Loads the bundle once; a unit becomes pictures, what the gallery shows of them, and last its part of the manifest.

    Always float32, so that a picture can be made again.
    """

    def __init__(self, config: GenerateConfig, digest: str) -> None:
        self.config, self.output = config, Output(config.output)
        on_gpu = torch.cuda.is_available()
        torch.backends.cudnn.allow_tf32 = False  # convolutions on GPUs are not float32 otherwise
        assert config.model is not None
        self.bundle = load_bundle(config.model, "cuda" if on_gpu else "cpu")
        if self.bundle.digest != digest:
            raise RuntimeError(f"{config.model} is {self.bundle.digest} on a worker, but was {digest} when the job started")
        self.device = torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads"
        self.loop = SamplingLoop(self.bundle, config.batch_size)
        self.preparing = threading.Lock()  # the encoders and their cache are one caller's at a time

    def __call__(self, table: pa.Table) -> pa.Table:
        unit: Unit = pickle.loads(table["unit"][0].as_py())
        statuses = self.written(unit) or [row["status"] for row in self.make(unit)]
        return pa.table({name: [statuses.count(name)] for name in ("made", "failed")})

    def written(self, unit: Unit) -> list[str] | None:
        """What became of a unit that a lost worker finished; None for one that is to be done."""
        data = self.output.read(f"{manifest.DIRECTORY}/{unit.part}")
        return None if data is None else pq.read_table(io.BytesIO(data), columns=["status"])["status"].to_pylist()

    def make(self, unit: Unit) -> list[Row]:
        """Put a unit in place; returns its rows of the manifest."""
        jobs = unit.jobs()
        rows: dict[str, Row] = {}
        files: dict[str, bytes] = {}
        with ThreadPoolExecutor(THREADS) as pool:
            plans = self._plans(jobs, pool)
            started = self._start(jobs, plans, rows)
            written = {}
            for future in as_completed(started):
                job, encode_s = started[future]
                planned = plans[id(job.request)]
                assert isinstance(planned, Plan)
                written[pool.submit(self._write, unit, job, planned, future.result(), encode_s)] = job
            for done in as_completed(written):
                rows[written[done].id], files[written[done].id] = done.result()
        made = [(job, rows[job.id], files[job.id]) for job in jobs if job.id in files]
        in_order = [rows[job.id] for job in jobs]
        layout = self.config.layout
        _retried(lambda: layouts.write_unit(self.output, layout, unit.name, made))
        shown = gallery.chunk(unit.name, in_order, files if layout in layouts.PACKED else {})
        _retried(lambda: self.output.write(f"{gallery.DIRECTORY}/{unit.name}.js", shown))
        _retried(lambda: manifest.write(self.output, unit.part, in_order))
        return in_order

    def _plans(self, jobs: Sequence[Job], pool: ThreadPoolExecutor) -> dict[int, Plan | InputError]:
        """How each request is made, or why it cannot be."""
        requests = {id(job.request): job.request for job in jobs if job.request is not None and job.error is None}
        return dict(zip(requests, pool.map(self._plan, requests.values()), strict=True))

    def _plan(self, request: PictureRequest) -> Plan | InputError:
        try:
            return plan(self.bundle, with_inputs(request, self.config))
        except InputError as error:
            return error
        except OSError as error:
            return InputError(f"an image cannot be read: {error}", "image", "io_error")

    def _start(
        self, jobs: Sequence[Job], plans: dict[int, Plan | InputError], rows: dict[str, Row]
    ) -> dict[Future[Made], tuple[Job, float]]:
        """Send the canvases of jobs on their way: each future with its job and the seconds that encoding took.

        What has failed already gets its row.
        """
        with self.preparing:
            canvases = self.loop.encoded(lambda: self._canvases(jobs, plans))
        started = {}
        for job, canvas, encode_s in canvases:
            if isinstance(canvas, ValueError):
                rows[job.id] = self._failed(job, canvas)
            else:
                started[self.loop.submit(canvas)] = job, encode_s
        return started

    def _canvases(self, jobs: Sequence[Job], plans: dict[int, Plan | InputError]) -> list[tuple[Job, Canvas | ValueError, float]]:
        """Each job with its canvas, or why there can be none, and the seconds that encoding took."""
        began = time.perf_counter()
        requests = [each.request for each in plans.values() if isinstance(each, Plan)]
        texts = [text for each in requests for text in (each.prompt, each.negative_prompt, each.prompt_to) if text is not None]
        if texts:
            self.bundle.prompts(texts)  # those that are new are encoded together
        share = (time.perf_counter() - began) / len(jobs)
        found: list[tuple[Job, Canvas | ValueError, float]] = []
        for job in jobs:
            began = time.perf_counter()
            planned: Plan | InputError = job.error or plans[id(job.request)]
            canvas: Canvas | ValueError
            try:
                canvas = (
                    planned if isinstance(planned, InputError) else planned.canvas(self.bundle, seed=job.seed, index=job.index)
                )
            except ValueError as error:
                canvas = error
            found.append((job, canvas, share + time.perf_counter() - began))
        return found

    def _failed(self, job: Job, error: ValueError) -> Row:
        param, code = (error.param, error.code) if isinstance(error, InputError) else (None, "invalid_value")
        why = {"error": str(error), "error_param": param, "error_code": code}
        return manifest.row_of(job, status="failed", bundle_digest=self.bundle.digest, finished_at=int(time.time()), **why)

    def _write(self, unit: Unit, job: Job, planned: Plan, made: Made, encode_s: float) -> tuple[Row, bytes]:
        """Put a picture in its place; returns its row and its file."""
        data = planned.file(self.bundle, made.picture, seed=job.seed, index=job.index)
        layout = self.config.layout
        file = layouts.place(layout, unit.name, job)
        _retried(lambda: layouts.write_picture(self.output, layout, job, file, data))
        seconds = {"encode_ms": encode_s, "sample_ms": made.sample_s, "decode_ms": made.decode_s}
        row = manifest.row_of(
            job,
            width=planned.size[0],
            height=planned.size[1],
            tokens=planned.grid[0] * planned.grid[1],
            bundle_digest=self.bundle.digest,
            device=self.device,
            file=file,
            sha256=hashlib.sha256(data).hexdigest(),
            status="made",
            finished_at=int(time.time()),
            **{name: round(1000 * value, 3) for name, value in seconds.items()},
        )
        return row, data


def with_inputs(request: PictureRequest, config: GenerateConfig) -> PictureRequest:
    """A request with the bytes of its images in place of their names. Raises InputError, or OSError of a store that fails."""
    if not request.images:
        return request
    images = tuple(_input(image, "image", config) for image in request.images)
    mask = None if request.mask is None else _input(request.mask, "mask", config)
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
        return image_bytes(_retried(lambda: _read(uri)), param)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(f"there is no {param} {name} that can be read", param) from error


def _read(uri: str) -> bytes:
    filesystem, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    with filesystem.open(path, "rb") as file:
        return file.read(MAX_IMAGE_BYTES + 1)


def _retried(do: Callable[[], T]) -> T:
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
