"""The tokenizing job: right tokens, every row accounted for, and nothing lost or done twice by a kill."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import assert_one_sentence
from PIL import Image
from test_image_decoding import jpeg_of_size, zip_bomb
from tokenizing import arguments, config, in_process, rejects_of, rows_of, run, run_in_process, start

from paella import command_line
from paella.bundle import load_vqgan, save_vqgan
from paella.conditioning import TextEncoders, clip_pixels, load_clip
from paella.config import TextConfig, VQConfig
from paella.images import MAX_PIXELS, center_crop, decode_image, to_tensor
from paella.vqgan import VQModel
from pipelines import cli, inspect_tokens, tokenize_images, tracking
from pipelines.byt5_columns import warning
from pipelines.img2dataset_layout import write_folder, write_webdataset
from pipelines.output_store import Output
from pipelines.sample_filters import FilterConfig
from pipelines.scenes import caption as scene_caption
from pipelines.scenes import scenes
from pipelines.sources import find_units, read_unit
from pipelines.token_dataset import TokenDataset
from pipelines.token_format import TokenFormat
from pipelines.token_stages import Decode, DecodeAndEncode, Encode, packed
from pipelines.tokenize_config import TokenizeConfig


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_webdataset(tmp_path_factory.mktemp("images") / "set", scenes(50, seed=0, held_out=False), shard_size=20)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, images, vqgan_bundle, ray_session) -> Path:
    """An undisturbed run: 50 images in 15 units of at most 4."""
    return run(config(images, vqgan_bundle, tmp_path_factory.mktemp("tokens") / "undisturbed"))


def table_of(settings: TokenizeConfig) -> pa.Table:
    """The first shard of a job, made in this process."""
    settings = settings.absolute()
    (decoded, *_) = Decode(settings).units(find_units(settings.input, settings.rows_per_unit, settings.source)[:1])
    return Encode(settings).table(decoded)


def test_clip_columns_are_what_clip_says_of_crop_and_caption(images, vqgan_bundle, clip_directory, dataset):
    both = {"clip": str(clip_directory), "clip_image": True, "clip_text": True}
    table = table_of(config(images, vqgan_bundle, "unused", **both))
    clip, tokenizer = load_clip(str(clip_directory))
    samples = list(read_unit(find_units(str(images), 4)[0]))
    crops = [center_crop(decode_image(sample.image), 32) for sample in samples]
    with torch.inference_mode():
        image, text = (clip.encode_image(clip_pixels(clip, crops)), clip.encode_text(tokenizer([s.caption for s in samples])))
    for name, values in {"clip_image": image, "clip_text": text}.items():
        kept = np.stack(table[name].to_numpy()).astype(np.float32)
        np.testing.assert_allclose(kept, values.numpy(), atol=2e-3, rtol=2e-3)  # float16
    assert TokenFormat.of(table.schema, "").clip_embd == image.shape[1]
    only = table_of(config(images, vqgan_bundle, "unused", clip=str(clip_directory), clip_text=True))
    assert only["clip_text"].equals(table["clip_text"]) and "clip_image" not in only.schema.names
    assert TokenFormat.of(only.schema, "").clip_columns == ("clip_text",)
    with pytest.raises(ValueError, match="another config .clip None"):
        run(config(images, vqgan_bundle, dataset, **both))
    with pytest.raises(ValueError, match="CLIP model 'no/such' cannot be loaded"):
        run(config(images, vqgan_bundle, "unused", clip="no/such", clip_text=True))
    with pytest.raises(ValueError, match="nothing to embed"):
        config(images, vqgan_bundle, "unused", clip="no/such")


def test_text_states_are_the_encoder_s_without_padding(images, vqgan_bundle, model_bundle):
    encoder = model_bundle / "encoders" / "byt5"
    table = table_of(config(images, vqgan_bundle, "unused", byt5=str(encoder)))
    text = TextEncoders.load(TextConfig(byt5=str(encoder)))
    format = TokenFormat.of(table.schema, "")
    for row in table.to_pylist():
        with torch.inference_mode():
            states = text([row["caption"]])["byt5"][0]
        assert (row["byt5_length"], format.byt5_embd) == states.shape
        kept = np.array(row["byt5"], dtype=np.float32).reshape(states.shape)
        np.testing.assert_allclose(kept, states.numpy(), atol=5e-3, rtol=5e-3)  # float16
    width = format.byt5_embd
    assert f"{200 * width / 1e6:.2f} MB for a caption" in warning(TextConfig(byt5=str(encoder)), 1000)
    with pytest.raises(ValueError, match="the text encoder 'no-such-encoder' cannot be loaded"):
        run(config(images, vqgan_bundle, "unused", byt5="no-such-encoder"))


def test_tokens_are_those_of_the_vqgan_on_the_same_crop(dataset, images, vqgan_bundle):
    model, _ = load_vqgan(str(vqgan_bundle))
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
    """pyarrow, pandas and DuckDB, in a process that knows nothing of Ray."""
    program = f"""
