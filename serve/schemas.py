"""Requests and responses of the image API, in OpenAI's shapes."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class GenerationRequest(BaseModel):
    """POST /v1/images/generations. A field that is not known is an error, never ignored."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(max_length=32_000)
    model: str | None = None
    n: int = Field(default=1, ge=1, le=10)
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    seed: int | None = Field(default=None, ge=0, le=2**32 - 1)
    num_inference_steps: int = Field(default=12, ge=1, le=100)
    guidance_scale: float = Field(default=4.0, ge=0, le=100, allow_inf_nan=False)

    @field_validator("size")
    @classmethod
    def _size(cls, value: str) -> str:
        if value != "auto" and not re.fullmatch(r"[1-9]\d{1,3}x[1-9]\d{1,3}", value):
            raise ValueError("must be WIDTHxHEIGHT or auto")
        return value

    def pixels(self, default: int) -> tuple[int, int]:
        """(width, height)."""
        if self.size == "auto":
            return default, default
        width, height = self.size.split("x")
        return int(width), int(height)


def error_body(message: str, code: str, param: str | None, kind: str = "invalid_request_error") -> dict:
    """The body of every error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
