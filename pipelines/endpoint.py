"""Pictures of a generating job from a running server, by its HTTP API, in place of workers of its own.

Asked politely: a few requests at a time, and again only when the server says so. A server that is away for a while, or restarted,
costs time and nothing else; one that stays away, refuses the key, or serves another model by then ends the job, which the same
command continues.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import math
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp

from paella.pictures import InputError
from paella.requests import MODE_FIELDS, PictureRequest
from pipelines.generate_config import GenerateConfig, api_settings
from pipelines.output_store import Output
from pipelines.picture_jobs import Job, Unit
from pipelines.picture_units import ATTEMPTS, Row, failed, put_picture, put_unit, with_inputs

PATIENCE_S = 600.0
"""A server that has no answer for so long ends the job."""
START_S = 3.0
"""The same before the job has begun."""
ANSWER_S = 660.0
"""A server gives up earlier."""
BUSY = (429, 503)
FOR_THE_USER = (401, 403, 404, 405)
"""Statuses that the next request would have too."""


def digest_of(config: GenerateConfig) -> str:
    """The digest of the model that the endpoint serves. Raises ValueError where there is none."""

    async def ask() -> str:
        async with _session() as session:
            return await Endpoint(config, "", session).digest()

    return asyncio.run(ask())


def generated(config: GenerateConfig, digest: str, missing: Sequence[Unit]) -> Iterator[dict[str, int]]:
    """A row with counts for each unit that is in place."""
    with asyncio.Runner() as runner:
        units = _units(config, digest, missing)
        while (counts := runner.run(anext(units, None))) is not None:  # type: ignore[arg-type]
            yield counts


async def _units(config: GenerateConfig, digest: str, missing: Sequence[Unit]) -> AsyncIterator[dict[str, int]]:
    """As many units at a time as fill the endpoint's requests while the oldest one ends."""
    at_a_time = 1 + math.ceil(config.concurrency / config.unit_size)
    waiting, tasks = iter(missing), set[asyncio.Task[dict[str, int]]]()
    async with _session() as session:
        endpoint = Endpoint(config, digest, session)
        while True:
            tasks |= {asyncio.create_task(endpoint.make(unit)) for unit in itertools.islice(waiting, at_a_time - len(tasks))}
            if not tasks:
                return
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()


