"""Training a text encoder of words: a whole run, a continued one, the U-Net that goes on training it, bad input."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import assert_one_sentence, small_config
from process_groups import without_a_cluster
from safetensors.torch import load_file

from paella.bundle import load_bundle, load_vqgan, vqgan_digests
from paella.conditioning import TextEncoders
from paella.config import TextConfig
from paella.training import OptimConfig, TextToTokens
from paella.words import NewWords
from pipelines import demo_flops, export, initial_weights, scenes, tracking, train, train_text
from pipelines.token_format import TokenFormat
from pipelines.train_config import resolved

ROWS, SIDE = 320, 16


def write_scenes(path: Path, digest: str) -> Path:
    """A token dataset of scenes by a tokenizer that needs no training: the colour in the middle of each patch is its code."""
    path.mkdir(parents=True)
    drawn = list(scenes.scenes(ROWS, seed=3, held_out=False))
    middles = np.stack([image for _, image in drawn])[:, 2::4, 2::4].reshape(ROWS, SIDE**2, 3)
    _, codes = np.unique(middles.reshape(-1, 3), axis=0, return_inverse=True)
    tokens = codes.reshape(ROWS, SIDE**2) % 32  # few of them are mixed, along outlines
    schema = TokenFormat(grid_height=SIDE, grid_width=SIDE, codebook_size=32, vqgan_digest=digest).schema()
    rows = [
        {"id": f"{i:03d}", "tokens": tokens[i], "caption": scenes.caption(scene), "width": 64, "height": 64, "sha256": "0"}
        for i, (scene, _) in enumerate(drawn)
    ]
    shards = [{"file": f"part-{i}.parquet", "rows": ROWS // 2} for i in range(2)]
    for index, shard in enumerate(shards):
        part = rows[ROWS // 2 * index :][: ROWS // 2]
        pq.write_table(pa.Table.from_pylist(part, schema=schema), path / shard["file"])
    (path / "dataset.json").write_text(json.dumps({"shards": shards}))
    return path


@pytest.fixture(scope="module")
def dataset(vqgan_bundle, tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "tokens", vqgan_digests(str(vqgan_bundle))[0])


def config(dataset: Path, output: Path, **changes) -> train_text.TrainTextConfig:
    values = {
        "data": str(dataset), "output": str(output), "model": NewWords(num_layers=1, max_length=32), "head_layers": 1,
        "global_batch_size": 64, "steps": 60, "checkpoint_every": 20, "precision": "float32", "num_workers": 1,
        "optim": OptimConfig(lr=3e-3, warmup_steps=10, final_lr_fraction=0.05), "ema_decay": 0.9,
    }  # fmt: skip
    return dataclasses.replace(train_text.presets()["tiny"], **(values | changes))


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    """A finished run."""
    output = tmp_path_factory.mktemp("text") / "run"
    with without_a_cluster(train_text):
        train_text.run(config(dataset, output))
    return output


def test_training_leaves_an_encoder_that_heard_its_captions(trained):
    text = TextEncoders.load(TextConfig(byt5="model"), trained)
    assert text.config.max_length == 32
    assert text(["a red circle"])["byt5"].shape == (1, 4, 128)
    report = json.loads((trained / "report.json").read_text())
    assert report["held_out_loss"] < 0.9 * report["held_out_loss_of_another"]
    run = tracking.run_of(trained)
    info = run.client().get_run(run.run_id)
    assert info.info.status == "FINISHED"
    assert info.data.params["model.num_layers"] == "1"
    assert {"loss", "grad_norm", "lr", "captions_per_s", "held_out_loss"} <= set(info.data.metrics)
    losses = tracking.metric_history(run, "loss")
    assert [step for step, _ in losses] == [20, 40, 60] and losses[-1][1] < 0.7 * losses[0][1]


def test_finished_training_does_nothing(trained, dataset, capsys):
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*") if file.is_file()}
    train_text.run(config(dataset, trained))
    assert "training of the text encoder is finished" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in trained.rglob("*") if file.is_file()}


def test_a_continued_run_ends_in_the_same_weights_on_any_number_of_workers(trained, dataset, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    shutil.rmtree(output / "model")
    values = json.loads((output / "config.json").read_text()) | {"output": str(output)}
    (output / "config.json").write_text(json.dumps(values))
    (output / "report.json").unlink()
    manifest = output / "checkpoints" / "step-00000040" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    with without_a_cluster(train_text):
        train_text.run(config(dataset, output, num_workers=2))
    assert manifest.stat().st_mtime_ns == written, "it began anew"
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (output, trained))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=0, msg=name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (output / "model" / name).read_text() == (trained / "model" / name).read_text()


def test_its_arithmetic_is_counted_by_steps(dataset, tmp_path):
    made = config(dataset, tmp_path)
    captions = made.training_data().captions(100)
    once = demo_flops.text_flops(made, captions)
    assert once > 1e6 * made.steps * made.global_batch_size
    assert demo_flops.text_flops(dataclasses.replace(made, steps=2 * made.steps), captions) == 2 * once


def test_without_held_out_rows_there_is_nothing_to_report(trained, dataset):
    made = config(dataset, trained, validation_images=0)
    model = train_text.new_model(made, train_text.learned_tokenizer(made), 32)
    assert train_text.held_out_losses(model, made.training_data()) == {}
    assert train_text._said({}) == "no rows were held out"


def unet_config(dataset: Path, vqgan: Path, output: Path, **changes) -> train.TrainConfig:
    values = {
        "data": str(dataset), "vqgan": str(vqgan), "output": str(output), "model": small_config(), "steps": 2, "num_workers": 1,
        "global_batch_size": 8, "checkpoint_every": 1, "sample_every": 0, "validate_every": 0, "ema_decay": 0.0,
    }  # fmt: skip
    return dataclasses.replace(train.presets()["tiny"], **(values | changes))


def test_the_unet_goes_on_training_it_and_a_bundle_is_enough_for_the_next_run(trained, dataset, vqgan_bundle, tmp_path):
    text, output = tmp_path / "text", tmp_path / "run"
    shutil.copytree(trained / "model", text)
    with without_a_cluster(train):
        train.run(unet_config(dataset, vqgan_bundle, output, text=str(text)))
    export.run(export.ExportConfig(run=str(output), output=str(tmp_path / "exported"), step=1))
    shutil.rmtree(text)
    before = load_file(trained / "model" / "model.safetensors")
    half, end = (load_bundle(str(path)).text for path in (tmp_path / "exported", output / "model"))
    assert end.config.train and end.config.byt5 == "encoders/byt5" and end.config.new_byt5 is None
    for name, value in end.byt5.state_dict().items():
        if name.endswith("embeddings.weight") or "dense.weight" in name:
            assert not torch.equal(value, before[name]) and not torch.equal(value, half.byt5.state_dict()[name]), name
        torch.testing.assert_close(value, before[name], atol=0.1, rtol=0, msg=name)
    tuned = resolved(unet_config(dataset, vqgan_bundle, tmp_path / "tuned", init=str(output / "model")))
    tuned = initial_weights.with_text_encoder(tuned)
    initial_weights.check(tuned)
    model = TextToTokens(tuned.model, text_root=initial_weights.text_root(tuned))
    initial_weights.initialise(model, load_vqgan(str(vqgan_bundle))[0].vquantizer.codebook.weight, tuned)
    for name, value in model.text.byt5.named_parameters():
        assert value.requires_grad and torch.equal(value, end.byt5.state_dict()[name]), name


def test_what_does_not_fit_is_named(trained, dataset, vqgan_bundle, tmp_path):
    for changes, words in [
        ({"data": str(tmp_path)}, "is not a finished token dataset"),
        ({"cells": 17}, "cells=17 is not allowed: .* has a grid of 16x16 tokens"),
        ({"global_batch_size": 512}, "fewer than global_batch_size=512"),
    ]:
        with pytest.raises(ValueError, match=words):
            train_text.run(config(dataset, tmp_path / "out", **changes))
    for changes in ({"steps": 0}, {"cells": 0}, {"head_layers": 0}, {"num_workers": 3}, {"validation_images": -1}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            config(dataset, tmp_path / "out", **changes)
    small = small_config()
    narrow = dataclasses.replace(small, unet=dataclasses.replace(small.unet, byt5_embd=64))
    for changes, words in [
        ({"text": str(trained / "model"), "model": narrow}, "has states of width 128, the model's byt5_embd is 64"),
        ({"text": str(tmp_path / "none")}, "none' cannot be loaded"),
    ]:
        with pytest.raises(ValueError, match=words):
            train.run(unet_config(dataset, vqgan_bundle, tmp_path / "out", **changes))
    with pytest.raises(ValueError, match="stored_text=True is not allowed: this model trains its own text encoder"):
        unet_config(dataset, vqgan_bundle, tmp_path, text="words", stored_text=True, model=small_frozen())
    assert not (tmp_path / "out").exists()


def small_frozen():
    return dataclasses.replace(small_config(), text=TextConfig())


def test_bad_command_lines(program, dataset, tmp_path):
    places = ["--data", dataset, "--output", tmp_path / "out"]
    assert_one_sentence(program("train_text", "tiny", *places, "--model.vocab-size", 100), "vocab_size=100", "at least 258")
    assert_one_sentence(program("train_text", "huge", *places), "there is no preset 'huge'; presets are tiny, small")
    assert "train_text.py tiny --data" in program("train_text", "--help").stdout
    assert not (tmp_path / "out").exists()
