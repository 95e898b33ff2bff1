"""Evaluation as a user runs it: numbers equal to plain computations, sweeps, categories, token references, kills, comparisons."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, assert_one_sentence, killed_when
from PIL import Image
from torch_fidelity import feature_extractor_inceptionv3 as inceptionv3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from paella.bundle import load_bundle
from paella.distances import frechet_distance
from pipelines import evaluate, features, tracking
from pipelines.evaluate import EvaluateConfig
from pipelines.image_sets import decode_captioned
from pipelines.token_format import TokenFormat


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """Inception with random weights, in torch-fidelity's file format."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inceptionv3, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(inceptionv3.FeatureExtractorInceptionV3, "load_state_dict", lambda self, values: None)
        network = inceptionv3.FeatureExtractorInceptionV3("inception", ["2048"])
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def swept(ray_session, clip_bundle, scene_shards, inception, tmp_path_factory):
    """Two numbers of steps, by every metric."""
    output = tmp_path_factory.mktemp("evaluated") / "sweep"
    config = EvaluateConfig(
        model=str(clip_bundle), reference=str(scene_shards), output=str(output), num_images=12, num_reference=40,
        metrics=("fid,clip-fid,cmmd,prdc", "clip-score,scenes,reconstruction"), steps=(1, 2), cfg=(4.0,),
        inception=str(inception),
    )  # fmt: skip
    evaluate.run(config)
    return config, json.loads((output / "report.json").read_text()), output


def test_every_setting_is_measured_and_shown(swept):
    _, report, output = swept
    assert list(report["cells"]) == ["steps1-cfg4", "steps2-cfg4"]
    names = {"fid", "clip_fid", "cmmd", "precision", "recall", "density", "coverage", "clip_score", "scene_all", "scene_colour"}
    for name, cell in report["cells"].items():
        assert names <= set(cell["metrics"])
        assert np.isfinite(list(cell["metrics"].values())).all()
        assert len(cell["images"]) == 12
        assert f"pictures/index.html#{name}" in (output / "index.html").read_text()
    assert report["reconstruction"]["psnr"] > 0
    page = (output / "index.html").read_text()
    for name in ("curves.png", "best.png", "worst.png"):
        assert name in page
        assert Image.open(output / name).width > 100
    assert "**" in (output / "report.md").read_text()


def test_numbers_are_those_of_plain_computations(swept, clip_directory, inception):
    config, report, output = swept
    made = report["cells"]["steps2-cfg4"]["images"]
    images = [np.asarray(Image.open(output / image["file"])) for image in made]
    real, _ = decode_captioned(config.reference, 64, 96)
    real = real[np.arange(40) * 96 // 40]
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_directory}")
    tokenizer, metrics = open_clip.get_tokenizer(f"local-dir:{clip_directory}"), report["cells"]["steps2-cfg4"]["metrics"]
    with torch.no_grad():
        both = [
            clip.eval().encode_image(torch.stack([preprocess(Image.fromarray(image)) for image in part]))
            for part in (images, real)
        ]
        text = clip.encode_text(tokenizer([image["prompt"] for image in made]))
    unit = [part.double() / part.double().norm(dim=1, keepdim=True) for part in (*both, text)]
    scores = 100 * (unit[0] * unit[2]).sum(1).clamp(min=0)
    assert metrics["clip_score"][0] == pytest.approx(scores.mean().item(), abs=1e-3)
    assert [image["clip_score"] for image in made] == pytest.approx(scores.tolist(), abs=1e-3)
    kernel = lambda a, b: torch.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 200).mean()  # noqa: E731
    expected = 1000 * (kernel(unit[0], unit[0]) + kernel(unit[1], unit[1]) - 2 * kernel(unit[0], unit[1]))
    assert metrics["cmmd"][0] == pytest.approx(expected.item(), abs=1e-3)
    assert metrics["clip_fid"][0] == pytest.approx(fid([part.double() for part in both]), rel=1e-3, abs=1e-3)
    network = features.load_inception(str(inception))
    found = [
        torch.cat([network(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])[0] for image in part])
        for part in (images, real)
    ]
    # torch-fidelity's own sum takes a minute for 2048 features: tests/test_distances.py compares it with ours on fewer
    assert metrics["fid"][0] == pytest.approx(frechet_distance(*found), rel=1e-3, abs=1e-3)


