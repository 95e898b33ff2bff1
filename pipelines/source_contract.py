"""What every source gives: captioned images as encoded bytes, or the reason why there is none; and how sources are configured.

A source is a list of units (`pipelines.sources.find_units`), each a few hundred samples that are read one after another. A unit's
name says which samples it holds, so that one unit becomes one output shard that is known to be finished by its name alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Format = Literal["auto", "webdataset", "parquet", "folder", "urls"]


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How images are fetched from the web."""

    timeout_s: float = 20.0
    """For one attempt, redirects included."""
    retries: int = 2
    """Further attempts where one may help: timeouts, broken connections, 429 and 5xx; never after another 4xx."""
    concurrency: int = 64
    """Images fetched at the same time by one reader. As many may be held in memory."""
    allow_private_addresses: bool = False
    """Also fetch from loopback, private and link-local addresses, which a list from the web has no business to name."""
    user_agent: str = "paella-ray"
    """Name in the User-Agent header, and to which an X-Robots-Tag may be addressed."""
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex", "noml")
    """Directives in an X-Robots-Tag header by which a site says no. Empty: none is heeded."""

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"fetch.timeout_s={self.timeout_s} is not allowed: a positive number of seconds")
        if self.retries < 0:
            raise ValueError(f"fetch.retries={self.retries} is not allowed: an integer of at least 0")
        if self.concurrency < 1:
            raise ValueError(f"fetch.concurrency={self.concurrency} is not allowed: an integer of at least 1")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How a source is read. Column names not given are those of LAION and img2dataset, whatever their case."""

    format: Format = "auto"
    """webdataset (tars), parquet (image bytes in a column), folder (files with .txt captions or one metadata.jsonl or .csv),
    urls (Parquet with URLs, whose images are fetched), or auto: told from the files."""
    image_column: str | None = None
    """Parquet: encoded bytes of the images, or a struct with `bytes`. Otherwise jpg, jpeg, png, webp, image, …"""
    url_column: str | None = None
    """Parquet with URLs. Otherwise url or image_url."""
    caption_column: str | None = None
    """Parquet, metadata.jsonl and .csv, or a key of webdataset's .json in place of .txt. Otherwise caption, text or txt."""
    id_column: str | None = None
    """Parquet: unique ids. Otherwise `key` where img2dataset wrote it, else file and row."""
    max_image_bytes: int = 64 * 2**20
    """Encoded images above this size are rejected unread."""
    fetch: FetchConfig = field(default_factory=FetchConfig)
    """How images are fetched from URLs."""

    def __post_init__(self) -> None:
        if self.max_image_bytes < 1:
            raise ValueError(f"source.max_image_bytes={self.max_image_bytes} is not allowed: an integer of at least 1")


@dataclass(frozen=True)
class Sample:
    """An encoded image and its caption."""

    id: str
    image: bytes
    caption: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What the source knows of the original, what it does not know being absent: `width`, `height`, `aesthetic`, `punsafe`,
    `pwatermark`, `similarity` (numbers), `sha256` (of the original download), `url`."""


@dataclass(frozen=True)
class Reject:
    """A sample that cannot be used: in which stage, why (a short word to count by), and the details."""

    id: str
    stage: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Filtered:
    """A sample that `wanted` turned down, by its reason; its image was not read."""

    id: str
    reason: str


Row: TypeAlias = Sample | Reject | Filtered

Wanted: TypeAlias = Callable[[str, Mapping[str, Any]], str | None]
"""Of a caption and its meta: why the sample is not wanted (a short word to count by), or None where it is."""


@dataclass(frozen=True)
class Unit:
    """Some samples of a source, in a fixed order. Small, and picklable."""

    name: str
    """Names the unit's samples: other samples, another name. Unique in the source; fit for a file's name."""
    num_samples: int
    """Rows that reading gives, as the listing says. A damaged or changed shard may give others: count what is read."""
    shard: str
    """Units of one shard follow one another and are best read together (`read_units`): then the shard is read once."""
    source: SourceConfig
    place: Any
    """Where the samples lie, for the reader of this kind of source."""
