"""Outputs: the same files on a path and on a real S3 server, whole or not at all; what cannot be written is said."""

import pytest
import s3fs

from pipelines.output_store import Output


@pytest.fixture(params=["local", "s3"])
def output(request, tmp_path) -> Output:
    return Output(str(tmp_path / "out") if request.param == "local" else f"{request.getfixturevalue('bucket')}/some/out")


def test_files_are_written_listed_read_and_deleted(output):
    output.require_writable()
    assert output.names() == set() and output.read("a") is None and not output.has("a")
    output.write("a", b"first")
    output.write("below/b", b"b")
    output.write("a", b"second")
    assert output.names() == {"a"} and (output / "below").names() == {"b"} and (output / "nowhere").names() == set()
    assert output.read("a") == b"second" and output.has("below/b")
    with output.open("a") as file:
        file.seek(3)
        assert file.read() == b"ond"
    output.delete("a")
    output.delete("a")
    assert not output.has("a")
    with pytest.raises(FileNotFoundError):
        output.open("a")


def test_another_config_is_refused_with_the_difference(output):
    output.require_same_config({"resolution": 32, "source.format": "auto"})
    output.require_same_config({"resolution": 32, "source.format": "auto"})
    with pytest.raises(ValueError, match="another config .resolution 32 → 64.; choose another --output"):
        output.require_same_config({"resolution": 64, "source.format": "auto"})


def test_leftovers_of_killed_writes_are_not_listed_and_go(tmp_path):
    output = Output(str(tmp_path))
    output.write("part-a.parquet", b"whole")
    torn = tmp_path / ".part-b.parquet.1.tmp"
    torn.write_bytes(b"PAR1")
    assert output.names() == {"part-a.parquet"}
    output.remove_leftovers()
    assert not torn.exists() and output.names() == {"part-a.parquet"}


def test_what_cannot_be_written_is_said(tmp_path, bucket, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        s3fs.S3FileSystem.clear_instance_cache()
        for uri in (str(tmp_path / "file"), f"{bucket}/tokens"):
            with pytest.raises(ValueError, match=f"the output {uri} cannot be written: "):
                Output(uri).require_writable()
        with pytest.raises(ValueError, match=f"{bucket}/tokens cannot be read: "):
            Output(f"{bucket}/tokens").names()
    s3fs.S3FileSystem.clear_instance_cache()
