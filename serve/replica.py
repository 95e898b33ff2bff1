"""The deployment that holds a model: an engine behind Ray Serve's calls, with its bundle swapped while it runs."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from opentelemetry import propagate
from pydantic import BaseModel, ConfigDict, Field
from ray.serve.config import AutoscalingContext

from paella.bundle import Bundle, load_bundle
from paella.pictures import MAX_AREA, MAX_IMAGE_BYTES, InputError
from paella.requests import modes_of, warm_up
from serve.engine import DeadlineExceeded, Draining, Engine, EngineConfig, EngineDied, QueueFull
from serve.modes import Order, Plan, input_tokens, plan
from serve.observability import EngineMetrics, tracer
from serve.schemas import ApiError

SWITCH_S = 0.0005
"""How long a thread may keep Python's lock while others want it. An order passes from thread to thread several times before it is
taken in or turned away, and each time may wait as long for the thread that samples; Python's own 5 ms add up."""

log = logging.getLogger("ray.serve")


class EngineSettings(BaseModel):
    """The `user_config` of a model's deployment: a new one is taken over without dropping requests."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """Bundle: directory, URI or models:/name@alias."""
    name: str
    """What requests call it."""
    dtype: Literal["auto", "float32", "bf16"] = "auto"
    """auto: bfloat16 on a GPU; float32 on a CPU, where pictures are then the same, bit for bit, in any company."""
    max_queued_images: int = Field(default=64, ge=1)
    max_batch_images: int = Field(default=32, ge=1)
    min_batch_images: int = Field(default=2, ge=1)
    lanes: int = Field(default=2, ge=1)

    def engine_config(self) -> EngineConfig:
        limits = {"max_queued_images", "max_batch_images", "min_batch_images", "lanes"}
        return EngineConfig(**self.model_dump(include=limits))


class Generator:
    """One model on one device. Sampling runs on the engine's threads, so that the replica always answers."""

    def __init__(self) -> None:
        sys.setswitchinterval(SWITCH_S)
        self.engine: Engine | None = None
        self.settings: EngineSettings | None = None
        self.closing: set[asyncio.Task] = set()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the bundle and send new requests to it; those that are under way finish with the old one."""
        settings = EngineSettings(**user_config)
        if settings == self.settings:
            return
        with ThreadPoolExecutor(1) as loader:  # which ends, and its team of OpenMP's threads with it
            bundle = await asyncio.get_running_loop().run_in_executor(loader, _load, settings)
        engine, old = Engine(bundle, settings.engine_config()), self.engine
        await engine.ready()
        self.metrics = EngineMetrics(settings.name)
        engine.observe = self.metrics.observe
        self.engine, self.settings = engine, settings
        if old is not None:
            task = asyncio.create_task(old.close())
            self.closing.add(task)
            task.add_done_callback(self.closing.discard)

    async def check_health(self) -> None:
        """Raises EngineDied where images would wait for ever: Serve then starts another replica."""
        self._engine.check()

    @property
    def _engine(self) -> Engine:
        assert self.engine is not None, "Serve calls reconfigure before anything else"
        return self.engine

    async def describe(self) -> dict[str, Any]:
        """What the model can do, for /v1/capabilities."""
        bundle, engine = self._engine.bundle, self._engine
        engine.check()
        side = bundle.config.image_size
        return {
            "digest": bundle.digest,
            "modes": modes_of(bundle),
            "default_size": f"{side}x{side}",
            "size_multiple": bundle.config.size_multiple,
            "token_pixels": bundle.config.vqgan.downsampling,
            "max_pixels": MAX_AREA * side * side,
            "max_image_bytes": MAX_IMAGE_BYTES,
            "max_queued_images": engine.config.max_queued_images,
            "max_prompt_tokens": bundle.text.config.max_length,
        }

    async def state(self) -> dict[str, Any]:
        """For operators and tests: what the engine holds now."""
        engine = self._engine
        return {
            "digest": engine.bundle.digest,
            "images": len(engine.images),
            "queued": engine.queued,
            "running": engine.running,
            "batch_tokens": engine.scheduler.max_tokens,
            "tasks": len(asyncio.all_tasks()),
            "closing": len(self.closing),
        }

    async def trace(self) -> list[dict[str, Any]]:
        """The last steps: when, how long, and which images at which of their steps took them together."""
        return list(self._engine.trace)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        if (engine := self.engine) is None:
            return {"images": 0.0}
        prompts = engine.bundle.prompts
        self.metrics.state(engine.queued, prompts.hits, prompts.misses)
        return {"images": float(len(engine.images))}

    async def generate(self, order: Order) -> dict[str, Any] | ApiError:
        """All pictures of an order at once. An error is returned, not raised: it is the client's to see, not the log's."""
        images: dict[int, bytes] = {}
        times: list[dict[str, float]] = []
        accepted: dict[str, Any] = {}
        async for event in self.stream(order):
            if isinstance(event, ApiError):
                return event
            if event["kind"] == "accepted":
                accepted = event
            elif event["kind"] == "completed":
                images[event["index"]] = event["data"]
                times.append(event["times"])
        return {**accepted, "images": [images[index] for index in sorted(images)], "times": times}

    async def stream(self, order: Order) -> AsyncIterator[dict[str, Any] | ApiError]:
        """`accepted`, then previews and pictures as they come; an ApiError is the last."""
        engine, metrics = self._engine, self.metrics
        with tracer.start_as_current_span("paella.generate", context=propagate.extract(order.trace)) as span:
            span.set_attribute("paella.mode", order.mode)
            open_images, ticket = order.num_images, None
            try:
                with engine.room_for(order.num_images):  # before any image is decoded
                    planned: Plan = await asyncio.wrap_future(engine.preparing.submit(plan, engine.bundle, order))
                ticket = engine.submit(planned.tasks)
                yield self._accepted(order, planned, engine.bundle.digest)
                async for event in ticket:
                    if event.error is not None:
                        raise event.error
                    if event.kind == "completed":
                        open_images -= 1
                        metrics.image(order.mode, "completed", event.times["queue_ms"] / 1000)
                    shown = {"kind": event.kind, "index": event.index, "data": event.data, "preview": event.preview}
                    yield {**shown, "times": event.times}
            except asyncio.CancelledError:
                self._count(order, open_images, "cancelled")
                raise
            except Exception as error:
                api_error = as_api_error(error)
                self._count(order, open_images, api_error.code)
                if api_error.status == 500:
                    span.record_exception(error)
                yield api_error
            finally:
                if ticket is not None:
                    ticket.cancel()

    def _count(self, order: Order, number: int, outcome: str) -> None:
        for _ in range(number):
            self.metrics.image(order.mode, outcome)

    def _accepted(self, order: Order, planned: Plan, digest: str) -> dict[str, Any]:
        width, height = planned.size
        return {
            "kind": "accepted",
            "size": f"{width}x{height}",
            "output_tokens": planned.tokens,
            "input_tokens": input_tokens(order),
            "warnings": planned.warnings,
            "digest": digest,
        }


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error in the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, "queue_full", str(error), retry_after_s=error.wait_s)
    if isinstance(error, Draining):
        return ApiError(503, "draining", "this server takes no new requests", retry_after_s=1)
    if isinstance(error, EngineDied):
        return ApiError(503, "starting", "the model is being restarted", retry_after_s=5)
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, "deadline_exceeded", str(error))
    if isinstance(error, InputError):
        return ApiError.of(error)
    if isinstance(error, ValueError):
        return ApiError(400, "invalid_value", str(error))
    log.error("an order failed", exc_info=error)
    return ApiError(500, "internal_error", "something went wrong in the server")


def _load(settings: EngineSettings) -> Bundle:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = settings.dtype == "bf16" or (settings.dtype == "auto" and device == "cuda")
    bundle = load_bundle(settings.model, device, torch.bfloat16 if half else torch.float32)
    warm_up(bundle)
    return bundle


def scale_on_images(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Autoscaling policy: as many replicas as the images that are here need, `target_ongoing_requests` for each."""
    per_replica = (context.aggregated_metrics or {}).get("images", {})
    target = (context.config.target_ongoing_requests if context.config else None) or 8
    wanted = math.ceil(sum(per_replica.values()) / target)
    low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return min(high, max(low, wanted)), {}
