"""The engine: every image of every request in one running batch.

A sampling thread takes one step after the other. Between two steps it lets waiting images in and those out that are done,
cancelled or late. Prompts and images are encoded on a thread of their own, pictures are decoded on another, and the event loop
only hands things on. A small model on a CPU has several sampling threads, its lanes: each takes its share of the batch through a
step and does not wait for the others, the first one here and each other one in a process of its own. A large model on a CPU has
one thread for everything, whose passes have all cores: a second team of OpenMP's threads would only be in its way. Nothing here
knows of HTTP or Ray:

    engine = Engine(bundle)
    await engine.ready()
    ticket = engine.submit([Task(make, encode, steps=12, tokens=256)])
    async for event in ticket: ...
    await engine.close()
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paella import edits
from paella.bundle import Bundle
from paella.cuda_graphs import GraphedUnet
from paella.sampler import Canvas, Predictor, SamplingConfig, step
from paella.step_scheduler import StepScheduler, num_tokens
from serve.knee import Knee
from serve.lanes import StepProcess

NICENESS = 10
"""How much nicer steps on a CPU are than all else: who wants to be let in, or turned away, need not wait for one. It is added to
what the process has, which is 15 in a worker of Ray's, and may only grow."""
MAX_PREVIEWS_BEHIND = 8
"""Previews are left out while more pictures than this wait to be decoded."""


class QueueFull(Exception):
    """No room in the queue; `wait_s` is when there is likely to be some."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"the queue is full; try again in {wait_s:.1f} s")
        self.wait_s = wait_s


class Draining(Exception):
    """The engine takes no new images."""


class DeadlineExceeded(Exception):
    """The deadline passed before the image was done."""


class EngineDied(Exception):
    """The sampling thread has ended by an error."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of one engine. Images are counted at the model's own size."""

    max_queued_images: int = 64
    """Images that wait for their first step; more are refused."""
    min_batch_images: int = 2
    """Images in the batch however little mixing pays, so that nobody waits for somebody else's last step."""
    max_batch_images: int = 32
    """Images in the batch at most; what the memory takes."""
    lanes: int = 2
    """Shares of the batch that a CPU steps side by side, for a small model; each after the first takes a process, of 350 MB."""

    def __post_init__(self) -> None:
        for name in ("max_queued_images", "min_batch_images", "max_batch_images", "lanes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: an integer of at least 1")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One image that is wanted."""

    make: Callable[[Bundle], Canvas]
    """Makes its canvas, on the preparing thread; a ValueError is the client's mistake."""
    finish: Callable[[Tensor, int | None], bytes]
    """Picture (3,H,W) in [0,1] → bytes of the answer, on the decoding thread; with the number of a preview, or None."""
    steps: int
    tokens: int
    deadline: float = float("inf")
    """By time.monotonic()."""
    num_previews: int = 0
    label: str = ""
    """What the trace calls it."""
    mode: str = ""


@dataclass(frozen=True)
class Event:
    """What became of an image: `preview` (data, number), `completed` (data) or `failed` (error)."""

    kind: str
    index: int
    data: bytes = b""
    preview: int = 0
    error: Exception | None = None
    times: dict[str, float] = field(default_factory=dict)
    """queue_ms, encode_ms, sample_ms, decode_ms."""


@dataclass(eq=False)
class _Image:
    """A task on its way through the engine."""

    task: Task
    index: int
    ticket: Ticket
    canvas: Canvas | None = None
    submitted: float = 0.0
    marks: dict[str, float] = field(default_factory=dict)
    previews: dict[int, int] = field(default_factory=dict)  # step → number of the preview behind it
    over: bool = False

    def gone(self, now: float) -> bool:
        return self.ticket.cancelled or self.over or now > self.task.deadline


