"""Processes that go on after whoever started them: with logs, and written down, so that they can be found again and ended."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil


class Processes:
    """What is there because of us: processes, the directory of their data and logs, the variables by which they find each other.

    Args:
        file: where it is written down.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        values = json.loads(file.read_text()) if file.exists() else {}
        self.processes: list[dict] = values.get("processes", [])
        self.place: str | None = values.get("directory")
        self.variables: dict[str, str] = values.get("variables", {})

    @property
    def directory(self) -> Path:
        assert self.place is not None, "nothing has been started"
        return Path(self.place)

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        values = {"processes": self.processes, "directory": self.place, "variables": self.variables}
        temporary = self.file.with_suffix(".tmp")
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(values, indent=1))
        temporary.replace(self.file)

    def start(self, name: str, command: Sequence[object], user: str | None = None, **variables: str) -> None:
        """A process with a log and a session of its own, written down."""
        with (self.directory / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                env=os.environ | self.variables | variables,
                user=user,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append({"name": name, "pid": process.pid, "created": psutil.Process(process.pid).create_time()})
        self.save()

    def wait(self, what: str, ready: Callable[[], object], timeout_s: float = 180) -> None:
        """Until `ready` raises nothing. Raises RuntimeError where that takes too long, or where the process that was started last
        has ended."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                ready()
                return
            except Exception as error:  # each server is not ready in a way of its own
                self._require_last()
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{what} does not answer: {error}") from error
                time.sleep(0.5)

    def _require_last(self) -> None:
        name, pid = self.processes[-1]["name"], self.processes[-1]["pid"]
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            raise RuntimeError(f"{name} has ended: {(self.directory / f'{name}.log').read_text()[-2000:]}")

    def end(self) -> None:
        """Kill them, children and all, and remove the directory."""
        alive = []
        for entry in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(entry["pid"])
                if abs(process.create_time() - entry["created"]) < 0.1:  # not another that has got its number
                    alive += [*process.children(recursive=True), process]
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=30)
        if self.place is not None:
            shutil.rmtree(self.place, ignore_errors=True)


def free_ports(number: int) -> list[int]:
    """Ports that nothing listens on, below those that the system gives to any connection at any time."""
    ports: list[int] = []
    for port in random.sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError), socket.socket() as candidate:
            candidate.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == number:
            return ports
    raise RuntimeError("there are no free ports")
