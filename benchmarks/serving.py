"""What mixing every request into one running batch is worth: the server against the same server with one request at a time, and
against `@serve.batch` with whole requests, over the library's `sample()` and over our engine.

    python benchmarks/serving.py                  # tiny with random weights, about ten minutes
    python benchmarks/serving.py --seconds 5
    python benchmarks/serving.py --preset paella-1b --ways ours --clients 1 8 32     # on a GPU

Closed loops: 8 clients (or --clients) that ask again as soon as they have their picture. Open loop: Poisson arrivals at 70 %
of what the first way can do in the closed loop (or --rate), of 4, 12 and 24 steps, pictures and edits, two sizes; the same
arrivals for all. On a CPU pictures are float32 and the same, bit for bit. The last line is one JSON object. (Not called serve.py:
as a script it would hide the package.)
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from PIL import Image
from ray import serve as ray_serve

from paella import edits
from paella.bundle import Bundle, load_bundle, save_bundle
from paella.conditioning import TextEncoders
from paella.config import PRESETS, NewByT5
from paella.sampler import SamplingConfig, sample
from paella.unet import Paella
from paella.vqgan import VQModel
from serve.app import Arguments, app, threads
from serve.ingress import Ingress
from serve.modes import plan
from serve.replica import EngineSettings, Generator
from serve.run import ray_serve_here

PORT = 8437
TIMES = ("queue_ms", "encode_ms", "sample_ms", "decode_ms")


class OneAtATime(Generator):
    """The same engine, which has one request at a time: the next one waits for its answer."""

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        await super().reconfigure(user_config)
        self.turn = asyncio.Lock()

    async def stream(self, order):
        async with self.turn:
            async for event in super().stream(order):
                yield event


class WholeRequests(Generator):
    """`@serve.batch` as its documentation has it: up to 8 requests are planned, sampled and decoded together on a thread, those
    of one size in one call of `sample()`; the next ones wait until all are done."""

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        await super().reconfigure(user_config)
        self.thread = ThreadPoolExecutor(1)

    async def generate(self, order):
        return await self.batched(order)

    @ray_serve.batch(max_batch_size=8, batch_wait_timeout_s=0.02)
    async def batched(self, orders):
        return await asyncio.get_running_loop().run_in_executor(self.thread, self.answers, orders)

    @torch.inference_mode()
    def answers(self, orders):
        bundle = self._engine.bundle
        plans = [plan(bundle, order) for order in orders]
        canvases = [[task.make(bundle) for task in planned.tasks] for planned in plans]
        by_size: dict[torch.Size, list] = {}
        for canvas in (each for some in canvases for each in some):
            by_size.setdefault(canvas.tokens.shape, []).append(canvas)
        for some in by_size.values():
            sample(bundle.unet, some, codebook=bundle.vqgan.vquantizer)
        return [self.answer(*each) for each in zip(orders, plans, canvases, strict=True)]

    def answer(self, order, planned, canvases):
        bundle = self._engine.bundle
        pictures = [bundle.decode(canvas.tokens[None])[0] for canvas in canvases]
        images = [task.finish(picture, None) for task, picture in zip(planned.tasks, pictures, strict=True)]
        times = dict.fromkeys(TIMES, 0.0)  # which nobody takes
        return {**self._accepted(order, planned, bundle.digest), "images": images, "times": [times] * len(images)}


class WholeRequestsOverOurs(Generator):
    """The same over our engine, which has the requests of a batch in its lanes."""

    async def generate(self, order):
        return await self.batched(order)

    @ray_serve.batch(max_batch_size=8, batch_wait_timeout_s=0.02)
    async def batched(self, orders):
        return await asyncio.gather(*(super(WholeRequestsOverOurs, self).generate(order) for order in orders))


WAYS: dict[str, type[Generator]] = {
    "@serve.batch": WholeRequests,
    "and our engine": WholeRequestsOverOurs,
    "ours": Generator,
    "one at a time": OneAtATime,
}


def build_bundle(path: Path, preset: str) -> str:
    """A bundle with random weights, whose text encoder is a small one."""
    torch.manual_seed(0)
    config = PRESETS[preset]
    if config.text.new_byt5 is None:
        text = dataclasses.replace(PRESETS["tiny"].text, new_byt5=NewByT5(d_model=config.unet.byt5_embd))
        config = dataclasses.replace(config, text=text)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        unet, vqgan = Paella(config.unet), VQModel(config.vqgan)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    weights = {"unet": unet.cpu().state_dict(), "vqgan": vqgan.cpu().state_dict()}
    save_bundle(path, config, weights, "random weights", TextEncoders.create(config.text))
    return str(path)


def deployed(model: str, kind: type) -> None:
    """Serve a bundle by one of the four ways, in place of what was served before."""
    if kind is Generator:
        application = app(Arguments(model=model, name="model", max_queued_images=1000))
    else:
        settings = EngineSettings(model=model, name="model", max_queued_images=1000)
        environment = {"env_vars": threads()}
        engine = ray_serve.deployment(
            kind,
            name="engine-model",
            user_config=settings.model_dump(),
            max_ongoing_requests=10_000,
            ray_actor_options={"num_cpus": 1, "num_gpus": float(torch.cuda.is_available()), "runtime_env": environment},
        ).bind()
        application = ray_serve.deployment(Ingress, name="ingress", max_ongoing_requests=10_000).bind(
            {"model": engine}, "model", 600
        )
    ray_serve.run(application, name="paella")


def requests(number: int, seed: int, side: int, mixed: bool) -> list[tuple[str, dict]]:
    """Requests of a run: text to image of 12 steps, or everything mixed."""
    import base64

    rng, made = random.Random(seed), []
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    for index in range(number):
        fields: dict[str, Any] = {"prompt": f"a red circle and a blue square, number {index}", "seed": index}
        if not mixed:
            made.append(("generations", fields))
        elif rng.random() < 0.3:
            made.append(("edits", fields | {"image": url, "num_inference_steps": rng.choice((4, 12, 24))}))
        else:
            size = rng.choice((f"{side}x{side}", f"{side}x{side // 2}"))
            made.append(("generations", fields | {"size": size, "num_inference_steps": rng.choice((4, 12, 24))}))
    return made


async def ask(session: aiohttp.ClientSession, request: tuple[str, dict]) -> tuple[float, float]:
    """Seconds until the answer is here, and how many of them the engine had it for."""
    began = time.perf_counter()
    async with session.post(f"http://127.0.0.1:{PORT}/v1/images/{request[0]}", json=request[1]) as answer:
        body = await answer.read()
        assert answer.status == 200, body
    took, metrics = time.perf_counter() - began, json.loads(body)["metrics"]
    return took, sum(metrics[name] for name in TIMES) / 1000


async def closed_loop(clients: int, seconds: float, side: int) -> dict[str, float]:
    """Pictures per second and latencies of clients that ask one after the other."""
    latencies: list[tuple[float, float]] = []
    queue = iter(requests(100_000, 1, side, mixed=False))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for _ in range(3):
            await ask(session, next(queue))
        began = time.perf_counter()

        async def client() -> None:
            while time.perf_counter() - began < seconds:
                latencies.append(await ask(session, next(queue)))

        await asyncio.gather(*(client() for _ in range(clients)))
        elapsed = time.perf_counter() - began
    return summary(latencies, elapsed)


async def open_loop(rate: float, seconds: float, side: int) -> list[tuple[float, float]]:
    """Latencies of requests that come when they come."""
    rng, number = random.Random(2), max(10, round(rate * seconds))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        tasks = []
        for request in requests(number, 3, side, mixed=True):
            await asyncio.sleep(rng.expovariate(rate))
            tasks.append(asyncio.create_task(ask(session, request)))
        return await asyncio.gather(*tasks)


def steps_of_late(seconds: float) -> dict[str, float]:
    """What the engine's trace says of its last seconds: how many images a step had, and how long it took."""
    rows = ray_serve.get_deployment_handle("engine-model", "paella").trace.remote().result()
    rows = [row for row in rows if row["at"] > rows[-1]["at"] - seconds]
    images, took = [len(row["images"]) for row in rows], [row["seconds"] for row in rows]
    at_most, step_s = max(row["running"] for row in rows), statistics.median(took)
    return {"steps": len(rows), "images_of_a_lane_p50": statistics.median(images), "batch_max": at_most, "step_s_p50": step_s}


