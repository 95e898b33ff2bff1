"""One running batch of a worker: canvases in from any thread, decoded pictures out.

A thread takes one step after the other of all images under way, whatever their settings and sizes; those that are done leave, and
those that wait take their places. On a GPU another thread decodes meanwhile, and callers encode. On a CPU that would only
take the cores from the step, and a second team of OpenMP's threads besides: there one thread does all work with tensors.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from paella.bundle import Bundle
from paella.sampler import Canvas, step
from paella.step_scheduler import StepScheduler

T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """A decoded picture (3,H,W) in [0,1], and the seconds that it took."""

    picture: Tensor
    sample_s: float
    decode_s: float


class SamplingLoop:
    """Runs one bundle. An error in a step or in decoding is raised by the futures of the images that it concerns."""

    def __init__(self, bundle: Bundle, batch_size: int) -> None:
        height, width = bundle.config.grid(*bundle.default_size)
        self.bundle = bundle
        self.scheduler = StepScheduler(batch_size * height * width)
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # what to do between two steps
        self.waited: dict[int, tuple[Future[Made], float]] = {}  # by canvas: who waits for it, and since when it is under way
        self.threads = torch.get_num_threads()
        on_cpu = next(bundle.unet.parameters()).device.type == "cpu"
        self.decoding = None if on_cpu else ThreadPoolExecutor(1)
        self.thread = threading.Thread(target=self._run, name="sampling", daemon=True)
        self.thread.start()

    def encoded(self, encode: Callable[[], T]) -> T:
        """What `encode` gives: work with tensors, where it slows no step down."""
        if self.decoding is not None:
            return encode()
        future: Future[T] = Future()

        def answer() -> None:
            try:
                future.set_result(encode())
            except Exception as error:
                future.set_exception(error)

        self.inbox.put(answer)
        return future.result()

    def submit(self, canvas: Canvas) -> Future[Made]:
        """Take an image to its end, as soon as there is room for it. From any thread."""
        future: Future[Made] = Future()

        def add() -> None:
            self.waited[id(canvas)] = future, 0.0
            self.scheduler.add(canvas)

        self.inbox.put(add)
        return future

    def close(self) -> None:
        """End the threads, behind what is here."""
        self.inbox.put(None)
        self.thread.join()
        if self.decoding is not None:
            self.decoding.shutdown()

    def _run(self) -> None:
        torch.set_num_threads(self.threads)  # in float32 another number rounds otherwise
        ending = False
        while not ending or self.scheduler.busy:
            ending = ending or not self._receive()
            now = time.perf_counter()
            for canvas in self.scheduler.admit():
                self.waited[id(canvas)] = self.waited[id(canvas)][0], now
            if self.scheduler.running:
                self._step(self.scheduler.running)

    def _receive(self) -> bool:
        """Do what callers want; waits if there is nothing else to do. False to end."""
        while True:
            try:
                wanted = self.inbox.get(block=not self.scheduler.busy)
            except queue.Empty:
                return True
            if wanted is None:
                return False
            wanted()

    def _step(self, batch: Sequence[Canvas]) -> None:
        try:
            step(self.bundle.unet, batch, codebook=self.bundle.vqgan.vquantizer)
        except Exception as error:
            for canvas in batch:
                self.waited.pop(id(canvas))[0].set_exception(error)
            self.scheduler.remove(batch)
        for canvas in self.scheduler.finished():
            future, began = self.waited.pop(id(canvas))
            decoded = canvas.tokens, future, time.perf_counter() - began
            if self.decoding is None:
                self._decode(*decoded)
            else:
                self.decoding.submit(self._decode, *decoded)

    def _decode(self, tokens: Tensor, future: Future[Made], sample_s: float) -> None:
        began = time.perf_counter()
        try:
            picture = self.bundle.decode(tokens[None])[0].cpu()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(Made(picture, sample_s, time.perf_counter() - began))
