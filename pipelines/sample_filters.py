"""Which samples are wanted: thresholds on what a source knows of an image, and on captions.

As in the published training code, a threshold turns down what has no such value: a set without scores gives nothing, and the
counts say why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LOWEST = {"min_aesthetic": "aesthetic", "min_similarity": "similarity"}
HIGHEST = {"max_punsafe": "punsafe", "max_pwatermark": "pwatermark"}


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What a sample has to be; every filter is off unless it is given."""

    min_size: int | None = None
    """Pixels of the original's shorter side, at least."""
    min_aesthetic: float | None = None
    """LAION's aesthetic score, about 1 to 10, at least."""
    min_similarity: float | None = None
    """CLIP similarity of image and caption, at least."""
    max_punsafe: float | None = None
    """Probability of being unsafe for work, at most."""
    max_pwatermark: float | None = None
    """Probability of a watermark, at most."""
    min_caption_length: int | None = None
    """Characters of the caption, at least."""
    max_caption_length: int | None = None
    """Characters of the caption, at most."""
    caption_characters: str | None = None
    """All the characters a caption may have, as in a regular expression's brackets: a-zA-Z0-9 .,'"-"""
    forbidden_words: tuple[str, ...] = ()
    """Words and phrases that no caption may have, whatever their case."""

    def __post_init__(self) -> None:
        for name in ("min_size", "min_caption_length", "max_caption_length"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} is not allowed: an integer of at least 0")
        for name in ("min_similarity", *HIGHEST):
            value = getattr(self, name)
            if value is not None and not -1 <= value <= 1:
                raise ValueError(f"{name}={value} is not allowed: a number from -1 to 1")
        try:
            re.compile(f"[{self.caption_characters or 'a'}]*")
        except re.error as error:
            raise ValueError(f"caption_characters={self.caption_characters!r} is not allowed: {error}") from error

    def turned_down(self, caption: str, meta: Mapping[str, Any]) -> str | None:
        """Why a sample is not wanted, known before its image is read: a short word to count by, or None where it is wanted."""
        return self._by_metadata(meta) or self._by_caption(caption)

    def too_small(self, width: int, height: int) -> bool:
        """Whether an original of this size is; for sources that do not know sizes, once the image is read."""
        return self.min_size is not None and min(width, height) < self.min_size

    def _by_metadata(self, meta: Mapping[str, Any]) -> str | None:
        if "width" in meta and "height" in meta and self.too_small(meta["width"], meta["height"]):
            return "min-size"
        for name, key in (LOWEST | HIGHEST).items():
            limit, value = getattr(self, name), meta.get(key)
            if limit is None:
                continue
            if value is None:
                return f"no-{key}"
            if not (value >= limit if name in LOWEST else value <= limit):  # also where it is not a number
                return name.replace("_", "-")
        return None

    def _by_caption(self, caption: str) -> str | None:
        if self.min_caption_length is not None and len(caption) < self.min_caption_length:
            return "min-caption-length"
        if self.max_caption_length is not None and len(caption) > self.max_caption_length:
            return "max-caption-length"
        if self.caption_characters is not None and not re.fullmatch(f"[{self.caption_characters}]*", caption):
            return "caption-characters"
        if self.forbidden_words and _any_of(self.forbidden_words).search(caption):
            return "forbidden-words"
        return None


def _any_of(words: tuple[str, ...]) -> re.Pattern[str]:
    # Python keeps compiled patterns, so that this is a look-up
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
