"""What a user can get wrong in training: one sentence that says what, where and what is allowed, before a worker starts."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import assert_one_sentence, small_config
from test_token_stream import write_tokens

from paella.bundle import vqgan_digests
from paella.training import NoiseConfig
from pipelines import cli, train
from pipelines.recovery import RecoveryConfig
from pipelines.train_config import TrainConfig, presets, read_train_config


@pytest.fixture(scope="module")
def data(vqgan_bundle, tmp_path_factory) -> Path:
    """A dataset that fits, and others that do not."""
    root, digest = tmp_path_factory.mktemp("data"), vqgan_digests(str(vqgan_bundle))[0]
    write_tokens(root / "good", [20, 20], digest=digest, side=8)
    write_tokens(root / "wide", [20], digest=digest, side=16)
    write_tokens(root / "strange", [20], digest="0" * 64, side=8)
    write_tokens(root / "empty", [0, 0], digest=digest, side=8)
    return root


def config(data: Path, vqgan: Path, output: Path, **changes) -> TrainConfig:
    values = {
        "data": str(data / "good"), "vqgan": str(vqgan), "output": str(output), "global_batch_size": 8,
        "model": dataclasses.replace(small_config(), image_size=32), "validation_images": 0,
    }  # fmt: skip
    return dataclasses.replace(presets()["tiny"], **(values | changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data": "empty"}, "has no rows"),
        ({"data": "wide"}, "has a grid of 16x16 tokens, the model's image_size=32 means one of 8x8"),
        ({"data": "strange"}, "were made by VQGAN"),
        ({"data": "missing"}, "is not a finished token dataset"),
        ({"more_data": ("wide",)}, "cannot be mixed: their grid_height is 16 and 8"),
        ({"data_weights": (1.0, 2.0)}, "a number above 0 for each of the 1 datasets"),
        ({"global_batch_size": 42}, "has 40 rows, fewer than global_batch_size=42"),
        ({"model": "with CLIP"}, "has no CLIP embeddings"),
        ({"recovery": RecoveryConfig(checkpoints="file/checkpoints")}, "checkpoints cannot be written to"),
        ({"output": "file/run"}, "cannot be written"),
    ],
)
def test_what_does_not_fit(data, vqgan_bundle, tmp_path, monkeypatch, changes, words):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    small = config(data, vqgan_bundle, tmp_path / "out")
    if "data" in changes:
        changes = {"data": str(data / changes["data"])}
    if "more_data" in changes:
        changes = {"more_data": tuple(str(data / name) for name in changes["more_data"])}
    if "model" in changes:
        changes = {"model": dataclasses.replace(small.model, text=dataclasses.replace(small.model.text, clip="x/y"))}
    with pytest.raises(ValueError, match=words):
        train.run(dataclasses.replace(small, **changes))
    assert not (tmp_path / "out" / "mlflow_run.json").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_workers": 3}, "global_batch_size=8 must be a multiple of num_workers=3"),
        ({"num_workers": 4, "min_workers": 1}, "must be a multiple of a number of workers from min_workers to num_workers, =3"),
        ({"num_workers": 2, "min_workers": 4}, "min_workers=4 is not allowed"),
        ({"steps": 0}, "steps=0"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"noise": NoiseConfig(own_draws=0.2)}, "noise.own_draws=0.2 is not allowed: 0, or .* batch, which has 4"),
        (  # three workers, whose 8 images are two parts of 4, where four have one of 6
            {"noise": NoiseConfig(own_draws=0.2), "num_workers": 4, "min_workers": 3, "global_batch_size": 24},
            "noise.own_draws=0.2 .* which has 4",
        ),
    ],
)
def test_settings_that_cannot_be(data, vqgan_bundle, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        config(data, vqgan_bundle, tmp_path, **changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"on_bad_step": "pray"}, "recovery.on_bad_step='pray' is not allowed: skip, rollback or stop"),
        ({"keep": 0}, "recovery.keep=0"),
        ({"every_minutes": -1.0}, "recovery.every_minutes=-1.0"),
        ({"spike": 1.0}, "recovery.spike=1.0 is not allowed: above 1"),
        ({"max_failures": -2}, "recovery.max_failures=-2"),
        ({"stuck_after_s": 0.0}, "recovery.stuck_after_s=0.0"),
    ],
)
def test_recovery_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        RecoveryConfig(**changes)


def test_a_run_goes_on_with_other_workers_but_no_other_model(data, vqgan_bundle, tmp_path):
    small = config(data, vqgan_bundle, tmp_path)
    cli.require_same_config(tmp_path, cli.config_values(small))
    other = dataclasses.replace(
        small, num_workers=1, min_workers=1, accelerator="H100", checkpoint_every=3, recovery=RecoveryConfig(keep=5)
    )
    cli.require_same_config(tmp_path, cli.config_values(other))
    assert json.loads((tmp_path / "config.json").read_text())["recovery"]["keep"] == 5
    with pytest.raises(ValueError, match=r"was made with another config \(seed 0 → 1\)"):
        cli.require_same_config(tmp_path, cli.config_values(dataclasses.replace(other, seed=1)))


def test_own_draws_of_one_image_a_part_are_enough(data, vqgan_bundle, tmp_path):
    assert config(data, vqgan_bundle, tmp_path, noise=NoiseConfig(own_draws=0.25)).part_size(4) == 4


def test_a_run_of_before_there_was_an_option_goes_on_without_it(data, vqgan_bundle, tmp_path):
    small = dataclasses.replace(config(data, vqgan_bundle, tmp_path), noise=NoiseConfig())
    values = cli.config_values(small)
    for name in ("balance", "own_draws", "own_draws_ahead", "stratified"):
        del values["noise"][name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    other = dataclasses.replace(small, noise=dataclasses.replace(small.noise, balance=0.5))
    with pytest.raises(ValueError, match=r"was made with another config \(noise.balance 0.0 → 0.5\)"):
        cli.require_same_config(tmp_path, cli.config_values(other), other)
    assert read_train_config(str(tmp_path)).noise == small.noise
    cli.require_same_config(tmp_path, cli.config_values(small), small)
    assert json.loads((tmp_path / "config.json").read_text()) == cli.config_values(small)


def test_an_unknown_store_is_one_sentence(program, data, vqgan_bundle, tmp_path):
    places = ["--data", data / "good", "--vqgan", vqgan_bundle, "--output", tmp_path / "o", "--global-batch-size", "8"]
    process = program("train", "tiny", *places, "--recovery.chekpoints", "x")
    assert_one_sentence(process, "Unrecognized options: --recovery.chekpoints")
