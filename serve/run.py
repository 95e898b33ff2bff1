"""Serve a model on this machine: an HTTP endpoint and a page to type prompts into.

python -m serve.run --model runs/demo/train/model
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve as ray_serve

from paella import command_line
from paella.bundle import load_bundle
from serve.app import Arguments, app


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where and what to serve."""

    model: str = "runs/demo/train/model"
    """Bundle: directory, URI or models:/name@alias."""
    port: int = 8000
    """Port on the loopback interface."""


def run(config: ServeConfig) -> None:
    """Serve until interrupted. Raises ValueError for a bundle that cannot be loaded."""
    model = str(Path(config.model).absolute()) if ":/" not in config.model else config.model
    try:
        load_bundle(model)
    except ValueError as error:
        raise ValueError(f"{error}; `make demo` makes a model") from error
    ray.init(address="local", num_cpus=4, log_to_driver=False)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": config.port})
    ray_serve.run(app(Arguments(model=model)), name="paella")
    address = f"http://127.0.0.1:{config.port}"
    print(f"serving {config.model} at {address}  (Ctrl-C ends it)", flush=True)
    print(
        f"""  curl {address}/v1/images/generations -H 'content-type: application/json' -d '{{"prompt": "a red circle"}}'""",
        flush=True,
    )
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        ray_serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    command_line.main(run, ServeConfig, __doc__ or "")
