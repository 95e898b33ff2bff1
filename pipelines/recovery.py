"""What a training run does when something goes wrong: how often it saves, what bad steps are, how it is asked to stop."""

from __future__ import annotations

import math
import signal
import threading
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from paella.parallel import cpu_group
from pipelines import cli

STOP_FILE = "stop"
"""In the directory of the checkpoints: whoever writes it asks the run for a last checkpoint and an end."""
ENDED_FILE = "ended.json"
"""Beside it: why the workers came to an end before the last step."""


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """How a run lives through failures."""

    checkpoints: str | None = None
    """Where checkpoints lie (directory or URI); in the output if not given."""
    keep: int = 2
    """Newest checkpoints that are kept, beside the one with the lowest validation loss, where there is one."""
    every_minutes: float | None = 30.0
    """Minutes after which there is a checkpoint, whatever checkpoint_every says; None for steps alone."""
    asynchronous: bool = True
    """Write checkpoints while training goes on, from a copy in memory; else training waits, and needs no copy."""
    max_failures: int = 3
    """Failures of workers after which the run gives up; it begins anew at the newest checkpoint until then. -1: never."""
    stuck_after_s: float = 1800.0
    """Seconds without a finished step after which the workers start anew, with a message that names who was not there."""
    on_bad_step: str = "skip"
    """A loss or gradient that is not finite, or a spike: skip (the weights stay as they are), rollback (to the newest checkpoint,
    and on with the data after the bad step) or stop."""
    spike: float | None = None
    """A loss above this many times the median of the last 64 steps is a bad step; None: only one that is not finite."""
    max_bad_steps: int = 20
    """Bad steps in a row after which the run stops, whatever on_bad_step says."""

    def __post_init__(self) -> None:
        if self.on_bad_step not in ("skip", "rollback", "stop"):
            raise ValueError(f"recovery.on_bad_step={self.on_bad_step!r} is not allowed: skip, rollback or stop")
        for name, low in (("keep", 1), ("max_failures", -1), ("max_bad_steps", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"recovery.{name}={getattr(self, name)} is not allowed: an integer of at least {low}")
        for name, above in (("every_minutes", 0), ("stuck_after_s", 0), ("spike", 1)):
            if (value := getattr(self, name)) is not None and not value > above:
                raise ValueError(f"recovery.{name}={value} is not allowed: above {above}")

    def place(self, output: str) -> str:
        """The directory or URI of the checkpoints of the run in `output`."""
        return cli.absolute(self.checkpoints or f"{output.rstrip('/')}/checkpoints").rstrip("/")


class Guard:
    """Decides whether a step counts, alike on all workers, since they all see the same mean loss and norm."""

    WINDOW = 64

    def __init__(self, config: RecoveryConfig) -> None:
        self.config = config
        self.losses: list[float] = []
        self.in_a_row, self.total = 0, 0
        self.rollback = False
        self.end: str | None = None

    @property
    def needs_loss(self) -> bool:
        return self.config.spike is not None

    @property
    def refused(self) -> bool:
        """Whether the last step was a bad one."""
        return self.in_a_row > 0

    def allows(self, norm: float, loss: float) -> bool:
        """Whether the optimizers may step with a gradient of this norm, from this mean loss over all workers."""
        reason = self._reason(norm, loss)
        if reason is None:
            self.in_a_row = 0
            self.losses = [*self.losses, loss][-self.WINDOW :] if self.needs_loss else []
            return True
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        if self.config.on_bad_step == "stop" or self.in_a_row >= self.config.max_bad_steps:
            self.end = f"{reason}, the {self.in_a_row}. bad step in a row"
        elif dist.get_rank() == 0:
            print(f"WARNING: {reason}: {self.config.on_bad_step}", flush=True)
        self.rollback = self.config.on_bad_step == "rollback"
        return False

    def _reason(self, norm: float, loss: float) -> str | None:
        if not (math.isfinite(norm) and math.isfinite(loss)):
            return f"the loss ({loss:.3g}) or its gradient's norm ({norm:.3g}) is not finite"
        if self.config.spike is not None and len(self.losses) >= 16 and loss > self.config.spike * median(self.losses):
            return f"the loss has jumped to {loss:.3g}, from a median of {median(self.losses):.3g}"
        return None

    def progress(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"losses": self.losses, "in_a_row": self.in_a_row, "total": self.total}

    def restore(self, progress: dict[str, Any]) -> None:
        """As it was at a checkpoint; the count of bad steps in a row goes on, or rolling back would never end."""
        self.losses, self.total = progress["losses"], max(self.total, progress["total"])
        self.in_a_row = max(self.in_a_row, progress["in_a_row"])


class Vote:
    """Whether any worker wants something: all learn it at the same step, one step later, while they train on."""

    def __init__(self) -> None:
        self.group = cpu_group()
        self.work: dist.Work | None = None
        self.box = torch.zeros(1, dtype=torch.int32)

    def __call__(self, mine: int) -> int:
        """Cast this step's vote; returns the largest of the step before."""
        outcome = self.finish()
        self.box = torch.tensor([mine], dtype=torch.int32)
        self.work = dist.all_reduce(self.box, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return outcome

    def finish(self) -> int:
        """The outcome of the last vote, if there is one."""
        work, self.work = self.work, None
        if work is None:
            return 0
        work.wait()
        return int(self.box.item())


_asked_to_stop = threading.Event()


def listen() -> None:
    """In a worker's main thread: SIGTERM asks for a last checkpoint, in place of ending the process at once."""
    signal.signal(signal.SIGTERM, lambda signum, frame: _asked_to_stop.set())


def asked_to_stop() -> bool:
    """Whether this process has been told to end."""
    return _asked_to_stop.is_set()
