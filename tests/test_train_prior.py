"""Training a prior as a user does: a whole run, a kill and a rerun to the same weights, and data it cannot use."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, assert_one_sentence, checkpointed, killed_when, small_config
from process_groups import without_a_cluster

from paella.bundle import load_bundle, save_bundle
from paella.conditioning import TextEncoders
from paella.config import PriorConfig
from paella.prior import load_prior
from paella.unet import Paella
from paella.vqgan import VQModel
from pipelines import tracking, train_prior
from pipelines.token_dataset import TokenDataset
from pipelines.token_format import TokenFormat
from pipelines.token_stream import TokenStream

WIDTH, ROWS, MISSING = 8, 200, {3, 77, 130}
SMALL = ["--model.clip-r", "8", "--model.c-hidden", "32", "--model.num-blocks", "2"]
LENGTH = ["--global-batch-size", "32", "--steps", "400", "--checkpoint-every", "50"]


def write_dataset(path: Path, clip_embd: int | None = WIDTH, texts: bool = True) -> Path:
    """Two shards whose image embeddings are a turn of the text embeddings; a few rows have none or half of it."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    text = rng.normal(size=(ROWS, WIDTH))
    image = text @ turn + 0.1 * rng.normal(size=text.shape)
    text[3 if texts else slice(None)], image[77], image[130] = np.nan, np.nan, np.inf
    schema = TokenFormat(grid_height=2, grid_width=2, codebook_size=16, vqgan_digest="0", clip_embd=clip_embd).schema()
    rows = [
        {
            "id": f"{i:03d}", "tokens": [i % 16] * 4, "caption": f"number {i}", "width": 8, "height": 8, "sha256": "0",
            "clip_text": text[i].astype(np.float16), "clip_image": image[i].astype(np.float16),
        }
        for i in range(ROWS)
    ]  # fmt: skip
    shards = [{"file": f"part-{i}.parquet", "rows": 100} for i in range(2)]
    for index, shard in enumerate(shards):
        part = [{name: row.get(name) for name in schema.names} for row in rows[100 * index :][:100]]
        pq.write_table(pa.Table.from_pylist(part, schema=schema), path / shard["file"])
    (path / "dataset.json").write_text(json.dumps({"shards": shards}))
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("clip") / "tokens")


def config(dataset: Path, output: Path) -> train_prior.TrainPriorConfig:
    tiny = train_prior.presets()["tiny"]
    return dataclasses.replace(
        tiny, data=str(dataset), output=str(output), model=PriorConfig(clip_r=8, c_hidden=32, c_r=32, num_blocks=2),
        global_batch_size=32, steps=400, checkpoint_every=50,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory) -> Path:
    """A finished run."""
    output = tmp_path_factory.mktemp("prior") / "run"
    with without_a_cluster(train_prior):
        train_prior.run(config(dataset, output))
    return output


def test_embeddings_come_in_the_order_of_the_tokens(dataset):
    reader = TokenStream([TokenDataset(str(dataset))], seed=1, global_batch_size=50, shuffle_rows=150)
    tokens, clip = reader.batches(), reader.clip_batches()
    rows = {row["id"]: row for row in pq.read_table([dataset / "part-0.parquet", dataset / "part-1.parquet"]).to_pylist()}
    missing = set()
    for _ in range(4):
        batch = next(clip)
        assert batch.ids == next(tokens).ids
        for sample, text, image, complete in zip(batch.ids, batch.text, batch.image, batch.complete, strict=True):
            if complete:
                assert np.array_equal(text, np.array(rows[sample]["clip_text"], np.float32))
                assert np.array_equal(image, np.array(rows[sample]["clip_image"], np.float32))
            else:
                missing.add(int(sample))
                assert not text.any() and not image.any()
    assert missing == MISSING
    second = next(reader.clip_batches(rank=1, world_size=2, start_step=2))
    third = next(reader.clip_batches(start_step=2))
    assert second.ids == third.ids[25:] and np.array_equal(second.image, third.image[25:])


