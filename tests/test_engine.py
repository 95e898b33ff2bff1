"""The engine and its scheduler alone: shared steps, joining and leaving between steps, bounds, nothing left behind."""

import asyncio
import functools
import itertools
import os
import random
import threading

import psutil
import pytest
import torch

from paella import edits
from paella.bundle import load_bundle
from paella.sampler import SamplingConfig, sample, step
from paella.step_scheduler import StepScheduler
from serve.engine import NICENESS, DeadlineExceeded, Draining, Engine, EngineConfig, EngineDied, QueueFull, Task, preview_steps
from serve.knee import Knee


@pytest.fixture(scope="module")
def bundle(clip_bundle):
    return load_bundle(str(clip_bundle))


def canvas(bundle, prompt="x", *, seed=0, steps=4, size=None):
    config = SamplingConfig(num_inference_steps=steps)
    return edits.text_to_image(bundle, prompt, seed=seed, size=size, config=config)


def task(bundle, *, seed=0, steps=4, size=(64, 64), label="", make=None, **more):
    """A picture's bytes are here those of its decoded pixels."""
    made = make or functools.partial(canvas, prompt="x", seed=seed, steps=steps, size=size)
    finish = lambda picture, preview: picture.numpy().tobytes()  # noqa: E731
    return Task(make=made, finish=finish, steps=steps, tokens=size[0] * size[1] // 16, label=label, **more)


def children():
    """Processes of lanes."""
    return [process for process in psutil.Process().children() if "serve.lanes" in process.cmdline()]


async def all_of(ticket):
    return [event async for event in ticket]


def with_engine(bundle, run, lanes=1, **config):
    """Run a coroutine with an engine; behind it there are no images, threads and processes of the engine's left."""

    async def body():
        engine = Engine(bundle, EngineConfig(lanes=lanes, **config))
        try:
            await engine.ready()
            nice = min(19, os.nice(0) + NICENESS)
            assert [process.nice() for process in children()] == [nice] * (lanes - 1)  # as the thread that started it
            return await asyncio.wait_for(run(engine), 120)
        finally:
            await asyncio.wait_for(engine.close(), 60)
            assert not engine.images and not engine.by_canvas
            assert not any(thread.is_alive() for thread in engine.sampling) and not children()

    return asyncio.run(body())


def test_scheduler_is_fair_and_bounded(bundle):
    scheduler = StepScheduler(max_tokens=600)
    first = [canvas(bundle, steps=2, seed=seed) for seed in range(2)]
    large, small = canvas(bundle, steps=1, size=(128, 128)), canvas(bundle, steps=1, size=(32, 32))
    for each in (*first, large, small):
        scheduler.add(each)
    assert scheduler.admit() == first  # the large one does not fit, and nobody overtakes it
    finished = []
    while scheduler.busy:
        scheduler.admit()
        step(bundle.unet, scheduler.running)
        finished += scheduler.finished()
    assert finished == [*first, large, small]


def test_scheduler_forgets(bundle):
    scheduler, images = StepScheduler(max_tokens=256), [canvas(bundle, seed=seed) for seed in range(3)]
    for each in images:
        scheduler.add(each)
    scheduler.admit()
    scheduler.remove(images[:2])
    assert scheduler.admit() == images[2:]


def observed(knee: Knee, **seconds_of_tokens: float) -> None:
    """Five steps of each size, which is written _4=1.0, and one that finds its kernels before them."""
    for name, seconds in seconds_of_tokens.items():
        for each in (60.0, *[seconds] * 5):
            knee.observe(int(name[1:]), each)


def test_knee():
    clock = [0.0]
    knee = Knee(2, 16, clock=lambda: clock[0])
    assert [knee.limit(demand) for demand in (0, 2, 3, 4, 9, 16, 1000)] == [2, 2, 4, 4, 16, 16, 16]
    observed(knee, _2=1.0, _4=1.0, _8=2.0)  # 2, 4 and 4 a second
    assert [knee.limit(demand) for demand in (2, 4, 8)] == [2, 4, 4]
    assert knee.limit(9) == 16, "not tried yet, and somebody waits for it"
    observed(knee, _16=3.9)
    assert knee.limit(1000) == 4, "which brings 3 % more than 4"
    clock[0] = 61.0
    assert knee.limit(8) == 8


def test_knee_behind_a_plateau():
    knee = Knee(2, 16)
    observed(knee, _2=1.0, _4=1.0, _8=2.0, _16=3.0)
    assert [knee.limit(demand) for demand in (4, 8, 16)] == [4, 4, 16]


def test_one_slow_step_is_no_measurement():
    knee = Knee(2, 16)
    observed(knee, _2=1.0, _4=1.0)
    for seconds in (9.0, 1.0, 1.0, 9.0, 1.0):
        knee.observe(8, seconds)
    assert knee.limit(8) == 8


def test_previews_are_spread():
    assert preview_steps(12, 3) == {3: 0, 6: 1, 9: 2}
    assert preview_steps(1, 3) == {}
    assert preview_steps(2, 3) == {1: 0}


def test_all_modes_and_sizes_share_steps(bundle):
    """A long request runs; a short one of another mode joins at the next step, and is done first."""
    image, mask = torch.rand(3, 64, 64), torch.zeros(64, 64, dtype=torch.bool)
    mask[:, 32:] = True

    async def run(engine):
        long = engine.submit([task(bundle, steps=60, label="long", mode="text-to-image")])
        while engine.running == 0 or engine.trace == []:
            await asyncio.sleep(0.001)
        paint = functools.partial(
            edits.inpaint, image=image, mask=mask, prompt="y", seed=1, config=SamplingConfig(num_inference_steps=4)
        )
        joined = engine.submit([task(bundle, steps=4, label="joined", mode="inpaint", make=paint)])
        wide = engine.submit([task(bundle, steps=4, size=(32, 64), label="wide", mode="text-to-image")])
        await asyncio.gather(all_of(joined), all_of(wide))
        assert engine.images  # the long one is still there
        await all_of(long)
        return list(engine.trace)

    trace = with_engine(bundle, run, min_batch_images=3)
    shared = [[label for label, _, _ in row["images"]] for row in trace]
    steps_of = {
        name: [number for row in trace for label, _, number in row["images"] if label == name]
        for name in ("long", "joined", "wide")
    }
    assert steps_of == {"long": [*range(60)], "joined": [*range(4)], "wide": [*range(4)]}
    for name in ("joined", "wide"):
        rows = [index for index, labels in enumerate(shared) if name in labels]
        assert rows == [*range(rows[0], rows[0] + 4)]  # no step is missed
        assert all("long" in shared[index] for index in rows)
        assert 0 < rows[0] < 55


def test_lanes_do_not_wait_for_each_other(bundle):
    """Of two images at the same time each has a lane; of four each lane has two, and every image gets every step."""

    async def run(engine):
        two = [engine.submit([task(bundle, seed=seed, steps=30, label=f"{seed}")]) for seed in range(2)]
        await asyncio.gather(*map(all_of, two))
        at = len(engine.trace)
        four = [engine.submit([task(bundle, seed=seed, steps=30, label=f"{seed}")]) for seed in range(4)]
        await asyncio.gather(*map(all_of, four))
        return list(engine.trace)[:at], list(engine.trace)[at:]

    for number, rows in zip((2, 4), with_engine(bundle, run, min_batch_images=4, lanes=2), strict=True):
        taken = [image for row in rows for image in row["images"]]
        assert sorted(taken) == sorted((f"{seed}", "", step) for seed in range(number) for step in range(30))
        full = [row for row in rows if row["running"] == number]
        assert sum(len(row["images"]) == number // 2 for row in full) > 0.9 * len(full)  # the first ones may be fewer
        spans = sorted((row["at"], row["at"] + row["seconds"]) for row in full)
        beside = sum(start < end for (_, end), (start, _) in itertools.pairwise(spans))
        assert beside > 0, "one lane after the other"  # few where other tests want both cores, too: steps give way to them


def test_pictures_are_those_of_sample(bundle):
    wanted = [canvas(bundle, seed=seed, steps=3 + seed, size=(64, 64 - 32 * (seed % 2))) for seed in range(6)]
    expected = [bundle.decode(sample(bundle.unet, [each]))[0].numpy().tobytes() for each in wanted]

    async def run(engine):
        tasks = [task(bundle, seed=seed, steps=3 + seed, size=(64, 64 - 32 * (seed % 2))) for seed in range(6)]
        return await asyncio.gather(*(all_of(engine.submit([each])) for each in tasks))

    for events, data in zip(with_engine(bundle, run, lanes=2), expected, strict=True):
        assert [(event.kind, event.data == data) for event in events] == [("completed", True)]


def test_clients_that_go_away_leave_at_the_next_step(bundle):
    """200 requests of which most are dropped at random; a slot is free within a step, and nothing stays."""
    rng = random.Random(0)

    async def patient(engine, index):
        return await all_of(engine.submit([task(bundle, seed=index, steps=3, label="kept")]))

    async def hasty(engine, index):
        running = asyncio.create_task(all_of(engine.submit([task(bundle, steps=1000, label=f"gone {index}")])))
        await asyncio.sleep(rng.uniform(0, 0.3))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    async def run(engine):
        before = threading.active_count()
        kept = await asyncio.gather(*(patient(engine, i) if i % 20 == 0 else hasty(engine, i) for i in range(200)))
        assert sum(1 for events in kept if events) == 10
        assert len(asyncio.all_tasks()) <= 2
        assert threading.active_count() <= before + 6
        return list(engine.trace)

    trace = with_engine(bundle, run, max_queued_images=300)
    assert {"kept"} <= {label for row in trace for label, _, _ in row["images"]}


def test_a_cancelled_image_takes_no_further_step(bundle):
    async def run(engine):
        ticket = engine.submit([task(bundle, steps=1000, label="gone")])
        while not engine.trace:
            await asyncio.sleep(0.001)
        ticket.cancel()
        at = len(engine.trace)
        while engine.images:
            await asyncio.sleep(0.001)
        return at, len(engine.trace)

    at, end = with_engine(bundle, run)
    assert end - at <= 1  # the step that was under way when the ticket was cancelled


def test_deadlines_bounds_and_mistakes(bundle):
    def fails(bundle):
        raise ValueError("no such thing")

    async def run(engine):
        (late,) = await all_of(engine.submit([task(bundle, steps=1000, deadline=0.0)]))
        assert isinstance(late.error, DeadlineExceeded)
        (wrong,) = await all_of(engine.submit([task(bundle, make=fails)]))
        assert isinstance(wrong.error, ValueError)
        with engine.room_for(3):  # for orders that are being planned
            for asked in (engine.room_for(2).__enter__, functools.partial(engine.submit, [task(bundle)] * 2)):
                with pytest.raises(QueueFull):
                    asked()
            with engine.room_for(1):
                pass
        ticket = engine.submit([task(bundle, seed=seed) for seed in range(4)])
        with pytest.raises(QueueFull) as full:
            engine.submit([task(bundle)] * 5)
        assert full.value.wait_s > 0
        assert [event.kind for event in await all_of(ticket)] == ["completed"] * 4
        engine.draining = True
        with pytest.raises(Draining):
            engine.submit([task(bundle)])

    with_engine(bundle, run, max_queued_images=4)


def test_no_more_images_than_the_memory_takes(bundle):
    """Also where there are more lanes than that."""

    async def run(engine):
        await asyncio.gather(*(all_of(engine.submit([task(bundle, seed=seed)])) for seed in range(3)))
        return [row["running"] for row in engine.trace]

    assert set(with_engine(bundle, run, lanes=2, max_batch_images=1)) == {1}


@pytest.fixture
def quiet(monkeypatch):
    """A thread that dies says nothing."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)


async def assert_dead(engine):
    for asked in (engine.check, functools.partial(engine.submit, [task(engine.bundle)])):
        with pytest.raises(EngineDied):
            asked()
    for thread in engine.sampling:
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
    assert not children()


def test_a_dead_engine_says_so(bundle, quiet):
    """An error in a step ends the engine: those who wait are told, and the health check too."""

    async def run():
        engine = Engine(bundle, EngineConfig(lanes=1))
        broken = canvas(bundle)
        broken.tokens = torch.zeros(3, 3, dtype=torch.long)  # a grid that the network refuses
        (event,) = await all_of(engine.submit([task(bundle, make=lambda bundle: broken)]))
        assert isinstance(event.error, EngineDied)
        await assert_dead(engine)

    asyncio.run(run())


def test_an_engine_dies_with_the_process_of_a_lane(bundle, quiet):
    async def run():
        engine = Engine(bundle, EngineConfig(lanes=2))
        await engine.ready()
        tickets = [engine.submit([task(bundle, seed=seed, steps=1000)]) for seed in range(2)]
        while len(engine.trace) < 20:
            await asyncio.sleep(0.01)
        children()[0].kill()
        for (event,) in await asyncio.gather(*map(all_of, tickets)):
            assert isinstance(event.error, EngineDied) and "exit code -9" in str(event.error)
        await assert_dead(engine)

    asyncio.run(asyncio.wait_for(run(), 60))
