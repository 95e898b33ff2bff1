"""OpenAI's Batch files: the lines of requests, and the lines of answers and errors that come of them.

An answer's body is the HTTP API's, and so are the defaults of a request: a line and the same request to the server give the same
file. Only the seed differs where none is given: here it follows from the picture's place, so that the job can be repeated.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from paella import requests
from paella.pictures import InputError

URLS = {
    "/v1/images/generations": "text-to-image",
    "/v1/images/edits": None,
    "/v1/images/variations": "variation",
}
"""Endpoints, and the modes that they fix."""
FIXED = {
    "response_format": ("b64_json",),
    "background": ("auto", "opaque"),
    "stream": (False,),
    "partial_images": (0,),
    "progress": (False,),
}
"""Fields that can have these values only."""
IGNORED = ("model", "user", "timeout_ms")
SHARED = (
    "prompt", "n", "size", "output_format", "output_compression", "quality", "negative_prompt", "seed", "num_inference_steps",
    "guidance_scale", "temperature",
)  # fmt: skip


def is_batch_line(values: Mapping[str, Any]) -> bool:
    """Whether a row is a request of a Batch file."""
    return "custom_id" in values and "body" in values


def opened(values: Mapping[str, Any]) -> dict[str, Any]:
    """A line's request as columns. Raises InputError for what the HTTP API refuses."""
    url, body = values.get("url"), values["body"]
    if not isinstance(url, str) or url not in URLS or values.get("method", "POST") != "POST" or not isinstance(body, dict):
        raise InputError(f"a request is a POST of a body to {', '.join(URLS)}", "url")
    mode = URLS[url]
    own = () if mode == "text-to-image" else ("image", *requests.MODE_FIELDS)
    row: dict[str, Any] = {"custom_id": values["custom_id"], "n": 1}
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        if name in FIXED:
            if value not in FIXED[name]:
                raise InputError(f"{name}={value!r} is not allowed: {FIXED[name][0]}", name, "unsupported_value")
        elif name == "mode" and mode in (None, value):
            row["mode"] = value
        elif name in (*SHARED, *own):
            row[name] = value
        else:
            raise InputError(f"unknown parameter {name}", name, "unknown_parameter")
    return _as_columns(row, mode)


def _as_columns(row: dict[str, Any], mode: str | None) -> dict[str, Any]:
    quality = row.pop("quality", "auto")
    if quality not in requests.QUALITY_STEPS:
        raise InputError(f"quality={quality!r} is not allowed: {', '.join(requests.QUALITY_STEPS)}", "quality")
    if quality != "auto" and "num_inference_steps" in row:
        raise InputError("num_inference_steps and quality both say how many steps: give one of them", "num_inference_steps")
    row.setdefault("num_inference_steps", requests.QUALITY_STEPS[quality])
    if row["n"] not in range(1, requests.MAX_N + 1):
        raise InputError(f"n={row['n']!r} is not allowed: 1 to {requests.MAX_N}", "n")
    if "image" in row:
        images = row["image"] if isinstance(row["image"], list) else [row["image"]]
        row["image"] = [_url(image) for image in images]
    if "mask" in row:
        row["mask"] = _url(row["mask"])
    if mode is not None:
        row["mode"] = mode
    elif "mode" not in row:
        row["mode"] = requests.default_mode(max(1, len(row.get("image", ()))), "mask" in row)
    return row


def _url(image: Any) -> Any:
    return image.get("image_url", image) if isinstance(image, dict) else image


def answer(pictures: Sequence[Mapping[str, Any]], files: Sequence[bytes], custom_id: str, request_id: str) -> bytes:
    """A line of the output file, of one request's rows of the manifest and the files of its pictures."""
    first = pictures[0]
    tokens, text = sum(row["tokens"] for row in pictures), len(first["prompt"].encode())
    text += len((first["negative_prompt"] or "").encode())
    body = {
        "id": request_id,
        "created": max(row["finished_at"] for row in pictures),
        "model": first["bundle_digest"],
        "data": [
            {"b64_json": base64.b64encode(file).decode(), "seed": row["seed"], "mode": row["mode"]}
            for row, file in zip(pictures, files, strict=True)
        ],
        "size": f"{first['width']}x{first['height']}",
        "output_format": first["output_format"],
        "background": "opaque",
        "usage": {
            "input_tokens": text,
            "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
            "output_tokens": tokens,
            "total_tokens": text + tokens,
        },
    }
    return _line(custom_id, request_id, 200, body)


def failure(message: str, param: str | None, code: str, custom_id: str, request_id: str) -> bytes:
    """A line of the error file."""
    own = code in ("internal_error", "io_error")
    kind = "server_error" if own else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return _line(custom_id, request_id, 500 if own else 413 if code == "payload_too_large" else 400, {"error": error})


def _line(custom_id: str, request_id: str, status: int, body: dict[str, Any]) -> bytes:
    response = {"status_code": status, "request_id": request_id, "body": body}
    line = {"id": f"batch_{request_id}", "custom_id": custom_id, "response": response, "error": None}
    return json.dumps(line).encode() + b"\n"
