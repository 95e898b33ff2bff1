"""The answer to an order: pictures in one JSON object, the bytes of one, or server-sent events; logged and measured."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.modes import Order
from serve.observability import Sight
from serve.schemas import ApiError

HEARTBEAT_S = 5.0


class Call:
    """One order, from its ingress to its engine and back; `kind` begins the names of its events."""

    def __init__(self, sight: Sight, model: str, handle: DeploymentHandle, order: Order, kind: str) -> None:
        self.sight, self.model, self.handle, self.order, self.kind = sight, model, handle, order, kind
        self.began = time.monotonic()
        self.tags = {"model": model, "mode": order.mode}
        self.created = int(time.time())

    def _log(self, status: int, code: str | None = None, **fields: Any) -> None:
        seconds = time.monotonic() - self.began
        self.sight.request.observe(seconds, self.tags | {"status": str(status)})
        user = self.order.request.user
        self.sight.log(
            prompt=self.order.request.prompt,
            request_id=self.order.request_id,
            traceparent=self.order.trace.get("traceparent"),
            status=status,
            code=code,
            ms=round(1000 * seconds, 1),
            images=self.order.num_images,
            steps=self.order.request.steps,
            user=hashlib.sha256(user.encode()).hexdigest()[:12] if user else None,
            **self.tags,
            **fields,
        )

    def _failure(self, error: BaseException) -> ApiError:
        """What the client is told, and the log."""
        if isinstance(error, asyncio.CancelledError):
            self.sight.cancelled.inc(1, self.tags)
            self._log(499, "client_gone")
            raise error
        if isinstance(error, RayError | RayServeException):
            error = ApiError(503, "starting", "the model's worker was lost; it is being restarted", retry_after_s=2)
        if not isinstance(error, ApiError):
            raise error
        self._log(error.status, error.code)
        return error

    def refused(self, error: ApiError) -> ApiError:
        """What the client is told, and the log, where the engine is not asked; which would have counted the images."""
        self.sight.images.inc(self.order.num_images, self.tags | {"outcome": error.code})
        return self._failure(error)

    async def whole(self, raw: bool) -> Response:
        """All pictures in one JSON object, or the bytes of the only one."""
        try:
            result = await self.handle.generate.remote(self.order)
            if isinstance(result, ApiError):
                raise result
        except BaseException as error:
            raise self._failure(error) from None
        slowest = max(result["times"], key=lambda times: sum(times.values()))
        metrics = slowest | {"steps": self.order.request.steps}
        self._log(200, **slowest)
        if raw:
            seed = str(self.order.seed)
            return Response(result["images"][0], media_type="image/png", headers={"x-seed": seed})
        data = [
            {"b64_json": base64.b64encode(image).decode(), "seed": seed, "mode": self.order.mode}
            for image, seed in zip(result["images"], self.order.seeds, strict=True)
        ]
        answer = {
            "id": f"img-{uuid.uuid4().hex}",
            "created": self.created,
            "model": self.model,
            "data": data,
            "size": result["size"],
            "output_format": self.order.request.output_format,
            "background": "opaque",
            "usage": _usage(result["input_tokens"], result["output_tokens"]),
            "metrics": metrics,
            "warnings": result["warnings"],
        }
        return JSONResponse(answer)

    async def streamed(self) -> StreamingResponse:
        """Server-sent events; what fails before the first one is an ordinary error."""
        response: Any = self.handle.options(stream=True).stream.remote(self.order)
        events = response.__aiter__()
        try:
            accepted = await events.__anext__()
            if isinstance(accepted, ApiError):
                raise accepted
        except BaseException as error:
            raise self._failure(error) from None
        headers = {"cache-control": "no-store"}
        return StreamingResponse(self._events(events, accepted), media_type="text/event-stream", headers=headers)

    async def _events(self, events: Any, accepted: dict[str, Any]) -> AsyncIterator[str]:
        done = previews = 0
        try:
            async for event in _with_heartbeats(events):
                if event is None:
                    yield ": still here\n\n"
                    continue
                if isinstance(event, ApiError):
                    raise event
                final = event["kind"] == "completed"
                if not final and not previews:
                    self.sight.preview.observe(time.monotonic() - self.began, self.tags)
                done, previews = done + final, previews + (not final)
                yield _sse(self._event(event, accepted))
                if self.order.request.progress:
                    counts = {"type": f"{self.kind}.progress", "completed": done, "images": self.order.num_images}
                    yield _sse(counts)
            self._log(200)
        except BaseException as error:
            yield _sse({"type": "error", **self._failure(error).body})

    def _event(self, event: dict[str, Any], accepted: dict[str, Any]) -> dict[str, Any]:
        request, index = self.order.request, event["index"]
        shared = {
            "b64_json": base64.b64encode(event["data"]).decode(),
            "background": "opaque",
            "created_at": int(time.time()),
            "output_format": request.output_format,
            "quality": request.quality,
            "size": accepted["size"],
            "image_index": index,
            "seed": self.order.seeds[index],
        }
        if event["kind"] == "preview":
            return {"type": f"{self.kind}.partial_image", "partial_image_index": event["preview"], **shared}
        tokens = accepted["output_tokens"] // self.order.num_images
        metrics = event["times"] | {"steps": request.steps}
        usage = _usage(accepted["input_tokens"], tokens)
        return {"type": f"{self.kind}.completed", **shared, "usage": usage, "metrics": metrics, "warnings": accepted["warnings"]}


async def _with_heartbeats(events: Any) -> AsyncIterator[Any]:
    """Events, and None after every HEARTBEAT_S without one."""
    upcoming: asyncio.Future | None = None
    try:
        while True:
            upcoming = upcoming or asyncio.ensure_future(events.__anext__())
            await asyncio.wait({upcoming}, timeout=HEARTBEAT_S)
            if not upcoming.done():
                yield None
                continue
            finished, upcoming = upcoming, None
            try:
                event = finished.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        if upcoming is not None:
            upcoming.cancel()


def _sse(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"


def _usage(input_tokens: dict[str, int], output_tokens: int) -> dict[str, Any]:
    inputs = sum(input_tokens.values())
    total = inputs + output_tokens
    details = {"input_tokens_details": input_tokens}
    return {"input_tokens": inputs, **details, "output_tokens": output_tokens, "total_tokens": total}
