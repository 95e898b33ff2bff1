"""The gallery beside an output: a page that reads from a disk without a server, however many pictures there are.

`index.html` knows how many pictures each chunk has; the chunks, `gallery/UNIT.js`, are written by the workers with their units,
and loaded when somebody looks at their pictures. Nothing is fetched from anywhere else.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

DIRECTORY = "gallery"
PAGE = Path(__file__).with_name("gallery.html")
THUMBNAIL = 128
"""Pixels of a side, of pictures that are not files of their own."""
SHOWN = ("id", "prompt", "file", "error", "seed", "mode", "width", "height", "settings", "images", "mask", "extra", "sha256")


def chunk(name: str, rows: Sequence[Mapping[str, Any]], pictures: Mapping[str, bytes]) -> bytes:
    """A script with rows of the manifest; of pictures that are not files of their own with small copies, by their ids."""
    shown = []
    for row in rows:
        values = {key: row[key] for key in SHOWN if row.get(key) not in (None, [])}
        if row["id"] in pictures:
            values["shown"] = _thumbnail(pictures[row["id"]])
        shown.append(values)
    return f"gallery({json.dumps(name)}, {json.dumps(shown)});\n".encode()


def _thumbnail(data: bytes) -> str:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(output: str, chunks: Sequence[tuple[str, int]], failed: int) -> bytes:
    """index.html of chunks and their numbers of rows, of which some have no picture: they have failed."""
    command = f"python pipelines/generate.py --output {shlex.quote(output)} --reproduce "
    data = json.dumps({"chunks": chunks, "command": command, "failed": failed}).replace("<", "\\u003c")
    return PAGE.read_text().replace('"DATA"', data).encode()
