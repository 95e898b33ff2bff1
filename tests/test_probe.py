"""The probe as a user runs it: numbers, plots and a table of a small model; the rows that it measures on; what it refuses."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import assert_one_sentence, small_config
from PIL import Image
from tokenizing import config, run_in_process

from pipelines import cli, probe, scenes, train
from pipelines.probe import ProbeConfig
from pipelines.token_dataset import TokenDataset

SHORT = {"images": 24, "levels": (0.5, 1.0), "captions_per_word": 4}


@pytest.fixture(scope="module")
def tokens(scene_shards, model_bundle, tmp_path_factory):
    """The scenes as tokens of the small model's VQGAN."""
    return run_in_process(config(scene_shards, model_bundle, tmp_path_factory.mktemp("tokens") / "set", resolution=64))


@pytest.fixture
def trained(tokens, model_bundle, tmp_path):
    """The small model where a training run on these tokens would have left it."""
    shutil.copytree(model_bundle, tmp_path / "run" / "model")
    values = {"data": str(tokens), "vqgan": str(model_bundle), "output": str(tmp_path / "run"), "model": small_config()}
    run = dataclasses.replace(train.presets()["tiny"], **values, validation_images=4)
    cli.require_same_config(tmp_path / "run", cli.config_values(run))
    return tmp_path / "run" / "model"


def test_a_small_model_is_probed(program, tokens, model_bundle, tmp_path):
    arguments = ["--images", 24, "--levels", 0.5, 1.0, "--captions-per-word", 4, "--output", tmp_path]
    done = program("probe", "--model", model_bundle, "--data", tokens, *arguments)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "probe.json").read_text())
    assert (values["images"], values["held_out"], values["levels"]) == (24, False, [0.5, 1.0])
    heard = {frozenset(each["words"]): each for each in values["hears"]}
    assert {frozenset(scenes.COLOURS), frozenset(("left", "right")), frozenset(scenes.SIZES)} <= heard.keys()
    for each in (*values["hears"], *values["words"]):
        assert np.isfinite([*each["nats"], *each["nats_rare"]]).all() and len(each["nats"]) == 2
    singles = [each for each in values["words"] if each["words"][0] in scenes.COLOURS]
    assert heard[frozenset(scenes.COLOURS)]["captions"] == sum(each["captions"] for each in singles)
    assert all(0 <= share <= 1 for bound in values["binds"] for share in bound["share"])
    assert Image.open(tmp_path / "probe.png").width > 500
    for words in ("HEARS", "BINDS", "t = 0.5", "training may have seen", "words exchanged █", "  purple", "numbers: "):
        assert words in done.stdout
    assert "hears words as a bag" in program("probe", "--help").stdout


def test_rows_held_out_of_training_are_found(trained, tokens, tmp_path):
    given = ProbeConfig(model=str(trained), data=str(tokens), **SHORT)
    batch, held_out = probe.rows_of(given)
    assert held_out and batch.ids == TokenDataset(str(tokens), hold_out=4).held_out().ids
    assert given.directory == tmp_path / "run" / "probe"
    other = dataclasses.replace(given, data=str(shutil.copytree(tokens, tmp_path / "other")))
    batch, held_out = probe.rows_of(other)
    assert not held_out and batch.ids == TokenDataset(str(tokens)).head(24).ids, "the run has had other data"


def test_what_does_not_fit_is_refused_in_one_sentence(program, tokens, model_bundle, vqgan_bundle, clip_bundle, tmp_path):
    for model, data, words in [
        (clip_bundle, tokens, "were made by VQGAN"),
        (vqgan_bundle, tokens, "were made by VQGAN"),
        (model_bundle, tmp_path, "is not a finished token dataset"),
        (tmp_path / "none", tokens, "there is no directory"),
    ]:
        assert_one_sentence(program("probe", "--model", model, "--data", data, "--output", tmp_path / "out"), words)
        assert not (tmp_path / "out").exists()
    places = {"model": str(model_bundle), "data": str(tokens)}
    for changes in ({"images": 0}, {"levels": (0.5, 1.5)}, {"levels": ()}, {"words": 0}, {"model": "s3://me/bundle"}):
        with pytest.raises(ValueError, match="levels" if "levels" in changes else "output|images|words"):
            ProbeConfig(**(places | changes))


def test_captions_in_which_nothing_can_be_replaced_are_refused(model_bundle, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(TokenDataset, "captions", lambda self, num: ["one caption"] * 4)
    head = TokenDataset(str(tokens)).head(4)
    monkeypatch.setattr(probe, "rows_of", lambda config: (dataclasses.replace(head, captions=["one caption"] * 4), False))
    with pytest.raises(ValueError, match="nothing to replace"):
        probe.run(ProbeConfig(model=str(model_bundle), data=str(tokens), output=str(tmp_path), **SHORT))
