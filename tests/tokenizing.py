"""What the tests of tokenizing share: configs, stages without Ray, reading what was written, killing jobs and parts of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipelines import cli, tokenize_images
from pipelines.tokenize_config import TokenizeConfig

PROGRAM = Path(__file__).parents[1] / "pipelines" / "tokenize_images.py"
SETTINGS = {"resolution": 32, "batch_size": 8, "rows_per_unit": 4}


def config(images, vqgan, output, **changes) -> TokenizeConfig:
    return TokenizeConfig(input=str(images), vqgan=str(vqgan), output=str(output), **(SETTINGS | changes))


def run(settings: TokenizeConfig) -> Path:
    return Path(tokenize_images.run(settings))


class InProcess:
    """As much of a Ray dataset as a job uses, its stages called here, one row after the other: to start actors takes Ray ten
    seconds, which tests of what comes of a job need not wait for.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows = rows

    def map_batches(self, stage: Any, *, fn_constructor_args: tuple = (), **settings: object) -> "InProcess":
        function = stage(*fn_constructor_args) if isinstance(stage, type) else stage
        made = (function(pa.Table.from_pylist([row])) for row in self.rows)
        tables = (table for some in made for table in ([some] if isinstance(some, pa.Table) else some))
        return InProcess(row for table in tables for row in table.to_pylist())

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


@contextlib.contextmanager
def in_process() -> Iterator[None]:
    """Jobs of this block run without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "dataset_of", InProcess)
        patch.setattr(cli, "start_ray", lambda: None)
        patch.setattr(ray, "cluster_resources", lambda: {"CPU": 2})
        yield


def run_in_process(settings: TokenizeConfig) -> Path:
    with in_process():
        return run(settings)


def arguments(images, vqgan, output, *more: object) -> list[str]:
    settings = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", value)]
    return list(map(str, ["--input", images, "--vqgan", vqgan, "--output", output, *settings, *more]))


def rows_of(output: Path) -> dict[str, dict]:
    """All rows by id, read from the shards alone; fails on an id that is there twice."""
    rows = [row for file in sorted(output.glob("part-*.parquet")) for row in pq.read_table(file).to_pylist()]
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows)
    return by_id


def rejects_of(output: Path) -> dict[str, str]:
    rows = [row for file in output.glob("rejects/*.parquet") for row in pq.read_table(file).to_pylist()]
    assert all(set(row) == {"id", "stage", "reason", "detail"} and row["detail"] for row in rows)
    return {row["id"]: row["reason"] for row in rows}


def start(*args: str) -> subprocess.Popen:
    """The program, as a user starts it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, PROGRAM, *args], env=environment, text=True, start_new_session=True, **pipes)


def family(pid: int) -> list[psutil.Process]:
    """All descendants: Ray's own processes are in sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def named(processes: list[psutil.Process], *words: str) -> list[psutil.Process]:
    """Those whose command line has one of the words."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            line = " ".join(process.cmdline())
            if any(word in line for word in words):
                found.append(process)
    return found


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def kill_all(process: subprocess.Popen) -> None:
    """The driver and everything it has started."""
    relatives = family(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    kill(relatives)
    process.communicate()


def wait_until(happened: Callable[[], object], process: subprocess.Popen | None = None, timeout_s: float = 400) -> None:
    """Polls often, since some instants are short. Fails where the program ends first."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate(timeout=5)
        time.sleep(0.002)