class Ticket:
    """A request's images; iterate over it for their events. Leaving the iteration early cancels what is left."""

    def __init__(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        self.loop, self.open = loop, number
        self.cancelled = False
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """From any thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            self.cancelled = True  # the loop is closed: nobody listens

    def cancel(self) -> None:
        """The images leave at the next step."""
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while self.open:
                event = await self.events.get()
                self.open -= event.kind != "preview"
                yield event
        finally:
            self.cancel()


class Engine:
    """Runs one bundle. `submit` and the tickets belong to one event loop."""

    def __init__(self, bundle: Bundle, config: EngineConfig | None = None) -> None:
        self.bundle, self.config = bundle, config or EngineConfig()
        height, width = bundle.config.grid(*bundle.default_size)
        per_image = height * width
        weight = next(bundle.unet.parameters())
        self.device = weight.device
        on_cpu = self.device.type == "cpu"
        small = on_cpu and bundle.config.single_threaded
        self.lanes, self.threads = (self.config.lanes, 1) if small else (1, torch.get_num_threads())
        self.one_thread = on_cpu and not small
        high = self.config.max_batch_images
        low = min(max(self.config.min_batch_images, self.lanes), high)
        if on_cpu and weight.dtype == torch.float32:  # each image has its own pass, so that a larger batch never pays
            high = low
        predictor: Predictor = bundle.unet if on_cpu else GraphedUnet(bundle.unet, (height, width))
        self.step_here = functools.partial(step, predictor, codebook=bundle.vqgan.vquantizer)
        self.knee = Knee(low * per_image, high * per_image)
        self.scheduler = StepScheduler(self.knee.low)
        self.trace: deque[dict[str, Any]] = deque(maxlen=10_000)
        self.images: set[_Image] = set()  # all that are not over
        self.planned = 0  # images that there is room for, and no task yet
        self.lock = threading.Lock()  # of what `submit` and the ends of images change
        self.turn = threading.Condition()  # of what the lanes share: scheduler, knee, trace and these four
        self.by_canvas: dict[int, _Image] = {}
        self.unprepared: deque[_Image] = deque()
        self.in_step: set[int] = set()  # ids of canvases that a lane has
        self.closed = False
        self.starting = self.lanes  # lanes that cannot take a step yet
        self.rate = 0.0  # tokens and steps per second, of late
        self.draining = False
        self.error: BaseException | None = None
        self.observe: Callable[[str, float, dict[str, str]], None] = lambda name, value, tags: None
        self.counter = itertools.count()
        new_thread = functools.partial(ThreadPoolExecutor, 1, initializer=torch.set_num_threads, initargs=(self.threads,))
        self.preparing, self.decoding = new_thread(), new_thread()
        self.decodes_behind = 0
        lanes = range(self.lanes)
        self.sampling = [threading.Thread(target=self._sample, args=[lane], name=f"lane {lane}", daemon=True) for lane in lanes]
        for thread in self.sampling:
            thread.start()

    # what the event loop calls

    async def ready(self) -> None:
        """Return once all lanes can take steps; images may be submitted before. Raises EngineDied."""
        while self.starting:
            self.check()
            await asyncio.sleep(0.02)

    @contextlib.contextmanager
    def room_for(self, images: int) -> Iterator[None]:
        """Keep places for images while their tasks are planned; `submit` those before anything is awaited. Raises as it does."""
        self._require_room(images)
        self.planned += images
        try:
            yield
        finally:
            self.planned -= images

    def _require_room(self, images: int) -> None:
        self.check()
        if self.draining:
            raise Draining
        if self.queued + self.planned + images > self.config.max_queued_images:
            raise QueueFull(self.wait_s())

    def submit(self, tasks: Sequence[Task]) -> Ticket:
        """Take a request's images in, all or none. Raises QueueFull, Draining or EngineDied."""
        with self.lock:
            self._require_room(len(tasks))
            ticket = Ticket(asyncio.get_running_loop(), len(tasks))
            images = [
                _Image(task, index, ticket, submitted=time.monotonic(), previews=preview_steps(task.steps, task.num_previews))
                for index, task in enumerate(tasks)
            ]
            self.images |= set(images)
        if self.one_thread:
            with self.turn:
                self.unprepared += images
                self.turn.notify()
        else:
            for image in images:
                self.preparing.submit(self._prepare, image)
        return ticket

    @property
    def queued(self) -> int:
        """Images that have not had their first step."""
        return sum("started" not in image.marks for image in list(self.images))

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    def wait_s(self) -> float:
        """Seconds until all that is here now is done, by the speed of late."""
        left = sum(
            image.task.tokens * (image.task.steps - (image.canvas.step if image.canvas else 0)) for image in list(self.images)
        )
        return left / self.rate if self.rate else 1.0

    def check(self) -> None:
        """Raises EngineDied if images would wait for ever."""
        if self.error is not None or not all(thread.is_alive() for thread in self.sampling):
            raise EngineDied(f"the sampling thread has ended: {self.error}")

    async def close(self) -> None:
        """Take nothing new, finish what is here, end the threads."""
        self.draining = True
        while self.images and self.error is None:
            await asyncio.sleep(0.02)
        with self.turn:
            self.closed = True
            self.turn.notify_all()
        for thread in self.sampling:
            await asyncio.to_thread(thread.join)
        for pool in (self.preparing, self.decoding):
            pool.shutdown(wait=False)

    # the preparing thread, or the sampling thread of a large model

    def _prepare(self, image: _Image) -> None:
        began = time.monotonic()
        if image.gone(began):
            return self._drop(image)
        try:
            canvas = image.task.make(self.bundle)
        except Exception as error:
            return self._end(image, Event("failed", image.index, error=error))
        image.marks |= {"encode": time.monotonic() - began, "prepared": time.monotonic()}
        with self.turn:
            image.canvas = canvas
            self.by_canvas[id(canvas)] = image
            self.scheduler.add(canvas)
            self.turn.notify_all()

    # the sampling threads

    def _sample(self, lane: int) -> None:
        torch.set_num_threads(self.threads)  # here as in the pools: in float32 another number rounds otherwise
        if self.device.type == "cpu" and sys.platform == "linux":  # where a thread has its own, which its process begins with
            os.nice(NICENESS)
        try:
            with self._steps_of(lane) as take_step:
                with self.turn:
                    self.starting -= 1
                while (work := self._next(lane)) is not None:
                    if isinstance(work, _Image):
                        self._prepare(work)
                    else:
                        self._step(work, take_step)
        except BaseException as error:
            with self.turn:
                self.error = error
                self.turn.notify_all()
            for image in list(self.images):
                self._end(image, Event("failed", image.index, error=EngineDied(str(error))))
            raise

    @contextlib.contextmanager
    def _steps_of(self, lane: int) -> Iterator[Callable[[list[Canvas]], None]]:
        """What takes the steps of a lane."""
        if lane:
            with contextlib.closing(StepProcess(self.bundle.unet, self.bundle.vqgan.vquantizer)) as take_step:
                yield take_step
        else:
            if self.device.type == "cuda":
                self._warm_up()
            yield self.step_here

    def _warm_up(self) -> None:
        """Take steps of one image and of more, for which a GPU finds kernels, and of which it records those of few."""
        number, config = 1, SamplingConfig(num_inference_steps=1)
        while number <= self.config.max_batch_images:
            self.step_here([edits.text_to_image(self.bundle, "x", seed=0, config=config) for _ in range(number)])
            number *= 2

    def _next(self, lane: int) -> _Image | list[Canvas] | None:
        """What a lane does next, as soon as there is something: an image to prepare, or canvases to step. None to end.

        An image that is alone stays in the first lane, whose steps need not be sent anywhere.
        """
        with self.turn:
            while self.error is None:
                if self.unprepared:
                    return self.unprepared.popleft()
                self._admit()
                running = self.scheduler.running
                share = [canvas for canvas in running if id(canvas) not in self.in_step][: -(-len(running) // self.lanes)]
                if share and (lane == 0 or self.in_step):
                    self.in_step |= set(map(id, share))
                    if len(self.in_step) < len(running):
                        self.turn.notify_all()  # there is work for another lane
                    return share
                ended = self.closed and not self.scheduler.busy
                if share or ended:
                    self.turn.notify_all()  # there is work for the first lane, or all end
                if ended:
                    return None
                self.turn.wait()
        return None

    def _admit(self) -> None:
        now = time.monotonic()
        here = [*self.scheduler.running, *self.scheduler.waiting]
        gone = [canvas for canvas in here if id(canvas) not in self.in_step and self.by_canvas[id(canvas)].gone(now)]
        if gone:
            self.scheduler.remove(gone)
            for canvas in gone:
                self._drop(self.by_canvas.pop(id(canvas)))
        self.scheduler.max_tokens = self.knee.limit(num_tokens([*self.scheduler.running, *self.scheduler.waiting]))
        for canvas in self.scheduler.admit():
            self.by_canvas[id(canvas)].marks["started"] = time.monotonic()

    def _step(self, share: list[Canvas], take_step: Callable[[list[Canvas]], None]) -> None:
        images = [self.by_canvas[id(canvas)] for canvas in share]
        taken = [(image.task.label, image.task.mode, canvas.step) for image, canvas in zip(images, share, strict=True)]
        running, began = list(self.scheduler.running), time.monotonic()
        take_step(share)
        if self.device.type == "cuda":  # or steps would be taken ahead of time, which no image could join or leave
            torch.cuda.current_stream(self.device).synchronize()
        seconds, tokens = time.monotonic() - began, num_tokens(running)  # in which the other lanes take their shares
        for image, canvas in zip(images, share, strict=True):
            if not canvas.done and canvas.step in image.previews and self.decodes_behind <= MAX_PREVIEWS_BEHIND:
                self._decode(image, canvas.prediction, image.previews[canvas.step])
        with self.turn:
            self.knee.observe(tokens, seconds)
            self.rate = tokens / seconds if not self.rate else 0.9 * self.rate + 0.1 * tokens / seconds
            row = {"step": next(self.counter), "at": began, "seconds": seconds, "images": taken, "running": len(running)}
            self.trace.append(row)
            done = [canvas for canvas in share if canvas.done]
            self.scheduler.remove(done)
            finished = [self.by_canvas.pop(id(canvas)) for canvas in done]
            self.in_step -= set(map(id, share))
        self.observe("step", seconds, {})
        self.observe("occupancy", tokens / self.knee.high, {})
        self.observe("tokens", num_tokens(share), {})
        for image, canvas in zip(finished, done, strict=True):
            image.marks["sampled"] = time.monotonic()
            self._decode(image, canvas.tokens, None)

    def _decode(self, image: _Image, tokens: Tensor, preview: int | None) -> None:
        with self.lock:
            self.decodes_behind += 1
        if self.one_thread:
            self._deliver(image, tokens, preview)
        else:
            self.decoding.submit(self._deliver, image, tokens, preview)

    # the decoding thread, or the sampling thread of a large model

    def _deliver(self, image: _Image, tokens: Tensor, preview: int | None) -> None:
        try:
            self._finish(image, tokens, preview)
        finally:
            with self.lock:
                self.decodes_behind -= 1

    def _finish(self, image: _Image, tokens: Tensor, preview: int | None) -> None:
        began = time.monotonic()
        if image.gone(began):
            return self._drop(image) if preview is None else None
        try:
            data = image.task.finish(self.bundle.decode(tokens[None])[0], preview)
        except Exception as error:
            return self._end(image, Event("failed", image.index, error=error))
        if preview is not None:
            return image.ticket.put(Event("preview", image.index, data, preview))
        marks, done = image.marks, time.monotonic()
        seconds = {
            "queue_ms": marks["started"] - image.submitted - marks["encode"],
            "encode_ms": marks["encode"],
            "sample_ms": marks["sampled"] - marks["started"],
            "decode_ms": done - marks["sampled"],
        }
        times = {name: round(1000 * value, 3) for name, value in seconds.items()}
        self._end(image, Event("completed", image.index, data, times=times))

    # from any thread

    def _drop(self, image: _Image) -> None:
        """An image that nobody waits for any more, or that is late."""
        late = not image.ticket.cancelled
        error = DeadlineExceeded("the deadline passed before the image was done") if late else asyncio.CancelledError()
        self._end(image, Event("failed", image.index, error=error))  # type: ignore[arg-type]

    def _end(self, image: _Image, event: Event) -> None:
        with self.lock:
            if image.over:
                return
            image.over = True
            self.images.discard(image)
        image.ticket.put(event)


def preview_steps(steps: int, number: int) -> dict[int, int]:
    """After which steps the previews of an image are made, evenly spread: {step: number of the preview}."""
    wanted = sorted({max(1, round(steps * (i + 1) / (number + 1))) for i in range(number)} - {steps})
    return {step: index for index, step in enumerate(wanted)}
