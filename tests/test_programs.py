"""VQGAN training, U-Net training and the demo as a user runs them: whole runs, kills, reruns, bad input."""

import dataclasses
import gzip
import json
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_sentence, killed_when, small_config
from process_groups import without_a_cluster

from paella.bundle import load_bundle
from paella.config import PRESETS
from paella.lora import LoraConfig
from paella.parallel import ParallelConfig
from paella.sampler import SamplingConfig
from pipelines import export, tracking, train
from pipelines.tokenize_images import TokenizeConfig
from pipelines.tokenize_images import run as tokenize


@pytest.fixture(scope="module")
def tokens(ray_session, scene_shards, vqgan_bundle, tmp_path_factory):
    output = tmp_path_factory.mktemp("tokens") / "set"
    return Path(tokenize(TokenizeConfig(input=str(scene_shards), vqgan=str(vqgan_bundle), output=str(output), resolution=64)))


def small_training(tokens, vqgan_bundle, output, **changes) -> train.TrainConfig:
    values = {
        "data": str(tokens), "vqgan": str(vqgan_bundle), "output": str(output), "model": small_config(), "steps": 12,
        "global_batch_size": 16, "checkpoint_every": 4, "sample_every": 6, "register_as": "test-model",
        "sampling": SamplingConfig(num_inference_steps=2), "validate_every": 6,
    }  # fmt: skip
    return dataclasses.replace(train.presets()["tiny"], **(values | changes))


@pytest.fixture(scope="module")
def trained(tokens, vqgan_bundle, tmp_path_factory):
    """A finished run of 12 steps on two workers, some of which were recorded; its MLflow has the default place."""
    output = tmp_path_factory.mktemp("train") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI")
        train.run(small_training(tokens, vqgan_bundle, output, profile="7:9"))
    return output


def test_training_leaves_a_bundle_samples_and_one_mlflow_run(trained, monkeypatch):
    bundle = load_bundle(str(trained / "model"))
    assert bundle.config.unet == small_config().unet
    assert sorted(file.name for file in (trained / "samples").iterdir()) == ["step-0000006.png", "step-0000012.png"]
    run = tracking.Run(**json.loads((trained / "mlflow_run.json").read_text()))
    info = run.client().get_run(run.run_id)
    assert info.info.status == "FINISHED"
    assert info.data.params["global_batch_size"] == "16"
    for name in (
        "loss", "accuracy", "grad_norm", "lr", "images_per_s", "tflops_per_worker", "mfu", "data_wait", "step_s", "memory_gb",
        "validation_loss", "validation_accuracy",
    ):  # fmt: skip
        assert np.isfinite(info.data.metrics[name])
    assert [step for step, _ in tracking.metric_history(run, "validation_loss")] == [6, 12]
    kept = {artifact.path for artifact in run.client().list_artifacts(run.run_id)}
    assert "trace-steps-7-9.json.gz" in kept
    with gzip.open(trained / "trace-steps-7-9.json.gz") as trace:
        assert any("conv" in event["name"] for event in json.load(trace)["traceEvents"])
    pictures = [artifact.path for artifact in run.client().list_artifacts(run.run_id, "images")]
    assert any("reconstructions" in path for path in pictures) and any("samples" in path for path in pictures)
    card = (trained / "model" / "model_card.md").read_text()
    for words in (
        "92 images as grids of 16x16",
        "12 of 12, 16 images each: 192 image views",
        "| validation_loss |",
        "new weights",
    ):
        assert words in card
    assert any(name.startswith("loss_t_") for name in info.data.metrics)
    uri = (trained / "registered_model.txt").read_text().strip()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.tracking_uri)
    mlflow.set_tracking_uri(run.tracking_uri)
    assert load_bundle(uri).digest == bundle.digest


