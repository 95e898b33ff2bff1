"""What one generating job is: its settings, and which of them decide what the output holds."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from paella import requests
from paella.config import require
from paella.pictures import InputError
from paella.sampler import MAX_SEED, SamplingConfig
from pipelines import cli
from pipelines.picture_jobs import JobSettings, parse, request_of
from pipelines.source_files import is_remote, join

FREE = ("model", "prompts", "output", "batch_size", "concurrency", "reproduce")
"""Settings that do not decide what the output holds, or do so by what they name."""

EXAMPLES: dict[str, dict[str, Any]] = {
    "inpaint": {"images": ("x",), "mask": "x"},
    "outpaint": {"images": ("x",), "pad_left": 32},
    "variation": {"images": ("x",)},
    "blend": {"images": ("x",), "weights": (1.0,)},
    "interpolate": {"images": ("x", "x")},
    "structural": {"images": ("x",)},
}
"""Inputs of rows, to try defaults on."""


def api_settings(sampling: SamplingConfig) -> dict[str, Any]:
    """The sampler's settings by the HTTP API's names. Raises InputError for those that it has no names for."""
    steps, first = sampling.num_inference_steps, sampling.at(0)
    by_api: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": first.cfg, "temperature": first.temperature}
    allowed = requests.sampling(**by_api)
    same = [sampling.at(step) == allowed.at(step) for step in range(steps)]
    others = [each.name for each in dataclasses.fields(SamplingConfig) if each.name not in ("temperature", "cfg")]
    if not all(same) or any(getattr(sampling, name) != getattr(allowed, name) for name in others):
        raise InputError(
            "the HTTP API knows num_inference_steps, one cfg for all steps, and a temperature that falls to 0.3 of itself; other "
            "settings of the sampler cannot be sent to an endpoint", "sampling", "unsupported_value",
        )  # fmt: skip
    return by_api


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """One batch generation job, or one picture of it again."""

    output: str
    """Directory or s3:// of the pictures; the same command with the same output continues it."""
    model: str | None = None
    """Bundle: directory, URI or models:/name@alias. With an endpoint, the name that it serves a model by, or its default."""
    prompts: str | None = None
    """File of prompts, a path or s3://: .parquet, .jsonl, .csv, .tsv, .txt or OpenAI's Batch .jsonl. Columns beside `prompt` are
    settings of the row: mode, image, mask, seed, size, steps, cfg, temperature, negative_prompt, n, id, …"""
    images_per_prompt: int = 1
    """Pictures of each prompt; a column `n` comes first."""
    seed: int = 0
    """Seed of the first picture; the i-th picture of the job has seed + i, where its row gives none."""
    layout: Literal["files", "parquet", "webdataset", "geneval", "openai-batch"] = "files"
    """images/ID.png, Parquet or tars with pictures in them, GenEval's directories, or OpenAI's Batch output beside the files."""
    format: Literal["png", "jpg", "webp"] = "png"
    """Of the pictures; only png says inside how it was made."""
    quality: int | None = None
    """Of jpg and webp, 0 to 100."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels, or auto: the source image's, or the model's."""
    negative_prompt: str | None = None
    """What guidance leads away from."""
    defaults: tuple[str, ...] = ()
    """Other columns for rows that lack them, as NAME=VALUE: mode=structural structure_strength=0.6."""
    batch_size: int = 32
    """Pictures of the model's own size in the running batch."""
    unit_size: int = 64
    """Pictures that are put in place together: what a kill can lose, of each worker twice."""
    threads: int | None = None
    """Of each worker on CPUs; by default as many as the library uses here, since another number rounds otherwise. A small model's
    workers have one."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Settings of the sampler, where a row gives none."""
    endpoint: str | None = None
    """http:// address of a running server that makes the pictures; PAELLA_API_KEY is its key. The sampler's settings and their
    defaults are then the HTTP API's."""
    concurrency: int = 8
    """Requests that the endpoint gets at a time."""
    reproduce: str | None = None
    """Id of a picture in the output's manifest to make again here, and to compare with the one that was made."""

    def __post_init__(self) -> None:
        for name in ("images_per_prompt", "batch_size", "unit_size", "concurrency"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        require(self.threads is None or self.threads >= 1, "threads", self.threads, "an integer of at least 1")
        require(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"0 to {MAX_SEED}")
        if self.reproduce is None and not ((self.model or self.endpoint) and self.prompts):
            raise ValueError("a model or an endpoint, and prompts, have to be given, or a picture to reproduce")
        if self.endpoint is not None:
            require(bool(re.match("https?://.", self.endpoint)), "endpoint", self.endpoint, "an http:// or https:// address")
            api_settings(self.base)
        if self.layout == "geneval" and self.format != "png":
            raise ValueError(f"format={self.format} is not allowed: GenEval reads png")
        self.columns  # noqa: B018  raises ValueError for values that no row could have

    @property
    def columns(self) -> dict[str, Any]:
        """Values of columns for rows that lack them."""
        given = {
            "output_format": "jpeg" if self.format == "jpg" else self.format,
            "output_compression": self.quality,
            "size": self.size,
            "negative_prompt": self.negative_prompt,
        }
        values, unknown = parse({name: value for name, value in given.items() if value is not None} | dict(self._pairs()))
        if unknown:
            raise ValueError(f"defaults={next(iter(unknown))!r} is not allowed: there is no such column")
        for mode in [values["mode"]] if "mode" in values else requests.MODES:
            request_of({"prompt": "x"} | EXAMPLES.get(mode, {}), self.sampling, {**values, "mode": mode})
        return values

    def _pairs(self) -> Iterator[tuple[str, str]]:
        for pair in self.defaults:
            name, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"defaults={pair!r} is not allowed: NAME=VALUE")
            yield name, value

    @property
    def base(self) -> SamplingConfig:
        """Settings of the sampler for rows that give none."""
        own = self.endpoint is None or self.sampling != SamplingConfig()
        return self.sampling if own else requests.sampling()

    def absolute(self) -> GenerateConfig:
        """With paths that mean the same in workers, which run in directories of their own."""
        names = ("prompts", "output") if self.endpoint else ("model", "prompts", "output")
        places = {name: cli.absolute(value) for name in names if (value := getattr(self, name))}
        return dataclasses.replace(self, **places)  # type: ignore[arg-type]

    def job_settings(self, digest: str) -> JobSettings:
        """What rows are read with, for a bundle of this digest."""
        return JobSettings(
            digest=digest,
            defaults=self.columns,
            sampling=self.base,
            images_per_prompt=self.images_per_prompt,
            seed=self.seed,
            by_place=self.layout == "geneval",
        )

    def input_uri(self, name: str) -> str:
        """Where an image lies that a row names: beside the file of prompts, where it is a relative path."""
        if is_remote(name) or name.startswith(("/", "data:")) or self.prompts is None:
            return name
        return join(self.prompts.rpartition("/")[0] or "/", name)

    def binding(self, digest: str, prompts_digest: str) -> dict[str, Any]:
        """What the output follows from: settings, and the model and the prompts by their contents."""
        values = cli.flattened(cli.config_values(self)) | {"model_digest": digest, "prompts_digest": prompts_digest}
        values["endpoint"] = self.endpoint is not None  # whose defaults are others
        return {name: value for name, value in values.items() if name not in FREE}
