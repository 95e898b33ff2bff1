"""Outputs on a local path or `s3://` alike: files that appear whole or not at all, and a config that stays the same.

Locally a file is written beside its place and moved there; a store takes it in one PUT, or in parts that become visible together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs

from paella.storage import first_line, new_file
from pipelines import cli


class Output:
    """A directory of an output. Small, and picklable: what it needs to reach a store it finds anew in each process."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.local = None if "://" in uri else Path(uri)

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> Output:
        return Output(f"{self.uri}/{name}")

    def _store(self) -> tuple[Any, str]:
        # without caches: another process, or another run, writes here too
        filesystem, root = fsspec.core.url_to_fs(self.uri, use_listings_cache=False)
        return filesystem, root.rstrip("/")

    def require_writable(self) -> None:
        """Create the directory. Raises ValueError where nothing can be written to it."""
        if self.local is not None:
            cli.require_writable(self.uri)
            return
        try:
            self.write(".writable", b"")
            self.delete(".writable")
        except Exception as error:  # each store has exceptions of its own: no such bucket, no credentials, no such host, …
            raise ValueError(f"the output {self.uri} cannot be written: {first_line(error)}") from error

    def names(self) -> set[str]:
        """The files that lie directly in the directory, from one listing. Leftovers of killed writes are not among them.

        Raises ValueError where a store does not say.
        """
        try:
            filesystem, root = self._store()
            found = filesystem.ls(root, detail=True)
        except FileNotFoundError:
            return set()
        except Exception as error:  # each store has exceptions of its own: no credentials, no such host, …
            raise ValueError(f"{self.uri} cannot be read: {first_line(error)}") from error
        names = {entry["name"].rsplit("/", 1)[-1] for entry in found if entry["type"] == "file"}
        return {name for name in names if name and not name.startswith(".")}  # stores mark directories by nameless files

    def has(self, name: str) -> bool:
        """Whether there is a file."""
        filesystem, root = self._store()
        return filesystem.exists(f"{root}/{name}")

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None where there is no such file."""
        filesystem, root = self._store()
        try:
            return filesystem.cat_file(f"{root}/{name}")
        except FileNotFoundError:
            return None

    def open(self, name: str) -> pa.NativeFile:
        """A file to read parts of. Raises FileNotFoundError where there is none."""
        filesystem, root = pafs.FileSystem.from_uri(self.uri if self.local is None else str(self.local.absolute()))
        return filesystem.open_input_file(f"{root}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file in its place."""
        if self.local is not None:
            with new_file(self.local / name) as file:
                file.write_bytes(data)
            return
        filesystem, root = self._store()
        filesystem.pipe_file(f"{root}/{name}", data)

    @contextmanager
    def growing(self, name: str) -> Iterator[IO[bytes]]:
        """A file to write to, which appears when the block ends without an exception, and not before."""
        if self.local is not None:
            with new_file(self.local / name) as place, place.open("wb") as file:
                yield file
            return
        filesystem, root = self._store()
        file = filesystem.open(f"{root}/{name}", "wb", autocommit=False)
        try:
            yield file
            file.close()
        except BaseException:
            file.discard()
            raise
        file.commit()

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        filesystem, root = self._store()
        if self.has(name):
            filesystem.rm_file(f"{root}/{name}")

    def remove_leftovers(self) -> None:
        """Remove what killed writes left beside their places, in directories below too. A store has none."""
        if self.local is not None:
            for leftover in self.local.rglob(".*.tmp"):
                leftover.unlink(missing_ok=True)

    def require_same_config(self, values: dict[str, Any]) -> None:
        """Write config.json into a new output; raises ValueError with the difference where an existing one says otherwise."""
        kept = self.read("config.json")
        if kept is None:
            self.write("config.json", (json.dumps(values, indent=1) + "\n").encode())
        else:
            cli.require_equal_configs(json.loads(kept), values, str(self))
