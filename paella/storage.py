"""Where things lie: local paths, `s3://` and other fsspec URIs, and `models:/name@alias` of an MLflow registry.

Finished outputs appear whole or not at all: they are written beside their place and moved there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def local_directory(uri: str) -> Path:
    """A local copy of the directory at `uri`; the directory itself where it is local.

    Raises ValueError where there is nothing at `uri`.
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
    filesystem, root = fsspec.core.url_to_fs(uri)
    if not filesystem.exists(root):
        raise ValueError(f"there is nothing at {uri}")
    with new_directory(cache, replace=True) as directory:
        filesystem.get(root.rstrip("/") + "/", str(directory) + "/", recursive=True)
    return cache


def _from_registry(uri: str) -> Path:
    import mlflow

    try:
        path = Path(mlflow.artifacts.download_artifacts(uri))
    except mlflow.exceptions.MlflowException as error:
        raise ValueError(f"{uri} cannot be fetched: {str(error).splitlines()[0]}") from error
    return next((config.parent for config in path.rglob("config.json")), path)


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