import glob, sys, duckdb, numpy as np, pandas as pd, pyarrow.parquet as pq
shards = {str(dataset / "part-*.parquet")!r}
rows = duckdb.sql(f"select id, tokens, caption, sha256 from '{{shards}}' order by id").fetchall()
files = sorted(glob.glob(shards))
table = pq.read_table(files).sort_by("id")
frame = pd.concat([pd.read_parquet(file) for file in files]).sort_values("id")
assert len(rows) == len(table) == len(frame) == 50
assert str(table.schema.field("tokens").type) == "fixed_size_list<element: uint16>[64]" and "extension" not in str(table.schema)
assert frame["tokens"].iloc[0].dtype == np.uint16 and frame["sha256"].str.len().eq(64).all()
for (id, tokens, caption, _), ours, theirs in zip(rows, table.to_pylist(), frame.to_dict("records")):
    assert id == ours["id"] == theirs["id"] and caption == ours["caption"] == theirs["caption"]
    assert list(tokens) == ours["tokens"] == theirs["tokens"].tolist()
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_mlflow_has_counts_rates_and_a_sheet(dataset):
    tracked = tracking.Run(**json.loads((dataset / "mlflow_run.json").read_text()))
    kept = tracked.client().get_run(tracked.run_id)
    assert kept.info.status == "FINISHED" and kept.data.params["resolution"] == "32"
    assert kept.data.metrics["written"] == 50 and kept.data.metrics["rejected"] == 0 and kept.data.metrics["psnr_db"] > 0
    images = [file.path for file in tracked.client().list_artifacts(tracked.run_id, "images")]
    assert any("originals_and_reconstructions" in path for path in images)


def test_dataset_json_accounts_for_everything(dataset, vqgan_bundle):
    info = json.loads((dataset / "dataset.json").read_text())
    assert (info["rows_in"], info["rows"], info["rejected"], info["rejects"]) == (50, 50, 0, {})
    assert [pq.read_metadata(dataset / s["file"]).num_rows for s in info["shards"]] == [s["rows"] for s in info["shards"]]
    assert info["vqgan_digest"] == load_vqgan(str(vqgan_bundle))[1] and info["grid"] == [8, 8] and info["resolution"] == 32
    assert info["seconds"] > 0 and info["images_per_s"] > 0


def test_separate_stages_another_layout_and_batch_size_give_the_same_tokens(tmp_path, dataset, vqgan_bundle):
    """The stages as they run with GPUs; in test_tokenize_kills with Ray's object store between them."""
    folder = write_folder(tmp_path / "folder", scenes(50, seed=0, held_out=False), shard_size=20)
    settings = config(folder, vqgan_bundle, tmp_path / "out", batch_size=7, rows_per_unit=16)
    with in_process():
        counts = list(tokenize_images._encoded(settings, find_units(str(folder), 16), separate=True).iter_rows())
    assert sorted(row["written"] for row in counts) == [4, 4, 10, 16, 16]
    ours, theirs = rows_of(tmp_path / "out"), rows_of(dataset)
    assert {i.split("/")[-1]: row["tokens"] for i, row in ours.items()} == {i: row["tokens"] for i, row in theirs.items()}


