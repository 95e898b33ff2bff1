"""Where things lie: local paths, `s3://` and other fsspec URIs, and `models:/name@alias` of an MLflow registry.

Finished outputs appear whole or not at all: they are written beside their place and moved there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LISTING = ".versions.json"
"""In a local copy: the size and version (ETag or time) of each file at the time of its download."""


def local_directory(uri: str) -> Path:
    """A local copy of the directory at `uri`; the directory itself where it is local.

    Files whose size and version at `uri` are those of the local copy are not fetched again; processes that want the same `uri` at
    the same time fetch it once. Raises ValueError where there is nothing at `uri`, or where it cannot be read.
    """
    if uri.startswith("models:/"):
        return _from_registry(uri)
    if "://" not in uri:
        path = Path(uri)
        if not path.is_dir():
            raise ValueError(f"there is no directory {uri}")
        return path
    import fsspec

    cache = Path(tempfile.gettempdir()) / f"paella-{os.getuid()}" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    try:
        filesystem, root = fsspec.core.url_to_fs(uri)
        filesystem.invalidate_cache()  # what is there now, not what was there before
        versions = _versions(filesystem, root.rstrip("/"))
    except FileNotFoundError:
        versions = {}
    except Exception as error:  # each store has exceptions of its own: no such protocol, no credentials, no such host, …
        raise ValueError(f"{uri} cannot be read: {first_line(error)}") from error
    if not versions:
        raise ValueError(f"there is nothing at {uri}")
    with _locked(cache.with_suffix(".lock")):
        _update(cache, versions, lambda name, target: filesystem.get_file(f"{root.rstrip('/')}/{name}", str(target)))
    return cache


def _versions(filesystem: Any, root: str) -> dict[str, list]:
    """[size, version] of each file below `root`, by its relative name."""
    found = filesystem.find(root, detail=True)
    versions = {}
    for name, info in found.items():
        relative = name.removeprefix(root).lstrip("/")
        if ".." in Path(relative).parts:
            raise ValueError(f"it holds a file that would lie outside, {relative}")
        if relative and not relative.endswith("/"):  # S3's markers of directories
            keys = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created")
            versions[relative] = [info.get("size"), next((str(info[key]) for key in keys if info.get(key)), None)]
    return versions


def _update(cache: Path, versions: dict[str, list], fetch: Callable[[str, Path], object]) -> None:
    """Make `cache` hold just these files in these versions: fetched, or linked from the copy that is there."""
    listing = cache / LISTING
    before = json.loads(listing.read_text()) if listing.exists() else {}
    kept = {
        name
        for name, version in versions.items()
        if version[1] and before.get(name) == version and _intact(cache / name, version)
    }
    if kept == set(versions) == set(before):
        return
    with new_directory(cache, replace=True) as directory:
        for name in versions:
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name in kept:
                os.link(cache / name, target)
            else:
                fetch(name, target)
        (directory / LISTING).write_text(json.dumps(versions))


def _intact(file: Path, version: list) -> bool:
    return file.is_file() and file.stat().st_size == version[0]


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _from_registry(uri: str) -> Path:
    import mlflow

    try:
        path = Path(mlflow.artifacts.download_artifacts(uri))
    except mlflow.exceptions.MlflowException as error:
        raise ValueError(f"{uri} cannot be fetched: {first_line(error)}") from error
    return next((config.parent for config in path.rglob("config.json")), path)


def first_line(error: BaseException) -> str:
    """What an exception says first, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends without an exception."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if replace and path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file name that becomes `path` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
