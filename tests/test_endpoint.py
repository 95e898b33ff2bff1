"""Batch generation through a running server: the files of a job with workers, bad rows by name, patience, and what ends a job."""

import json
import socket

import pytest
from conftest import assert_one_sentence, worker_here
from served import KEYS
from test_generate import BAD, GOOD, settled, write_inputs

from paella import requests
from paella.sampler import SamplingConfig
from pipelines import endpoint, generate, manifest
from pipelines.generate_config import GenerateConfig, api_settings
from pipelines.output_store import Output
from pipelines.picture_jobs import Jobs, JobSettings
from pipelines.prompts import PromptRow


@pytest.fixture
def job(server, clip_bundle, tmp_path, monkeypatch) -> GenerateConfig:
    """Every mode, and every mistake, for the server."""
    monkeypatch.setenv("PAELLA_API_KEY", KEYS[0])
    write_inputs(tmp_path)
    values = {"prompts": str(tmp_path / "prompts.jsonl"), "output": str(tmp_path / "out"), "images_per_prompt": 2, "unit_size": 7}
    return GenerateConfig(endpoint=server[0], **values)


def rows_of(config: GenerateConfig) -> list[dict]:
    return [row | {"device": None} for row in settled(manifest.rows(Output(config.output)))]


def test_files_are_those_of_a_job_of_its_own(job, clip_bundle, tmp_path, capsys):
    generate.run(job)
    rows = rows_of(job)
    own = GenerateConfig(
        model=str(clip_bundle), sampling=requests.sampling(), output=str(tmp_path / "own"), prompts=job.prompts,
        images_per_prompt=2, unit_size=7,
    )  # fmt: skip
    with worker_here():
        generate.run(own)
    unlike = next(number for number, (row, _) in enumerate(GOOD) if row["prompt"] == "a schedule")
    expected = rows_of(own)
    for mine, other in zip(rows, expected, strict=True):
        if mine["row"] == unlike:
            assert mine["status"] == "failed" and "one cfg for all steps" in mine["error"]
        elif other["status"] == "made":
            assert mine == other
            assert (tmp_path / "out" / mine["file"]).read_bytes() == (tmp_path / "own" / other["file"]).read_bytes()
        else:
            assert mine["status"] == "failed" and mine["error"]
    assert {number for number, _ in enumerate(BAD, len(GOOD))} <= {row["row"] for row in rows if row["status"] == "failed"}
    capsys.readouterr()
    generate.run(job)
    assert "generation is finished" in capsys.readouterr().out


def test_a_full_queue_is_waited_for(server, job, tmp_path):
    """The server has room for 24."""
    (tmp_path / "many.txt").write_text("".join(f"a circle, number {number}\n" for number in range(60)))
    values = {"concurrency": 60, "sampling": requests.sampling(6)}
    config = GenerateConfig(endpoint=job.endpoint, prompts=str(tmp_path / "many.txt"), output=str(tmp_path / "many"), **values)
    generate.run(config)
    info = json.loads((tmp_path / "many" / "job.json").read_text())
    assert (info["made"], info["failed"]) == (60, 0)


def test_what_ends_a_job(job, program, monkeypatch, tmp_path):
    flags = ["--prompts", job.prompts, "--output", tmp_path / "other"]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert_one_sentence(program("generate", "--endpoint", nobody, *flags), f"{nobody} has no answer")
    assert_one_sentence(program("generate", "--endpoint", "example", *flags), "an http:// or https:// address")
    there = ["--endpoint", job.endpoint, *flags]
    assert_one_sentence(program("generate", *there, "--model", "other"), "serves no model other, but")
    assert_one_sentence(program("generate", *there, "--sampling.top-k", "3"), "cannot be sent to an endpoint")
    monkeypatch.setenv("PAELLA_API_KEY", "wrong")
    assert_one_sentence(program("generate", *there), "refuses: the API key is missing or wrong")
    assert not (tmp_path / "other").exists()


def test_another_model_behind_the_same_address_ends_the_job(job, monkeypatch):
    monkeypatch.setattr(endpoint, "digest_of", lambda config: "0" * 40)
    with pytest.raises(ValueError, match=r"serves [0-9a-f]+ now, but served 0+ when"):
        generate.run(job)
    assert not manifest.parts(Output(job.output))


def test_frames_of_one_row_are_one_request_and_equal_rows_of_other_seeds_are_two():
    row = {"prompt": "a", "prompt_to": "b", "mode": "interpolate", "frames": 2}
    rows = [PromptRow(0, row | {"seed": 1}), PromptRow(1, row | {"seed": 2}), PromptRow(2, {"prompt": "c", "n": 2})]
    jobs = Jobs(rows, JobSettings(digest="d", defaults={}, sampling=requests.sampling(), images_per_prompt=1, seed=0))
    assert [[job.seed for job in some] for some in endpoint._together(list(jobs))] == [[1, 1], [2, 2], [4], [5]]


def test_the_apis_settings():
    assert api_settings(requests.sampling(3, 2.0, 0.5)) == {
        "num_inference_steps": 3, "guidance_scale": 2.0, "temperature": 0.5,
    }  # fmt: skip
    for other in (SamplingConfig(), SamplingConfig(cfg=(8, 2)), SamplingConfig(temperature=(1, 0.3), top_k=2)):
        with pytest.raises(ValueError, match="cannot be sent"):
            api_settings(other)
