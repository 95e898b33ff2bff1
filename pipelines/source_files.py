"""The files of a source, on a local disk or on S3: listed once, and opened so that reading here and there is cheap on either.

Credentials and endpoint of S3 are those of the standard AWS variables.
"""

from __future__ import annotations

import functools
import io
import os
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Tree:
    """The files below a directory or an s3:// prefix, or a single file."""

    root: str
    sizes: dict[str, int]
    """Bytes of each file by its name below the root, sorted; what is hidden or in a `_tmp` is left out."""

    @property
    def remote(self) -> bool:
        return is_remote(self.root)

    def uri(self, name: str) -> str:
        return join(self.root, name)

    def named(self, *suffixes: str) -> list[str]:
        """The files with one of these suffixes, in lower case or upper."""
        return [name for name in self.sizes if name.lower().endswith(suffixes)]


def is_remote(uri: str) -> bool:
    return "://" in uri


def join(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}" if is_remote(root) else os.path.join(root, name)


def list_tree(uri: str) -> Tree:
    """Raises ValueError where there is nothing at `uri`, or where it cannot be read."""
    sizes = _remote_sizes(uri) if is_remote(uri) else _local_sizes(uri)
    if uri.endswith((".tar", ".parquet")) and set(sizes) == {""}:  # the uri is a file
        root, name = os.path.split(uri)
        return Tree(root, {name: sizes[""]})
    shown = {name: sizes[name] for name in sorted(sizes) if not _hidden(name)}
    return Tree(uri, shown)


def _hidden(name: str) -> bool:
    return any(part == "_tmp" or part.startswith(".") for part in name.split("/"))


def _local_sizes(path: str) -> dict[str, int]:
    if os.path.isfile(path):
        return {"": os.path.getsize(path)}
    if not os.path.isdir(path):
        raise ValueError(f"the input {path} is not a directory")
    sizes: dict[str, int] = {}
    pending = [""]
    while pending:
        below = pending.pop()
        with os.scandir(os.path.join(path, below)) as entries:
            for entry in entries:
                name = f"{below}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{name}/")
                else:
                    sizes[name] = _size(entry)
    return sizes


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nothing: reading says so
        return 0


def _remote_sizes(uri: str) -> dict[str, int]:
    try:
        filesystem, path = _filesystem(uri)
        at = filesystem.get_file_info(path)
        if at.type == pafs.FileType.File:
            return {"": at.size}
        found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"the input {uri} cannot be read: {str(error).splitlines()[0]}") from error
    sizes = {info.path.removeprefix(path).lstrip("/"): info.size for info in found if info.is_file}
    if not sizes:
        raise ValueError(f"there is nothing at the input {uri}")
    return sizes


def _filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    scheme, _, place = uri.partition("://")
    bucket, _, _ = place.partition("/")
    return _store(f"{scheme}://{bucket}", os.getpid()), place.rstrip("/")


@functools.lru_cache(maxsize=8)
def _store(uri: str, _pid: int) -> pafs.FileSystem:
    """One client for all files; making one looks the bucket's region up."""
    return pafs.FileSystem.from_uri(uri)[0]


class SourceFile(io.BufferedReader):
    """A file opened for reading, whose reads are at least `buffer_bytes` long. Seeking within the buffer is free."""

    def __init__(self, uri: str, buffer_bytes: int) -> None:
        self.uri = uri
        raw: io.RawIOBase
        if is_remote(uri):
            filesystem, path = _filesystem(uri)
            raw = filesystem.open_input_file(path)
            self.num_bytes = raw.size()  # type: ignore[attr-defined]
        else:
            raw = open(uri, "rb", buffering=0)  # noqa: SIM115 closed with the buffer around it
            self.num_bytes = os.fstat(raw.fileno()).st_size
        super().__init__(raw, buffer_bytes)


def exists(uri: str) -> bool:
    """Whether there is a file. Raises OSError where the store cannot say."""
    if not is_remote(uri):
        return os.path.isfile(uri)
    filesystem, path = _filesystem(uri)
    return filesystem.get_file_info(path).type == pafs.FileType.File


def read_bytes(uri: str) -> bytes:
    """Raises OSError where the file cannot be read."""
    with SourceFile(uri, 1 << 16) as file:
        return file.read()


def open_native(uri: str) -> pa.NativeFile:
    """As pyarrow reads best, which has buffers of its own."""
    if not is_remote(uri):
        return pa.OSFile(uri)
    filesystem, path = _filesystem(uri)
    return filesystem.open_input_file(path)


def tail(uri: str, num_bytes: int) -> bytes:
    """The last bytes of a file."""
    with open_native(uri) as file:
        start = max(0, file.size() - num_bytes)
        return file.read_at(file.size() - start, start)


def stem(name: str) -> str:
    """`a/b.tar` → `a/b`."""
    return str(PurePosixPath(name).with_suffix(""))


def unit_name(shard: str, start: int, digest: str) -> str:
    """A unit's name, fit for a file's name: its shard's last part, where it starts there, and the digest of what it holds."""
    last = re.sub(r"[^A-Za-z0-9._-]", "_", shard.rpartition("/")[2])[:80]
    return f"{last or 'folder'}-{start:08d}-{digest[:8]}"


def utf8(name: str) -> str:
    """File names need not be UTF-8, but ids are."""
    try:
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # surrogates that stand for no byte, from a .json
        return name.encode(errors="backslashreplace").decode()
