"""What reading costs beside decoding and encoding: listing a large set, a tar in one pass and in slices, images from a site.

    python benchmarks/sources.py

Ratios are to tarfile alone that reads every member, and to aiohttp's own loop without checks; the last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import aiohttp
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import source_webdataset
from pipelines.fetch import Request, fetch_all
from pipelines.source_contract import FetchConfig, Sample, SourceConfig
from pipelines.sources import find_units, read_unit, read_units

SHARDS, SAMPLES, FETCHED = 1200, 10_000, 3000
META = json.dumps({"original_width": 900, "original_height": 700, "similarity": 0.3, "url": "http://a/b.jpg"}).encode()


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # for the web site
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        listing(Path(folder) / "set", figures)
        reading(Path(folder) / "one", figures)
    fetching(figures)
    for name, value in figures.items():
        print(f"{name:40} {value:10.3f}")
    print(json.dumps({"benchmark": "sources"} | figures))


def listing(root: Path, figures: dict[str, float]) -> None:
    """1,200 finished shards of 10,000 rows, whose tars are empty: they are not opened."""
    root.mkdir()
    for shard in range(SHARDS):
        (root / f"{shard:05d}.tar").write_bytes(bytes(10240))
        (root / f"{shard:05d}.parquet").write_bytes(b"")
        stats = {"count": SAMPLES, "successes": 8000, "start_time": shard}
        (root / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, units = timed(lambda: find_units(str(root)))
    figures["list 12M rows in 1,200 tars, s"] = seconds
    figures["units"] = len(units)
    figures["memory of the list, MB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def reading(root: Path, figures: dict[str, float]) -> None:
    """A tar of 10,000 samples of 30 KB."""
    root.mkdir()
    blob, keys = os.urandom(30_000), [f"{number:09d}" for number in range(SAMPLES)]
    with tarfile.open(root / "00000.tar", "w") as tar:
        for key in keys:
            for suffix, data in ((".jpg", blob), (".txt", b"a caption"), (".json", META)):
                member = tarfile.TarInfo(key + suffix)
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    failures = {"status": ["success"] * SAMPLES, "error_message": pa.nulls(SAMPLES, pa.string())}
    pq.write_table(pa.table({"key": keys} | failures), root / "00000.parquet")
    (root / "00000_stats.json").write_text(json.dumps({"count": SAMPLES, "successes": SAMPLES}))

    def plain() -> int:
        with tarfile.open(root / "00000.tar", "r|") as tar:
            return sum(len(tar.extractfile(member).read()) for member in tar)  # type: ignore[union-attr]

    def slices(size: int) -> int:
        source_webdataset._index.cache_clear()
        return sum(1 for unit in find_units(str(root), size) for _ in read_unit(unit))

    alone, _ = timed(plain)
    one_pass, rows = timed(lambda: sum(1 for _ in read_units(find_units(str(root)))))
    assert rows == SAMPLES
    figures["tarfile alone, samples/s"] = SAMPLES / alone
    figures["one pass, of tarfile alone"] = alone / one_pass
    for size in (1024, 64):
        figures[f"units of {size}, of tarfile alone"] = alone / timed(lambda size=size: slices(size))[0]


def fetching(figures: dict[str, float]) -> None:
    """Images of 30 KB from a site on this machine, which takes most of the time."""
    from web import Answer, site

    with site({"/a.jpg": Answer(os.urandom(30_000))}) as web:
        url = web.url("/a.jpg")
        config = SourceConfig(fetch=FetchConfig(allow_private_addresses=True, concurrency=16))
        requests = [(None, Request(str(n), url, "x", {}, {})) for n in range(FETCHED)]
        bare = timed(lambda: asyncio.run(_bare(url)))[0]
        ours, rows = timed(lambda: [row for _, row in fetch_all(requests, config)])
        assert all(isinstance(row, Sample) for row in rows)
    figures["bare aiohttp, images/s"] = FETCHED / bare
    figures["fetch_all, of bare aiohttp"] = bare / ours


async def _bare(url: str) -> None:
    slots = asyncio.Semaphore(16)
    async with aiohttp.ClientSession() as session:

        async def one() -> None:
            async with slots, session.get(url) as response:
                await response.read()

        await asyncio.gather(*(one() for _ in range(FETCHED)))


def timed(work: Callable) -> tuple[float, object]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    main()