def summary(latencies: list[tuple[float, float]], elapsed: float) -> dict[str, float]:
    ordered = sorted(took for took, _ in latencies)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    outside = statistics.median(took - inside for took, inside in latencies)
    percentiles = {"p50_s": statistics.median(ordered), "p99_s": p99, "outside_engine_s": outside}
    return {"images_per_s": len(ordered) / elapsed, **percentiles, "images": len(ordered)}


@torch.inference_mode()
def library(model: str, seconds: float) -> float:
    """Median seconds of a picture by the library alone, from a new prompt to pixels."""
    bundle, took, began = loaded(model), [], time.perf_counter()
    config = SamplingConfig(cfg=(4.0,), temperature=(1.0, 0.3))
    for index in range(10_000):
        at = time.perf_counter()
        canvas = edits.text_to_image(bundle, f"a red circle and a blue square, number {index}", seed=index, config=config)
        bundle.decode(sample(bundle.unet, [canvas], codebook=bundle.vqgan.vquantizer)).cpu()
        if index:  # the first one finds its kernels
            took.append(time.perf_counter() - at)
        if took and time.perf_counter() - began > seconds:
            break
    return statistics.median(took)


def loaded(model: str) -> Bundle:
    """As the server has it."""
    on_gpu = torch.cuda.is_available()
    return load_bundle(model, "cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else torch.float32)


def alone(function: Callable[[str, float], float], model: str, seconds: float, number: int = 1) -> float:
    """What a function gives in a process of its own, where no thread is left behind by another; the mean of several at once."""
    with ProcessPoolExecutor(number, get_context("spawn")) as processes:
        return statistics.mean([*processes.map(function, [model] * number, [seconds] * number)])


def engine_alone(model: str, seconds: float) -> float:
    """Median seconds of a picture by the engine alone, one after the other."""
    return asyncio.run(_engine_alone(model, seconds))


async def _engine_alone(model: str, seconds: float) -> float:
    from serve.engine import Engine
    from serve.modes import Order
    from serve.schemas import GenerationRequest

    with ThreadPoolExecutor(1) as loader:  # as in the replica, the thread that loads ends
        bundle = loader.submit(loaded, model).result()
    engine = Engine(bundle)
    await engine.ready()
    took, began = [], time.perf_counter()
    for index in range(10_000):
        at = time.perf_counter()
        request = GenerationRequest(prompt=f"a red circle and a blue square, number {index}", seed=index)
        tasks = plan(engine.bundle, Order(request=request, seed=index, request_id="x", timeout_s=60, trace={})).tasks
        tasks = [dataclasses.replace(each, finish=lambda picture, preview: picture.cpu().numpy().tobytes()) for each in tasks]
        _ = [event async for event in engine.submit(tasks)]
        if index:  # the first one finds its kernels
            took.append(time.perf_counter() - at)
        if took and time.perf_counter() - began > seconds:
            break
    await engine.close()
    return statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="of serving, in this order")
    parser.add_argument("--clients", type=int, nargs="+", default=[8], help="of the closed loops")
    parser.add_argument("--seconds", type=float, default=20, help="of each run")
    parser.add_argument(
        "--rounds", type=int, default=1, help="of open loops, in turn, whose requests count together: a machine's speed changes"
    )
    parser.add_argument("--rate", type=float, help="requests per second of the open loop")
    arguments = parser.parse_args()
    seconds, side = arguments.seconds, PRESETS[arguments.preset].image_size
    with tempfile.TemporaryDirectory() as directory:
        model = build_bundle(Path(directory) / "bundle", arguments.preset)
        taken: dict[str, list[float]] = {"library": [], "engine_alone": []}
        for function in [library, engine_alone] * (arguments.rounds + 1):
            taken[function.__name__].append(alone(function, model, seconds / 4))
        single = {name: statistics.median(seconds_of) for name, seconds_of in taken.items()}
        if not torch.cuda.is_available():  # what no engine on two cores can be better than
            single["library_beside_another"] = alone(library, model, seconds, number=2)
        print(json.dumps(single), flush=True)
        results: dict[str, dict[str, dict[str, float]]] = {}
        came: dict[str, list[tuple[float, float]]] = {}  # in the open loops of all rounds
        spent: dict[str, float] = collections.defaultdict(float)
        rate = arguments.rate
        with ray_serve_here("127.0.0.1", PORT):
            for number, name in [(number, name) for number in range(arguments.rounds) for name in arguments.ways]:
                deployed(model, WAYS[name])
                runs = results.setdefault(name, {})
                for clients in [*arguments.clients, *[1] * (name == "ours")] if number == 0 else []:
                    runs[f"closed {clients}"] = asyncio.run(closed_loop(clients, seconds, side))
                    print(f"{name}, {clients} clients: {json.dumps(runs[f'closed {clients}'])}", flush=True)
                    if name == "ours":
                        print(f"    {json.dumps(steps_of_late(seconds))}", flush=True)
                rate = rate or 0.7 * max(run["images_per_s"] for run in runs.values())
                if name != "one at a time":  # which could not keep up
                    began = time.perf_counter()
                    came.setdefault(name, []).extend(asyncio.run(open_loop(rate, 2 * seconds, side)))
                    spent[name] += time.perf_counter() - began
                    runs["open"] = summary(came[name], spent[name])
                    print(f"{name}, open loops until now: {json.dumps(runs['open'])}", flush=True)
    report(single, results, rate)