def fid(parts: list[torch.Tensor]) -> float:
    statistics = [fid_features_to_statistics(part) for part in parts]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def test_results_are_in_mlflow(swept):
    _, report, output = swept
    run = tracking.Run(**json.loads((output / "mlflow_run.json").read_text()))
    logged = run.client().get_run(run.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics["cmmd.steps2-cfg4"] == report["cells"]["steps2-cfg4"]["metrics"]["cmmd"][0]
    assert "cmmd_plus_minus.steps2-cfg4" in logged.data.metrics
    assert {file.path for file in run.client().list_artifacts(run.run_id)} == {"best.png", "worst.png", "curves.png", "report.md"}


def test_a_finished_evaluation_does_nothing_and_features_are_kept(swept, capsys, monkeypatch):
    config, _, output = swept
    monkeypatch.setattr(features, "_embedded", lambda *args: pytest.fail("nothing is to be embedded again"))
    evaluate.run(config)
    assert "evaluation is finished" in capsys.readouterr().out
    (output / "report.json").unlink()
    report = (output / "report.md").read_bytes()
    evaluate.run(config)
    assert (output / "report.md").read_bytes() == report


def test_pictures_equal_to_the_reference_have_no_distance(swept, clip_directory, tmp_path):
    config, _, _ = swept
    same = features.embed(
        features.reference(config.reference, config.model, 64, 40), features.Networks(str(clip_directory)), tmp_path
    )
    metrics = evaluate.distances_to(evaluate.Reference(same), same, ["clip-fid", "cmmd", "prdc"])
    assert metrics["clip_fid"][0] == pytest.approx(0, abs=1e-3)
    assert metrics["cmmd"][0] == pytest.approx(0, abs=1e-6)
    assert metrics["precision"][0] == metrics["recall"][0] == 1


def test_tokens_are_a_reference(swept, clip_bundle, tmp_path):
    config, _, _ = swept
    bundle = load_bundle(str(clip_bundle))
    images, captions = decode_captioned(config.reference, 64, 12)
    tokens = [bundle.encode(torch.from_numpy(image.copy()).permute(2, 0, 1) / 255).flatten().tolist() for image in images]
    digest = json.loads((clip_bundle / "config.json").read_text())["digests"]["vqgan"]
    schema = TokenFormat(grid_height=16, grid_width=16, codebook_size=32, vqgan_digest=digest).schema()
    rows = [
        {"id": str(number), "tokens": row, "caption": caption, "width": 64, "height": 64, "sha256": None}
        for number, (row, caption) in enumerate(zip(tokens, captions, strict=True))
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "shard.parquet")
    (tmp_path / "dataset.json").write_text(json.dumps({"shards": [{"file": "shard.parquet", "rows": 12}]}))
    found = list(_all(features.reference(str(tmp_path), config.model, 64, 5)))
    assert [caption for caption, _ in found] == [captions[number * 12 // 5] for number in range(5)]
    with torch.inference_mode():
        expected = bundle.decode(bundle.encode(torch.from_numpy(images[0].copy()).permute(2, 0, 1) / 255)[None])
    assert np.abs(found[0][1] / 255 - expected[0].permute(1, 2, 0).numpy()).max() < 0.01
    assert features.captions(str(tmp_path), 5) == [caption for caption, _ in found]


def _all(images: features.ImageSet):
    for chunk in images.chunks:
        yield from images.read(chunk)


def test_categories_have_numbers_of_their_own_and_runs_compare(without_ray, swept, clip_bundle, tmp_path, capsys):
    table = pd.DataFrame({"Prompt": ["a red circle", "two squares", "blue"], "Category": ["Shapes", "Shapes", "Colours"]})
    table.to_csv(tmp_path / "parti.tsv", sep="\t", index=False)
    config = EvaluateConfig(
        model=str(clip_bundle), prompts=str(tmp_path / "parti.tsv"), output=str(tmp_path / "parti"), metrics=("clip-score",),
        steps=(1,),
    )  # fmt: skip
    evaluate.run(config)
    (cell,) = json.loads((tmp_path / "parti/report.json").read_text())["cells"].values()
    assert set(cell["categories"]) == {"Shapes", "Colours"}
    scores = [image["clip_score"] for image in cell["images"]]
    assert cell["categories"]["Shapes"]["clip_score"][0] == pytest.approx(np.mean(scores[:2]), abs=1e-3)
    evaluate.run(EvaluateConfig(compare=(str(tmp_path / "parti"), str(swept[2])), output=str(tmp_path / "compared")))
    assert "steps2-cfg4" in capsys.readouterr().out


@pytest.mark.slow  # generation, which it consists of, is killed in tests/test_generate_kills.py
def test_killed_and_rerun_gives_the_same_numbers(swept, tmp_path):
    config, report, _ = swept
    output = tmp_path / "killed"
    command = [
        sys.executable, ROOT / "pipelines/evaluate.py", "--model", config.model, "--reference", config.reference,
        "--num-images", "12", "--num-reference", "40", "--output", output,
        "--metrics", "cmmd,clip-score", "--steps", "1", "2", "--cfg", "4",
    ]  # fmt: skip
    killed_when(command, lambda: list((output / "pictures").glob("images/steps2-cfg4-*")))
    assert not (output / "report.json").exists()
    values = {"metrics": ("cmmd,clip-score",), "steps": (1, 2), "cfg": (4.0,), "output": str(output), "inception": None}
    evaluate.run(dataclasses.replace(config, **values))
    again = json.loads((output / "report.json").read_text())
    for name in ("steps1-cfg4", "steps2-cfg4"):
        for metric in ("cmmd", "clip_score"):
            expected = report["cells"][name]["metrics"][metric]
            assert again["cells"][name]["metrics"][metric] == pytest.approx(expected)
    evaluate.run(EvaluateConfig(compare=(str(output), str(swept[2])), output=str(tmp_path / "compared")))
    page = (tmp_path / "compared/index.html").read_text()
    sources = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert len(sources) == 24
    assert all((tmp_path / "compared" / source).exists() for source in sources)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"metrics": ("beauty",)}, "metrics='beauty' is not allowed"),
        ({"metrics": ("fid",)}, "torch-fidelity's Inception weights"),
        ({"metrics": ("cmmd",), "reference": None}, "the metric cmmd needs a reference"),
        ({"metrics": ("clip-score",), "reference": None}, "either a reference or prompts"),
        ({"model": None}, "either model or compare"),
        ({"steps": (0,)}, "num_inference_steps=0"),
        ({"cfg": (float("nan"),)}, "cfg"),
        ({"num_images": 0}, "num_images=0"),
    ],
)
def test_settings_that_cannot_be(values, words):
    with pytest.raises(ValueError, match=words):
        EvaluateConfig(**{"model": "m", "reference": "r", "output": "o"} | values)


def test_bad_input(program, model_bundle, scene_shards, tmp_path):
    output = tmp_path / "out"
    process = program("evaluate", "--model", model_bundle, "--reference", scene_shards, "--output", output)
    assert_one_sentence(process, "has no CLIP of its own: name one with --clip")
    assert not output.exists()
    with pytest.raises(ValueError, match="is not a finished evaluation"):
        evaluate.run(EvaluateConfig(compare=(str(tmp_path),), output=str(output)))
    (tmp_path / "weights.pth").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="holds no Inception weights"):
        features.load_inception(str(tmp_path / "weights.pth"))
