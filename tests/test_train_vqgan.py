"""VQGAN training as a user runs it: losses and logs, kills, several workers, streaming, fine-tuning, collapse, bad input."""

import dataclasses
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_VQ, assert_one_sentence, checkpointed, killed_when
from PIL import Image
from process_groups import without_a_cluster
from safetensors.torch import load_file

from paella.bundle import load_bundle, load_vqgan, replace_vqgan, save_vqgan, vqgan_digests
from paella.images import to_tensor
from paella.metrics import codebook_use
from paella.vq_losses import VQLossConfig
from paella.vqgan import VQModel
from pipelines import scenes, tracking, train_vqgan
from pipelines.token_dataset import require_vqgan
from pipelines.token_format import TokenFormat
from pipelines.vq_images import Crop, ImageSet, InMemory, Stream

FULL_LOSS = VQLossConfig(adversarial=0.1, adversarial_warmup=5, r1=0.1, lecam=0.01, discriminator_width=8)
FULL_FLAGS = [
    "--loss.adversarial", "0.1", "--loss.adversarial-warmup", "5", "--loss.r1", "0.1", "--loss.lecam", "0.01",
    "--loss.discriminator-width", "8",
]  # fmt: skip


def small(data: Path, output: Path, **changes) -> train_vqgan.TrainVQConfig:
    values = {
        "model": SMALL_VQ, "image_size": 32, "steps": 60, "continuous_steps": 10, "revive_every": 10, "checkpoint_every": 20,
        "batch_size": 8, "precision": "float32",
    }  # fmt: skip
    tiny = train_vqgan.presets()["tiny"]
    return dataclasses.replace(tiny, data=str(data), output=str(output), **(values | changes))


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "vqgan.safetensors")


