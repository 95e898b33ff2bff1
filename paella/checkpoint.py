"""Training state on disk: every rank writes its shards (torch.distributed.checkpoint), any number of ranks reads them.

A manifest with the digest of every file is written last: a directory without one is no checkpoint, and one whose files
are not what the manifest says is damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from paella.ema import Ema

MANIFEST = "manifest.json"


class TrainingState:
    """What a training run holds: module, optimizers and averages; all ranks together write it, and read it in place."""

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ema: Ema) -> None:
        self.model, self.optimizers, self.ema = model, optimizers, ema
        self.thread = ThreadPoolExecutor(1, "write", initializer=give_way)

    def save(self, directory: Path, group: dist.ProcessGroup | None = None, *, asynchronous: bool = False) -> Future[None]:
        """Write this rank's shards; asynchronous: copied now, written by a thread, whose collectives go through `group`."""
        if asynchronous:
            return self.thread.submit(write, copied(self._values()), directory, group)
        done: Future[None] = Future()
        try:
            write(self._values(), directory, group)
            done.set_result(None)
        except (Exception, dcp.CheckpointException) as error:  # kept, as the thread would
            done.set_exception(error)
        return done

    def load(self, uri: str) -> None:
        """Read a directory or URI of shards, each rank what it needs of them."""
        values = self._values()
        dcp.load(values, storage_reader=reader(uri))
        set_state_dict(self.model, self.optimizers, model_state_dict=values["model"], optim_state_dict=values["optimizer"])

    def _values(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizers)
        return {"model": model, "optimizer": optimizer, "ema": self.ema.shadow}


def write(values: dict[str, Any], directory: Path, group: dist.ProcessGroup | None) -> None:
    """Write this rank's shards of values. Every rank must call it."""
    writer = dcp.FileSystemWriter(directory)
    writer.fs = LargeWrites()
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)  # plans take long, and the GIL
    dcp.save(values, storage_writer=writer, planner=planner, process_group=group)


class LargeWrites(FileSystem):
    """Local files, written a few MB at a time: with every write the GIL changes hands, which training waits for."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with open(path, mode, buffering=1 << 22) as stream:
            yield cast(io.IOBase, stream)


def copied(values: dict[str, Any]) -> dict[str, Any]:
    """The same values with tensors of their own, on the CPU. `dcp.async_save` copies each sharded one three times."""
    return tree_map_only(Tensor, _copied, values)


def _copied(value: Tensor) -> Tensor:
    if isinstance(value, DTensor):
        return DTensor(_copied(value.to_local()), value._spec, requires_grad=False)
    return value.detach().to("cpu", copy=True)


def give_way() -> None:
    """Let other threads have the CPUs before this one, for as long as it lives."""
    if sys.platform == "linux":  # where a thread has a policy of its own; niceness is little against Ray's workers, who have 15
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))


def reader(uri: str) -> dcp.FileSystemReader:
    """Reads the shards in a directory or at a URI."""
    if "://" not in uri:
        return dcp.FileSystemReader(uri)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return FsspecReader(uri)


def digest(file: BinaryIO) -> str:
    """SHA-256 of an open file."""
    hashed = hashlib.sha256()
    while block := file.read(1 << 22):
        hashed.update(block)
    return hashed.hexdigest()


def manifest(step: int, progress: dict[str, Any], digests: dict[str, str]) -> bytes:
    """The manifest of the state after `step` steps; progress is what else the run has to remember, as JSON values."""
    return json.dumps({"step": step, "progress": progress, "files": digests}, indent=1).encode()
