"""A server as a user starts it, for the tests that talk to one."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from processes import free_ports

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("key-one", "key-two")


@contextlib.contextmanager
def serving(bundle: Path, *flags: str, **variables: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address and the process of a server on a free port, until the block ends; it must end well."""
    (port,) = free_ports(1)
    process = subprocess.Popen(
        [sys.executable, "-m", "serve.run", "--model", bundle, "--port", str(port), *flags],
        cwd=ROOT,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    lines = []
    while process.poll() is None and not any("serving" in line for line in lines):
        lines.append(process.stdout.readline())
    assert process.poll() is None, lines
    yield f"http://127.0.0.1:{port}", process
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert process.poll() == 0