def assert_close(a: Path, b: Path, atol: float) -> None:
    for name, value in weights(a).items():
        torch.testing.assert_close(value, weights(b)[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def whole(ray_session, scene_shards, tmp_path_factory) -> Path:
    """An undisturbed run on one worker, with every loss but the perceptual one, augmentation and running means as codes."""
    output = tmp_path_factory.mktemp("vqgan") / "whole"
    train_vqgan.run(small(scene_shards, output, loss=FULL_LOSS, augment=True, codebook_update="ema"))
    return output


COMMAND = [
    "tiny", "--model.bottleneck-blocks", "1", "--model.c-hidden", "16", "--model.c-latent", "4", "--model.codebook-size", "32",
    "--image-size", "32", "--steps", "60", "--continuous-steps", "10", "--revive-every", "10", "--batch-size", "8",
    "--precision", "float32", "--augment", "--codebook-update", "ema", *FULL_FLAGS,
]  # fmt: skip


def test_losses_and_codebook_are_logged(whole):
    run = tracking.Run(**json.loads((whole / "mlflow_run.json").read_text()))
    metrics = run.client().get_run(run.run_id).data.metrics
    for name in ("l1", "l2", "edges", "quantization", "adversarial", "adversarial_weight", "discriminator", "lecam"):
        assert np.isfinite(metrics[name]), name
    assert 0 < metrics["codebook_use"] <= 1
    assert metrics["perplexity"] > 1
    assert load_vqgan(str(whole / "model"))[0].config == SMALL_VQ


@pytest.mark.slow  # the loop it shares with `train` is killed in tests of that
def test_killed_and_rerun_gives_the_same_weights(whole, scene_shards, tmp_path):
    output = tmp_path / "killed"
    command = [
        sys.executable, ROOT / "pipelines/train_vqgan.py", *COMMAND, "--data", scene_shards, "--output", output,
        "--checkpoint-every", "20",
    ]  # fmt: skip
    killed_when(command, lambda: checkpointed(output))
    assert not (output / "report.json").exists(), "the run was over before it was killed"
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert "from step 0" not in finished.stdout
    assert_close(output, whole, atol=1e-5)


class Instant:
    """True some random seconds after a run's next checkpoint: before that, there would be nothing to lose."""

    def __init__(self, output: Path) -> None:
        self.checkpoints, self.delay_s = output / "checkpoints", random.SystemRandom().uniform(0, 4)
        self.before, self.instant = self.newest(), float("inf")

    def newest(self) -> list[str]:
        return sorted(path.parent.name for path in self.checkpoints.glob("step-*/manifest.json"))[-1:]

    def __call__(self) -> bool:
        if self.instant == float("inf") and self.newest() != self.before:
            self.instant = time.monotonic() + self.delay_s
        return time.monotonic() > self.instant


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_five_random_instants(scene_shards, tmp_path):
    arguments = [*COMMAND, "--steps", "3000", "--checkpoint-every", "100", "--data", scene_shards, "--output"]
    command = [sys.executable, ROOT / "pipelines/train_vqgan.py", *arguments]
    output = tmp_path / "killed"
    for _ in range(5):
        killed_when([*command, output], Instant(output))
    assert not (output / "report.json").exists(), "the run was over before the last kill"
    for path in (output, tmp_path / "whole"):
        finished = subprocess.run([*command, path], capture_output=True, text=True, timeout=600)
        assert finished.returncode == 0, finished.stderr
        print([line for line in finished.stdout.splitlines() if "from step" in line])
    assert_close(output, tmp_path / "whole", atol=1e-5)


def test_streamed_images_are_those_of_the_set_in_a_repeatable_order(ray_session, scene_shards):
    images = ImageSet.find(str(scene_shards), Crop(32, 40, augment=True))
    stream = Stream(images, seed=3, batch_size=8, part=slice(0, 8))
    whole = list(stream.batches(0, 24))
    assert len(whole) == 24
    assert all(batch.shape == (8, 32, 32, 3) for batch in whole)
    later = list(stream.batches(7, 24))
    assert np.array_equal(np.stack(whole[7:]), np.stack(later))
    halves = [list(dataclasses.replace(stream, part=part).batches(7, 24)) for part in (slice(0, 4), slice(4, 8))]
    assert all(np.array_equal(np.concatenate(pair), batch) for *pair, batch in zip(*halves, later, strict=True))
    numbers = stream.numbers(np.arange(len(images.training)))
    assert sorted(numbers) == sorted(images.training), "an epoch has every training image once"
    assert not set(numbers) & set(images.held_back)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> np.ndarray:
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((32, 32))) for _, image in scenes.scenes(1000, seed=9, held_out=True)]
    )


def test_decoder_only_leaves_the_tokens_of_1000_images_as_they_are(model_bundle, thousand, scene_shards, tmp_path):
    init = str(model_bundle)
    with without_a_cluster(train_vqgan):
        bundle = str(train_vqgan.run(small(scene_shards, tmp_path / "tuned", init=init, train="decoder", steps=20)))
    before, after = load_vqgan(init)[0], load_vqgan(bundle)[0]
    images = to_tensor(thousand)
    tokens = before.encode(images)
    assert len(tokens.unique()) > 8
    assert torch.equal(tokens, after.encode(images))
    assert not torch.equal(before.decode_indices(before.encode(images[:8])), after.decode_indices(after.encode(images[:8])))
    joined = load_bundle(str(tmp_path / "tuned" / "bundle"))
    assert torch.equal(joined.vqgan.out_block[0].weight, after.out_block[0].weight)
    assert joined.digest == load_bundle(init).digest
    old, new = vqgan_digests(init)[0], vqgan_digests(bundle)
    assert new[0] != old
    made = TokenFormat(grid_height=8, grid_width=8, codebook_size=32, vqgan_digest=old)
    require_vqgan(made, new, "the tokens")
    with pytest.raises(ValueError, match="were made by VQGAN"):
        require_vqgan(dataclasses.replace(made, vqgan_digest="0"), new, "the tokens")
    save_vqgan(tmp_path / "other", VQModel(SMALL_VQ))
    with pytest.raises(ValueError, match="makes other tokens than VQGAN"):
        replace_vqgan(init, str(tmp_path / "other"), tmp_path / "x")


