"""What the demo leaves to look at, of a small model: all numbers in report.json, and a page that shows each of its pictures."""

import itertools
import json

import pytest
from conftest import worker_here
from PIL import Image
from tokenizing import config, run_in_process

from pipelines import generate, img2dataset_layout, probe, report, scene_binding, scenes, tracking
from pipelines.demo import DemoConfig, write_prompts
from pipelines.generate_config import GenerateConfig
from pipelines.stages import Stages

SECONDS = {"vqgan": 30.0, "train": 90.5, "report": 7.0}


@pytest.fixture(scope="module")
def demo(scene_shards, model_bundle, mlflow_runs, tmp_path_factory):
    """A demo of which all is there but the report; its model lies elsewhere."""
    root = tmp_path_factory.mktemp("demo")
    run_in_process(config(scene_shards, model_bundle, root / "tokens", resolution=64))
    img2dataset_layout.write_folder(root / "held-out", scenes.scenes(18, seed=1, held_out=True))
    prompts = write_prompts(root, DemoConfig(output=str(root), num_prompts=6))
    with worker_here():
        generate.run(GenerateConfig(model=str(model_bundle), prompts=str(prompts), output=str(root / "pictures")))
    run = tracking.open_run(root / "train", "train", {})
    levels = ("0.00_0.25", "0.25_0.50", "0.50_0.75", "0.75_1.00")
    tracking.log_metrics(run, {f"loss_t_{level}": 1.0 for level in levels} | {"accuracy": 0.5}, 1)
    (root / "stages.json").write_text(json.dumps({"seconds": SECONDS, "finished": list(SECONDS), "peak_bytes": 2e9}))
    return root


def test_report_of_scenes(demo, model_bundle, monkeypatch):
    monkeypatch.setattr(scene_binding, "CODED_SCENES", 30)
    whole = probe.ProbeConfig
    monkeypatch.setattr(probe, "ProbeConfig", lambda **given: whole(**given | {"images": 12, "levels": (1.0,)}))
    prompts = (demo / "prompts.txt").read_text().splitlines()
    stages = Stages(demo / "stages.json", SECONDS)
    report.write(demo, model_bundle, prompts, stages, {"vqgan": 15e12, "train": 115e12}, generated_scenes=True)
    values = json.loads((demo / "report.json").read_text())
    assert values["prompts"] == 6 and values["accuracy_of_reconstructions"].keys() == values["accuracy"].keys()
    assert values["binding"].keys() == scenes.RELATIONS.keys()
    assert values["probe"]["images"] == 12 and values["probe"]["hears"] and values["probe"]["binds"]
    assert json.loads((demo / "probe.json").read_text()) == values["probe"]
    pulse = values["pulse"]
    assert (pulse["tflop"], pulse["seconds"]) == (130.0, 120), "the report's own seconds are none of the demo's"
    assert pulse["accuracy"]["colour"] == round(values["accuracy"]["colour"], 2)
    page = (demo / "index.html").read_text()
    for name in ("contact_sheet", "emergence", "training", "probe", "reconstructions"):
        assert f'src="{name}.png"' in page
        assert Image.open(demo / f"{name}.png").width > 100
    for words in ("Left: how much worse", "Right: how often", "130.0 TFLOP", "binding: left of"):
        assert words in page
    said = report.summary(demo)
    assert pulse["row"] in said and "Caption accuracy on 6 held-out captions" in said


def test_captions_of_scenes_are_read_apart_by_their_objects():
    drawn = [(scenes.caption(scene), image) for scene, image in scenes.scenes(30, seed=3, held_out=True)]
    wrong = [(caption, image) for (caption, _), (_, image) in itertools.pairwise(drawn) if " of a " in caption]
    values = report.of_scenes(drawn + wrong)
    assert values["accuracy_one_object"]["all"] == 1
    assert values["accuracy_two_objects"]["all"] < values["accuracy"]["all"] < 1