def test_training_leaves_a_prior_and_one_mlflow_run(undisturbed):
    model, _ = load_prior(str(undisturbed / "model"))
    assert model.config.clip_r == WIDTH
    run = tracking.Run(**json.loads((undisturbed / "mlflow_run.json").read_text()))
    info = run.client().get_run(run.run_id)
    assert info.info.status == "FINISHED"
    assert info.data.params["model.num_blocks"] == "2"
    assert {"loss", "loss_t_0.75_1.00", "grad_norm", "lr", "pairs_per_s"} <= set(info.data.metrics)
    assert {file.path for file in run.client().list_artifacts(run.run_id, "model")} == {
        "model/config.json",
        "model/prior.safetensors",
    }
    losses = tracking.metric_history(run, "loss")
    assert losses[-1][1] < 0.6 * losses[0][1]
    assert info.data.metrics["cosine"] > 0.8 > 0.3 > info.data.metrics["cosine_of_another"]


def test_the_prior_joins_a_bundle(undisturbed, dataset, tmp_path, model_bundle):
    small = small_config()
    narrow = dataclasses.replace(small, unet=dataclasses.replace(small.unet, clip_embd=WIDTH))
    weights = {"unet": Paella(narrow.unet).state_dict(), "vqgan": VQModel(narrow.vqgan).state_dict()}
    save_bundle(tmp_path / "narrow", narrow, weights, "card", TextEncoders.create(narrow.text))
    wanted = dataclasses.replace(config(dataset, tmp_path), bundle=str(tmp_path / "narrow"))
    train_prior.join_bundle(wanted, undisturbed / "model")
    assert load_bundle(str(tmp_path / "bundle")).prior is not None
    with pytest.raises(ValueError, match="takes CLIP embeddings of width 64, the model's clip_r is 8"):
        train_prior.run(dataclasses.replace(wanted, bundle=str(model_bundle)))


def test_finished_training_does_nothing(undisturbed, dataset, capsys):
    before = {file: file.stat().st_mtime_ns for file in undisturbed.rglob("*") if file.is_file()}
    train_prior.run(config(dataset, undisturbed))
    assert "training is finished" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in undisturbed.rglob("*") if file.is_file()}


@pytest.mark.slow  # the loop it shares with `train` is killed in tests of that
def test_killed_and_rerun_to_the_same_weights(ray_session, undisturbed, dataset, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, ROOT / "pipelines/train_prior.py", "tiny", "--data", dataset, "--output", output, *SMALL, *LENGTH]
    killed_when(command, lambda: checkpointed(output))
    assert not (output / "model").exists(), "the run was over before it was killed"
    train_prior.run(config(dataset, output))  # what the same command does, in the Ray that is running here
    run = tracking.Run(**json.loads((output / "mlflow_run.json").read_text()))
    steps = sorted(metric.step for metric in run.client().get_metric_history(run.run_id, "loss"))
    assert steps.count(20) == 1, "the rerun began anew"
    assert sorted(set(steps)) == list(range(20, 401, 20))
    ours, theirs = (load_prior(str(path / "model"))[0].state_dict() for path in (output, undisturbed))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=name)


def test_what_does_not_fit_is_named(dataset, tmp_path):
    good, none = config(dataset, tmp_path / "out"), write_dataset(tmp_path / "none", texts=False)
    for changes, words in [
        ({"data": str(tmp_path)}, "is not a finished token dataset"),
        ({"data": str(none)}, "no row with both clip_text and clip_image among its first 200"),
        ({"model": PriorConfig(clip_r=9)}, "embeddings of width 8, the model's clip_r is 9"),
        ({"global_batch_size": 256}, "fewer than global_batch_size=256"),
    ]:
        with pytest.raises(ValueError, match=words):
            train_prior.run(dataclasses.replace(good, **changes))
    for changes in ({"drop_text": 1.0}, {"steps": 0}, {"num_workers": 3}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            dataclasses.replace(good, **changes)
    assert not (tmp_path / "out").exists()


def test_a_dataset_without_embeddings_is_one_sentence(program, tmp_path):
    without = write_dataset(tmp_path / "without", clip_embd=None)
    process = program("train_prior", "tiny", "--data", without, "--output", tmp_path / "out")
    assert_one_sentence(process, "without has no CLIP embeddings (columns clip_text and clip_image)")
    assert not (tmp_path / "out").exists()
    assert "clip_text and clip_image" in program("train_prior", "--help").stdout
