"""An iterator that works ahead in a thread, by a bounded number of items."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


def prefetched(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, or the same exception, at most `depth` of them ready. Closing it ends the thread."""
    ready: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def put(item: object) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if closed.is_set():
                    return
            put(_END)
        except BaseException as error:  # for whoever waits for the next item
            put(_Failure(error))

    threading.Thread(target=work, name="prefetch", daemon=True).start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        closed.set()
