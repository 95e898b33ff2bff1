"""What the loops of the training programs share: resuming, an optimizer step, checkpoints, metrics over steps and workers.

Every function and method here is to be called by every worker.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from paella import checkpoint
from paella.ema import Ema
from paella.parallel import mean_over_workers
from pipelines import tracking
from pipelines.workers import resume_directory

Optimizers = Sequence[torch.optim.Optimizer]


def require_counts(config: Any, *names: str) -> None:
    """Raises ValueError for a field below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} is not allowed: an integer of at least 1")


def require_run(config: Any, *counts: str) -> None:
    """Raises ValueError for what no training program allows: a count below 1, a batch that workers cannot share, a precision."""
    require_counts(config, "steps", "global_batch_size", "num_workers", "checkpoint_every", *counts)
    if config.global_batch_size % config.num_workers:
        raise ValueError(f"global_batch_size={config.global_batch_size} must be a multiple of num_workers={config.num_workers}")
    if config.precision not in ("auto", "bf16", "float32"):
        raise ValueError(f"precision={config.precision!r} is not allowed: auto, bf16 or float32")


def resume(model: nn.Module, optimizers: Optimizers, ema: Ema) -> int:
    """Read the newest checkpoint, if there is one, in place; returns the step to start from."""
    with resume_directory() as directory:
        return checkpoint.load(directory, model, optimizers, ema) if directory else 0


def save_checkpoint(model: nn.Module, optimizers: Optimizers, ema: Ema, step: int) -> None:
    """Keep the state after `step` steps as the newest checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoint.save(directory, model, optimizers, ema, step)
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(directory))


def sample_numbers(step: int, global_batch_size: int) -> range:
    """The numbers in the run of this worker's samples of a step: what their random numbers are drawn from."""
    size = global_batch_size // dist.get_world_size()
    first = step * global_batch_size + dist.get_rank() * size
    return range(first, first + size)


def optimizer_step(model: nn.Module, optimizers: Optimizers, loss: Tensor, grad_clip: float) -> Tensor:
    """Backward pass and update; returns the gradient's norm before it was clipped."""
    loss.backward()
    norm = clip_grad_norm_(model.parameters(), grad_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return norm


class Report:
    """Sums metrics over steps and workers; every few steps their means go to MLflow, from rank 0, and to the console.

    Args:
        means: named means from the sums of a number of steps.
        shown: those of them that the console shows.
        steps, global_batch_size: of the run.
        unit: what a batch consists of.
    """

    EVERY = 20

    def __init__(
        self,
        mlflow_run: tracking.Run,
        means: Callable[[Tensor, int], dict[str, float]],
        *,
        shown: Sequence[str] = ("loss",),
        steps: int,
        global_batch_size: int,
        unit: str,
    ) -> None:
        self.mlflow_run, self.means, self.shown = mlflow_run, means, shown
        self.steps, self.global_batch_size, self.unit = steps, global_batch_size, unit
        self._reset()

    def _reset(self) -> None:
        self.sums: Tensor | None = None
        self.num_steps, self.since = 0, time.monotonic()

    def step(self, step: int, sums: Tensor, grad_norm: Tensor, lr: float) -> str | None:
        """Add a step; returns a line about the last steps when one is due."""
        self.sums = sums if self.sums is None else self.sums + sums
        self.num_steps += 1
        if (step + 1) % self.EVERY and step + 1 != self.steps:
            return None
        norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        rate = self.num_steps * self.global_batch_size / (time.monotonic() - self.since)
        values = self.means(mean_over_workers(self.sums).cpu(), self.num_steps)
        values |= {"grad_norm": norm.item(), "lr": lr, f"{self.unit}_per_s": rate}
        if dist.get_rank() == 0:
            tracking.log_metrics(self.mlflow_run, values, step + 1)
        self._reset()
        return "".join(f"{name} {values[name]:.3f}  " for name in self.shown) + f"{rate:.0f} {self.unit}/s"
