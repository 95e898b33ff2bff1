"""Threads that work for a while and then end.

On a CPU, every thread that works with tensors has a team of OpenMP threads, for as long as it lives. While there are more team
members than cores, libgomp sends all that wait to sleep at once, and the thousands of parallel sections of one picture each wait
for one to wake up: a picture alone then takes twice as long. So threads that nobody has needed for a while end, and their teams
with them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

REST_S = 1.0


class Helpers:
    """A pool of threads that ends when it has not been used for REST_S, and begins anew when it is."""

    def __init__(self, name: str, size: int = 1) -> None:
        self.name, self.size = name, size
        self.lock = threading.Lock()
        self.pool: ThreadPoolExecutor | None = None
        self.used = 0.0
        self.threads = torch.get_num_threads()

    def submit(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        with self.lock:
            if self.pool is None:  # one number of threads everywhere: another rounds otherwise
                self.pool = ThreadPoolExecutor(self.size, self.name, initializer=torch.set_num_threads, initargs=(self.threads,))
            self.used = time.monotonic()
            return self.pool.submit(work, *args, **kwargs)

    def rest(self) -> None:
        """End the threads, after what they still have to do, if nobody has needed them for a while."""
        if self.pool is not None and time.monotonic() - self.used > REST_S:
            self.close()

    def close(self) -> None:
        """End the threads, after what they still have to do."""
        with self.lock:
            if self.pool is not None:
                self.pool.shutdown(wait=False)
                self.pool = None
