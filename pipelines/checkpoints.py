"""The checkpoints of a training run: written beside training, whole or not at all, the newest intact one found again.

    checkpoints/step-00000400/…           the shards of every rank
    checkpoints/step-00000400/manifest.json   last: step, what the run has to remember, and the digest of every file

They lie in a directory that all workers see, or in an object store. Every method is to be called by every worker.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from paella.checkpoint import MANIFEST, TrainingState, digest, give_way, manifest
from paella.parallel import cpu_group
from paella.storage import first_line

PREFIX = "step-"


class Checkpoints:
    """Writes, finds and clears away checkpoints under `uri`.

    Args:
        keep: newest ones that are kept, beside the one whose progress has the lowest "score".
        asynchronous: a checkpoint is copied, and written while training goes on; else training waits.
    """

    def __init__(self, uri: str, keep: int, *, asynchronous: bool = True) -> None:
        self.uri, self.keep, self.asynchronous = uri, keep, asynchronous
        self.filesystem, self.root = open_directory(uri)
        self.local = isinstance(self.filesystem, pafs.LocalFileSystem)
        self.rank = dist.get_rank()
        self.group = cpu_group()  # the writing thread's, as collectives of two threads must not mix
        self.thread = ThreadPoolExecutor(1, "checkpoint", initializer=give_way)
        self.pending: Future[None] | None = None
        self.newest: int | None = None

    def save(self, state: TrainingState, step: int, progress: dict[str, Any]) -> None:
        """Write the state after `step` steps, once the checkpoint before it is written."""
        self.wait()
        if self.rank == 0 and self._exists(step, MANIFEST):  # damaged, or of a time before a rollback
            self.filesystem.delete_dir_contents(self._path(step))
        directory = Path(self._path(step)) if self.local else Path(tempfile.mkdtemp(prefix="paella-checkpoint-"))
        saving = state.save(directory, self.group, asynchronous=self.asynchronous)
        self.pending = self.thread.submit(self._commit, saving, directory, step, progress)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written any more."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def load(self, state: TrainingState) -> dict[str, Any] | None:
        """Read the newest intact checkpoint in place; returns its manifest, None where there is none. Says which are damaged."""
        self.wait()
        for step in self._agreed(self._steps):
            found = self._agreed(functools.partial(self._manifest, step))
            damage = self._damage(step, found["files"]) if found else [f"its {MANIFEST} cannot be read"]
            if damage:
                self._say(f"the checkpoint of step {step} is damaged ({damage[0]}); falling back to the one before it")
                continue
            state.load(self._path(step) if self.local else f"{self.uri.rstrip('/')}/{name_of(step)}")
            self.newest = step
            return found
        return None

    def read(self, name: str) -> bytes | None:
        """A small file beside the checkpoints, None where there is none; for one worker."""
        return read(self.filesystem, f"{self.root}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Write a small file beside the checkpoints; for one worker."""
        write(self.filesystem, f"{self.root}/{name}", content)

    def _commit(self, saving: Future[None], directory: Path, step: int, progress: dict[str, Any]) -> None:
        """Make a checkpoint of the written shards, if all ranks could write theirs; else say so, and keep those before it."""
        files: dict[str, str] = {}
        problem = attempt(saving.result, self.rank) or attempt(lambda: files.update(self._finish(directory, step)), self.rank)
        if not self.local:
            shutil.rmtree(directory, ignore_errors=True)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (files, problem), self.group)
        problems = [problem for _, problem in parts if problem]
        if not problems and self.rank == 0:
            digests = {name: value for files, _ in parts for name, value in files.items()}
            if failed := attempt(lambda: self.write(f"{name_of(step)}/{MANIFEST}", manifest(step, progress, digests)), 0):
                problems = [failed]
        outcome = [problems]
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[0]:
            kept = "there is none before it" if self.newest is None else f"that of step {self.newest} is intact"
            self._say(f"the checkpoint of step {step} could not be written ({outcome[0][0]}); {kept}; training goes on")
        else:
            self.newest = step
        if self.rank == 0:
            self._clear()

    def _finish(self, directory: Path, step: int) -> dict[str, str]:
        """Digests of the files that this rank has written, which are then in place."""
        own = [file for file in directory.iterdir() if is_of_rank(file.name, self.rank)]
        digests = {}
        for file in own:
            with file.open("rb") as stream:
                digests[file.name] = digest(stream)
        if not self.local:
            self.filesystem.create_dir(self._path(step))
            for file in own:
                target = f"{self._path(step)}/{file.name}"
                pafs.copy_files(str(file), target, pafs.LocalFileSystem(), self.filesystem)
        return digests

    def _clear(self) -> None:
        """Remove what is not finished, what is damaged, and all but the newest few and the best."""
        complete = [step for step in self._steps() if self._exists(step, MANIFEST)]
        newest = -1 if self.newest is None else self.newest
        wanted = set([step for step in complete if step <= newest][: self.keep])
        scores = {step: score for step in complete if (score := self._score(step)) is not None}
        if scores:
            wanted.add(min(scores, key=lambda step: scores[step]))
        for step in set(self._steps()) - wanted:
            with contextlib.suppress(OSError):  # a store that is briefly away is no reason to stop: next time
                if step in complete:  # first, so that no half of it is taken for a checkpoint
                    self.filesystem.delete_file(f"{self._path(step)}/{MANIFEST}")
                self.filesystem.delete_dir(self._path(step))

    def _damage(self, step: int, files: dict[str, str]) -> list[str]:
        """What is wrong with a checkpoint's files; each rank reads its share of them."""
        own = [self._wrong(step, name, files[name]) for name in sorted(files)[self.rank :: dist.get_world_size()]]
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, [wrong for wrong in own if wrong], self.group)
        return [wrong for part in parts for wrong in part]

    def _wrong(self, step: int, name: str, expected: str) -> str | None:
        try:
            with self.filesystem.open_input_stream(f"{self._path(step)}/{name}") as stream:
                return None if digest(stream) == expected else f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"

    def _manifest(self, step: int) -> dict[str, Any] | None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(self.read(f"{name_of(step)}/{MANIFEST}") or b"")
            return found if found["step"] == step and found["files"] else None
        return None

    def _score(self, step: int) -> float | None:
        found = self._manifest(step)
        return None if found is None else found["progress"].get("score")

    def _steps(self) -> list[int]:
        """Steps with a directory, newest first."""
        found = self.filesystem.get_file_info(pafs.FileSelector(self.root, allow_not_found=True))
        names = [info.base_name for info in found if info.type == pafs.FileType.Directory]
        return sorted((int(name.removeprefix(PREFIX)) for name in names if name.startswith(PREFIX)), reverse=True)

    def _path(self, step: int) -> str:
        return f"{self.root}/{name_of(step)}"

    def _exists(self, step: int, name: str) -> bool:
        return self.filesystem.get_file_info(f"{self._path(step)}/{name}").type == pafs.FileType.File

    def _agreed(self, value: Callable[[], Any]) -> Any:
        """What rank 0 finds, on all ranks."""
        box = [value() if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(f"WARNING: {text}", flush=True)


def name_of(step: int) -> str:
    """The directory of a step's checkpoint."""
    return f"{PREFIX}{step:08d}"


def is_of_rank(name: str, rank: int) -> bool:
    """Whether a rank has written a file: `__RANK_N.distcp`, and rank 0 what describes them."""
    return name.startswith(f"__{rank}_") or (rank == 0 and name == ".metadata")


def attempt(action: Callable[[], Any], rank: int) -> str | None:
    """On which rank what went wrong, in a line; None where nothing did."""
    try:
        action()
    except CheckpointException as error:  # of one rank, on all
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {first_line(cause)}"
    except Exception as error:
        return f"rank {rank}: {first_line(error)}"
    return None


def open_directory(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path there."""
    filesystem, root = pafs.FileSystem.from_uri(uri if "://" in uri else str(Path(uri).absolute()))
    return filesystem, root.rstrip("/")


def require_writable(uri: str) -> None:
    """Make the directory of a run's checkpoints. Raises ValueError where that cannot be done."""
    try:
        filesystem, root = open_directory(uri)
        filesystem.create_dir(root)
        write(filesystem, f"{root}/.writable", b"")
        filesystem.delete_file(f"{root}/.writable")
    except (OSError, ValueError) as error:  # Arrow's errors are both
        raise ValueError(f"checkpoints cannot be written to {uri}: {first_line(error)}") from error


def read(filesystem: pafs.FileSystem, path: str) -> bytes | None:
    """A file's bytes, None where there is none."""
    try:
        with filesystem.open_input_stream(path) as stream:
            return stream.read()
    except FileNotFoundError:
        return None


def write(filesystem: pafs.FileSystem, path: str, content: bytes) -> None:
    """Whole or not at all: objects are, files are moved into place."""
    local = isinstance(filesystem, pafs.LocalFileSystem)
    place = f"{path}.tmp" if local else path
    with filesystem.open_output_stream(place) as stream:
        stream.write(content)
    if local:
        filesystem.move(place, path)
