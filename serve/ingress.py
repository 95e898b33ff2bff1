"""The HTTP edge: OpenAI's image API and Paella's own modes. Checks requests, sends them to the engines, shapes the answers.

Images are never decoded here, and no engine is asked before a request is known to be sound.
"""
# No `from __future__ import annotations` here: FastAPI must see the types of the ingress's methods, not their names.

import asyncio
import contextlib
import ipaddress
import json
import os
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from opentelemetry import propagate
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from paella.pictures import InputError, image_bytes
from paella.sampler import MAX_SEED
from serve.answers import Call
from serve.limits import BodyLimit
from serve.modes import Order
from serve.observability import Sight, inject, prometheus, tracer
from serve.refusals import Refusals
from serve.schemas import (
    ApiError,
    EditRequest,
    ErrorAnswer,
    GenerationRequest,
    ImageRequest,
    ImagesAnswer,
    VariationRequest,
    invalid,
)

PAGE = Path(__file__).parent / "page"
CODES = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "payload_too_large", 415: "unsupported_media_type"}
SMALL_BODY = 65_536
"""Bytes of JSON that are parsed sooner than a thread takes over."""
LOOPBACK = "PAELLA_LOOPBACK"
"""Set to 1 by who starts a server that only its own machine can reach: behind HAProxy, clients all look as if they were on it."""
R = TypeVar("R", bound=ImageRequest)

api = FastAPI(title="paella-ray", version="1", docs_url=None, redoc_url=None)
api.add_middleware(BodyLimit)


def _failed(request: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)


@api.exception_handler(ApiError)
async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return _failed(request, error)


@api.exception_handler(RequestValidationError)
async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    return _failed(request, invalid(list(error.errors())))


@api.exception_handler(HTTPException)
async def _http(request: Request, error: HTTPException) -> JSONResponse:
    return _failed(request, ApiError(error.status_code, CODES.get(error.status_code, "invalid_value"), str(error.detail)))


@api.exception_handler(Exception)
async def _bug(request: Request, error: Exception) -> JSONResponse:
    return _failed(request, ApiError(500, "internal_error", "something went wrong in the server"))


async def _authorized(request: Request) -> None:
    """A key of PAELLA_API_KEYS (separated by commas); with none set, only this machine may ask."""
    keys = [key.strip() for key in os.environ.get("PAELLA_API_KEYS", "").split(",") if key.strip()]
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if keys and not any(secrets.compare_digest(given.encode(), key.encode()) for key in keys):
        raise ApiError(401, "invalid_api_key", "the API key is missing or wrong: Authorization: Bearer KEY")
    behind_haproxy = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    near = _is_loopback(request.client.host if request.client else "")
    if not keys and not (near and (os.environ.get(LOOPBACK) == "1" or not behind_haproxy)):
        raise ApiError(403, "permission_denied", "this server has no API keys, so only its own machine may use it")


async def _ending(request: Request) -> AsyncIterator[None]:
    """`request.state.ends`: what ends when the last byte of the answer is sent, or the client is gone."""
    with contextlib.ExitStack() as request.state.ends:
        yield


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True  # no address: a socket of this machine


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": ErrorAnswer} for code in codes}


EVENTS = [f"image_{of}.{what}" for of in ("generation", "edit") for what in ("partial_image", "completed", "progress")]
EVENT: dict[str, Any] = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": [*EVENTS, "error"]},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}},
        },
    },
}
"""One of the server-sent events of a stream."""
PICTURES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ImagesAnswer,
        "content": {
            "text/event-stream": {"schema": EVENT},
            **{f"image/{kind}": {"schema": {"type": "string", "format": "binary"}} for kind in ("png", "webp", "jpeg")},
        },
    },
    **_errors(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504),
}
PLAIN = _errors(401, 403, 404, 500, 503)
KEYED = [Depends(_authorized)]
ORDER = [*KEYED, Depends(_ending)]


