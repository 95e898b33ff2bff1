"""Requests and errors of the image API, in OpenAI's shapes. A field that is not known is an error, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from paella.pictures import InputError
from paella.requests import MAX_N, MAX_PROMPT, QUALITY_STEPS, check_inputs, default_mode, is_text

UNSUPPORTED_FIELDS = (
    "complexity", "frame_count", "frame_duration_ms", "input_fidelity", "markup", "moderation", "safety_identifier", "style",
    "svg",
)  # fmt: skip
"""OpenAI's fields that a Paella cannot honour."""


def _refuse(*values: str) -> BeforeValidator:
    """Values of OpenAI's that cannot be honoured get an error code of their own."""

    def check(value: Any) -> Any:
        if value in values:
            raise PydanticCustomError("unsupported_value", "{value} is not supported", {"value": value})
        return value

    return BeforeValidator(check)


class ImageRequest(BaseModel):
    """What all endpoints share. `null` is as if the field were not there."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = Field(default="", max_length=MAX_PROMPT)
    model: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_N)
    size: str = Field(
        default="auto", pattern=r"^(auto|[1-9]\d{1,3}x[1-9]\d{1,3})$", description="WIDTHxHEIGHT in pixels, or auto"
    )
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=3, description="previews of each image, with stream=true")
    progress: bool = Field(default=False, description="an event behind every preview and picture that says how far all are")
    output_format: Annotated[Literal["png", "webp", "jpeg"], _refuse("gif", "svg")] = "png"
    output_compression: int | None = Field(default=None, ge=0, le=100, description="quality of webp and jpeg")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd", "xhigh", "max"] = Field(
        default="auto", description=f"number of steps: {QUALITY_STEPS}"
    )
    response_format: Annotated[Literal["b64_json"], _refuse("url")] = "b64_json"
    background: Annotated[Literal["auto", "opaque"], _refuse("transparent")] = "auto"
    user: str | None = Field(default=None, max_length=256, description="written to the access log")
    negative_prompt: str | None = Field(default=None, max_length=MAX_PROMPT)
    seed: int | None = Field(default=None, ge=0, le=2**32 - 1, description="of the first image; image i has seed + i")
    num_inference_steps: int | None = Field(default=None, ge=1, le=100, description="12 if neither it nor quality is given")
    guidance_scale: float = Field(default=4.0, ge=0, le=100, allow_inf_nan=False)
    temperature: float = Field(default=1.0, ge=0.01, le=3, allow_inf_nan=False, description="falls to 0.3 of it in the last step")
    timeout_ms: int | None = Field(default=None, ge=1, le=3_600_000, description="the answer is 504 behind it")

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        for name in UNSUPPORTED_FIELDS:
            if name in given:
                raise PydanticCustomError("unsupported_value", "{name} is not supported", {"name": name, "param": name})
        return given

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _text(cls, value: str | None) -> str | None:
        if value is not None and not is_text(value):
            raise ValueError("must be text without null characters and lone surrogates")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.num_inference_steps is not None and self.quality != "auto":
            _wrong("num_inference_steps", "num_inference_steps and quality both say how many steps: give one of them")
        if self.partial_images and not self.stream:
            _wrong("partial_images", "partial_images needs stream=true")
        if self.progress and not self.stream:
            _wrong("progress", "progress needs stream=true")
        if self.output_compression is not None and self.output_format == "png":
            _wrong("output_compression", "output_compression is for webp and jpeg")
        return self

    @property
    def steps(self) -> int:
        return self.num_inference_steps or QUALITY_STEPS[self.quality]


class GenerationRequest(ImageRequest):
    """POST /v1/images/generations."""

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    mode: Literal["text-to-image"] = "text-to-image"


Data = bytes | str
"""An image: the bytes of an uploaded file, or a data URL."""
EditMode = Literal["inpaint", "outpaint", "variation", "blend", "interpolate", "structural"]


class EditRequest(ImageRequest):
    """POST /v1/images/edits: as a multipart form with files, or as JSON with data URLs."""

    mode: EditMode | None = Field(default=None, description="with a mask inpaint, with several images blend, else structural")
    image: list[Data] = Field(default_factory=list, max_length=16)
    mask: Data | None = Field(default=None, description="as large as the image; edited where its alpha is 0")
    pad_left: int = Field(default=0, ge=0, le=4096)
    pad_right: int = Field(default=0, ge=0, le=4096)
    pad_top: int = Field(default=0, ge=0, le=4096)
    pad_bottom: int = Field(default=0, ge=0, le=4096)
    strength: float = Field(default=1.0, gt=0, le=4, allow_inf_nan=False, description="variation: how much the image counts")
    weights: list[Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]] | None = Field(default=None, max_length=16)
    text_weight: float = Field(default=1.0, ge=0, le=10, allow_inf_nan=False)
    prompt_to: str | None = Field(default=None, min_length=1, max_length=MAX_PROMPT)
    frames: int = Field(default=5, ge=2, le=16)
    structure_strength: float = Field(default=0.4, ge=0, lt=1, allow_inf_nan=False, description="how much of the image stays")

    @field_validator("image", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        listed = value if isinstance(value, list) else [value]
        return [item.get("image_url", item) if isinstance(item, dict) else item for item in listed]

    @field_validator("mask", mode="before")
    @classmethod
    def _unwrapped(cls, value: Any) -> Any:
        return value.get("image_url", value) if isinstance(value, dict) else value

    @field_validator("weights", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @property
    def resolved_mode(self) -> str:
        return self.mode or default_mode(max(1, len(self.image)), self.mask is not None)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        try:
            check_inputs(self.resolved_mode, self, len(self.image), self.model_fields_set)
        except InputError as error:
            _wrong(error.param or "image", str(error))
        if self.resolved_mode == "interpolate" and self.n != 1:
            _wrong("n", "interpolate makes `frames` images: n is 1")
        return self

    @property
    def num_images(self) -> int:
        return self.frames if self.resolved_mode == "interpolate" else self.n


class VariationRequest(EditRequest):
    """POST /v1/images/variations, a multipart form or JSON."""

    mode: Literal["variation"] = "variation"


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """The body of every error."""

    error: Error


class Usage(BaseModel):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int = Field(description="latent tokens of all images")
    total_tokens: int


class ImageData(BaseModel):
    b64_json: str
    seed: int
    mode: str


class Metrics(BaseModel):
    """Milliseconds of the image that took longest, and its steps."""

    queue_ms: float
    encode_ms: float
    sample_ms: float
    decode_ms: float
    steps: int


class ImagesAnswer(BaseModel):
    """The answer of the three image endpoints."""

    id: str
    created: int
    model: str
    data: list[ImageData]
    size: str
    output_format: str
    background: str = "opaque"
    usage: Usage
    metrics: Metrics
    warnings: list[str] = Field(description="what was not taken as it was given, such as the end of a long prompt")


def _wrong(param: str, message: str) -> None:
    raise PydanticCustomError("invalid_value", "{message}", {"message": message, "param": param})


class ApiError(Exception):
    """An error that the client is to see."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None, retry_after_s: float | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry_after_s = status, code, message, param, retry_after_s

    @classmethod
    def of(cls, error: InputError) -> ApiError:
        return cls(413 if error.code == "payload_too_large" else 400, error.code, str(error), error.param)

    def __reduce__(self) -> tuple:
        return ApiError, (self.status, self.code, self.message, self.param, self.retry_after_s)

    @property
    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after_s + 0.5)))
        if self.status == 504:
            headers["x-should-retry"] = "false"
        return headers


def invalid(errors: list[Any]) -> ApiError:
    """What pydantic found wrong first, as an error of the API."""
    first = errors[0]
    context = first.get("ctx", {})
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = context.get("param") or (place[0] if place else None)
    kind = first["type"]
    if kind == "extra_forbidden":
        return ApiError(400, "unknown_parameter", f"unknown parameter {param}", param)
    message = first["msg"].removeprefix("Value error, ")
    if "param" not in context and param:
        message = f"{param}: {message}"
    return ApiError(400, "unsupported_value" if kind == "unsupported_value" else "invalid_value", message, param)