def test_fine_tuning_with_lora_and_exporting_a_checkpoint_of_it(trained, tokens, vqgan_bundle, tmp_path):
    """Everything but adapters stays as in the bundle it started from, which a checkpoint's bundle shows after as many steps."""
    changes = {"init": str(trained / "model"), "lora": LoraConfig(rank=2), "parallel": ParallelConfig(accumulate=2)}
    short = {"steps": 4, "checkpoint_every": 2, "sample_every": 0, "validate_every": 0}
    output = tmp_path / "tuned"
    with without_a_cluster(train):
        train.run(small_training(tokens, vqgan_bundle, output, **changes, **short))
    export.run(export.ExportConfig(run=str(output), output=str(tmp_path / "exported"), step=2, register_as="tuned", alias="two"))
    start, half, end = (load_bundle(str(path)) for path in (trained / "model", tmp_path / "exported", output / "model"))
    states = [bundle.unet.state_dict() for bundle in (start, half, end)]
    for name, before, between, after in zip(states[0], *(state.values() for state in states), strict=True):
        if not name.endswith(("in_proj_weight", "out_proj.weight", "kv_mapper.1.weight")) and name != "byt5_mapper.weight":
            assert torch.equal(before, between) and torch.equal(before, after), name
    for earlier, later in ((0, 1), (1, 2)):
        name = "byt5_mapper.weight"
        assert not torch.equal(states[earlier][name], states[later][name]), "adapters have moved"
    card = (tmp_path / "exported" / "model_card.md").read_text()
    assert "2 of 4" in card and "the bundle `model`, LoRA of rank 2" in card
    mlflow_run = tracking.run_of(output)
    version = mlflow_run.client().get_model_version_by_alias("tuned", "two")
    assert version.run_id == mlflow_run.run_id
    assert mlflow_run.client().get_run(mlflow_run.run_id).info.status == "FINISHED"
    for config, words in [
        (export.ExportConfig(run=str(output), output=str(output / "model")), "exists already"),
        (export.ExportConfig(run=str(output), output=str(tmp_path / "x"), step=3), "no checkpoint of step 3"),
        (export.ExportConfig(run=str(tmp_path), output=str(tmp_path / "x")), "is not the output of a training run"),
    ]:
        with pytest.raises(ValueError, match=words):
            export.run(config)


def test_finished_training_does_nothing(trained, tokens, vqgan_bundle, capsys):
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*") if file.is_file()}
    train.run(small_training(tokens, vqgan_bundle, trained, profile="7:9"))
    assert "training is finished" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in trained.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_demo_killed_in_each_stage_completes(tmp_path):
    root = tmp_path / "runs" / "demo"
    sizes = ["--num-images", "400", "--vqgan-steps", "250", "--train-steps", "30", "--num-prompts", "16"]
    command = [sys.executable, ROOT / "pipelines/demo.py", "--output", root, *sizes]
    for sign in (
        "images/*.tar",
        "vqgan/checkpoints/step-*/manifest.json",
        "tokens/*",
        "train/config.json",
        "pictures/images/*.png",
    ):
        killed_when(command, lambda sign=sign: list(root.glob(sign)))
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    report = json.loads((root / "report.json").read_text())
    assert report["prompts"] == 16
    assert (root / "index.html").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr


def test_training_refuses_what_does_not_fit(tokens, vqgan_bundle, model_bundle, clip_bundle, tmp_path):
    wider = dataclasses.replace(small_config(), unet=dataclasses.replace(small_config().unet, c_in=16))
    cases = [
        ({"vqgan": str(model_bundle)}, "were made by VQGAN"),
        ({"global_batch_size": 1000}, "fewer than global_batch_size"),
        ({"model": PRESETS["tiny"]}, "codebook of 32 codes"),
        ({"sample_prompts": str(tmp_path / "none.txt")}, "cannot be read"),
        ({"init": "publishd"}, "published, short-run or a bundle"),
        ({"init": str(vqgan_bundle)}, "or a bundle with a U-Net"),
        ({"init": str(clip_bundle)}, "is for tokens of VQGAN"),
        ({"init": str(model_bundle), "model": wider}, r"c_in 8, not 16"),
    ]
    for changes, words in cases:
        with pytest.raises(ValueError, match=words):
            train.run(small_training(tokens, vqgan_bundle, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()
    for changes in ({"steps": 0}, {"num_workers": 3}, {"precision": "fp8"}, {"profile": "20:10"}, {"validate_every": -1}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            small_training(tokens, vqgan_bundle, tmp_path / "out", **changes)


def test_command_line_errors(program, tmp_path):
    places = ["--data", tmp_path, "--vqgan", tmp_path, "--output", tmp_path / "o"]
    for arguments, words in [
        (["huge", *places], "there is no preset 'huge'; presets are tiny, small, paella-1b"),
        (["tiny", *places, "--stepz", "3"], "Unrecognized options: --stepz"),
        (["tiny", *places, "--steps", "many"], "--steps: invalid literal"),
        (["tiny", *places, "--steps", "0"], "steps=0 is not allowed"),
        (["tiny", *places, "--optim.lr", "-1"], "optim.lr=-1.0 is not allowed"),
        (["tiny", *places[:4]], "Missing from"),
    ]:
        assert_one_sentence(program("train", *arguments), words)
    process = program("train", "tiny", *places)
    assert_one_sentence(process, "is not a finished token dataset")
    assert "paella-1b" in program("train", "--help").stdout
    process = program("train_vqgan", "tiny", "--data", tmp_path / "none", "--output", tmp_path / "o")
    assert_one_sentence(process, "is not a directory")
    assert not (tmp_path / "o").exists()
