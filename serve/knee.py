"""How large a batch pays: up to the knee, behind which a larger one takes longer in proportion."""

from __future__ import annotations

import time
from collections.abc import Callable

GAIN = 1.05
"""What doubling a batch must bring in tokens per second."""
MEMORY_S = 60.0
"""Older measurements are forgotten, so that a batch size which was slow once is tried again."""


class Knee:
    """Batch limit in tokens, from measured steps: doubled from `low` on, at most to `high`, for as long as that pays.

    A size that has not been measured of late counts as one that pays.
    """

    def __init__(self, low: int, high: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.low, self.high, self.clock = low, max(low, high), clock
        self.rates: dict[int, tuple[float, float]] = {}
        """Tokens per second and the time of the measurement, by the number of doublings of `low`."""

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        level = max(0, (max(1, tokens) - 1) // self.low).bit_length()
        rate, now = tokens / max(seconds, 1e-6), self.clock()
        old, at = self.rates.get(level, (rate, now))
        self.rates[level] = (rate if now - at > MEMORY_S else 0.8 * old + 0.2 * rate, now)

    @property
    def limit(self) -> int:
        now, level = self.clock(), 0
        recent = {level: rate for level, (rate, at) in self.rates.items() if now - at <= MEMORY_S}
        while self.low << level < self.high:
            if level in recent and level + 1 in recent and recent[level + 1] < GAIN * recent[level]:
                break
            level += 1
        return min(self.low << level, self.high)
