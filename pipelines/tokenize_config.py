"""What one tokenizing job is: its settings, and which of them decide what the dataset holds."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from paella.config import TextConfig
from pipelines import cli
from pipelines.clip_columns import clip_digest
from pipelines.image_decoding import DECODER, Crop
from pipelines.sample_filters import FilterConfig
from pipelines.source_contract import SourceConfig

MULTIPLE = 32
"""Of the sides of buckets, in pixels: what the published models need."""
PUBLISHED_CLIP = "ViT-H-14/laion2b_s32b_b79k"
FREE = ("estimate", "batch_size", "source.fetch.timeout_s", "source.fetch.retries", "source.fetch.concurrency")
"""Settings that do not decide what the dataset holds: a job may be continued with others."""


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """One tokenizing job."""

    input: str
    """Captioned images, a directory or s3://: img2dataset's output in any of its formats, a folder of images with captions,
    Parquet with images, or LAION's Parquet with URLs."""
    vqgan: str
    """Bundle with the VQGAN."""
    output: str
    """Directory or s3:// of the token dataset; the same command with the same output continues it."""
    resolution: int = 256
    """Side in pixels of the square that images are scaled and cropped to."""
    aspect_ratios: tuple[str, ...] = ()
    """In place of one dataset of squares, one for each of these (1:1 3:2 2:3), of the images whose own ratio is nearest to it, in
    directories like 320x192 (width, height). Sides are multiples of 32; the input is read once for each."""
    bucket: Annotated[str | None, tyro.conf.Suppress] = None
    """The aspect ratio of this dataset, of those above."""
    crop: Literal["center", "random"] = "center"
    """The middle of an image, or a place that follows from its id."""
    filters: Annotated[FilterConfig, tyro.conf.arg(name="")] = field(default_factory=FilterConfig)
    """Which samples are wanted."""
    deduplicate: Literal["no", "exact", "perceptual"] = "no"
    """Keep the first of samples whose images are the same bytes (exact), or also look alike (perceptual)."""
    clip: str | None = None
    """CLIP of the embeddings: an open_clip name or a directory; ViT-H-14/laion2b_s32b_b79k, as published, if not given."""
    clip_image: bool = False
    """Keep the CLIP embedding of each image, 2 KB for the published CLIP."""
    clip_text: bool = False
    """Keep the CLIP embedding of each caption, 2 KB for the published CLIP."""
    byt5: str | None = None
    """Text encoder whose states of each caption are kept: a hub name or a directory. ByT5-XL's take half a megabyte a caption."""
    batch_size: int = 64
    """Images per pass of the VQGAN."""
    rows_per_unit: int = 1024
    """Samples per output shard, at most."""
    source: SourceConfig = field(default_factory=SourceConfig)
    """How the input is read."""
    estimate: bool = False
    """Write nothing: tokenize a sample, and say how long the whole input would take and how large the dataset would be."""

    def __post_init__(self) -> None:
        for name in ("resolution", "batch_size", "rows_per_unit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: an integer of at least 1")
        if self.clip is not None and not (self.clip_image or self.clip_text):
            raise ValueError(f"clip={self.clip} is not allowed without clip_image or clip_text: there is nothing to embed")
        for ratio in self.aspect_ratios:
            if not re.fullmatch(r"[1-9]\d{0,3}:[1-9]\d{0,3}", ratio):
                raise ValueError(f"aspect_ratios={ratio} is not allowed: width:height, as in 3:2")

    def buckets(self) -> list[TokenizeConfig]:
        """A job for each dataset: this one, or one for each aspect ratio."""
        jobs = [dataclasses.replace(self, bucket=ratio) for ratio in self.aspect_ratios]
        return [
            dataclasses.replace(job, output=f"{self.output.rstrip('/')}/{job.cropping.width}x{job.cropping.height}")
            for job in jobs
        ] or [self]

    def in_bucket(self, width: int, height: int) -> bool:
        """Whether an image of this size belongs to this dataset."""
        if self.bucket is None:
            return True
        nearest = min(self.aspect_ratios, key=lambda ratio: abs(math.log(_ratio(ratio) * height / width)))
        return nearest == self.bucket

    def absolute(self) -> TokenizeConfig:
        """With paths that mean the same in workers, which run in directories of their own."""
        named = self.clip or (PUBLISHED_CLIP if self.clip_image or self.clip_text else None)
        return dataclasses.replace(
            self,
            input=cli.absolute(self.input),
            vqgan=cli.absolute(self.vqgan),
            output=cli.absolute(self.output),
            clip=cli.absolute_if_directory(named),
            byt5=cli.absolute_if_directory(self.byt5),
        )

    @property
    def cropping(self) -> Crop:
        if self.bucket is None:
            return Crop(self.resolution, self.resolution, self.crop)
        root = math.sqrt(_ratio(self.bucket))
        height, width = (max(1, round(side / MULTIPLE)) * MULTIPLE for side in (self.resolution / root, self.resolution * root))
        return Crop(height, width, self.crop)

    @property
    def clip_columns(self) -> tuple[str, ...]:
        return tuple(name for name, wanted in (("clip_text", self.clip_text), ("clip_image", self.clip_image)) if wanted)

    @property
    def text(self) -> TextConfig | None:
        """The text encoder whose states are kept."""
        return None if self.byt5 is None else TextConfig(byt5=self.byt5, clip=None)

    def binding(self, vqgan_digest: str) -> dict[str, Any]:
        """What the dataset follows from: settings, models by digest, and how pixels are made."""
        values = cli.flattened(cli.config_values(self)) | {
            "vqgan": vqgan_digest,
            "clip": clip_digest(self.clip),
            "byt5": clip_digest(self.byt5),
            "decoder": DECODER,
        }
        return {name: value for name, value in values.items() if name not in FREE}


def _ratio(text: str) -> float:
    width, height = text.split(":")
    return int(width) / int(height)