@pytest.mark.slow
def test_equal_codes_recover_within_200_steps(ray_session, scene_shards, thousand, tmp_path):
    config = dataclasses.replace(SMALL_VQ, codebook_size=256)
    train_vqgan.run(small(scene_shards, tmp_path / "good", model=config, steps=300, continuous_steps=100, revive_every=50))
    model = VQModel(config)
    model.load_state_dict(weights(tmp_path / "good"))
    model.vquantizer.codebook.weight.data.fill_(0.1)
    save_vqgan(tmp_path / "collapsed", model)
    images = to_tensor(thousand)
    assert codebook_use(model.eval().encode(images), 256)[0] == 1 / 256
    train_vqgan.run(small(scene_shards, tmp_path / "run", init=str(tmp_path / "collapsed"), steps=200, revive_every=50))
    run = tracking.Run(**json.loads((tmp_path / "run" / "mlflow_run.json").read_text()))
    use = dict(tracking.metric_history(run, "codebook_use"))
    assert use[200] > 0.5, use
    assert vqgan_digests(str(tmp_path / "run" / "model"))[1:] == [], "all of it was trained: its tokens are others"


@pytest.mark.slow
def test_a_collapse_stops_the_run_and_says_why(ray_session, tmp_path):
    """On images that are read as training goes on."""
    data = tmp_path / "grey"
    data.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), "grey").save(data / f"{i}.png")
        (data / f"{i}.txt").write_text("grey")
    model = dataclasses.replace(SMALL_VQ, codebook_size=2048)
    config = small(data, tmp_path / "run", steps=120, memory_gb=1e-6, model=model)
    for _ in range(2):  # a rerun says it again
        with pytest.raises(ValueError, match="the codebook has collapsed: after .* steps only .* of 2048 codes"):
            train_vqgan.run(config)
    assert not (tmp_path / "run" / "report.json").exists()


def test_images_that_cannot_be_read_give_way(ray_session, tmp_path):
    for i in range(8):
        Image.new("RGB", (48, 40), (i * 30, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("red")
    (tmp_path / "5.png").write_bytes(b"no image")
    images = ImageSet.find(str(tmp_path), Crop(32, 40, augment=True))
    assert len(images.read(images.training)) == 6
    (batch,) = Stream(images, seed=0, batch_size=14, part=slice(None)).batches(0, 1)
    assert batch.shape == (14, 32, 32, 3)
    memory = InMemory(list(images.read(images.training).values()), images.crop, 0, 4)
    assert memory.batch(0, slice(2, 4), torch.Generator().manual_seed(0)).shape == (2, 32, 32, 3)


def test_settings_that_cannot_be(tmp_path):
    for changes, words in [
        ({"train": "decoder"}, "train=decoder needs init"),
        ({"train": "encoder"}, "train='encoder'"),
        ({"load_size": 16}, "load_size=16"),
        ({"batch_size": 9, "num_workers": 2}, "multiple of num_workers=2"),
        ({"codebook_update": "ema", "model": dataclasses.replace(SMALL_VQ, quantizer="cosine")}, "codebook_update=ema"),
        ({"image_size": 30}, "image_size=30"),
        ({"continuous_steps": 60}, "continuous_steps=60"),
    ]:
        with pytest.raises(ValueError, match=words):
            small(tmp_path, tmp_path / "x", **changes)


def test_bad_input(program, scene_shards, vqgan_bundle, tmp_path):
    data = ("tiny", "--data", scene_shards, "--output", tmp_path / "x")
    assert_one_sentence(program("train_vqgan", *data, "--init", tmp_path / "none"), "there is no directory")
    loss = VQLossConfig(perceptual=1, perceptual_model=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        train_vqgan.run(small(scene_shards, tmp_path / "x", loss=loss))
    assert not (tmp_path / "x").exists()
