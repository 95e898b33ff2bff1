"""What the loops of the training programs share: a run that continues where it was, an optimizer step, metrics over steps.

Every function and method here is to be called by every worker.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray.train
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from paella.checkpoint import TrainingState
from paella.ema import Ema
from paella.parallel import gradient_norm, mean_over_workers
from pipelines import cli, tracking
from pipelines.checkpoints import Checkpoints, require_writable
from pipelines.recovery import ENDED_FILE, STOP_FILE, Guard, Vote, asked_to_stop
from pipelines.watchdog import Watchdog

Optimizers = Sequence[torch.optim.Optimizer]
T = TypeVar("T")


def require_counts(config: Any, *names: str) -> None:
    """Raises ValueError for a field below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} is not allowed: an integer of at least 1")


def require_run(config: Any, *counts: str) -> None:
    """Raises ValueError for what no training program allows: a count below 1, a batch that workers cannot share, a precision."""
    require_counts(config, "steps", "global_batch_size", "num_workers", "checkpoint_every", *counts)
    fewest = getattr(config, "min_workers", None) or config.num_workers
    if not 1 <= fewest <= config.num_workers:
        raise ValueError(f"min_workers={fewest} is not allowed: 1 to num_workers={config.num_workers}")
    for number in range(fewest, config.num_workers + 1):
        if config.global_batch_size % number:
            name = "num_workers" if number == config.num_workers else "a number of workers from min_workers to num_workers, "
            raise ValueError(f"global_batch_size={config.global_batch_size} must be a multiple of {name}={number}")
    if config.precision not in ("auto", "bf16", "float32"):
        raise ValueError(f"precision={config.precision!r} is not allowed: auto, bf16 or float32")


def require_places(config: Any) -> Path:
    """Make the directories of output and checkpoints; returns the first. Raises ValueError where that cannot be done."""
    output = cli.require_writable(config.output)
    require_writable(config.recovery.place(config.output))
    return output


class Training:
    """A training run on this worker, from where it was: it saves, lives through bad steps, and ends when it is asked to.

        training = Training(config, mlflow_run, model, optimizers, ema, report)
        for step, batch in training.steps(lambda start: dataset.batches(start_step=start)):
            … one optimizer step, with training.guard …
        if training.ended: return

    Args:
        config: of the program: steps, checkpoint_every, output and recovery.
        first_checkpoint: no checkpoint before so many steps.
    """

    STOP_EVERY_S = 2.0
    """Between looks for a request to stop."""
    PREEMPTION_EVERY = 10
    """Steps between questions to Ray whether a node is about to go: each is a barrier."""

    def __init__(
        self,
        config: Any,
        mlflow_run: tracking.Run,
        model: nn.Module,
        optimizers: Optimizers,
        ema: Ema,
        report: Report | None = None,
        first_checkpoint: int = 1,
    ) -> None:
        self.config, self.mlflow_run, self.report = config, mlflow_run, report
        self.first_checkpoint = max(1, first_checkpoint)
        self.guard, self.vote = Guard(config.recovery), Vote()
        self.watchdog = Watchdog(config.recovery.stuck_after_s)
        self.state = TrainingState(model, optimizers, ema)
        place = config.recovery.place(config.output)
        self.checkpoints = Checkpoints(place, config.recovery.keep, asynchronous=config.recovery.asynchronous)
        self.step, self.offset = 0, 0
        self.score: float | None = None
        """How good the run's weights are, lower is better, if the program measures it: the best checkpoint is kept."""
        self.ended = False
        self.preempted: object = None
        self._restore()
        self.saved_at = self.looked_at = time.monotonic()

    def steps(self, batches_from: Callable[[int], Iterable[T]]) -> Iterator[tuple[int, T]]:
        """Each step and its batch. The batches of a step on: `batches_from(step)`, asked again after a rollback."""
        gc.collect()
        gc.freeze()  # or now and then a worker looks through all that it has imported for 0.4 s, and the others wait for it
        with contextlib.closing(self.watchdog):
            while self.step < self.config.steps and not self.ended:
                with contextlib.closing(_generator(batches_from(self.step + self.offset))) as batches:
                    yield from self._until_rollback(batches)
        self.vote.finish()
        self.checkpoints.wait()

    def _until_rollback(self, batches: Iterator[T]) -> Iterator[tuple[int, T]]:
        for batch in batches:
            self.watchdog.at(self.step, "training")
            yield self.step, batch
            if self.guard.rollback:
                return self._roll_back()
            self.step += 1
            self.watchdog.at(self.step, "saving")
            self._after_step()
            if self.ended or self.step == self.config.steps:
                return None
            self.watchdog.at(self.step, "reading data")
        return None

    def _after_step(self) -> None:
        wanted = self.vote(self._want())
        if self.guard.end:
            self._end(f"stopped at step {self.step}: {self.guard.end}", failed=True)
        elif wanted == 2:
            self._save()
            self.checkpoints.wait()
            saved = "no checkpoint" if self.checkpoints.newest is None else f"a checkpoint of step {self.checkpoints.newest}"
            self._end(f"stopped after step {self.step} as asked, with {saved}; the same command continues", failed=False)
        elif self.step < self.config.steps and (wanted == 1 or self.step % self.config.checkpoint_every == 0):
            self._save()

    def _want(self) -> int:
        """What this worker would do now: 1 save, 2 save and stop, 0 neither."""
        now, wish = time.monotonic(), int(asked_to_stop() and not self.preempted)
        if wish:
            self.preempted = "by a signal"
        if self.step % self.PREEMPTION_EVERY == 0 and (info := ray.train.get_preemption_info()) and not self.preempted:
            self.preempted, wish = info, 1
        minutes = self.config.recovery.every_minutes
        if dist.get_rank() == 0:
            if minutes is not None and now - self.saved_at > 60 * minutes:
                self.saved_at, wish = now, 1
            if now - self.looked_at > self.STOP_EVERY_S:
                self.looked_at = now
                wish = 2 if self.checkpoints.read(STOP_FILE) is not None else wish
        return wish

    def _save(self) -> None:
        if self.step < self.first_checkpoint:
            return
        progress = {"mlflow_run": self.mlflow_run.run_id, "offset": self.offset, "guard": self.guard.progress()}
        progress["score"] = self.score
        if self.report is not None:
            progress["report"] = self.report.progress()
        self.checkpoints.save(self.state, self.step, progress)
        self.saved_at = time.monotonic()

    def _restore(self) -> bool:
        """Read the newest intact checkpoint, if there is one."""
        found = self.checkpoints.load(self.state)
        if found is None:
            return False
        self.step, progress = found["step"], found["progress"]
        self.offset = progress["offset"]
        self.guard.restore(progress["guard"])
        if self.report is not None:
            self.report.restore(progress["report"])
        return True

    def _roll_back(self) -> None:
        bad, self.guard.rollback = self.step, False
        self.watchdog.at(bad, "rolling back")
        if self.guard.end or not self._restore():
            reason = self.guard.end or "there is no checkpoint to roll back to"
            self._end(f"stopped at step {bad}: {reason}", failed=True)
            return
        self.offset += bad + 1 - self.step
        if dist.get_rank() == 0:
            print(f"WARNING: back at step {self.step}, and on with the data after step {bad}", flush=True)

    def _end(self, reason: str, *, failed: bool) -> None:
        self.checkpoints.wait()
        self.ended = True
        if dist.get_rank() == 0:
            self.checkpoints.write(ENDED_FILE, json.dumps({"reason": reason, "failed": failed}).encode())


