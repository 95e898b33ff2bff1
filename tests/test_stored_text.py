"""Training on the states of captions that tokenizing stored: what the encoder itself gives, up to float16."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import small_config
from process_groups import without_a_cluster
from test_token_stream import write_tokens
from tokenizing import config, run_in_process

from paella.config import TextConfig
from paella.sampler import SamplingConfig
from paella.training import TextToTokens, draw_noise
from pipelines import tracking, train
from pipelines.clip_columns import clip_digest
from pipelines.export import averaged_state
from pipelines.token_dataset import TokenDataset
from pipelines.train_config import TrainConfig, presets
from pipelines.train_step import forward, split


@pytest.fixture(scope="module")
def encoder(model_bundle) -> str:
    return str(model_bundle / "encoders" / "byt5")


@pytest.fixture(scope="module")
def tokens(scene_shards, vqgan_bundle, encoder, tmp_path_factory) -> str:
    output = tmp_path_factory.mktemp("tokens") / "with-states"
    return str(run_in_process(config(scene_shards, vqgan_bundle, output, byt5=encoder, rows_per_unit=32)))


@pytest.fixture
def settings(tokens, vqgan_bundle, encoder, tmp_path) -> TrainConfig:
    model = small_config()
    unet = dataclasses.replace(model.unet, byt5_embd=TokenDataset(tokens).format.byt5_embd)
    model = dataclasses.replace(model, image_size=32, unet=unet, text=TextConfig(byt5=encoder))
    changes = {
        "data": tokens, "vqgan": str(vqgan_bundle), "output": str(tmp_path / "run"), "model": model, "stored_text": True,
        "steps": 20, "sample_every": 20, "validate_every": 20, "validation_images": 4, "global_batch_size": 8, "num_workers": 2,
        "init": "published", "sampling": SamplingConfig(num_inference_steps=1), "precision": "float32",
    }  # fmt: skip
    return dataclasses.replace(presets()["tiny"], **changes)


def test_the_loss_is_that_with_the_encoder(settings):
    torch.manual_seed(0)
    dataset, model = TokenDataset(settings.data), TextToTokens(settings.model)
    torch.nn.init.normal_(model.unet.clf[1].weight)
    both = {}
    for states in (False, True):
        batch = dataset.head(10, states=states)
        draws = draw_noise(torch.from_numpy(batch.tokens), 32, 0, list(range(10)), settings.noise, 0)
        parts = split(model, batch, draws, 5, torch.device("cpu"))
        both[states] = [forward(model, settings, *part)[0].item() for part in parts]
    assert both[True] == pytest.approx(both[False], abs=1e-4) and both[True] != both[False]


def test_a_run_takes_them_from_the_dataset(settings, tmp_path):
    noise = dataclasses.replace(settings.noise, balance=0.5, own_draws=0.5, stratified=True)  # whose pass hears them as well
    with without_a_cluster(train):
        train.run(dataclasses.replace(settings, noise=noise, checkpoint_every=10))
    output = tmp_path / "run"
    means = averaged_state(str(output / "checkpoints" / "step-00000010"))["balance.means"]
    assert (means > 0).sum() > 10
    run = tracking.Run(**json.loads((output / "mlflow_run.json").read_text()))
    assert run.client().get_metric_history(run.run_id, "validation_loss")[-1].step == 20
    assert (output / "samples" / "step-0000020.png").exists()


def test_states_of_another_encoder_are_refused(settings, encoder, tmp_path):
    other = str(shutil.copytree(encoder, tmp_path / "other"))
    (tmp_path / "other" / "note.txt").write_text("another one")
    text = TextConfig(byt5=other)
    with pytest.raises(ValueError, match=f"but the model has {clip_digest(other)}"):
        train.run(dataclasses.replace(settings, model=dataclasses.replace(settings.model, text=text)))
    with pytest.raises(ValueError, match="trains its own text encoder"):
        train.run(dataclasses.replace(settings, model=dataclasses.replace(small_config(), image_size=32)))
    with pytest.raises(ValueError, match="has no states of a text encoder"):
        TokenDataset(str(write_tokens(tmp_path / "without", [4]))).require_states("any")
