"""A small CLIP: it learns, loads as any open_clip model, and continues after a kill; bad input."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_one_sentence, checkpointed, killed_when
from process_groups import without_a_cluster
from safetensors.torch import load_file

from paella.conditioning import load_clip
from pipelines import train_clip
from pipelines.image_sets import decode_captioned

TOWERS = {"patch_size": 16, "width": 32, "layers": 1, "text_width": 32}


def small(data: Path, output: Path, **changes) -> train_clip.TrainClipConfig:
    model = train_clip.ClipConfig(**TOWERS)
    tiny = train_clip.presets()["tiny"]
    return dataclasses.replace(tiny, data=str(data), output=str(output), model=model, batch_size=64, **changes)


@pytest.fixture(scope="module")
def trained(scene_shards, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("clip") / "run"
    with without_a_cluster(train_clip):
        train_clip.run(small(scene_shards, output, steps=120))
    return output


def test_it_tells_pictures_apart_and_loads_as_any_other(trained, scene_shards):
    clip, tokenizer = load_clip(str(trained / "model"))
    images, captions = decode_captioned(str(scene_shards), 64, 96)
    with torch.inference_mode():
        image = F.normalize(clip.encode_image(train_clip.pixels(images)))
        text = F.normalize(clip.encode_text(tokenizer(captions)))
    assert image.shape == text.shape == (96, 64)
    right = ((image @ text.T).argmax(1) == torch.arange(96)).float().mean().item()
    assert right > 0.3, "of 96 captions, by chance 0.01"
    assert json.loads((trained / "report.json").read_text()).keys() == {"retrieval", "images"}


def test_finished_training_does_nothing(trained, scene_shards, capsys):
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*") if file.is_file()}
    train_clip.run(small(scene_shards, trained, steps=120))
    assert "CLIP training is finished" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in trained.rglob("*") if file.is_file()}


@pytest.mark.slow  # the loop it shares with `train` is killed in tests of that
def test_killed_and_rerun_gives_the_same_weights(scene_shards, tmp_path, ray_session):
    flags = [f"--model.{name.replace('_', '-')}={value}" for name, value in TOWERS.items()]
    command = [
        sys.executable, ROOT / "pipelines/train_clip.py", "tiny", "--data", scene_shards, "--output", tmp_path / "killed",
        "--batch-size", "64", "--steps", "60", "--checkpoint-every", "5", "--precision", "float32", *flags,
    ]  # fmt: skip
    killed_when(command, lambda: checkpointed(tmp_path / "killed"))
    assert not (tmp_path / "killed" / "report.json").exists(), "the run was over before it was killed"
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert "from step 0" not in finished.stdout
    train_clip.run(small(scene_shards, tmp_path / "whole", steps=60, checkpoint_every=5, precision="float32"))
    killed, whole = (load_file(tmp_path / name / "model" / "open_clip_model.safetensors") for name in ("killed", "whole"))
    for name, value in whole.items():
        torch.testing.assert_close(killed[name], value, atol=1e-5, rtol=0, msg=name)


def test_bad_input(program, scene_shards, tmp_path):
    data = ("tiny", "--data", scene_shards, "--output", tmp_path / "x")
    assert_one_sentence(program("train_clip", *data, "--image-size", 60), "image_size=60", "multiple of 8")
    assert_one_sentence(program("train_clip", *data, "--steps", 0), "steps=0", "at least 1")
    assert_one_sentence(program("train_clip", "tiny", "--data", tmp_path / "none", "--output", tmp_path / "x"), "none")
    assert not (tmp_path / "x").exists()
