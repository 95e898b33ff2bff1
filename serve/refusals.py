"""Turning away at the edge what the engine has just turned away: a flood must not take the CPU that pictures are made on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

from serve.schemas import ApiError

SHARE_OF_WAIT = 0.1
"""How long an engine is not asked again, as a share of the time in which it will have done all that it holds: so little of its
queue is empty then that it never runs out of images."""
MAX_S = 1.0
"""The longest time for which it is not asked."""


class Refusals:
    """Models whose queue was full a moment ago, as one ingress has seen them.

    Of several replicas any will do: orders go to the emptier of two, so that where one is full the others nearly are.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.latest: dict[str, tuple[float, int, ApiError]] = {}
        """By model: until when, from how many images on, with what."""

    def add(self, model: str, images: int, error: ApiError) -> None:
        """The engine had no room for an order of so many images."""
        seconds = min(MAX_S, SHARE_OF_WAIT * (error.retry_after_s or 0.0))
        self.latest[model] = (self.clock() + seconds, images, error)

    def of(self, model: str, images: int) -> ApiError | None:
        """What an order of as many images or fewer got a moment ago."""
        until, refused, error = self.latest.get(model, (0.0, 0, None))
        return copy.copy(error) if images >= refused and self.clock() < until else None  # raised once each
