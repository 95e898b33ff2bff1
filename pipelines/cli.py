"""What all programs share: starting Ray, outputs that can be written, and configs that stay the same."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.data import DataContext
from ray.util.debug import log_once

ROOT = Path(__file__).resolve().parents[1]  # workers import this checkout wherever the program was started from

WORKER_ENVIRONMENT = {
    # glibc gives large blocks back to the system and takes them anew in every step; keeping them saves a tenth of a step on a CPU
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**26),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # pages of 2 MB, where the kernel has them
    # a worker's print goes to the driver by Ray's logs already
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}

START_ATTEMPTS = 3
"""Ray's node gives up on its agents after 15 s (ray-project/ray#65983), in which a busy machine may not have started them."""


def start_ray() -> None:
    """Connect to the running cluster (`ray job submit`, RAY_ADDRESS) or start one on this machine."""
    if ray.is_initialized():
        return
    # what the user has set stays: models that hardly fit need an allocator that gives memory back
    chosen = {name: os.environ.get(name, value) for name, value in WORKER_ENVIRONMENT.items()}
    environment = {"env_vars": chosen | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")}}
    runtime_env = None if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else environment
    if "RAY_ADDRESS" in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        ray.init(address="auto", runtime_env=runtime_env, logging_level=logging.WARNING)
    else:
        _start_here(runtime_env)


def _start_here(runtime_env: dict[str, Any] | None) -> None:
    for attempt in range(1, START_ATTEMPTS + 1):
        before = set(psutil.Process().children(recursive=True))
        try:
            cpus = max(2, os.cpu_count() or 2)
            ray.init(address="local", num_cpus=cpus, runtime_env=runtime_env, logging_level=logging.WARNING)
            return
        except Exception as error:  # of no type of its own
            for left in set(psutil.Process().children(recursive=True)) - before:  # Ray ends them only with this process
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            if attempt == START_ATTEMPTS:
                raise
            print(f"Ray did not start, which is tried again: {error}", file=sys.stderr, flush=True)


def dataset_of(rows: list[dict[str, Any]]) -> ray.data.Dataset:
    """One task for each row; no bars and plans of Ray's own: one bar in images says more."""
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    log_once("ray_data_progress_manager_disabled")  # Ray would remind of the line above
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def absolute(uri: str) -> str:
    """A URI as it is, a local path made absolute: Ray's workers run in directories of their own."""
    return uri if "://" in uri or uri.startswith("models:/") else str(Path(uri).absolute())


def absolute_if_directory(name: str | None) -> str | None:
    """A directory's name made absolute; a name on a hub, and none, as they are."""
    return str(Path(name).absolute()) if name is not None and Path(name).is_dir() else name


def require_writable(path: str) -> Path:
    """Create an output directory. Raises ValueError where that cannot be done."""
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"the output {path} cannot be written: {error.strerror}") from error
    return directory


def config_values(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


FREE = (
    "num_workers", "min_workers", "parallel", "checkpoint_every", "recovery", "sample_every", "validate_every", "profile",
    "accelerator", "text_accelerator",
)  # fmt: skip
"""Settings that a run can be continued with others of: they decide how it runs, not what comes of it."""


def completed(values: dict[str, Any], config: Any) -> dict[str, Any]:
    """The values of an older config.json with the defaults of a config's options that there were not yet."""
    made = dict(values)
    for each in dataclasses.fields(config):
        inner, part = values.get(each.name), getattr(config, each.name)
        if isinstance(inner, dict) and dataclasses.is_dataclass(part):
            made[each.name] = completed(inner, part)
        elif each.name not in values and each.default is not dataclasses.MISSING:
            made[each.name] = json.loads(json.dumps(each.default))
    return made


def require_same_config(directory: Path, values: dict[str, Any], config: Any = None) -> None:
    """Write config.json into an output; raises ValueError with the difference where an existing one says otherwise.

    Args:
        config: that the values are of, where one that was made before there was some option is the same as with its default.
    """
    file = directory / "config.json"
    before = json.loads(file.read_text()) if file.exists() else values
    require_equal_configs(before if config is None else completed(before, config), values, str(directory))
    if values != before or not file.exists():
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(values, indent=1) + "\n")
        temporary.replace(file)


def require_equal_configs(before: dict[str, Any], values: dict[str, Any], where: str) -> None:
    """Raises ValueError with the difference where an output's config is not the one it is to be continued with."""
    differ = [
        f"{key} {was!r} → {now!r}"
        for key, was, now in _differences(flattened(before), flattened(values))
        if key.split(".")[0] not in FREE
    ]
    if differ:
        raise ValueError(f"{where} was made with another config ({', '.join(differ)}); choose another --output")


def _differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(before | after):
        if before.get(key) != after.get(key):
            yield key, before.get(key), after.get(key)


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted keys: {"optim": {"lr": 1}} → {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
