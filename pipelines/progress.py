"""Progress of a long job that runs in a worker: one line every few seconds with rate and time left."""

from __future__ import annotations

import time


class Progress:
    """Prints lines rather than a bar: they come through Ray's logs, `ray job logs` and files alike."""

    EVERY_S = 15.0

    def __init__(self, name: str, total: int, start: int = 0, *, enabled: bool = True) -> None:
        self.name, self.total, self.start, self.enabled = name, total, start, enabled
        self.began = self.printed = time.monotonic()
        self.note = ""

    def update(self, done: int, note: str | None = None) -> None:
        self.note = note or self.note
        now = time.monotonic()
        if not self.enabled or (now - self.printed < self.EVERY_S and done < self.total):
            return
        self.printed = now
        rate = (done - self.start) / max(1e-9, now - self.began)
        left = (self.total - done) / max(1e-9, rate)
        filled = round(20 * done / self.total)
        bar = "█" * filled + "·" * (20 - filled)
        print(f"{self.name} {bar} {done}/{self.total}  {self.note}  {duration(left)} left", flush=True)


def duration(seconds: float) -> str:
    """As a person reads it: 42 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
