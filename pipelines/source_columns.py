"""Columns by their names in LAION's and img2dataset's tables, whatever their case, and what a row says of its image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.source_files import utf8

CAPTION = ("caption", "text", "txt")
IMAGE = ("jpg", "jpeg", "png", "webp", "image", "image_bytes", "img", "bytes")
URL = ("url", "image_url")
KEY = ("key",)

NUMBERS = {
    "width": ("original_width", "width"),  # img2dataset's `width` is that of the stored image
    "height": ("original_height", "height"),
    "aesthetic": ("aesthetic", "aesthetic_score"),
    "punsafe": ("punsafe",),
    "pwatermark": ("pwatermark",),
    "similarity": ("similarity",),
}
TEXTS = {"sha256": ("sha256",), "md5": ("md5",), "url": URL}
META = (*NUMBERS, "sha256", "url")
"""The keys of a sample's meta."""


def find(names: Iterable[str], candidates: Iterable[str]) -> str | None:
    """The first candidate that is among the names, as it is written there."""
    written = {name.lower(): name for name in reversed(list(names))}
    return next((written[name] for name in candidates if name in written), None)


def known(names: Iterable[str]) -> dict[str, list[str]]:
    """Of each key of meta (and `md5`), the columns that may say it, the best first."""
    written = {name.lower(): name for name in reversed(list(names))}
    return {
        key: found
        for key, candidates in (NUMBERS | TEXTS).items()
        if (found := [written[name] for name in candidates if name in written])
    }


def values(row: Mapping[str, Any], columns: Mapping[str, list[str]]) -> dict[str, Any]:
    """What a row says in `known` columns; what is missing or makes no sense is absent."""
    meta = {}
    for key, names in columns.items():
        clean = _number if key in NUMBERS else _text
        value = next((value for name in names if (value := clean(row.get(name))) is not None), None)
        if value is not None:
            meta[key] = int(value) if key in ("width", "height") else value
    return meta


def meta_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The meta of a row on its own, as of a .json."""
    meta = values(row, known(row))
    meta.pop("md5", None)
    return meta


def _number(value: Any) -> float | None:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return None
        return number if math.isfinite(number) else None
    return None


def _text(value: Any) -> str | None:
    return utf8(value) if isinstance(value, str) and value else None
