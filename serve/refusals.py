"""Turning away at the edge what the engine would turn away: a flood must not take the CPU that pictures are made on."""

from __future__ import annotations

import contextlib
import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator

from serve.schemas import ApiError

GROWTH_PER_S = 0.02
"""By how much more, and by one image at least, is let through with each second since the engine refused something: a full one is
asked about once in a second, and one that has more room by now, for new replicas or want of other ingresses, is soon found to."""


class Refusals:
    """Images under way through one ingress, and how many there were when the engine had no room for more.

    What of them has come to its end leaves room for as much, so that the engine need not be asked in order to know.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.under_way: Counter[str] = Counter()
        """Images by model."""
        self.full: dict[str, tuple[int, float, ApiError]] = {}
        """By model: how many images are too many, since when, and what the engine said of it."""

    @contextlib.contextmanager
    def under_way_with(self, model: str, images: int) -> Iterator[None]:
        """Count an order's images until its answer has been sent. Raises ApiError where they are too many."""
        too_many, since, error = self.full.get(model, (0, 0.0, None))
        by_now = too_many + int(max(1.0, GROWTH_PER_S * too_many) * (self.clock() - since))
        if error is not None and self.under_way[model] + images >= by_now:
            raise copy.copy(error)  # each is raised once
        self.under_way[model] += images
        try:
            yield
        finally:
            self.under_way[model] -= images

    def add(self, model: str, error: ApiError) -> None:
        """The engine had no room for one of the orders that are under way."""
        self.full[model] = self.under_way[model], self.clock(), error
