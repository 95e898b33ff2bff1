"""What an operator sees of a running training: how well it uses the hardware, where time goes, memory, a trace on demand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from paella.config import ModelConfig
from paella.flops import peak_flops, training_flops
from pipelines import tracking

T = TypeVar("T")


class Utilisation:
    """Metrics of one worker between two reports: TFLOP/s, MFU, times of steps, the share spent waiting for data, memory.

    Args:
        config: of the model whose U-Net trains.
        device, dtype: what it is computed on and in.
        num_workers: that share the images.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, num_workers: int) -> None:
        self.device, self.num_workers = device, num_workers
        self.flops_per_image = training_flops(config)
        self.peak = peak_flops(device, dtype)
        self.process = psutil.Process()
        self._reset()

    def _reset(self) -> None:
        self.waited, self.since = 0.0, time.monotonic()
        self.steps_s: list[float] = []

    def watched(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; how long each is waited for is taken down, and how long until the next is asked for."""
        began = time.monotonic()
        for batch in batches:
            self.waited += time.monotonic() - began
            yield batch
            now = time.monotonic()
            self.steps_s.append(now - began)
            began = now

    def metrics(self, images_per_s: float) -> dict[str, float]:
        """Since the last call, given the rate of all workers together."""
        rate = images_per_s * self.flops_per_image / self.num_workers
        values = {
            "tflops_per_worker": rate / 1e12,
            "data_wait": self.waited / max(1e-9, time.monotonic() - self.since),
            "step_s": statistics.median(self.steps_s or [0.0]),
            "slowest_step_s": max(self.steps_s, default=0.0),
        }
        if self.peak is not None:
            values["mfu"] = rate / self.peak
        if self.device.type == "cuda":
            values["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        values["memory_gb"] = self.process.memory_info().rss / 1e9
        self._reset()
        return values


class Trace:
    """Records the steps of a window with torch's profiler, on rank 0, into a file that chrome://tracing and Perfetto open.

    Args:
        window: "10:20" records steps 10 … 19; None nothing.
        directory: of `trace-steps-10-20.json.gz`, which is logged to the MLflow run too.
    """

    def __init__(self, window: str | None, directory: Path, mlflow_run: tracking.Run, *, enabled: bool) -> None:
        self.first, self.end = steps_of(window) if window is not None and enabled else (-1, -1)
        self.file, self.mlflow_run = directory / f"trace-steps-{self.first}-{self.end}.json.gz", mlflow_run
        self.profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Call before each step."""
        if step == self.first:
            self.profiler = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self.profiler.start()

    def after(self, step: int) -> None:
        """Call after each step."""
        if self.profiler is not None and step + 1 == self.end:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.file))
            self.profiler = None
            tracking.log_file(self.mlflow_run, self.file)
            print(f"trace of steps {self.first} to {self.end}: {self.file}", flush=True)


def steps_of(window: str) -> tuple[int, int]:
    """First step and end of "10:20". Raises ValueError for anything else."""
    first, _, end = window.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ValueError(f"profile={window!r} is not allowed: first step and end, like 10:20")
    return int(first), int(end)