def report(alone: dict[str, float], results: dict[str, dict[str, dict[str, float]]], rate: float) -> None:
    print(f"\n{'':16} {'load':>12} {'images/s':>9} {'p50 s':>8} {'p99 s':>8}    (open: {rate:.1f} requests/s)")
    for name, runs in results.items():
        for load, run in runs.items():
            print(f"{name:16} {load:>12} {run['images_per_s']:9.2f} {run['p50_s']:8.3f} {run['p99_s']:8.3f}")
    ratios = {"engine_speed_of_library_at_concurrency_1": alone["library"] / alone["engine_alone"]}
    if beside := alone.get("library_beside_another"):
        ratios["throughput_of_two_libraries_of_one"] = 2 * alone["library"] / beside
    if (ours := results.get("ours")) is not None:
        ratios["http_and_ray_ms"] = 1000 * ours["closed 1"]["outside_engine_s"]
        most = max((load for load in ours if load.startswith("closed")), key=lambda load: int(load.split()[1]))
        if (other := results.get("one at a time")) is not None:
            ratios["throughput_of_one_at_a_time"] = ours[most]["images_per_s"] / other[most]["images_per_s"]
        for name in ("@serve.batch", "and our engine"):
            if name in results:
                ratios[f"open_p99_of_{name}"] = ours["open"]["p99_s"] / results[name]["open"]["p99_s"]
    for name, value in ratios.items():
        print(f"{name:44} {value:8.3f}")
    print(json.dumps({"ratios": ratios, "seconds_of_an_image": alone, "results": results}))


if __name__ == "__main__":
    main()
