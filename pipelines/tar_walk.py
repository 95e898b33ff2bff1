"""Walks the samples of a webdataset tar: members with the same key, one after another. What is damaged or odd has a name.

Nothing is extracted, no link is followed, and no more is read into memory than the caller's limit, whatever a header says.
"""

from __future__ import annotations

import struct
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipelines.source_files import IMAGE_SUFFIXES, SourceFile
from pipelines.source_rows import Member

MAX_HEADER_BYTES = 1 << 20
"""Long names and attributes above this are damage: tarfile would read them whole."""
MAX_MEMBERS = 64
"""Members of one sample that are looked at."""
SUFFIXES = (*IMAGE_SUFFIXES, ".txt", ".json")


class DamagedTar(Exception):
    """Where and how a tar ends before its end."""


@dataclass
class Group:
    """The members of one key."""

    key: str
    offset: int
    """Byte of the tar at which its first header lies."""
    members: list[Member] = field(default_factory=list)
    problem: tuple[str, str] | None = None
    """Reason and detail, where it cannot be used as it is."""


class _TarFile(SourceFile):
    """A file of which headers cannot ask for more than `MAX_HEADER_BYTES` at once, nor for what lies behind its end."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if whence == 0 and offset > self.num_bytes:
            raise tarfile.ReadError(f"it ends at byte {self.num_bytes} in the middle of a member")
        return super().seek(offset, whence)

    def data(self, member: tarfile.TarInfo) -> bytes:
        self.seek(member.offset_data)
        return super().read(member.size)


def walk(uri: str, offset: int, buffer_bytes: int, max_bytes: Callable[[int, str], int]) -> Iterator[Group]:
    """The samples from `offset` on, in the tar's order.

    Args:
        max_bytes: of a sample's place in this walk and a suffix: members of at most so many bytes are read.

    Raises DamagedTar at the end of what can be read of a damaged tar, OSError where the store fails.
    """
    with _TarFile(uri, buffer_bytes) as file:
        group: Group | None = None
        number = 0
        try:
            for member in _members(file, offset):
                key, suffix = _split(member.name)
                if group is None or group.key != key:
                    if group is not None:
                        yield group
                        number += 1
                    group = Group(key, member.offset)
                _add(group, member, suffix, file, max_bytes(number, suffix))
        except (tarfile.TarError, ValueError, OverflowError, RecursionError, struct.error) as error:
            if group is not None:
                yield group
            raise DamagedTar(f"{error or type(error).__name__}") from error
        if group is not None:
            yield group


def _members(file: _TarFile, offset: int) -> Iterator[tarfile.TarInfo]:
    """All but directories. Raises tarfile.TarError for damage: tarfile itself takes a bad header for the end."""
    file.seek(offset)
    with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            if not member.isdir():
                yield member
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or any(block):
            what = "another header is damaged" if block else "it has no end-of-archive mark: half written?"
            raise tarfile.ReadError(f"at byte {tar.offset} of {file.num_bytes}: {what}")


def _split(name: str) -> tuple[str, str]:
    """webdataset's rule: the key ends at the first dot of the file's name."""
    directory, _, base = name.rpartition("/")
    key, dot, suffix = base.partition(".")
    return (f"{directory}/{key}" if directory else key), (dot + suffix).lower()


def _add(group: Group, member: tarfile.TarInfo, suffix: str, file: _TarFile, max_bytes: int) -> None:
    path = PurePosixPath(member.name)
    detail = None
    if not member.isfile() or member.issparse():
        detail = f"the member {member.name} is no plain file but of tar's type {member.type!r}"
    elif path.is_absolute() or ".." in path.parts:
        detail = f"the member {member.name} would lie outside"
    elif len(group.members) == MAX_MEMBERS:
        detail = f"more than {MAX_MEMBERS} members"
    if detail is not None:
        group.problem = group.problem or ("unsafe-member", detail)
        return
    wanted = suffix in SUFFIXES and member.size <= max_bytes
    data = file.data(member) if wanted else None
    if data is not None and len(data) < member.size:
        where = f"it ends at byte {file.num_bytes} in the middle of {member.name}"
        group.problem = ("truncated-member", where)
        raise tarfile.ReadError(where)
    group.members.append(Member(suffix, member.size, data))
