"""Captions encoded ahead of training, by actors beside the workers: on smaller GPUs, say, than those that train.

Rows of a Ray Data pipeline would go to whichever worker asks first. Here each worker sends out the captions of its next batches
itself, so that the order stays the run's own and an interrupted run goes on exactly. An actor that dies is started again, and
its calls with it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch

from paella.config import TextConfig
from paella.parallel import compute_dtype
from pipelines.byt5_columns import Byt5Columns
from pipelines.prefetch import prefetched
from pipelines.token_dataset import TokenBatch
from pipelines.train_config import TrainConfig

SENT_BATCHES = 8
"""Batches of a worker whose captions are with the actors."""
READY_BATCHES = 2


class TextActor:
    """The text encoder of a run, frozen."""

    def __init__(self, config: TextConfig, precision: str) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.byt5 = Byt5Columns(config, device, compute_dtype(precision, torch.device(device)))

    def states(self, captions: list[str]) -> list[np.ndarray]:
        """States (L,D) float16 of each caption."""
        return self.byt5.states(captions)


def start_actors(config: TrainConfig) -> list[Any]:
    """As many as the config wants, each with a GPU where the cluster has any; they end with this process."""
    if not config.text_actors:
        return []
    gpu = ray.cluster_resources().get("GPU", 0) > 0
    kind = ray.remote(TextActor).options(
        num_cpus=1,
        num_gpus=int(gpu),
        accelerator_type=config.text_accelerator,
        max_restarts=-1,
        max_task_retries=-1,
    )
    text = dataclasses.replace(config.model.text, clip=None)
    return [kind.remote(text, config.precision) for _ in range(config.text_actors)]


class TextStage:
    """A worker's way to the actors.

    Args:
        actors: from `start_actors`; with none of them batches stay as they are.
        first: the actor that gets the first captions; another for each worker, so that they do not all wait for the same.
        size: captions that go to an actor together. Those that pass the model together, since states depend, in their last
            bit, on the captions they are computed with.
    """

    def __init__(self, actors: list[Any], first: int, size: int) -> None:
        self.actors, self.size = actors, size
        self.turns = itertools.count(first)

    def __call__(self, batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
        """The same batches with the states of their captions, some of them ready."""
        return prefetched(self._encoded(batches), READY_BATCHES) if self.actors else batches

    def _encoded(self, batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
        sent: deque[tuple[TokenBatch, list]] = deque()
        for batch in batches:
            sent.append((batch, self._send(batch)))
            if len(sent) == SENT_BATCHES:
                yield _received(*sent.popleft())
        while sent:
            yield _received(*sent.popleft())

    def encode(self, batch: TokenBatch) -> TokenBatch:
        """One batch with the states of its captions."""
        return _received(batch, self._send(batch)) if self.actors else batch

    def _send(self, batch: TokenBatch) -> list:
        parts = [batch.captions[first : first + self.size] for first in range(0, len(batch.captions), self.size)]
        return [self.actors[next(self.turns) % len(self.actors)].states.remote(part) for part in parts]


def _received(batch: TokenBatch, parts: list) -> TokenBatch:
    return dataclasses.replace(batch, states=[states for part in ray.get(parts) for states in part])
