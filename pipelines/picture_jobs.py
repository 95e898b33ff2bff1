"""From rows of prompts to pictures: what the columns mean, the id of each picture, and units of them.

Columns are the fields of `paella.requests.PictureRequest` and of `SamplingConfig`, and those of ALIASES; what else a row has is
carried along. An id is given, or a digest of all that decides the picture, so that equal work is done once. A row that makes
no sense becomes a failed job, with its reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from paella import requests
from paella.pictures import InputError
from paella.requests import PictureRequest
from paella.sampler import MAX_SEED, SamplingConfig
from pipelines.openai_batch import is_batch_line, opened
from pipelines.prompts import PromptRow

ALIASES = {
    "caption": "prompt",
    "steps": "num_inference_steps",
    "guidance_scale": "cfg",
    "image": "images",
    "images_per_prompt": "n",
    "custom_id": "id",
    "format": "output_format",
    "quality": "output_compression",
}
TEXTS = ("mode", "prompt", "negative_prompt", "prompt_to", "size", "mask", "output_format", "choice", "renoise_from", "id")
INTEGERS = (
    "num_inference_steps", "renoise_steps", "top_k", "frames", "seed", "n", "width", "height", "output_compression",
    *requests.PADS,
)  # fmt: skip
NUMBERS = ("strength", "text_weight", "structure_strength", "top_p", "typical_p")
LISTS = ("cfg", "temperature", "noise", "weights", "guided_steps")
"""Several numbers; one stands for all steps, a temperature falls to 0.3 of it."""
COLUMNS = (*TEXTS, *INTEGERS, *NUMBERS, *LISTS, "images")
SAMPLER = {each.name for each in dataclasses.fields(SamplingConfig)}
REQUEST = {each.name for each in dataclasses.fields(PictureRequest)} - {"sampling"}
MAX_PER_ROW = 10_000
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,127}")
"""Ids that are names of files; no dots, which would end a key in a tar."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture that is wanted, or a row that made no sense."""

    id: str
    name: str
    """Of its file, without directory and suffix."""
    order: int
    """Among all pictures."""
    row: int
    """Of its prompt, among all rows."""
    index: int
    """Among the pictures of its row."""
    seed: int
    request: PictureRequest | None
    error: InputError | None = None
    row_id: str | None = None
    """What the row calls itself."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Values of other columns."""


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """What rows are read with."""

    digest: str
    """Of the bundle."""
    defaults: Mapping[str, Any]
    """Values of columns, where a row has none."""
    sampling: SamplingConfig
    images_per_prompt: int
    seed: int
    by_place: bool = False
    """Ids and names of files are the places of rows and pictures, whatever they are called."""