def hostile_folder(root: Path) -> Path:
    """Ten good samples among eleven bad ones."""
    write_folder(root, scenes(10, seed=4, held_out=False))
    good = (root / "00000" / "000000000.jpg").read_bytes()
    huge = io.BytesIO()
    Image.new("1", (MAX_PIXELS // 5000 + 1, 5000)).save(huge, "PNG")
    bad = {
        "truncated": good[: len(good) // 2],
        "html": b"<!doctype html><title>404</title>",
        "huge": huge.getvalue(),
        "nothing": b"",
        "bomb": zip_bomb(20_000, 20_000),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        "megapixels": jpeg_of_size(10_000, 10_000),
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


def test_hostile_rows_are_rejected_by_reason_and_good_ones_written(tmp_path, vqgan_bundle, capsys):
    output = run_in_process(config(hostile_folder(tmp_path / "in"), vqgan_bundle, tmp_path / "out"))
    assert len(rows_of(output)) == 10
    assert rejects_of(output) == {
        "truncated": "damaged-image",
        "html": "not-an-image",
        "huge": "too-large",
        "nothing": "not-an-image",
        "bomb": "too-large",
        "postscript": "not-an-image",
        "megapixels": "too-large",
        "blank": "empty-caption",
        "latin1": "caption-not-utf8",
        "uncaptioned": "no-caption",
        "double": "duplicate-key",
    }
    info = json.loads((output / "dataset.json").read_text())
    assert info["rejects"]["not-an-image"] == 3 and sum(info["rejects"].values()) == 11
    assert "rows in 21 = written 10 + filtered 0 + rejected 11" in capsys.readouterr().out
    details = {row["id"]: row["detail"] for f in output.glob("rejects/*") for row in pq.read_table(f).to_pylist()}
    assert "pixels, more than" in details["huge"]
    assert len(TokenDataset(str(output)).shards) == 6  # an empty shard is none the worse for it


def test_filters_and_duplicates_are_counted(tmp_path, vqgan_bundle, ray_session, capsys):
    some = [*scenes(12, seed=0, held_out=False)]
    folder = write_folder(tmp_path / "in", some + some[:5], shard_size=20)
    unwanted = sum("green" in scene_caption(scene) for scene, _ in some)
    repeated = sum("green" not in scene_caption(scene) for scene, _ in some[:5])
    filters = FilterConfig(forbidden_words=("green",), min_size=40)
    settings = config(folder, vqgan_bundle, tmp_path / "out", filters=filters, deduplicate="exact")
    output = run(settings)
    info = json.loads((output / "dataset.json").read_text())
    forbidden = 17 - 12 + unwanted - repeated
    assert info["filters"] == {"forbidden-words": forbidden, "exact-duplicate": repeated}
    kept = [number for number, (scene, _) in enumerate(some) if "green" not in scene_caption(scene)]
    assert sorted(rows_of(output)) == [f"00000/{number:09d}" for number in kept]
    assert f"rows in 17 = written {12 - unwanted} + filtered {5 + unwanted} + rejected 0" in capsys.readouterr().out
    assert not list((output / "staged").rglob("*.parquet"))
    leftover = output / "staged" / next(output.glob("part-*.parquet")).name  # of a job killed at its very end
    leftover.write_bytes(b"")
    run(settings)
    assert "finished" in capsys.readouterr().out and not leftover.exists()


def test_what_a_lost_worker_has_written_is_not_done_again(tmp_path, images, vqgan_bundle):
    settings, units = config(images, vqgan_bundle, tmp_path / "out"), find_units(str(images), 4)[:3]
    task = pa.Table.from_pylist(packed([units]))
    worker = DecodeAndEncode(settings)
    first = next(iter(worker(task)))
    (shard,) = (tmp_path / "out").glob("part-*.parquet")
    before = shard.stat().st_mtime_ns
    again = list(worker(task))
    assert [table.to_pylist() for table in again] == [[{"written": 4, "filtered": 0, "rejected": 0}]] * 3
    assert again[0].equals(first) and shard.stat().st_mtime_ns == before


def test_aspect_ratios_have_datasets_of_their_own(tmp_path, vqgan_bundle):
    sizes = {"square": (80, 80), "nearly": (90, 80), "wide": (160, 80), "tall": (60, 160)}
    for name, size in sizes.items():
        Image.linear_gradient("L").resize(size).convert("RGB").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    output = run_in_process(config(tmp_path, vqgan_bundle, tmp_path / "out", resolution=64, aspect_ratios=("1:1", "2:1")))
    square, wide = (output / name for name in ("64x64", "96x32"))
    assert set(rows_of(square)) == {"square", "nearly", "tall"} and set(rows_of(wide)) == {"wide"}
    info = json.loads((wide / "dataset.json").read_text())
    assert info["grid"] == [8, 24] and info["filters"] == {"other-aspect-ratio": 3}
    assert TokenDataset(str(wide)).format.grid_width == 24
    with pytest.raises(ValueError, match="aspect_ratios=square is not allowed"):
        config(tmp_path, vqgan_bundle, tmp_path / "out", aspect_ratios=("square",))


def test_an_estimate_writes_nothing(images, vqgan_bundle, tmp_path, ray_session, capsys):
    run(config(images, vqgan_bundle, tmp_path / "out", estimate=True))
    out = capsys.readouterr().out
    said = json.loads(out.splitlines()[-1])
    assert said["images"] == 50 and said["kept"] == 1 and said["images_per_s_per_worker"] > 0 and said["hours"] > 0
    assert 50 * 128 < said["bytes"] < 50 * 10_000 and "images/s per worker" in out
    assert not (tmp_path / "out").exists()


def test_a_dataset_on_s3_is_the_same(bucket, images, vqgan_bundle, dataset, tmp_path, capsys):
    """The program itself writes to a real S3 server; a second run does nothing."""
    uri = f"{bucket}/some/tokens"
    out, err = start(*arguments(images, vqgan_bundle, uri)).communicate(timeout=380)
    assert "rows in 50 = written 50 + filtered 0 + rejected 0" in out, err
    tokenize_images.run(config(images, vqgan_bundle, uri))
    assert f"tokenizing is finished: {uri}" in capsys.readouterr().out
    remote = TokenDataset(uri)
    assert remote.num_rows == 50 and remote.shards == TokenDataset(str(dataset)).shards
    output = Output(uri)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in output.names():
        (copy / name).write_bytes(output.read(name) or b"")
    assert rows_of(copy) == rows_of(dataset)
    assert output.names() == {file.name for file in dataset.iterdir() if file.is_file()}
    inspect_tokens.run(inspect_tokens.InspectConfig(uri=uri))
    with pytest.raises(ValueError, match="resolution 32 → 64"):
        tokenize_images.run(config(images, vqgan_bundle, uri, resolution=64))


def test_all_rejected_is_an_error_that_can_be_repaired(tmp_path, vqgan_bundle):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jpg").write_bytes(b"<html>")
        (tmp_path / f"{name}.txt").write_text("" if name == "c" else "a caption")
    settings = config(tmp_path, vqgan_bundle, tmp_path / "out")
    with pytest.raises(ValueError, match=r"none of the 3 samples in .* 2 of them: not-an-image"):
        run_in_process(settings)
    assert not (tmp_path / "out" / "dataset.json").exists()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.jpg")
    assert list(rows_of(run_in_process(settings))) == ["a"]


def test_new_tars_are_added_and_a_changed_input_is_refused(tmp_path, vqgan_bundle):
    root = write_webdataset(tmp_path / "in", scenes(8, seed=0, held_out=False), shard_size=4)
    later = root / "00001_stats.json"
    later.rename(tmp_path / "later.json")
    settings = config(root, vqgan_bundle, tmp_path / "out")
    output = run_in_process(settings)
    (first,) = output.glob("part-*.parquet")
    before = first.stat().st_mtime_ns
    (tmp_path / "later.json").rename(later)
    assert len(rows_of(run_in_process(settings))) == 8 and first.stat().st_mtime_ns == before
    assert TokenDataset(str(output)).num_rows == 8
    (root / "00000_stats.json").unlink()
    with pytest.raises(ValueError, match="files were added to or removed from"):
        run_in_process(settings)


def test_a_finished_job_does_nothing(dataset, images, vqgan_bundle, capsys, monkeypatch):
    monkeypatch.setattr(cli, "start_ray", lambda: pytest.fail("Ray was started for nothing"))
    before = {file: file.stat().st_mtime_ns for file in dataset.rglob("*")}
    assert run(config(images, vqgan_bundle, dataset)) == dataset
    assert "finished" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in dataset.rglob("*")} == before


def test_a_job_killed_before_its_last_file_only_writes_that(tmp_path, dataset, images, vqgan_bundle, monkeypatch):
    monkeypatch.setattr(cli, "start_ray", lambda: pytest.fail("Ray was started for nothing"))
    copy = tmp_path / "copy"
    settings = config(images, vqgan_bundle, copy)
    (copy / "rejects").mkdir(parents=True)
    for file in [*dataset.glob("part-*"), *dataset.glob("rejects/*")]:
        (copy / file.relative_to(dataset)).write_bytes(file.read_bytes())
    torn = copy / ".part-00000.parquet.1.tmp"
    torn.write_bytes(b"PAR1")
    assert run(settings) == copy and not torn.exists()
    keys = ("rows", "shards", "rejects", "grid", "vqgan_digest")
    one, other = (json.loads((path / "dataset.json").read_text()) for path in (copy, dataset))
    assert [one[key] for key in keys] == [other[key] for key in keys]


def test_changed_settings_are_refused(dataset, images, vqgan_bundle, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in dataset.rglob("*")}
    with pytest.raises(ValueError, match="resolution 32 → 64"):
        run(config(images, vqgan_bundle, dataset, resolution=64))
    with pytest.raises(ValueError, match="needs a multiple of 4"):
        run(config(images, vqgan_bundle, dataset, resolution=30))
    save_vqgan(tmp_path / "other", VQModel(VQConfig(bottleneck_blocks=1, c_hidden=16, codebook_size=32)))
    with pytest.raises(ValueError, match=r"vqgan '[0-9a-f]{64}' → '[0-9a-f]{64}'"):
        run(config(images, tmp_path / "other", dataset))
    moved = tmp_path / "moved"
    moved.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be written"):
        run(config(images, vqgan_bundle, moved))
    assert {file: file.stat().st_mtime_ns for file in dataset.rglob("*")} == before


def test_a_vqgan_at_another_place_is_the_same_one(dataset, images, vqgan_bundle, tmp_path):
    model, _ = load_vqgan(str(vqgan_bundle))
    save_vqgan(tmp_path / "copy", model)
    assert run(dataclasses.replace(config(images, vqgan_bundle, dataset), vqgan=str(tmp_path / "copy"))) == dataset


@pytest.mark.parametrize("mistake", ["missing input", "no captions", "not a bundle"])
def test_mistakes_exit_with_2_and_one_line(tmp_path, images, vqgan_bundle, mistake, monkeypatch, capsys):
    source, bundle = images, vqgan_bundle
    if mistake == "missing input":
        source = tmp_path / "nowhere"
    elif mistake == "no captions":
        source = tmp_path
        Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    else:
        bundle = images
    monkeypatch.setattr(sys, "argv", ["tokenize_images", *arguments(source, bundle, tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        command_line.main(tokenize_images.run, TokenizeConfig, "")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_the_program_itself_says_one_sentence(program, tmp_path, vqgan_bundle):
    process = program("tokenize_images", *arguments(tmp_path / "nowhere", vqgan_bundle, tmp_path / "out"))
    assert_one_sentence(process, "nowhere")
    assert process.stdout == ""
