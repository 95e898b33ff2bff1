"""A sample of the files that share its key, or what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines import source_columns as columns
from pipelines.source_contract import Filtered, Reject, Row, Sample, SourceConfig, Wanted
from pipelines.source_files import IMAGE_SUFFIXES, utf8

MAX_TEXT_BYTES = 1 << 20
"""Captions and .json above this are rejected unread."""


@dataclass
class Member:
    """One file of a sample; data is None where it was not read: not asked for, or larger than allowed."""

    suffix: str
    size: int
    data: bytes | None = None


def row_of(
    id: str, members: Sequence[Member], problem: tuple[str, str] | None, source: SourceConfig, wanted: Wanted | None
) -> Row:
    """A sample of its files, or what is wrong with them."""
    images, captions, jsons = ([m for m in members if m.suffix in s] for s in (IMAGE_SUFFIXES, (".txt",), (".json",)))
    problem = problem or _unusable(images, captions, jsons)
    if problem is not None:
        reason, detail = problem
        return Reject(id, "read", reason, utf8(detail))
    try:
        values = json.loads(jsons[0].data or b"{}") if jsons else {}
    except (ValueError, RecursionError) as error:
        return Reject(id, "read", "json-not-readable", str(error))
    values = values if isinstance(values, dict) else {}
    column = source.caption_column or (None if captions else columns.find(values, columns.CAPTION))
    if not column and not captions:
        return Reject(id, "read", "no-caption", "an image without a .txt caption")
    text = values.get(column) if column else captions[0].data
    return captioned(id, images[0].data or b"", text, columns.meta_of(values), column or ".txt", wanted)


def captioned(id: str, image: bytes, text: Any, meta: dict[str, Any], where: str, wanted: Wanted | None) -> Row:
    """A sample, unless its caption is empty or it is not wanted."""
    try:
        caption = (text.decode() if isinstance(text, bytes) else text if isinstance(text, str) else "").strip()
        caption.encode()  # a .json may hold half a character
    except UnicodeError as error:
        return Reject(id, "read", "caption-not-utf8", str(error))
    if not caption:
        return Reject(id, "read", "empty-caption", f"the caption in {where} is empty or no text")
    reason = wanted(caption, meta) if wanted else None
    return Sample(id, image, caption, meta) if reason is None else Filtered(id, reason)


def _unusable(images: list[Member], captions: list[Member], jsons: list[Member]) -> tuple[str, str] | None:
    """Reason and detail."""
    if max(map(len, (images, captions, jsons))) > 1:
        return "duplicate-key", f"{len(images)} images, {len(captions)} captions, {len(jsons)} .json"
    if not images:
        return "no-image", "there is no .jpg, .jpeg, .png or .webp of this key"
    large = next((member for member in [*images, *captions, *jsons] if member.data is None), None)
    return None if large is None else ("too-large", f"the {large.suffix} has {large.size} bytes")
