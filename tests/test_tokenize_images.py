"""The tokenizing job: right tokens, every row accounted for, and nothing lost or done twice by a kill."""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from paella import command_line
from paella.bundle import load_vqgan, save_vqgan
from paella.conditioning import clip_pixels, load_clip
from paella.config import VQConfig
from paella.images import MAX_PIXELS, center_crop, decode_image, to_tensor
from paella.vqgan import VQModel
from pipelines import cli
from pipelines.img2dataset_layout import write_folder, write_webdataset
from pipelines.scenes import scenes
from pipelines.sources import find_units, read_unit
from pipelines.token_dataset import TokenDataset
from pipelines.tokenize_images import DecodeUnit, EncodeUnit, TokenizeConfig, run

PROGRAM = Path(__file__).parents[1] / "pipelines" / "tokenize_images.py"


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory) -> Path:
    """A tiny VQGAN whose codes all occur: with the initial codebook near 0, one code would be nearest to everything."""
    torch.manual_seed(0)
    model = VQModel(VQConfig(bottleneck_blocks=1, c_hidden=16, codebook_size=32)).eval()
    with torch.inference_mode():
        images = np.stack([image for _, image in scenes(16, seed=9, held_out=False)])
        latents = model.encode_latents(to_tensor(images)).permute(0, 2, 3, 1).reshape(-1, 4)
        model.vquantizer.codebook.weight.copy_(latents[torch.randperm(len(latents))[:32]])
    path = tmp_path_factory.mktemp("bundles") / "vqgan"
    save_vqgan(path, model)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_webdataset(tmp_path_factory.mktemp("images") / "set", scenes(50, seed=0, held_out=False), shard_size=20)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, images, vqgan, ray_session) -> Path:
    """An undisturbed run: 50 images in 15 units of at most 4."""
    return run(config(images, vqgan, tmp_path_factory.mktemp("tokens") / "undisturbed"))


def config(images, vqgan, output, **changes) -> TokenizeConfig:
    values = {"image_size": 32, "batch_size": 8, "rows_per_unit": 4} | changes
    return TokenizeConfig(input=str(images), vqgan=str(vqgan), output=str(output), **values)


def test_clip_columns_are_what_clip_says_of_crop_and_caption(images, vqgan, clip_directory, tmp_path, ray_session):
    output = run(config(images, vqgan, tmp_path / "tokens", clip=str(clip_directory)))
    rows = rows_of(output)
    clip, tokenizer = load_clip(str(clip_directory))
    samples = [sample for unit in find_units(str(images)) for sample in read_unit(unit)][:5]
    crops = [center_crop(decode_image(sample.image), 32) for sample in samples]
    with torch.inference_mode():
        image, text = (clip.encode_image(clip_pixels(clip, crops)), clip.encode_text(tokenizer([s.caption for s in samples])))
    for name, values in {"clip_image": image, "clip_text": text}.items():
        kept = np.stack([rows[sample.id][name] for sample in samples]).astype(np.float32)
        np.testing.assert_allclose(kept, values.numpy(), atol=2e-3, rtol=2e-3)  # float16
    assert TokenDataset(str(output)).require_clip() == image.shape[1]
    with pytest.raises(ValueError, match="another config .clip .* None"):
        run(config(images, vqgan, output))
    with pytest.raises(ValueError, match="CLIP model 'no/such' cannot be loaded"):
        run(config(images, vqgan, tmp_path / "other", clip="no/such"))
    assert not (tmp_path / "other").exists()


def rows_of(output: Path) -> dict[str, dict]:
    """All rows by id, read from the shards alone; fails on an id that is there twice."""
    rows = [row for file in sorted(output.glob("part-*.parquet")) for row in pq.read_table(file).to_pylist()]
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows)
    return by_id


