"""What a worker of a generating job does: units of jobs become pictures in their places, and then a part of the manifest.

Several units are under way in a worker at a time: while one's last pictures are sampled, the next one's prompts and images are
encoded and fill the batch, and pictures that are done are decoded, written and sent off.
"""

from __future__ import annotations

import io
import pickle
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from paella.bundle import load_bundle
from paella.pictures import InputError
from paella.requests import PictureRequest, Plan, plan
from paella.sampler import Canvas
from pipelines import manifest
from pipelines.generate_config import GenerateConfig
from pipelines.output_store import Output
from pipelines.picture_jobs import Job, Unit
from pipelines.picture_units import Row, failed, put_picture, put_unit, with_inputs
from pipelines.sampling_loop import Made, SamplingLoop

THREADS = 8
"""Inputs that are read, and pictures that are written, at a time."""


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
        return put_unit(self.output, self.config.layout, unit, jobs, rows, files)

    def _plans(self, jobs: Sequence[Job], pool: ThreadPoolExecutor) -> dict[int, Plan | InputError]:
        """How each request is made, or why it cannot be."""
        requests = {id(job.request): job.request for job in jobs if job.request is not None and job.error is None}
        return dict(zip(requests, pool.map(self._plan, requests.values()), strict=True))

    def _plan(self, request: PictureRequest) -> Plan | InputError:
        try:
            return plan(self.bundle, with_inputs(request, self.config))
        except InputError as error:
            return error

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
                rows[job.id] = failed(job, canvas, self.bundle.digest)
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

    def _write(self, unit: Unit, job: Job, planned: Plan, made: Made, encode_s: float) -> tuple[Row, bytes]:
        """Put a picture in its place; returns its row and its file."""
        data = planned.file(self.bundle, made.picture, seed=job.seed, index=job.index)
        seconds = {"encode_ms": encode_s, "sample_ms": made.sample_s, "decode_ms": made.decode_s}
        row = put_picture(
            self.output,
            self.config.layout,
            unit,
            job,
            data,
            width=planned.size[0],
            height=planned.size[1],
            tokens=planned.grid[0] * planned.grid[1],
            bundle_digest=self.bundle.digest,
            device=self.device,
            **{name: round(1000 * value, 3) for name, value in seconds.items()},
        )
        return row, data