def parse(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of known columns, by their names and of their types, and those of others. Raises InputError for wrong types."""
    known: dict[str, Any] = {}
    extra = {}
    for column, value in values.items():
        name = ALIASES.get(column, column)
        if name not in COLUMNS:
            extra[column] = value
        elif name in known:
            raise InputError(f"{column} is there twice, by different names", column)
        else:
            known[name] = _converted(name, column, value)
    width, height = known.pop("width", None), known.pop("height", None)
    if (width is None) != (height is None) or (width is not None and "size" in known):
        raise InputError("a size is given as size, WIDTHxHEIGHT, or as width and height", "size")
    return (known if width is None else known | {"size": f"{width}x{height}"}), extra


def _converted(name: str, column: str, value: Any) -> Any:
    try:
        if name == "images":
            return _names(value)
        if name in TEXTS:
            return str(value) if name == "id" else _only(value, str)
        if name in INTEGERS:
            return _integer(value)
        if name in NUMBERS:
            return _number(value)
        return _numbers(name, value)
    except (TypeError, ValueError) as error:
        kind = "text" if name in (*TEXTS, "images") else "an integer" if name in INTEGERS else "a number"
        raise InputError(f"{column}={value!r} is not allowed: {kind}"[:300], column) from error


def _only(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise TypeError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    if isinstance(value, str) and value.strip().startswith("["):
        value = json.loads(value)
    if isinstance(value, list | tuple):
        return tuple(_integer(item) if name == "guided_steps" else _number(item) for item in value)
    number = _number(value)
    return (number, max(1e-3, 0.3 * number)) if name == "temperature" else (number,)


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) and value.startswith("["):
        value = json.loads(value)
    return tuple(_only(item, str) for item in (value if isinstance(value, list | tuple) else [value]))


def request_of(known: Mapping[str, Any], base: SamplingConfig, defaults: Mapping[str, Any]) -> PictureRequest:
    """What a row asks for: its own values, else the defaults of what its mode has, else the library's. Raises InputError."""
    images, mask = known.get("images", ()), known.get("mask")
    mode = known.get("mode") or defaults.get("mode") or requests.default_mode(len(images), mask is not None)
    values = {name: value for name, value in defaults.items() if _has(mode, known, name)} | {**known}
    try:
        sampling = dataclasses.replace(base, **{name: value for name, value in values.items() if name in SAMPLER})
    except ValueError as error:
        raise InputError(str(error), str(error).partition("=")[0]) from error
    own = {name: value for name, value in values.items() if name in REQUEST}
    return PictureRequest(**own | {"mode": mode, "sampling": sampling})


def _has(mode: str, given: Mapping[str, Any], name: str) -> bool:
    """Whether a default is for such a row."""
    if name == "size":
        return mode != "outpaint"
    if name == "negative_prompt":
        return "prompt_to" not in given
    if name == "output_compression":
        return given.get("output_format") != "png"
    return mode in requests.MODE_FIELDS.get(name, (mode,))


class Jobs:
    """The jobs of rows, one after the other; `rows_digest` says behind the last one what was read."""

    def __init__(self, rows: Iterable[PromptRow], settings: JobSettings) -> None:
        self.rows, self.settings = rows, settings
        self.rows_digest = hashlib.sha256()
        self.seen: dict[int, int] = {}  # digests of contents by digests of ids
        self.order = 0

    def __iter__(self) -> Iterator[Job]:
        for row in self.rows:
            self.rows_digest.update(json.dumps([row.values, row.error], sort_keys=True, default=str).encode())
            for job, content in self._of_row(row):
                self.order += 1
                if (new := self._new(job, content)) is not None:
                    yield new

    def _of_row(self, row: PromptRow) -> Iterator[tuple[Job, str]]:
        """A job for each picture, with a digest of all that decides its file; or one that has failed."""
        row_id = row.values.get("id", row.values.get("custom_id"))
        common: dict[str, Any] = {"row": row.number, "row_id": None if row_id is None else str(row_id)}
        try:
            request, seeds, extra = self._asked(row)
        except InputError as error:
            content = _digest([row.number, row.values, str(error)])
            prompt = row.values.get("prompt", row.values.get("caption"))
            extra = {} if prompt is None else {"prompt": str(prompt)}
            nothing: dict[str, Any] = {"index": 0, "seed": 0, "request": None}
            yield Job(id=content, name=content, order=self.order, error=error, extra=extra, **nothing, **common), content
            return
        common |= {"request": request, "extra": extra}
        for index, seed in enumerate(seeds):
            content = self._content(request, seed, index)
            identity = content
            if self.settings.by_place:
                identity = f"{row.number:05d}-{index:04d}"
            elif row_id is not None:
                identity = str(row_id) if len(seeds) == 1 else f"{row_id}-{index}"
            name = identity if SAFE_NAME.fullmatch(identity) else content
            yield Job(id=identity, name=name, order=self.order, index=index, seed=seed, **common), content

    def _asked(self, row: PromptRow) -> tuple[PictureRequest, list[int], dict[str, Any]]:
        """What a row asks for, the seeds of its pictures, and what else it says. Raises InputError."""
        if row.error is not None:
            raise InputError(row.error, None)
        values, base, defaults = row.values, self.settings.sampling, self.settings.defaults
        if is_batch_line(values):
            values, base, defaults = opened(values), requests.sampling(), {}
        known, extra = parse(values)
        request = request_of(known, base, defaults)
        seed, number = known.get("seed"), known.get("n", self.settings.images_per_prompt)
        if not 1 <= number <= MAX_PER_ROW:
            raise InputError(f"n={number} is not allowed: 1 to {MAX_PER_ROW}", "n")
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise InputError(f"seed={seed} is not allowed: 0 to {MAX_SEED}", "seed")
        first = (self.settings.seed + self.order) % (MAX_SEED + 1) if seed is None else seed
        return request, request.seeds(first, number), extra

    def _content(self, request: PictureRequest, seed: int, index: int) -> str:
        inputs = [*request.images, "|", *([] if request.mask is None else [request.mask])]
        form = [request.output_format, request.output_compression]
        frame = index if request.mode == "interpolate" else 0
        return _digest([self.settings.digest, request.prompt, seed, frame, request.settings, inputs, form])

    def _new(self, job: Job, content: str) -> Job | None:
        """The job, if its picture is not asked for already; a failed one where its id is another picture's."""
        identity, picture = _number_of(job.id), _number_of(content)
        if self.seen.get(identity, picture) != picture:
            error = InputError(f"the id {job.id} is used twice, for different pictures", "id")
            job, identity = dataclasses.replace(job, id=content, name=content, error=error), picture
        if identity in self.seen:
            return None
        self.seen[identity] = picture
        return job


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _number_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


@dataclass(frozen=True)
class Unit:
    """Pictures that are made together, and put in place with one part of the manifest."""

    name: str
    num_jobs: int
    packed: bytes
    """Its jobs; empty where nobody needs them any more."""

    @property
    def part(self) -> str:
        """Its part of the manifest."""
        return f"part-{self.name}.parquet"

    def jobs(self) -> list[Job]:
        return pickle.loads(zlib.decompress(self.packed))


def units(jobs: Iterable[Job], size: int, finished: set[str]) -> Iterator[Unit]:
    """Jobs in units of `size`, whose names follow from their ids; of those whose parts are finished without the jobs."""
    some: list[Job] = []
    number = 0
    for job in jobs:
        some.append(job)
        if len(some) == size:
            yield _unit(number, some, finished)
            some, number = [], number + 1
    if some:
        yield _unit(number, some, finished)


def _unit(number: int, jobs: list[Job], finished: set[str]) -> Unit:
    unit = Unit(f"{number:06d}-{_digest([job.id for job in jobs])[:8]}", len(jobs), b"")
    return unit if unit.part in finished else dataclasses.replace(unit, packed=zlib.compress(pickle.dumps(jobs), 1))