def rejects_of(output: Path) -> dict[str, str]:
    rows = [row for file in output.glob("rejects/*.parquet") for row in pq.read_table(file).to_pylist()]
    assert all(set(row) == {"id", "stage", "reason", "detail"} and row["detail"] for row in rows)
    return {row["id"]: row["reason"] for row in rows}


def test_tokens_are_those_of_the_vqgan_on_the_same_crop(dataset, images, vqgan):
    model, _ = load_vqgan(str(vqgan))
    rows = rows_of(dataset)
    samples = [sample for unit in find_units(str(images)) for sample in read_unit(unit)]
    assert set(rows) == {sample.id for sample in samples} and len(rows) == 50
    for sample in samples:
        crop = center_crop(decode_image(sample.image), 32)
        with torch.inference_mode():
            tokens = model.encode(to_tensor(crop[None])).flatten()
        assert rows[sample.id]["tokens"] == tokens.tolist()
        assert rows[sample.id]["caption"] == sample.caption
        assert (rows[sample.id]["width"], rows[sample.id]["height"]) == (64, 64)
    assert len({code for row in rows.values() for code in row["tokens"]}) > 16


def test_other_programs_read_the_shards(dataset):
    info = json.loads((dataset / "dataset.json").read_text())
    files = [dataset / shard["file"] for shard in info["shards"]]
    table = pq.read_table(files)
    frame = pd.concat([pd.read_parquet(file) for file in files])
    assert str(table.schema.field("tokens").type) == "fixed_size_list<element: uint16>[64]"
    assert len(table) == len(frame) == info["rows"] == 50
    assert frame["tokens"].iloc[0].dtype == np.uint16 and frame["sha256"].str.len().eq(64).all()
    assert "extension" not in str(table.schema)


def test_dataset_json_accounts_for_everything(dataset, vqgan):
    info = json.loads((dataset / "dataset.json").read_text())
    assert (info["rows_in"], info["rows"], info["rejected"], info["rejects"]) == (50, 50, 0, {})
    assert [pq.read_metadata(dataset / s["file"]).num_rows for s in info["shards"]] == [s["rows"] for s in info["shards"]]
    assert info["vqgan_digest"] == load_vqgan(str(vqgan))[1] and info["grid"] == [8, 8] and info["image_size"] == 32
    assert info["seconds"] > 0 and info["images_per_s"] > 0


def test_two_stages_the_other_layout_and_another_batch_size_give_the_same_tokens(tmp_path, dataset, vqgan):
    """The stages as they run with GPUs, with Ray's object store between them."""
    folder = write_folder(tmp_path / "folder", scenes(50, seed=0, held_out=False), shard_size=20)
    settings = config(folder, vqgan, tmp_path / "out", batch_size=7, rows_per_unit=1024)
    (tmp_path / "out" / "rejects").mkdir(parents=True)
    decode, encode = DecodeUnit(32), EncodeUnit(settings)
    units = find_units(str(folder), 1024)
    decoded = [ray.get(ray.put(decode(pa.table({"unit": [pickle.dumps(unit)]})))) for unit in units]
    assert [encode(table)["rows_in"].to_pylist() for table in decoded] == [[20], [20], [10]]
    ours, theirs = rows_of(tmp_path / "out"), rows_of(dataset)
    assert {i.split("/")[-1]: row["tokens"] for i, row in ours.items()} == {i: row["tokens"] for i, row in theirs.items()}


