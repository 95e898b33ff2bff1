"""Batch generation as a user runs it: every mode by column, bad rows, equal work once, layouts, S3, kills, one picture again."""

import base64
import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import assert_one_sentence
from PIL import Image

from paella import edits, requests
from paella.bundle import load_bundle
from paella.images import to_uint8
from paella.pictures import encoded
from paella.sampler import SamplingConfig, sample
from pipelines import generate, manifest
from pipelines.generate_config import GenerateConfig
from pipelines.output_store import Output


def png(color="red", size=(64, 64), mode="RGB") -> bytes:
    data = io.BytesIO()
    Image.new(mode, size, color).save(data, "PNG")
    return data.getvalue()


def half_mask(size=(64, 64)) -> bytes:
    image = Image.new("RGBA", size, (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (size[0] // 2, 0, *size))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


GOOD: list[tuple[dict, int]] = [
    ({"prompt": "a red circle", "note": "carried along"}, 2),
    ({"prompt": "a red circle", "seed": 7, "cfg": 4, "temperature": 1.0, "n": 1}, 1),
    ({"prompt": "a red circle", "seed": 7, "guidance_scale": 4.0, "temperature": 1, "n": 1}, 0),  # the same once more
    ({"prompt": "wide", "size": "96x64", "steps": 4, "negative_prompt": "blue", "id": "wide"}, 2),
    ({"prompt": "a schedule", "width": 32, "height": 64, "cfg": [6, 2], "temperature": [0.9, 0.2], "n": 1}, 1),
    ({"prompt": "x", "image": "red.png", "mask": "mask.png", "n": 1, "id": "painted"}, 1),
    ({"prompt": "x", "image": "red.png", "n": 1}, 1),
    ({"prompt": "x", "image": "red.png", "mode": "outpaint", "pad_left": 32, "pad_top": 8, "n": 1}, 1),
    ({"image": "red.png", "mode": "variation", "strength": 0.5, "n": 1}, 1),
    ({"prompt": "x", "images": ["red.png", "blue.png"], "weights": [1, 0.5], "text_weight": 0.5, "n": 1}, 1),
    ({"prompt": "a", "prompt_to": "b", "mode": "interpolate", "frames": 3}, 3),
    ({"images": ["red.png", "blue.png"], "mode": "interpolate", "frames": 2}, 2),
    ({"caption": "in webp", "output_format": "webp", "output_compression": 50, "n": 1}, 1),
]
"""Rows, and how many pictures they make."""
BAD: list[tuple[dict, str]] = [
    ({"prompt": ""}, "needs a prompt"),
    ({"prompt": "x", "mode": "dream"}, "mode='dream' is not allowed"),
    ({"prompt": "x", "image": "none.png"}, "there is no image none.png"),
    ({"prompt": "x", "image": "text.png"}, "must be a PNG, JPEG or WebP image"),
    ({"prompt": "x", "image": "http://127.0.0.1:1/x.png"}, "a path, s3:// or a data URL"),
    ({"prompt": "x", "image": "red.png", "mask": "small-mask.png"}, "the mask has (32, 32) pixels"),
    ({"prompt": "x", "steps": -1}, "num_inference_steps=-1 is not allowed"),
    ({"prompt": "x", "steps": "many"}, "steps='many' is not allowed: an integer"),
    ({"prompt": "x", "cfg": float("nan")}, "cfg=(nan,) is not allowed"),
    ({"prompt": "x", "size": "65x64"}, "multiples of"),
    ({"prompt": "x", "size": "6400x6400"}, "more than"),
    ({"prompt": "x", "seed": -1}, "seed=-1 is not allowed"),
    ({"prompt": "x", "frames": 3}, "frames is for the mode interpolate"),
    ({"prompt": "another", "id": "wide-0", "n": 1}, "used twice"),
]
"""Rows, and what the manifest says of them."""


def write_inputs(root: Path) -> None:
    root.mkdir(exist_ok=True)
    files = {"red.png": png(), "blue.png": png("blue"), "mask.png": half_mask(), "small-mask.png": half_mask((32, 32))}
    for name, data in (files | {"text.png": b"text"}).items():
        (root / name).write_bytes(data)
    rows = [row for row, _ in GOOD] + [row for row, _ in BAD]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")


@pytest.fixture(scope="module")
def mixed(ray_session, clip_bundle, tmp_path_factory) -> GenerateConfig:
    """All modes and all mistakes in one job, in several units and batches."""
    root = tmp_path_factory.mktemp("mixed")
    write_inputs(root)
    config = GenerateConfig(
        model=str(clip_bundle), prompts=str(root / "prompts.jsonl"), output=str(root / "out"), images_per_prompt=2, seed=5,
        batch_size=4, unit_size=5, defaults=("structure_strength=0.6",), sampling=SamplingConfig(num_inference_steps=2),
    )  # fmt: skip
    generate.run(config)
    return config


@pytest.fixture(scope="module")
def bundle(clip_bundle):
    return load_bundle(str(clip_bundle))


@pytest.fixture(scope="module")
def rows(mixed) -> list[dict]:
    return list(manifest.rows(Output(mixed.output)))


def test_every_row_is_in_the_manifest(mixed, rows):
    assert [row["order"] for row in rows] == sorted(row["order"] for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    for number, (_, pictures) in enumerate(GOOD):
        of_row = [row for row in rows if row["row"] == number]
        assert [row["status"] for row in of_row] == ["made"] * pictures, (number, of_row)
        assert [row["index"] for row in of_row] == list(range(pictures))
    errors = {row["row"]: row["error"] for row in rows if row["status"] == "failed"}
    wanted = [words for _, words in BAD] + ["not a line of JSON"]
    for number, words in enumerate(wanted, len(GOOD)):
        assert words in errors.pop(number)
    assert not errors
    made = [row for row in rows if row["status"] == "made"]
    for row in made:
        assert hashlib.sha256(Path(mixed.output, row["file"]).read_bytes()).hexdigest() == row["sha256"]
        assert min(row["encode_ms"], row["sample_ms"], row["decode_ms"]) > 0
    assert {file.name for file in Path(mixed.output, "images").iterdir()} == {Path(row["file"]).name for row in made}
    assert [(row["seed"], json.loads(row["extra"])) for row in made[:2]] == [(5 + i, {"note": "carried along"}) for i in (0, 1)]
    assert {row["mode"] for row in made} == set(requests.MODES)
    info = json.loads(Path(mixed.output, "job.json").read_text())
    assert (info["made"], info["failed"]) == (len(made), len(rows) - len(made))
    assert duckdb_count(mixed.output) == len(rows)


def duckdb_count(output: str) -> int:
    import duckdb

    return duckdb.sql(f"select count(*) from '{output}/manifest/*.parquet'").fetchall()[0][0]


def test_files_are_the_librarys(mixed, rows, bundle):
    """Each picture alone, by the library's own functions; its file byte for byte, its pixels by `edits` itself."""
    root = Path(mixed.prompts).parent
    for row in rows:
        if row["status"] != "made":
            continue
        request = manifest.request_of(row)
        images = tuple((root / name).read_bytes() for name in request.images)
        mask = None if request.mask is None else (root / request.mask).read_bytes()
        planned = requests.plan(bundle, dataclasses.replace(request, images=images, mask=mask))
        canvas = planned.canvas(bundle, seed=row["seed"], index=row["index"])
        picture = bundle.decode(sample(bundle.unet, [canvas], codebook=bundle.vqgan.vquantizer))[0]
        data = planned.file(bundle, picture, seed=row["seed"], index=row["index"])
        assert data == Path(mixed.output, row["file"]).read_bytes(), row
    by_row = {row["row"]: row for row in rows if row["status"] == "made"}
    two = SamplingConfig(num_inference_steps=2)
    wanted = {
        1: edits.text_to_image(bundle, "a red circle", seed=7, config=dataclasses.replace(two, cfg=(4.0,), temperature=(1, 0.3))),
        4: edits.text_to_image(
            bundle, "a schedule", seed=by_row[4]["seed"], size=(32, 64),
            config=dataclasses.replace(two, cfg=(6, 2), temperature=(0.9, 0.2)),
        ),
        6: edits.restyle(bundle, red(), "x", strength=1 - 0.6, seed=by_row[6]["seed"], config=two),
    }  # fmt: skip
    for number, canvas in wanted.items():
        picture = to_uint8(bundle.decode(sample(bundle.unet, [canvas])))[0]
        image = Image.open(Path(mixed.output, by_row[number]["file"]))
        assert np.array_equal(np.asarray(image), picture), number
        assert image.text["bundle"] == bundle.digest and "made by a model" in image.text["generator"]


def red():
    from paella.pictures import decode_rgb, fitted

    return fitted(decode_rgb(png()), (64, 64))


def test_the_api_gives_the_same_file(bundle):
    """What the deployment answers to an order is what the library plans for the same settings."""
    from serve.modes import Order, plan
    from serve.schemas import EditRequest, GenerationRequest

    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "temperature": 0.8, "negative_prompt": "blue"}
    sampling = requests.sampling(2, 3.0, 0.8)
    for asked, own in [
        (GenerationRequest(prompt="a", size="32x64", **settings), {"size": "32x64"}),
        (EditRequest(prompt="a", image=[png()], mask=half_mask(), **settings), {"mode": "inpaint", "mask": half_mask()}),
    ]:
        order = Order(request=asked, seed=3, request_id="r", timeout_s=60, trace={})
        (task,) = plan(bundle, order).tasks
        images = {} if isinstance(asked, GenerationRequest) else {"images": (png(),)}
        mine = requests.plan(
            bundle, requests.PictureRequest(prompt="a", negative_prompt="blue", sampling=sampling, **own, **images)
        )
        made = [bundle.decode(sample(bundle.unet, [canvas]))[0] for canvas in (task.make(bundle), mine.canvas(bundle, seed=3))]
        assert task.finish(made[0], None) == mine.file(bundle, made[1], seed=3)


def test_a_rerun_makes_only_what_is_missing(mixed, rows, capsys):
    output = Path(mixed.output)
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*") if file.is_file()}
    generate.run(mixed)
    assert "generation is finished" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in output.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"another config \(seed 5 → 6\)"):
        generate.run(dataclasses.replace(mixed, seed=6))
    (output / "index.html").unlink()
    part = sorted((output / "manifest").iterdir())[1]
    part.unlink()
    (output / "images" / ".torn.png.1.tmp").write_bytes(b"torn")
    generate.run(dataclasses.replace(mixed, batch_size=3))
    assert (output / "index.html").exists() and not list(output.rglob(".*"))
    kept = [file for file in before if file.parent.name == "manifest" and file != part]
    assert all(file.stat().st_mtime_ns == before[file] for file in kept)
    assert settled(manifest.rows(Output(mixed.output))) == settled(rows)


def settled(rows) -> list[dict]:
    """Rows of a manifest without what another run measures otherwise."""
    return [{name: value for name, value in row.items() if name not in manifest.TIMES} for row in rows]


def test_a_picture_can_be_made_again(mixed, rows, program):
    for row in (next(row for row in rows if row["mode"] == mode) for mode in ("text-to-image", "inpaint", "interpolate")):
        again = program("generate", "--output", mixed.output, "--reproduce", row["id"])
        assert again.returncode == 0 and "bit-equal" in again.stdout, again.stderr
    part = next(row for row in rows if row["mode"] == "blend")
    output = Output(mixed.output)
    files = {row["id"]: file for file in manifest.parts(output) for row in next(manifest.read(output, [file])).to_pylist()}
    file = files[part["id"]]
    original = Path(mixed.output, "manifest", file).read_bytes()
    table = pq.read_table(io.BytesIO(original)).to_pylist()
    manifest.write(output, file, [row | {"seed": row["seed"] + 1} if row["id"] == part["id"] else row for row in table])
    again = program("generate", "--output", mixed.output, "--reproduce", part["id"])
    assert again.returncode == 1 and "of the pixels differ" in again.stdout
    Path(mixed.output, "manifest", file).write_bytes(original)
    failed = next(row for row in rows if row["status"] == "failed")
    assert_one_sentence(program("generate", "--output", mixed.output, "--reproduce", failed["id"]), "was not made")
    assert_one_sentence(program("generate", "--output", mixed.output, "--reproduce", "none"), "has no picture none")


def small(bundle_path, prompts, output, **changes) -> GenerateConfig:
    values = {"unit_size": 3, "sampling": SamplingConfig(num_inference_steps=1)} | changes
    return GenerateConfig(model=str(bundle_path), prompts=str(prompts), output=str(output), **values)


def test_openai_batch(without_ray, clip_bundle, bundle, tmp_path):
    """What the `openai` client's own types read from the output and error files."""
    from openai.types import ImagesResponse

    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    body = {"model": "any", "prompt": "a red circle", "num_inference_steps": 1}
    lines = [
        ("one", "generations", body | {"seed": 7, "n": 2}),
        ("edit", "edits", body | {"image": [{"image_url": url}], "size": "64x64"}),
        ("bad", "generations", body | {"colour": "red"}),
        ("large", "generations", body | {"size": "6400x6400"}),
        ("one", "generations", body | {"seed": 8}),
    ]
    requested = [{"custom_id": id, "method": "POST", "url": f"/v1/images/{end}", "body": body} for id, end, body in lines]
    (tmp_path / "batch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in requested))
    generate.run(small(clip_bundle, tmp_path / "batch.jsonl", tmp_path / "out", layout="openai-batch", unit_size=2))
    answers = [json.loads(line) for line in (tmp_path / "out/output.jsonl").read_text().splitlines()]
    assert [(line["custom_id"], line["response"]["status_code"], line["error"]) for line in answers] == [
        (id, 200, None) for id in ("one", "edit", "one")
    ]
    answer = ImagesResponse.model_validate(answers[0]["response"]["body"])
    assert answer.usage is not None and answer.usage.output_tokens == 2 * 16 * 16 and answer.size == "64x64"
    planned = requests.plan(bundle, requests.PictureRequest(prompt="a red circle", sampling=requests.sampling(1)))
    for item, seed in zip(answer.data or [], (7, 8), strict=True):
        picture = bundle.decode(sample(bundle.unet, [planned.canvas(bundle, seed=seed)]))[0]
        assert base64.b64decode(item.b64_json or "") == planned.file(bundle, picture, seed=seed)
    failures = [json.loads(line) for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
    assert {line["custom_id"]: line["response"]["body"]["error"]["code"] for line in failures} == {
        "bad": "unknown_parameter", "large": "invalid_value",
    }  # fmt: skip
    assert failures[0]["response"]["status_code"] == 400 and failures[0]["response"]["body"]["error"]["param"] == "colour"


def test_geneval(without_ray, model_bundle, tmp_path):
    """Read as GenEval's evaluate_images.py reads it."""
    tasks = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}] * 2
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    prompts = tmp_path / "evaluation_metadata.jsonl"
    generate.run(small(model_bundle, prompts, tmp_path / "out", layout="geneval", images_per_prompt=4))
    folders = sorted(path for path in (tmp_path / "out").iterdir() if path.is_dir() and path.name.isdigit())
    assert [path.name for path in folders] == ["00000", "00001"]
    for folder in folders:
        with (folder / "metadata.jsonl").open() as file:
            assert json.load(file) == tasks[0]
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == [f"{index:04d}.png" for index in range(4)]
        assert all(Image.open(folder / "samples" / name).size == (64, 64) for name in names)


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_pictures_in_shards(without_ray, model_bundle, tmp_path, layout, program):
    (tmp_path / "p.txt").write_text("a\nb\nc\n\nd\n")
    generate.run(small(model_bundle, tmp_path / "p.txt", tmp_path / "out", layout=layout, format="jpg"))
    rows = list(manifest.rows(Output(str(tmp_path / "out"))))
    assert len({row["file"] for row in rows}) == 2
    found = {}
    for file in sorted((tmp_path / "out/images").iterdir()):
        if layout == "parquet":
            for row in pq.read_table(file).to_pylist():
                found[row["id"]] = row["image"]["bytes"], row["prompt"]
            continue
        with tarfile.open(file) as tar:
            members = {name: tar.extractfile(name).read() for name in tar.getnames()}
        for name in [name for name in members if name.endswith(".json")]:
            key = name.removesuffix(".json")
            found[json.loads(members[name])["id"]] = members[f"{key}.jpg"], members[f"{key}.txt"].decode()
    assert {row["id"]: (row["sha256"], row["prompt"]) for row in rows} == {
        id: (hashlib.sha256(data).hexdigest(), prompt) for id, (data, prompt) in found.items()
    }
    again = program("generate", "--output", tmp_path / "out", "--reproduce", rows[3]["id"])
    assert "bit-equal" in again.stdout, again.stderr


def test_s3_in_and_out(without_ray, bucket, clip_bundle, tmp_path, capsys):
    """Prompts, images and masks from a real S3 server, and the output on it: the same as on a disk."""
    import s3fs

    write_inputs(tmp_path / "in")
    remote = s3fs.S3FileSystem()
    for file in (tmp_path / "in").iterdir():
        remote.pipe_file(f"{bucket.removeprefix('s3://')}/in/{file.name}", file.read_bytes())
    pictures = {}
    for root in (str(tmp_path), bucket):
        config = small(clip_bundle, f"{root}/in/prompts.jsonl", f"{root}/out", unit_size=8, layout="openai-batch")
        generate.run(config)
        output = Output(f"{root}/out")
        rows = list(manifest.rows(output))
        assert all(hashlib.sha256(output.read(row["file"])).hexdigest() == row["sha256"] for row in rows if row["file"])
        pictures[root] = settled(rows)
        assert len(output.read("output.jsonl").splitlines()) == len({row["row"] for row in rows if row["status"] == "made"})
    assert pictures[bucket] == pictures[str(tmp_path)]
    capsys.readouterr()
    generate.run(config)
    assert f"generation is finished: {bucket}/out" in capsys.readouterr().out


def test_bad_flags_stop_before_anything_starts(program, model_bundle, vqgan_bundle, tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "p.doc").write_text("a\n")
    (tmp_path / "p.csv").write_text("a,b\n1,2\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    places = {"--model": model_bundle, "--prompts": tmp_path / "p.txt", "--output": tmp_path / "o"}
    for changes, words in [
        ({"--model": tmp_path / "none"}, "there is no directory"),
        ({"--model": vqgan_bundle}, "holds no U-Net"),
        ({"--prompts": tmp_path / "none.txt"}, "there is no file of prompts"),
        ({"--prompts": tmp_path / "empty.txt"}, "there are no prompts in"),
        ({"--prompts": tmp_path / "p.doc"}, "unknown format"),
        ({"--prompts": tmp_path / "p.csv"}, "no column prompt or caption"),
        ({"--prompts": tmp_path / "latin.txt"}, "not UTF-8"),
        ({"--batch-size": 0}, "batch_size=0 is not allowed"),
        ({"--sampling.cfg": "nan"}, "cfg=(nan,) is not allowed"),
        ({"--size": "64"}, "size='64' is not allowed"),
        ({"--defaults": "mood=good"}, "there is no such column"),
        ({"--defaults": "strength=9"}, "strength=9.0 is not allowed"),
        ({"--defaults": "strength"}, "NAME=VALUE"),
        ({"--quality": 90}, "output_compression"),
        ({"--layout": "geneval", "--format": "jpg"}, "GenEval reads png"),
        ({"--seed": -1}, "seed=-1 is not allowed"),
    ]:
        flags = [part for pair in (places | changes).items() for part in pair]
        assert_one_sentence(program("generate", *flags), words)
        assert not (tmp_path / "o").exists()
    assert_one_sentence(program("generate", "--output", tmp_path / "o"), "a model or an endpoint, and prompts, have to be given")


def test_jpeg_says_that_a_model_made_it():
    import torch

    image = Image.open(io.BytesIO(encoded(torch.zeros(3, 8, 8), "jpeg", 80, None)))
    assert "made by a model" in image.getexif()[0x0131]