def _generator(batches: Iterable[T]) -> Generator[T]:
    """So that it can be closed, whatever it is."""
    yield from batches


def sample_numbers(step: int, global_batch_size: int) -> range:
    """The numbers in the run of this worker's samples of a step: what their random numbers are drawn from."""
    size = global_batch_size // dist.get_world_size()
    first = step * global_batch_size + dist.get_rank() * size
    return range(first, first + size)


def optimizer_step(model: nn.Module, optimizers: Optimizers, loss: Tensor, grad_clip: float, guard: Guard) -> float:
    """Backward pass and update; returns the gradient's norm before it was clipped."""
    loss.backward()
    return update(model, optimizers, loss, grad_clip, guard)


def update(model: nn.Module, optimizers: Optimizers, loss: Tensor, grad_clip: float, guard: Guard) -> float:
    """Clip the gradients, and step unless the guard finds the step bad; returns their norm before."""
    norm = gradient_norm(model.parameters())
    clip_grads_with_norm_(model.parameters(), grad_clip, norm)
    value = norm.item()
    allowed = guard.allows(value, mean_over_workers(loss.detach().clone()).item() if guard.needs_loss else 0.0)
    for optimizer in optimizers:
        if allowed:
            optimizer.step()
        optimizer.zero_grad()
    return value


class Report:
    """Sums metrics over steps and workers; every few steps their means go to MLflow, from rank 0, and to the console.

    Args:
        means: named means from the sums of a number of steps.
        shown: those of them that the console shows.
        steps, global_batch_size: of the run.
        unit: what a batch consists of.
        more: further metrics, given the units a second.
        observe: is told the metrics and the step as MLflow is.
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
        more: Callable[[float], dict[str, float]] = lambda rate: {},
        observe: Callable[[dict[str, float], int], object] = lambda values, step: None,
    ) -> None:
        self.curve = tracking.Curve(mlflow_run, "grad_norm") if dist.get_rank() == 0 else None
        self.means, self.shown, self.more, self.observe = means, shown, more, observe
        self.steps, self.global_batch_size, self.unit = steps, global_batch_size, unit
        self._reset()

    def _reset(self) -> None:
        self.sums: Tensor | None = None
        self.num_steps, self.timed_steps, self.since = 0, 0, time.monotonic()

    def progress(self) -> dict[str, Any]:
        """For the checkpoint: the sums since the last means, of all workers."""
        sums = None if self.sums is None else mean_over_workers(self.sums.clone()).tolist()
        return {"sums": sums, "num_steps": self.num_steps}

    def restore(self, progress: dict[str, Any]) -> None:
        """As it was at a checkpoint."""
        self._reset()
        self.num_steps = progress["num_steps"]
        self.sums = None if progress["sums"] is None else torch.tensor(progress["sums"])

    def step(self, step: int, sums: Tensor, grad_norm: float, lr: float) -> str | None:
        """Add a step, unless it was bad; returns a line about the last steps when one is due."""
        self.timed_steps += 1
        if math.isfinite(grad_norm):
            self.sums = sums if self.sums is None else self.sums.to(sums.device) + sums
            self.num_steps += 1
        if ((step + 1) % self.EVERY and step + 1 != self.steps) or self.sums is None:
            return None
        rate = self.timed_steps * self.global_batch_size / (time.monotonic() - self.since)
        values = self.means(mean_over_workers(self.sums).cpu(), self.num_steps)
        values |= {"grad_norm": grad_norm, "lr": lr, f"{self.unit}_per_s": rate} | self.more(rate)
        if self.curve is not None:
            self.curve.log(values, step + 1)
            self.observe(values, step + 1)
        self._reset()
        return "".join(f"{name} {values[name]:.3f}  " for name in self.shown) + f"{rate:.0f} {self.unit}/s"
