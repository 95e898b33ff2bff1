"""Continuous batching: which images take the next step together.

Images join a running batch between steps and leave it when they are done, each at its own step. Nothing here knows of threads,
clocks or Ray: whoever owns the loop calls `admit`, takes a step of `running`, and collects `finished`:

    scheduler = StepScheduler(max_tokens=2048)
    scheduler.add(canvas)
    while scheduler.busy:
        scheduler.admit()
        step(model, scheduler.running, codebook=codebook)
        for canvas in scheduler.finished():
            ...

Sizes may be mixed: `sampler.step` takes one pass for each, so that every running image gets its step in every round. Waiting
images come in strictly in the order of their arrival: none starves, and a large one holds up the small ones behind it until there
is room for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from paella.sampler import Canvas


class StepScheduler:
    """Images that wait and images that are under way, of which there are at most `max_tokens` tokens.

    One image alone is always let in, however large. `max_tokens` may be changed at any time: images under way stay.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.waiting: deque[Canvas] = deque()
        self.running: list[Canvas] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, canvas: Canvas) -> None:
        """At the end of the queue."""
        self.waiting.append(canvas)

    def admit(self) -> list[Canvas]:
        """Let waiting images into the batch as far as there is room; returns those that came in."""
        came, tokens = [], num_tokens(self.running)
        while self.waiting and (not self.running or tokens + self.waiting[0].tokens.numel() <= self.max_tokens):
            canvas = self.waiting.popleft()
            tokens += canvas.tokens.numel()
            self.running.append(canvas)
            came.append(canvas)
        return came

    def finished(self) -> list[Canvas]:
        """Take the images that have had their last step out of the batch."""
        done = [canvas for canvas in self.running if canvas.done]
        self.running = [canvas for canvas in self.running if not canvas.done]
        return done

    def remove(self, canvases: Collection[Canvas]) -> None:
        """Forget images, wherever they are."""
        gone = {id(canvas) for canvas in canvases}
        self.waiting = deque(canvas for canvas in self.waiting if id(canvas) not in gone)
        self.running = [canvas for canvas in self.running if id(canvas) not in gone]


def num_tokens(canvases: Iterable[Canvas]) -> int:
    """Tokens of all images: what a batch's time and memory depend on."""
    return sum(canvas.tokens.numel() for canvas in canvases)
