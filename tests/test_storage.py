"""Copies of remote directories: whole, fetched once, and new where the remote is."""

import threading
import time

import fsspec
import pytest

from paella import storage
from paella.storage import LISTING, local_directory


@pytest.fixture
def remote(monkeypatch, tmp_path):
    """A directory in fsspec's memory, and the names that are fetched from it."""
    memory = fsspec.filesystem("memory")
    memory.pipe({"/remote/a": b"one", "/remote/sub/b": b"two"})
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))
    fetched: list[str] = []
    get_file = type(memory).get_file

    def counted(self, name, target, **options):
        fetched.append(name)
        time.sleep(0.02)
        get_file(self, name, target, **options)

    monkeypatch.setattr(type(memory), "get_file", counted)
    yield memory, fetched
    memory.rm("/remote", recursive=True)


def files(directory):
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_only_what_is_new_is_fetched(remote):
    memory, fetched = remote
    directory = local_directory("memory://remote")
    assert len(fetched) == 2
    assert local_directory("memory://remote/") is not None and len(fetched) == 4, "another URI, another copy"
    fetched.clear()
    local_directory("memory://remote")
    assert fetched == []
    memory.pipe("/remote/a", b"six")  # of the same size
    memory.pipe("/remote/c", b"new")
    memory.rm("/remote/sub/b")
    local_directory("memory://remote")
    assert sorted(fetched) == ["/remote/a", "/remote/c"]
    held = files(directory)
    held.pop(LISTING)
    assert held == {"a": b"six", "c": b"new"}


def test_a_damaged_copy_is_mended(remote):
    _, fetched = remote
    directory = local_directory("memory://remote")
    (directory / "a").write_bytes(b"")
    (directory / "sub" / "b").unlink()
    fetched.clear()
    local_directory("memory://remote")
    assert sorted(fetched) == ["/remote/a", "/remote/sub/b"] and (directory / "a").read_bytes() == b"one"


def test_many_at_the_same_time_fetch_once(remote):
    _, fetched = remote
    threads = [threading.Thread(target=local_directory, args=("memory://remote",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 2


def test_names_that_would_lie_outside(tmp_path):
    class Store:
        def find(self, root, detail):
            return {f"{root}/../../evil": {"size": 1}}

    with pytest.raises(ValueError, match="would lie outside"):
        storage._versions(Store(), "bucket/model")


def test_what_cannot_be_read():
    with pytest.raises(ValueError, match="nowhere://x cannot be read: Protocol not known"):
        local_directory("nowhere://x")