def _body(model: type[ImageRequest], form: bool = True) -> dict[str, Any]:
    """The request body in the OpenAPI document; images are files in a form, data URLs in JSON."""
    as_json = model.model_json_schema()
    content = {"application/json": {"schema": as_json}}
    if form:
        as_form = json.loads(json.dumps(as_json))
        for name in ("image", "mask"):
            single = {"type": "string", "format": "binary"}
            as_form["properties"][name] = {"type": "array", "items": single} if name == "image" else single
        content["multipart/form-data"] = {"schema": as_form}
    return {"requestBody": {"required": True, "content": content}}


async def _parsed(request: Request, model: type[R], form: bool = True) -> R:
    """The checked body of a request. Raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        values = await _json(request)
    elif form and kind == "multipart/form-data":
        values = await _form(request)
    else:
        allowed = "application/json or multipart/form-data" if form else "application/json"
        raise ApiError(415, "unsupported_media_type", f"the body must be {allowed}, not {kind or 'without a type'}")
    if isinstance(values, dict) and issubclass(model, EditRequest):
        for name in ("image", "mask"):
            items = values.get(name)
            if isinstance(items, list) and len(items) <= 16:
                values[name] = [await asyncio.to_thread(_unpacked, item, name) for item in items]
            elif items is not None and not isinstance(items, list):
                values[name] = await asyncio.to_thread(_unpacked, items, name)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise invalid(list(error.errors())) from error


def _unpacked(item: Any, name: str) -> Any:
    """Bytes of a file, data URL or {"image_url": data URL}; anything else is left for the schema to refuse."""
    if isinstance(item, dict) and set(item) == {"image_url"}:
        item = item["image_url"]
    try:
        return image_bytes(item, name) if isinstance(item, bytes | str) else item
    except InputError as error:
        raise ApiError.of(error) from error


async def _json(request: Request) -> Any:
    body = await request.body()
    try:
        return json.loads(body) if len(body) <= SMALL_BODY else await asyncio.to_thread(json.loads, body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_value", "the body is not valid JSON") from error


async def _form(request: Request) -> dict[str, Any]:
    """Fields of a form; `name[]` and repeated names are lists."""
    try:
        form = await request.form(max_files=17, max_fields=100)
    except HTTPException as error:
        raise ApiError(error.status_code if error.status_code == 413 else 400, "invalid_value", str(error.detail)) from error
    values: dict[str, Any] = {}
    for key, item in form.multi_items():
        value: Any = await item.read() if isinstance(item, UploadFile) else item
        name, listed = key.removesuffix("[]"), key.endswith("[]") or key == "image"
        if listed or name in values:
            before = values.get(name, [])
            values[name] = [*(before if isinstance(before, list) else [before]), value]
        else:
            values[name] = value
    await form.close()
    return values


async def _describe(handle: DeploymentHandle) -> dict[str, Any]:
    return await handle.describe.remote()


# everything that the ingress uses stands before it: Ray takes the application as it is when the class is made


@ray_serve.ingress(api)
class Ingress:
    """One per node or more; holds nothing but handles, and how many images are under way to each."""

    def __init__(self, engines: dict[str, DeploymentHandle], default: str, timeout_s: float) -> None:
        self.engines, self.default, self.timeout_s = engines, default, timeout_s
        self.started = int(time.time())
        self.sight, self.refusals = Sight(), Refusals()

    @api.get("/", include_in_schema=False)
    async def page(self) -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @api.get("/page/{name}", include_in_schema=False)
    async def page_file(self, name: str) -> FileResponse:
        if name not in ("page.js", "page.css"):
            raise ApiError(404, "not_found", f"there is no {name}")
        return FileResponse(PAGE / name)

    @api.get("/health/live", responses=_errors(500))
    async def live(self) -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/health/ready", responses=_errors(500, 503))
    async def ready(self) -> dict[str, Any]:
        """Ready when every model's engine answers and runs."""
        return {"status": "ok", "models": await self._described()}

    @api.get("/metrics", response_class=PlainTextResponse, responses=_errors(500))
    async def prometheus(self) -> PlainTextResponse:
        return PlainTextResponse(await prometheus())

    @api.get("/v1/models", dependencies=KEYED, responses=PLAIN)
    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model(name) for name in self.engines]}

    @api.get("/v1/models/{model}", dependencies=KEYED, responses=PLAIN)
    async def model(self, model: str) -> dict[str, Any]:
        self._engine(model)
        return self._model(model)

    @api.get("/v1/capabilities", dependencies=KEYED, responses=PLAIN)
    async def capabilities(self) -> dict[str, Any]:
        """Modes, limits and defaults of every model."""
        fields = GenerationRequest.model_fields
        names = ("guidance_scale", "temperature", "n", "output_format")
        defaults = {"num_inference_steps": 12, **{name: fields[name].default for name in names}}
        return {"default_model": self.default, "models": await self._described(), "defaults": defaults}

    @api.post(
        "/v1/images/generations",
        dependencies=ORDER,
        responses=PICTURES,
        response_model=None,
        openapi_extra=_body(GenerationRequest, form=False),
    )
    async def generations(self, request: Request) -> Response:
        return await self._answer(request, await _parsed(request, GenerationRequest, form=False), "image_generation")

    @api.post("/v1/images/edits", dependencies=ORDER, responses=PICTURES, response_model=None, openapi_extra=_body(EditRequest))
    async def edits(self, request: Request) -> Response:
        return await self._answer(request, await _parsed(request, EditRequest), "image_edit")

    @api.post(
        "/v1/images/variations",
        dependencies=ORDER,
        responses=PICTURES,
        response_model=None,
        openapi_extra=_body(VariationRequest),
    )
    async def variations(self, request: Request) -> Response:
        return await self._answer(request, await _parsed(request, VariationRequest), "image_edit")

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "paella-ray"}

    def _engine(self, name: str) -> DeploymentHandle:
        if name not in self.engines:
            raise ApiError(
                404, "model_not_found", f"there is no model {name[:200]}; there are {', '.join(self.engines)}", "model"
            )
        return self.engines[name]

    async def _described(self) -> dict[str, Any]:
        try:
            answers = [asyncio.wait_for(_describe(handle), 5) for handle in self.engines.values()]
            return dict(zip(self.engines, await asyncio.gather(*answers), strict=True))
        except (TimeoutError, RayError, RayServeException) as error:
            raise ApiError(503, "starting", "a model is not ready yet", retry_after_s=5) from error

    async def _answer(self, request: Request, body: Any, kind: str) -> Response:
        """Send an order to its engine, and the answer to the client in the form that it asked for."""
        name = body.model or self.default
        handle = self._engine(name)
        raw = "image/png" in request.headers.get("accept", "") and not body.stream
        with tracer.start_as_current_span("paella.request", context=propagate.extract(request.headers)):
            order = Order(
                request=body,
                seed=secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed,
                request_id=request.headers.get("x-request-id", "")[:128],  # Serve's proxy makes one where the client gave none
                timeout_s=self.timeout_s if body.timeout_ms is None else body.timeout_ms / 1000,
                trace=inject({}),
            )
            if raw and (order.num_images != 1 or body.output_format != "png"):
                raise ApiError(400, "invalid_value", "Accept: image/png is for one PNG image", "n")
            call = Call(self.sight, name, handle, order, kind)
            try:
                request.state.ends.enter_context(self.refusals.under_way_with(name, order.num_images))
            except ApiError as error:
                raise call.refused(error) from None
            try:
                return await (call.streamed() if body.stream else call.whole(raw))
            except ApiError as error:
                if error.code == "queue_full":
                    self.refusals.add(name, error)
                raise
