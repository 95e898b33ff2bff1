"""Stages of a long job: what runs now, how long is left, seconds per stage over restarts, peak memory of all processes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from pipelines.progress import duration


class Stages:
    """Times named stages; what an earlier, killed run spent is kept in `file` and added."""

    def __init__(self, file: Path, expected_s: Mapping[str, float]) -> None:
        self.file, self.expected_s = file, expected_s
        state = json.loads(file.read_text()) if file.exists() else {}
        self.seconds: dict[str, float] = state.get("seconds", {})
        self.finished: list[str] = state.get("finished", [])
        self.peak_bytes: int = state.get("peak_bytes", 0)

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        number = list(self.expected_s).index(name) + 1
        if name in self.finished:
            print(f"\n[{number}/{len(self.expected_s)}] {what}: done before", flush=True)
        else:
            left = sum(s for stage, s in self.expected_s.items() if stage not in self.finished)
            print(f"\n[{number}/{len(self.expected_s)}] {what} (about {duration(left)} left in all)", flush=True)
        began = time.monotonic()
        try:
            yield
        finally:
            if name not in self.finished:
                self.seconds[name] = self.seconds.get(name, 0) + time.monotonic() - began
                self._save()
        if name not in self.finished:
            self.finished.append(name)
            self._save()

    @contextmanager
    def measured(self, every_s: float = 2.0) -> Iterator[None]:
        """Watch the memory of this process and all it started (Ray's processes and workers)."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(every_s):
                self.peak_bytes = max(self.peak_bytes, tree_bytes())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._save()

    def _save(self) -> None:
        temporary = self.file.with_suffix(".tmp")
        state = {"seconds": self.seconds, "finished": self.finished, "peak_bytes": self.peak_bytes}
        temporary.write_text(json.dumps(state, indent=1) + "\n")
        temporary.replace(self.file)


def tree_bytes() -> int:
    """Memory of this process and its descendants; pages that several share count once (proportional set size)."""
    total = 0
    root = psutil.Process()
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.Error, AttributeError):
            continue
    return total
