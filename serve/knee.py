"""How large a batch pays: up to the knee, behind which a larger one takes longer in proportion."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable

GAIN = 1.05
"""What a larger batch must bring in tokens per second over every smaller one."""
MEMORY_S = 60.0
"""Older measurements are forgotten, so that a batch size which was slow once is tried again."""
SAMPLES = 9
"""Steps of a size that are remembered: their median counts, as the first of a shape find their kernels and take seconds."""
ENOUGH = 5
"""Steps of a size that make a measurement."""


class Knee:
    """Batch limit in tokens, from measured steps: `low`, or the largest doubling of it up to `high` that pays.

    A size that has not been measured of late counts as one that pays, and the sizes behind one that does not are tried as well:
    small passes are replayed on a GPU, so that the first which is not gains nothing, but one of four times as many images does.
    """

    def __init__(self, low: int, high: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.low, self.high, self.clock = low, max(low, high), clock
        self.steps: dict[int, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=SAMPLES))
        """When, and tokens per second, by the number of doublings of `low`."""

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self.steps[self._level(tokens)].append((self.clock(), tokens / max(seconds, 1e-6)))

    def limit(self, demand: int) -> int:
        """Where so many tokens are here, under way or waiting."""
        chosen, best = 0, self._rate(0) or 0.0
        for level in range(1, self._level(min(demand, self.high)) + 1):
            rate = self._rate(level)
            if rate is None or rate >= GAIN * best:
                chosen = level
            best = max(best, rate or 0.0)
        return min(self.low << chosen, self.high)

    def _level(self, tokens: int) -> int:
        return max(0, (max(1, tokens) - 1) // self.low).bit_length()

    def _rate(self, level: int) -> float | None:
        """Tokens per second, if it has been measured of late."""
        recent = [rate for at, rate in self.steps[level] if self.clock() - at <= MEMORY_S]
        return statistics.median(recent) if len(recent) >= ENOUGH else None