def hostile_folder(root: Path) -> Path:
    """Ten good samples among eight bad ones."""
    write_folder(root, scenes(10, seed=4, held_out=False))
    good = (root / "00000" / "000000000.jpg").read_bytes()
    huge = io.BytesIO()
    Image.new("1", (MAX_PIXELS // 5000 + 1, 5000)).save(huge, "PNG")
    bad = {
        "truncated": good[: len(good) // 2],
        "html": b"<!doctype html><title>404</title>",
        "huge": huge.getvalue(),
        "nothing": b"",
    }
    for name, data in bad.items():
        (root / f"{name}.jpg").write_bytes(data)
        (root / f"{name}.txt").write_text("a caption")
    for name, caption in (("blank", b""), ("latin1", b"caf\xe9"), ("uncaptioned", None), ("double", b"two images")):
        (root / f"{name}.jpg").write_bytes(good)
        if caption is not None:
            (root / f"{name}.txt").write_bytes(caption)
    (root / "double.png").write_bytes(good)
    return root


def test_hostile_rows_are_rejected_by_reason_and_good_ones_written(tmp_path, vqgan, ray_session, capsys):
    output = run(config(hostile_folder(tmp_path / "in"), vqgan, tmp_path / "out"))
    assert len(rows_of(output)) == 10
    assert rejects_of(output) == {
        "truncated": "unreadable-image",
        "html": "unreadable-image",
        "huge": "unreadable-image",
        "nothing": "unreadable-image",
        "blank": "empty-caption",
        "latin1": "caption-not-utf8",
        "uncaptioned": "no-caption",
        "double": "duplicate-key",
    }
    info = json.loads((output / "dataset.json").read_text())
    assert info["rejects"]["unreadable-image"] == 4 and sum(info["rejects"].values()) == 8
    assert "rows in 18 = written 10 + rejected 8" in capsys.readouterr().out
    details = {row["id"]: row["detail"] for f in output.glob("rejects/*") for row in pq.read_table(f).to_pylist()}
    assert "pixels, more than" in details["huge"]
    assert len(TokenDataset(str(output)).shards) == 5  # an empty shard is none the worse for it


def test_all_rejected_is_an_error_that_can_be_repaired(tmp_path, vqgan, ray_session):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jpg").write_bytes(b"<html>")
        (tmp_path / f"{name}.txt").write_text("" if name == "c" else "a caption")
    settings = config(tmp_path, vqgan, tmp_path / "out")
    with pytest.raises(ValueError, match=r"none of the 3 samples in .* 2 of them: unreadable-image"):
        run(settings)
    assert not (tmp_path / "out" / "dataset.json").exists()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.jpg")
    assert list(rows_of(run(settings))) == ["a"]


def test_new_tars_are_added_and_a_changed_input_is_refused(tmp_path, vqgan, ray_session):
    root = write_webdataset(tmp_path / "in", scenes(8, seed=0, held_out=False), shard_size=4)
    later = root / "00001_stats.json"
    later.rename(tmp_path / "later.json")
    settings = config(root, vqgan, tmp_path / "out")
    output = run(settings)
    (first,) = output.glob("part-*.parquet")
    before = first.stat().st_mtime_ns
    (tmp_path / "later.json").rename(later)
    assert len(rows_of(run(settings))) == 8 and first.stat().st_mtime_ns == before
    assert TokenDataset(str(output)).num_rows == 8
    (root / "00000_stats.json").unlink()
    with pytest.raises(ValueError, match="files were added to or removed from"):
        run(settings)


def test_a_finished_job_does_nothing(dataset, images, vqgan, capsys, monkeypatch):
    monkeypatch.setattr(cli, "start_ray", lambda: pytest.fail("Ray was started for nothing"))
    before = {file: file.stat().st_mtime_ns for file in dataset.rglob("*")}
    assert run(config(images, vqgan, dataset)) == dataset
    assert "finished" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in dataset.rglob("*")} == before


def test_a_job_killed_before_its_last_file_only_writes_that(tmp_path, dataset, images, vqgan, monkeypatch):
    monkeypatch.setattr(cli, "start_ray", lambda: pytest.fail("Ray was started for nothing"))
    copy = tmp_path / "copy"
    settings = config(images, vqgan, copy)
    (copy / "rejects").mkdir(parents=True)
    for file in [*dataset.glob("part-*"), *dataset.glob("rejects/*")]:
        (copy / file.relative_to(dataset)).write_bytes(file.read_bytes())
    torn = copy / ".part-00000.parquet.1.tmp"
    torn.write_bytes(b"PAR1")
    assert run(settings) == copy and not torn.exists()
    keys = ("rows", "shards", "rejects", "grid", "vqgan_digest")
    one, other = (json.loads((path / "dataset.json").read_text()) for path in (copy, dataset))
    assert [one[key] for key in keys] == [other[key] for key in keys]


def test_changed_settings_are_refused(dataset, images, vqgan, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in dataset.rglob("*")}
    with pytest.raises(ValueError, match="image_size 32 → 64"):
        run(config(images, vqgan, dataset, image_size=64))
    with pytest.raises(ValueError, match="needs a multiple of 4"):
        run(config(images, vqgan, dataset, image_size=30))
    save_vqgan(tmp_path / "other", VQModel(VQConfig(bottleneck_blocks=1, c_hidden=16, codebook_size=32)))
    with pytest.raises(ValueError, match=r"vqgan '[0-9a-f]{64}' → '[0-9a-f]{64}'"):
        run(config(images, tmp_path / "other", dataset))
    moved = tmp_path / "moved"
    moved.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be written"):
        run(config(images, vqgan, moved))
    assert {file: file.stat().st_mtime_ns for file in dataset.rglob("*")} == before


def test_a_vqgan_at_another_place_is_the_same_one(dataset, images, vqgan, tmp_path):
    model, _ = load_vqgan(str(vqgan))
    save_vqgan(tmp_path / "copy", model)
    assert run(dataclasses.replace(config(images, vqgan, dataset), vqgan=str(tmp_path / "copy"))) == dataset


def arguments(images, vqgan, output, **changes) -> list[str]:
    values = dataclasses.asdict(config(images, vqgan, output, **changes))
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize("mistake", ["missing input", "no captions", "not a bundle"])
def test_mistakes_exit_with_2_and_one_line(tmp_path, images, vqgan, mistake, monkeypatch, capsys):
    source, bundle = images, vqgan
    if mistake == "missing input":
        source = tmp_path / "nowhere"
    elif mistake == "no captions":
        source = tmp_path
        Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    else:
        bundle = images
    monkeypatch.setattr(sys, "argv", ["tokenize_images", *arguments(source, bundle, tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        command_line.main(run, TokenizeConfig, "")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ")
    assert not (tmp_path / "out").exists()


def start(*args: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    return subprocess.Popen(
        [sys.executable, PROGRAM, *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_the_program_itself_says_one_sentence(tmp_path, vqgan):
    process = start(*arguments(tmp_path / "nowhere", vqgan, tmp_path / "out"))
    out, err = process.communicate(timeout=120)
    (line,) = err.splitlines()
    assert (process.returncode, out) == (2, "") and line.startswith("error: ") and "nowhere" in line


def test_a_killed_job_continues_to_the_same_dataset(tmp_path, dataset, images, vqgan):
    output = tmp_path / "killed"
    process = start(*arguments(images, vqgan, output))
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 150
        while len(list(output.glob("part-*.parquet"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)
            time.sleep(0.02)
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        for relative in family:  # Ray's own processes are in sessions of their own
            with contextlib.suppress(psutil.NoSuchProcess):
                relative.kill()
        process.communicate()
    psutil.wait_procs(family, timeout=20)
    finished = {file: file.stat().st_mtime_ns for file in output.glob("part-*.parquet")}
    assert 3 <= len(finished) < 15 and not (output / "dataset.json").exists()
    with pytest.raises(ValueError, match="not a finished token dataset"):
        TokenDataset(str(output))
    partial, whole = rows_of(output), rows_of(dataset)  # reading them fails on a torn file
    assert partial.items() <= whole.items()
    run(config(images, vqgan, output))
    assert rows_of(output) == whole
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert [file.name for file in output.rglob(".*")] == []
    assert [f.name for f in sorted(output.glob("part-*"))] == [f.name for f in sorted(dataset.glob("part-*"))]
