"""What the real img2dataset writes, from a web server on this machine, in its three formats: on disk and on a real S3 server."""

import hashlib
import io
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from web import Answer, site

from pipelines import features
from pipelines.source_contract import FetchConfig, Reject, Sample, SourceConfig
from pipelines.sources import by_shard, find_units, read_unit, read_units

pytestmark = pytest.mark.skipif(sys.version_info >= (3, 13), reason="img2dataset 1.47 needs imghdr, which Python 3.13 has not")

FORMATS = ("webdataset", "parquet", "files")
NUM = 12
DEAD, BROKEN = 3, 8
"""Rows whose page is missing, and is no image."""


def jpeg(number):
    data = io.BytesIO()
    Image.new("RGB", (90 + number, 70), (number * 20, 100, 50)).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a table of URLs and what img2dataset made of it, and the rows that should be read, by caption."""
    root = tmp_path_factory.mktemp("img2dataset")
    pages = {f"/{n}.jpg": Answer(jpeg(n)) for n in range(NUM) if n != DEAD} | {f"/{BROKEN}.jpg": Answer(b"<html>")}
    with site(pages) as web:
        rows = [
            {"URL": web.url(f"/{n}.jpg"), "TEXT": f"picture {n} äß", "similarity": 0.3, "punsafe": n / 20,
             "AESTHETIC_SCORE": 5.0 + n}
            for n in range(NUM)
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), root / "list.parquet")
        command = [sys.executable, Path(__file__).with_name("run_img2dataset.py"), root / "list.parquet", root, *FORMATS]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
    metas = {
        row["TEXT"]: {"width": 90 + n, "height": 70, "aesthetic": 5.0 + n, "punsafe": n / 20, "similarity": 0.3,
                      "sha256": hashlib.sha256(jpeg(n)).hexdigest(), "url": row["URL"]}
        for n, row in enumerate(rows) if n not in (DEAD, BROKEN)
    }  # fmt: skip
    return root, metas


def read(uri, rows_per_unit=1024):
    units = find_units(uri, rows_per_unit)
    rows = [row for together in by_shard(units) for _, row in read_units(together)]
    assert len(rows) == sum(unit.num_samples for unit in units) == NUM
    return rows


def require_all(rows, metas):
    """Every good row with all that is known of it, every bad one with its reason."""
    assert {row.caption: dict(row.meta) for row in rows if isinstance(row, Sample)} == metas
    assert all(Image.open(io.BytesIO(row.image)).size == (64, 64) for row in rows if isinstance(row, Sample))
    rejects = {row.id.rpartition("/")[2]: (row.stage, row.reason) for row in rows if isinstance(row, Reject)}
    assert rejects == {"000003": ("source", "failed-to-download"), "000013": ("source", "failed-to-resize")}
    keys = {f"{n // 5:05d}{n % 5}" for n in range(NUM)}
    assert {row.id.rpartition("/")[2] for row in rows} == keys and len({row.id for row in rows}) == NUM
    assert any("404" in row.detail for row in rows if isinstance(row, Reject))


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("rows_per_unit", [2, 1024])
def test_the_three_formats(written, output_format, rows_per_unit):
    root, metas = written
    rows = read(f"{root}/{output_format}", rows_per_unit)
    require_all(rows, metas)
    units = find_units(f"{root}/{output_format}", rows_per_unit)
    one_by_one = [row for unit in units for number in range(unit.num_samples) for row in read_unit(unit, [number])]
    assert sorted(one_by_one, key=lambda row: row.id) == sorted(rows, key=lambda row: row.id)


def test_shards_that_are_not_finished_are_left_out_and_added_later(written):
    root, _ = written
    for output_format in FORMATS:
        stats = root / output_format / "00001_stats.json"
        before = find_units(f"{root}/{output_format}")
        stats.rename(root / "aside")
        some = find_units(f"{root}/{output_format}")
        (root / "aside").rename(stats)
        assert 0 < len(some) < len(before) and {unit.name for unit in some} < {unit.name for unit in before}
        assert sum(unit.num_samples for unit in some) == 7
        assert find_units(f"{root}/{output_format}") == before


def test_the_same_from_a_real_s3_server(written, bucket, tmp_path):
    import s3fs

    root, metas = written
    store = s3fs.S3FileSystem()
    store.put(f"{root}/", f"{bucket}/", recursive=True)
    for output_format in FORMATS:
        local, remote = f"{root}/{output_format}", f"{bucket}/{output_format}"
        assert [unit.name for unit in find_units(remote, 2)] == [unit.name for unit in find_units(local, 2)]
        for rows_per_unit in (2, 1024):
            rows = read(remote, rows_per_unit)
            require_all(rows, metas)
            assert rows == read(local, rows_per_unit)
        assert features.captions(remote, 3) == features.captions(local, 3)  # as reference images of an evaluation
    with site({f"/{n}.jpg": Answer(jpeg(n)) for n in range(NUM)}) as web:
        table = pa.table({"URL": [web.url(f"/{n}.jpg") for n in range(NUM)], "TEXT": [f"picture {n}" for n in range(NUM)]})
        pq.write_table(table, tmp_path / "urls.parquet")
        store.put(str(tmp_path / "urls.parquet"), f"{bucket}/urls/urls.parquet")
        source = SourceConfig(fetch=FetchConfig(allow_private_addresses=True))
        rows = [row for unit in find_units(f"{bucket}/urls", 5, source) for row in read_unit(unit)]
        assert [row.image for row in rows] == [jpeg(n) for n in range(NUM)]


def test_other_layouts_and_mistakes_on_s3(bucket, tmp_path):
    import s3fs
    from test_sources import png, write_files, write_tar

    write_tar(
        tmp_path / "tars" / "a.tar",
        [(f"{n}{suffix}", data) for n in range(5) for suffix, data in ((".png", png()), (".txt", b"x"))],
    )
    content = (tmp_path / "tars" / "a.tar").read_bytes()
    (tmp_path / "tars" / "b.tar").write_bytes(content[:2600])  # one sample and a half
    write_files(tmp_path / "folder", [("sub/a.png", png()), ("sub/a.txt", b"a"), ("sub/b.png", png()), ("sub/b.txt", b"\xe9")])
    write_files(tmp_path / "listed", [("metadata.csv", b"file_name,text\na.png,a\ngone.png,b\n"), ("a.png", png())])
    s3fs.S3FileSystem().put(f"{tmp_path}/", f"{bucket}/", recursive=True)
    for name in ("tars", "folder", "listed", "tars/a.tar"):
        for rows_per_unit in (2, 1024):
            rows = {}
            for root in (str(tmp_path), bucket):
                units = find_units(f"{root}/{name}", rows_per_unit)
                rows[root] = [(u.name, replace_detail(row)) for together in by_shard(units) for u, row in read_units(together)]
            assert rows[bucket] == rows[str(tmp_path)] and rows[bucket]
    with pytest.raises(ValueError, match=f"there is nothing at the input {bucket}/nowhere"):
        find_units(f"{bucket}/nowhere")
    with pytest.raises(ValueError, match="the input s3://no-such-bucket-here/x cannot be read|there is nothing"):
        find_units("s3://no-such-bucket-here/x")


def replace_detail(row):
    """A file that is missing is told by its place, which differs."""
    return Reject(row.id, row.stage, row.reason, "") if isinstance(row, Reject) else row
