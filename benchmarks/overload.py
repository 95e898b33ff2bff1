"""What the server does with ten times the load that it can take, and with clients that go away.

    python benchmarks/overload.py                 # tiny with random weights, about two minutes
    python benchmarks/overload.py --soak 30       # minutes of mixed, bad and interrupted requests instead

First the peak: pictures per second of a closed loop. Then requests at ten times that rate, come what may: the table gives the
share of each status, the pictures per second that are still made, as a ratio to the peak, and how fast the others are refused.
Then clients that each ask for pictures and hang up after up to two seconds: how long after the last one the engine is empty, and
what memory, tasks and files are left of them. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from ray import serve as ray_serve
from serving import PORT, build_bundle, closed_loop, requests

from paella.config import PRESETS
from serve.app import Arguments, app
from serve.run import ray_serve_here

SIDE = PRESETS["tiny"].image_size
TIMES = 10
QUEUE = 32


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


async def overloaded(rate: float, seconds: float) -> dict[str, Any]:
    """Requests that come at `rate` a second, whatever becomes of them: how many of each status, and how fast."""
    took: dict[int, list[float]] = collections.defaultdict(list)
    without_retry_after = 0

    async def ask(session: aiohttp.ClientSession, kind: str, body: dict) -> None:
        nonlocal without_retry_after
        began = time.perf_counter()
        async with session.post(f"http://127.0.0.1:{PORT}/v1/images/{kind}", json=body) as answer:
            await answer.read()
            took[answer.status].append(time.perf_counter() - began)
            without_retry_after += answer.status == 429 and "retry-after" not in answer.headers

    rng = random.Random(0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        tasks, began = [], time.perf_counter()
        for kind, body in requests(round(rate * seconds), 4, SIDE, mixed=False):
            await asyncio.sleep(rng.expovariate(rate))
            tasks.append(asyncio.create_task(ask(session, kind, body)))
        await asyncio.gather(*tasks)
        elapsed = time.perf_counter() - began
    return {
        "statuses": {status: len(values) for status, values in sorted(took.items())},
        "asked_per_s": len(tasks) / elapsed,
        "images_per_s": len(took[200]) / elapsed,
        "refused_p50_ms": 1000 * percentile(took[429], 0.5),
        "refused_p99_ms": 1000 * percentile(took[429], 0.99),
        "without_retry_after": without_retry_after,
    }


async def disconnecting(clients: int) -> float:
    """Clients that hang up after up to two seconds; returns the seconds until the engine has no image any more."""
    handle = ray_serve.get_deployment_handle("engine-tiny", "paella")
    rng = random.Random(1)

    async def client(session: aiohttp.ClientSession, kind: str, body: dict) -> None:
        await asyncio.sleep(rng.uniform(0, 8))
        try:
            timeout = aiohttp.ClientTimeout(rng.uniform(0.01, 2))
            async with session.post(f"http://127.0.0.1:{PORT}/v1/images/{kind}", json=body, timeout=timeout) as answer:
                await answer.read()
        except TimeoutError:
            pass

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session, kind, body) for kind, body in requests(clients, 5, SIDE, mixed=True)))
    began = time.perf_counter()
    while (await handle.state.remote())["images"]:
        assert time.perf_counter() - began < 60, "images of clients that are gone stay"
        await asyncio.sleep(0.01)
    return time.perf_counter() - began


async def left_behind() -> dict[str, int]:
    """Memory and tasks of the engine's replica, and the processes' open files."""
    state = await ray_serve.get_deployment_handle("engine-tiny", "paella").state.remote()
    lines = [(process, " ".join(process.cmdline())) for process in psutil.Process().children(recursive=True)]
    replicas = [process for process, line in lines if any(name in line for name in ("ServeReplica", "ProxyActor", "haproxy"))]
    return {
        "tasks": state["tasks"],
        "bytes": sum(process.memory_full_info().uss for process in replicas),
        "files": sum(process.num_fds() for process in replicas),
    }


BAD = [
    ("generations", {"prompt": "x", "stepz": 3}),
    ("generations", {"prompt": "x", "size": "65x64"}),
    ("generations", {"prompt": "x", "seed": -1}),
    ("edits", {"prompt": "x", "image": "data:image/png;base64,aGVsbG8="}),
]


async def soak(minutes: float) -> dict[str, Any]:
    """Six clients that ask for everything, a tenth of it wrong, and hang up on another tenth; what is held twice a minute."""
    end, statuses, held = time.monotonic() + 60 * minutes, collections.Counter[str](), []
    queue = iter(requests(1_000_000, 6, SIDE, mixed=True))

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            chance = rng.random()
            kind, body = rng.choice(BAD) if chance < 0.1 else next(queue)
            body = body | {"prompt": f"a red circle, number {rng.randrange(500)}"}  # few, or the cache of prompts would grow on
            timeout = aiohttp.ClientTimeout(rng.uniform(0.01, 2) if chance > 0.9 else 300)
            try:
                async with session.post(f"http://127.0.0.1:{PORT}/v1/images/{kind}", json=body, timeout=timeout) as answer:
                    await answer.read()
                    statuses[str(answer.status)] += 1
            except TimeoutError:
                statuses["hung up"] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(30)
            held.append(await left_behind())
            print(f"  {len(held) / 2:5.1f} min  {held[-1]['bytes'] / 1e6:7.1f} MB  {held[-1]['tasks']} tasks", flush=True)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(watch(), *(client(session, number) for number in range(6)))
    return {"statuses": dict(statuses), "held": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15, help="of the closed and of the open loop")
    parser.add_argument("--clients", type=int, default=1000, help="that hang up")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="of mixed requests, instead of all else")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = build_bundle(Path(directory) / "bundle", "tiny")
        with ray_serve_here("127.0.0.1", PORT):
            ray_serve.run(app(Arguments(model=model, name="tiny", max_queued_images=QUEUE)), name="paella")
            report = soaked(arguments.soak) if arguments.soak else flooded(arguments.seconds, arguments.clients)
    print(json.dumps({"benchmark": "overload", **report}))


def soaked(minutes: float) -> dict[str, Any]:
    """Run the soak and print what came of it."""
    report = asyncio.run(soak(minutes))
    third = max(1, len(report["held"]) // 3)
    first, last = (sum(held["bytes"] for held in part) / third for part in (report["held"][:third], report["held"][-third:]))
    print(f"statuses {report['statuses']}; memory of the last third {last / first:.3f} of the first third's")
    return report | {"memory_last_of_first_third": last / first}


def flooded(seconds: float, clients: int) -> dict[str, Any]:
    """Run everything else and print what came of it."""
    peak = asyncio.run(closed_loop(16, seconds, SIDE))["images_per_s"]
    flood = asyncio.run(overloaded(TIMES * peak, seconds))
    rounds = []
    for _ in range(2):  # the first one makes pools and buffers that stay
        empty_s = asyncio.run(disconnecting(clients))
        time.sleep(3)
        rounds.append({"empty_s": empty_s, **asyncio.run(left_behind())})
    flood["goodput"] = flood["images_per_s"] / peak
    print(f"\npeak {peak:.2f} images/s; at {flood['asked_per_s']:.0f} requests/s, a queue of {QUEUE}:")
    print(f"  statuses {flood['statuses']}, goodput {flood['goodput']:.2f} of the peak")
    print(f"  refused within {flood['refused_p50_ms']:.0f} ms (p50), {flood['refused_p99_ms']:.0f} ms (p99)")
    print(f"{clients} clients that hang up, twice: the engine is empty {rounds[1]['empty_s']:.2f} s after the last one")
    more = {name: rounds[1][name] - rounds[0][name] for name in ("tasks", "bytes", "files")}
    print(
        f"  from the first round to the second: {more['bytes'] / 1e6:+.1f} MB, {more['tasks']:+} tasks, {more['files']:+} files"
    )
    return {"peak_images_per_s": peak, "flood": flood, "rounds": rounds}


if __name__ == "__main__":
    main()