def _session() -> aiohttp.ClientSession:
    key = os.environ.get("PAELLA_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=ANSWER_S, sock_connect=10))


class Endpoint:
    """One server, and the job that its pictures are for."""

    def __init__(self, config: GenerateConfig, digest: str, session: aiohttp.ClientSession) -> None:
        self.config, self.expected, self.session = config, digest, session
        self.url, self.output = str(config.endpoint).rstrip("/"), Output(config.output)
        self.slots = asyncio.Semaphore(config.concurrency)

    async def digest(self) -> str:
        """Of the model as it is served now."""
        try:
            known = await self._ask("GET", "/v1/capabilities", None)
        except InputError as error:
            raise ValueError(f"{self.url} does not say what it serves: {error}") from error
        name = self.config.model or known["default_model"]
        if name not in known["models"]:
            raise ValueError(f"{self.url} serves no model {name}, but {', '.join(known['models'])}")
        return known["models"][name]["digest"]

    async def make(self, unit: Unit) -> dict[str, int]:
        """Put a unit in place; returns how many pictures were made and failed. Raises ValueError for what ends the job."""
        jobs = unit.jobs()
        answers = await asyncio.gather(*(self._answer(some) for some in _together(jobs)))
        if (digest := await self.digest()) != self.expected:
            raise ValueError(f"{self.url} serves {digest} now, but served {self.expected} when the job started")
        rows = await asyncio.to_thread(self._put, unit, jobs, [pair for some in answers for pair in some])
        statuses = [row["status"] for row in rows]
        return {name: statuses.count(name) for name in ("made", "failed")}

    def _put(self, unit: Unit, jobs: Sequence[Job], answers: Sequence[tuple[Job, InputError | dict[str, Any]]]) -> list[Row]:
        rows, files = {}, {}
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            written = {}
            for job, answer in answers:
                if isinstance(answer, InputError):
                    rows[job.id] = failed(job, answer, self.expected)
                    continue
                files[job.id] = answer.pop("data")
                written[job.id] = pool.submit(put_picture, self.output, self.config.layout, unit, job, files[job.id], **answer)
            rows |= {identity: future.result() for identity, future in written.items()}
        return put_unit(self.output, self.config.layout, unit, jobs, rows, files)

    async def _answer(self, jobs: Sequence[Job]) -> list[tuple[Job, InputError | dict[str, Any]]]:
        """What one request gives for jobs that share it: each one's file and values of its row, or why there is none."""
        job = jobs[0]
        try:
            if job.request is None or job.error is not None:
                raise job.error or AssertionError
            async with self.slots:
                request = await asyncio.to_thread(with_inputs, job.request, self.config)
                path = "generations" if request.mode == "text-to-image" else "edits"
                answer = await self._ask("POST", f"/v1/images/{path}", self._body(request, job.seed))
        except InputError as error:
            return [(each, error) for each in jobs]
        width, height = map(int, answer["size"].split("x"))
        shared = {name: answer["metrics"][name] for name in ("encode_ms", "sample_ms", "decode_ms")}
        shared |= {"width": width, "height": height, "tokens": answer["usage"]["output_tokens"] // len(answer["data"])}
        shared |= {"bundle_digest": self.expected, "device": self.url}
        at = [each.index if request.mode == "interpolate" else 0 for each in jobs]
        files = [base64.b64decode(answer["data"][index]["b64_json"]) for index in at]
        return [(each, {"data": file} | shared) for each, file in zip(jobs, files, strict=True)]

    def _body(self, request: PictureRequest, seed: int) -> dict[str, Any]:
        """A request as the API has it. Raises InputError for settings that it has no names for."""
        fields = [name for name in MODE_FIELDS if request.mode in MODE_FIELDS[name] and name != "mask"]
        names = ("mode", "prompt", "negative_prompt", "size", "output_format", "output_compression", *fields)
        body = {name: getattr(request, name) for name in names} | {"seed": seed, "model": self.config.model}
        body |= api_settings(request.sampling)
        if request.images:
            body["image"] = [_data_url(image) for image in request.images]
        if request.mask is not None:
            body["mask"] = _data_url(request.mask)
        return {name: value for name, value in body.items() if value is not None}

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The answer, however often it has to be asked for. Raises InputError for a request that the server refuses.

        Raises ValueError where it refuses them all, or stays away.
        """
        began, broken = time.monotonic(), 0
        while True:
            status, content, wait_s = await self._once(method, path, body)
            if status == 200:
                return content
            message = content["message"]
            if status in FOR_THE_USER:
                raise ValueError(f"{self.url} refuses: {message}")
            broken += status >= 500 and status not in BUSY
            if (0 < status < 500 and status not in BUSY) or broken == ATTEMPTS:
                raise InputError(message, content["param"], content["code"])
            if time.monotonic() - began > (PATIENCE_S if self.expected else START_S):
                raise ValueError(f"{self.url} has no answer: {message}")
            await asyncio.sleep(min(60.0, wait_s))

    async def _once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any], float]:
        """Status (0 where nobody answers as a server of ours does), content, and seconds to wait before asking again."""
        try:
            async with self.session.request(method, self.url + path, json=body) as answer:
                content = await answer.json()
                if answer.status == 200:
                    return 200, content, 0.0
                error = {name: content["error"][name] for name in ("message", "param", "code")}
                return answer.status, error, float(answer.headers.get("retry-after", 1))
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            return 0, {"message": str(error) or type(error).__name__}, 1.0


def _together(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs that one request makes: the frames of an interpolation; else one at a time, so that none waits for another."""
    for _, some in itertools.groupby(jobs, key=lambda job: job.row):  # not by request: equal ones may have different seeds
        of_row = list(some)
        request = of_row[0].request
        if request is not None and request.mode == "interpolate":
            yield of_row
        else:
            yield from ([job] for job in of_row)


def _data_url(image: bytes | str) -> str:
    assert isinstance(image, bytes)
    kind = {b"\x89": "png", b"\xff": "jpeg", b"R": "webp"}[image[:1]]
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
