"""Evaluating tokenizers as a user does: a table of two, the worst cases, words, rFID as torch-fidelity has it, bad input."""

import json

import pytest
import torch
from conftest import assert_one_sentence
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from paella.bundle import load_vqgan
from paella.images import to_tensor
from paella.vq_losses import ClipDistance
from pipelines import evaluate_vqgan
from pipelines.evaluate_vqgan import EvaluateVQConfig, by_group, verdict
from pipelines.image_sets import decode_captioned


@pytest.fixture(scope="module")
def compared(scene_shards, vqgan_bundle, model_bundle, clip_directory, tmp_path_factory):
    """Two VQGANs with random weights, one alone and one in a whole model, at two sizes."""
    output = tmp_path_factory.mktemp("evaluated") / "report"
    config = EvaluateVQConfig(
        vqgans=(str(vqgan_bundle), str(model_bundle)), data=str(scene_shards), output=str(output), sizes=(32, 64), max_images=40,
        features=str(clip_directory), perceptual=str(clip_directory), batch_size=16,
    )  # fmt: skip
    return config, evaluate_vqgan.run(config), output


def test_the_report_has_a_row_for_each_vqgan_and_size(compared, vqgan_bundle):
    config, rows, output = compared
    assert [(row["vqgan"], row["size"]) for row in rows] == [(uri, size) for size in (32, 64) for uri in config.vqgans]
    assert json.loads((output / "report.json").read_text()) == rows
    text = (output / "report.md").read_text()
    assert "| PSNR dB | SSIM | perceptual | rFID | codes in use |" in text
    assert f"{vqgan_bundle} at 64 pixels: not good enough" in text
    assert "Best at 32 pixels" in text
    for row in rows:
        assert row["images"] == 40
        assert row["perceptual"] > 0
    assert sorted(file.name for file in output.glob("worst-*")) == [f"worst-{n}-{s}.png" for n in (1, 2) for s in (32, 64)]
    assert Image.open(output / "worst-1-64.png").width > 100


def test_rfid_is_torch_fidelitys_on_the_same_features(compared, vqgan_bundle, clip_directory):
    config, rows, _ = compared
    images, _ = decode_captioned(config.data, 64, 40)
    model, features = load_vqgan(str(vqgan_bundle))[0], ClipDistance(str(clip_directory))
    with torch.inference_mode():
        batch = to_tensor(images)
        output = model.decode_indices(model.encode(batch)).clamp(0, 1)
        statistics = [fid_features_to_statistics(features.embed(part).double()) for part in (output, batch)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    row = next(row for row in rows if row["size"] == 64)
    assert row["rfid"] == pytest.approx(expected, abs=1e-3, rel=1e-3)


def test_words():
    row = {"psnr": 33.0, "ssim": 0.95, "codebook_use": 0.9, "regions": {"flat areas": 40.0, "fine texture": 25.0}, "groups": {}}
    assert verdict(row).startswith("good enough")
    assert "fails first on fine texture (25.0 dB)" in verdict(row)
    assert verdict(row | {"psnr": 25.0, "codebook_use": 0.1}).startswith("fair")
    assert "unused" in verdict(row | {"codebook_use": 0.1})
    captions = ["a sign with text", "a woman's face", "a dog", "Texture of wood"] * 5
    groups = by_group(torch.tensor([20.0, 22.0, 30.0, 30.0] * 5), captions)
    assert groups == {"pictures with text": 20.0, "pictures of people": 22.0}


def test_bad_input(program, scene_shards, vqgan_bundle, tmp_path):
    data = ("--vqgans", vqgan_bundle, "--data", scene_shards, "--output", tmp_path / "x")
    assert_one_sentence(program("evaluate_vqgan", *data, "--sizes", 60), "sizes=60")
    places = {"data": str(scene_shards), "output": str(tmp_path / "x")}
    for changes, words in [
        ({"features": str(tmp_path / "none")}, "cannot be loaded"),
        ({"vqgans": (str(tmp_path),)}, "config.json"),
    ]:
        with pytest.raises(ValueError, match=words):
            evaluate_vqgan.run(EvaluateVQConfig(**({"vqgans": (str(vqgan_bundle),)} | places | changes)))
    for changes, words in [({"vqgans": ()}, "vqgans is empty"), ({"max_images": 0}, "max_images=0")]:
        with pytest.raises(ValueError, match=words):
            EvaluateVQConfig(**({"vqgans": ("x",)} | places | changes))
    assert not (tmp_path / "x").exists()
