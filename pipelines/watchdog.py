"""A training group that is stuck: the workers find out who was not there, say so, and end, so that they are started anew."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

EXIT_CODE = 75


class Watchdog:
    """Tells the other workers where this one is, and ends it when nothing has moved for `stuck_after_s`.

    A thread does both: a worker that waits in a collective cannot. The heartbeats lie in the process group's own store, which
    rank 0 serves from a thread without Python, so that they can be read as long as its process runs at all.
    """

    def __init__(self, stuck_after_s: float, every_s: float = 1.0) -> None:
        self.stuck_after_s, self.every_s = stuck_after_s, every_s
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store().clone())
        self.place: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
        self.at(-1, "starting")
        self.stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def at(self, step: int, doing: str) -> None:
        """This worker is at `step`, and what it does there."""
        self.place = self.place | {"step": step, "doing": doing, "since": time.time()}

    def close(self) -> None:
        """Nobody waits for anybody any more."""
        self.stopped.set()

    def _watch(self) -> None:
        while not self.stopped.wait(self.every_s):
            place = self.place
            late = time.time() - place["since"] > self.stuck_after_s
            try:
                self.store.set(str(self.rank), json.dumps(place | {"beat": time.time()}))
                message = self.describe([self._read(rank) for rank in range(self.world_size)]) if late else None
            except RuntimeError:  # the store is gone, and rank 0 with it
                message = "rank 0, which keeps the heartbeats, does not answer"
            if late and not self.stopped.is_set():
                print(f"no step has been finished for {self.stuck_after_s:.0f} s: {message}", file=sys.stderr, flush=True)
                time.sleep(3 if self.rank == 0 else 0)  # until the others have read their heartbeats
                os._exit(EXIT_CODE)

    def _read(self, rank: int) -> dict[str, Any] | None:
        self.store.set_timeout(timedelta(seconds=10))
        return json.loads(self.store.get(str(rank))) if self.store.check([str(rank)]) else None

    def describe(self, places: list[dict[str, Any] | None]) -> str:
        """Who is behind the others."""
        now = time.time()
        known = [place for place in places if place is not None]
        last = min((place["step"] for place in known), default=-1)
        furthest = max(((place["step"], place["since"]) for place in known), default=(-1, 0.0))
        words = []
        for rank, place in enumerate(places):
            if place is None:
                words.append(f"rank {rank} has never been heard of")
            elif now - place["beat"] > max(10.0, 5 * self.every_s):
                words.append(f"rank {rank} ({where(place)}) has given no sign of life for {now - place['beat']:.0f} s")
            elif (place["step"] == last and place["step"] < furthest[0]) or place["doing"] != "training":
                words.append(f"rank {rank} ({where(place)}) did not arrive: it is at step {place['step']}, {place['doing']}")
        return "; ".join(words) or f"all ranks are at step {last}, and wait for each other"


def where(place: dict[str, Any]) -> str:
    return f"{place['host']}, process {place['pid']}"
