"""What operators see: metrics through Ray's own exporter, a structured access log, trace context."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
import urllib.request
from typing import Any

import ray
from opentelemetry import propagate, trace
from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300]
tracer = trace.get_tracer("paella-ray")


class EngineMetrics:
    """Of one engine: what `Engine.observe` is given, and what becomes of images."""

    def __init__(self, model: str) -> None:
        self.tags = {"model": model}
        keys = ("model",)
        self.step = Histogram("paella_step_seconds", "time of one step of the batch", SECONDS, keys)
        self.occupancy = Gauge("paella_batch_occupancy", "tokens in the batch, of those that it takes at most", keys)
        self.tokens = Counter("paella_tokens_total", "tokens that took a step", keys)
        self.images = images_counter()
        self.queued = Gauge("paella_queued_images", "images before their first step", keys)
        self.wait = Histogram("paella_queue_wait_seconds", "time before an image's first step", SECONDS, keys)
        self.cache_hits = Gauge("paella_prompt_cache_hits", "prompts that had been encoded before", keys)
        self.cache_misses = Gauge("paella_prompt_cache_misses", "prompts that were encoded", keys)

    def observe(self, name: str, value: float, tags: dict[str, str]) -> None:
        """From the sampling thread, behind each step."""
        if name == "step":
            self.step.observe(value, self.tags)
        elif name == "occupancy":
            self.occupancy.set(value, self.tags)
        elif name == "tokens":
            self.tokens.inc(value, self.tags)

    def image(self, mode: str, outcome: str, wait_s: float | None = None) -> None:
        """An image has come to its end: completed, cancelled, deadline_exceeded, invalid, refused or failed."""
        self.images.inc(1, self.tags | {"mode": mode, "outcome": outcome})
        if wait_s is not None:
            self.wait.observe(wait_s, self.tags)

    def state(self, queued: int, hits: int, misses: int) -> None:
        self.queued.set(queued, self.tags)
        self.cache_hits.set(hits, self.tags)
        self.cache_misses.set(misses, self.tags)


def images_counter() -> Counter:
    return Counter("paella_images_total", "images by mode and outcome", ("model", "mode", "outcome"))


class Sight:
    """Of one ingress: metrics of requests, and one JSON line for each, without its prompt unless PAELLA_LOG_PROMPTS=1."""

    def __init__(self) -> None:
        keys = ("model", "mode")
        self.request = Histogram("paella_request_seconds", "request to last byte", SECONDS, (*keys, "status"))
        self.preview = Histogram("paella_first_preview_seconds", "request to the first preview", SECONDS, keys)
        self.cancelled = Counter("paella_cancelled_requests_total", "clients that went away", keys)
        self.images = images_counter()
        self.prompts = os.environ.get("PAELLA_LOG_PROMPTS") == "1"
        self.lines = logging.getLogger("paella.access")
        self.lines.setLevel(logging.INFO)
        self.lines.propagate = False
        if not self.lines.handlers:
            self.lines.addHandler(logging.StreamHandler(sys.stderr))

    def log(self, *, prompt: str, **fields: Any) -> None:
        """An access log line; fields that are None are left out."""
        fields |= {"prompt": prompt} if self.prompts else {}
        self.lines.info(json.dumps({"time": round(time.time(), 3), **{k: v for k, v in fields.items() if v is not None}}))


def inject(carrier: dict[str, str]) -> dict[str, str]:
    """The headers of the current trace, added to a carrier."""
    propagate.inject(carrier)
    return carrier


async def prometheus() -> str:
    """All of our metrics on all nodes, from Ray's exporters, in Prometheus' text format."""
    addresses = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in await asyncio.to_thread(ray.nodes)
        if node["Alive"] and node.get("MetricsExportPort")
    ]
    texts = await asyncio.gather(*(asyncio.to_thread(_scrape, address) for address in addresses))
    seen: dict[str, None] = {}  # nodes repeat the lines of help and type, which may come once only
    for text in texts:
        seen |= dict.fromkeys(line for line in text.splitlines() if "paella_" in line)
    return "\n".join(seen) + "\n"


def _scrape(address: str) -> str:
    try:
        with urllib.request.urlopen(address, timeout=3) as response:
            return response.read().decode()
    except OSError:
        return ""  # a node that is going away
