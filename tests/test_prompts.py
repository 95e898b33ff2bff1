"""Files of prompts in every format, and what their columns mean."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paella import requests
from paella.pictures import InputError
from paella.sampler import SamplingConfig
from pipelines import prompts
from pipelines.openai_batch import opened
from pipelines.picture_jobs import Jobs, JobSettings, parse, units
from pipelines.prompts import PromptRow

SETTINGS = JobSettings(digest="d", defaults={}, sampling=SamplingConfig(), images_per_prompt=1, seed=0)


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("p.txt", "a\n\n  b  \n", [{"prompt": "a"}, {"prompt": "b"}]),
        ("p.jsonl", '{"Prompt": "a", "cfg": null}\n\n{"prompt": "b", "x": [1]}\n', [{"prompt": "a"}, {"prompt": "b", "x": [1]}]),
        ("p.csv", '\ufeffid,caption\n1,"a, b"\n2,\n', [{"id": "1", "caption": "a, b"}, {"id": "2"}]),
        (
            "p.tsv",
            "Prompt\tCategory\tChallenge\tNote\na b\tX\tBasic\t\n",
            [{"prompt": "a b", "category": "X", "challenge": "Basic"}],
        ),
    ],
)
def test_formats(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert [row.values for row in prompts.read(str(tmp_path / name))] == expected


def test_parquet(tmp_path):
    rows = [{"prompt": "a", "steps": 3, "cfg": None}, {"prompt": "b", "steps": None, "cfg": 2.0}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert [row.values for row in prompts.read(str(tmp_path / "p.parquet"))] == [
        {"prompt": "a", "steps": 3}, {"prompt": "b", "cfg": 2.0},
    ]  # fmt: skip
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot be read"):
        list(prompts.read(str(tmp_path / "p.parquet")))


def test_rows_that_cannot_be_read_do_not_stop_the_others(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n[1]\n{"prompt"\n{"prompt": "b"}\n')
    assert [row.error is None for row in prompts.read(str(tmp_path / "p.jsonl"))] == [True, False, False, True]
    (tmp_path / "p.csv").write_text("prompt\na,b\nc\n")
    assert [row.error for row in prompts.read(str(tmp_path / "p.csv"))] == ["more values than columns", None]


def jobs(*values, **changes):
    import dataclasses

    made = Jobs([PromptRow(number, dict(row)) for number, row in enumerate(values)], dataclasses.replace(SETTINGS, **changes))
    return list(made)


def test_ids_follow_from_what_decides_a_picture():
    same = [{"prompt": "a", "seed": 1}, {"prompt": "a", "seed": "1", "steps": 12}, {"seed": 1.0, "caption": "a", "category": "x"}]
    assert len(jobs(*same)) == 1
    others = [{"prompt": "b", "seed": 1}, {"prompt": "a", "seed": 2}, {"prompt": "a", "seed": 1, "steps": 3},
              {"prompt": "a", "seed": 1, "size": "64x64"}, {"prompt": "a", "seed": 1, "format": "webp"},
              {"prompt": "a", "seed": 1, "negative_prompt": "n"}, {"prompt": "a", "seed": 1, "image": "x.png"}]  # fmt: skip
    assert len({job.id for job in jobs(same[0], *others)}) == 8
    assert jobs(same[0])[0].id != jobs(same[0], digest="another")[0].id
    assert [job.seed for job in jobs({"prompt": "a"}, {"prompt": "a", "n": 2}, {"prompt": "a"}, seed=2**32 - 2)] == [
        2**32 - 2, 2**32 - 1, 0, 1,
    ]  # fmt: skip


def test_given_ids_name_files_where_they_can():
    first, second, third = jobs({"prompt": "a", "id": "good-name_1"}, {"prompt": "b", "id": "../up"}, {"prompt": "c", "id": 5})
    assert (first.id, first.name) == ("good-name_1", "good-name_1")
    assert second.id == "../up" and "/" not in second.name
    assert third.id == "5"


def test_defaults_are_for_rows_that_have_them():
    defaults = {"structure_strength": 0.7, "size": "96x64", "negative_prompt": "n", "mode": None}
    text, edit, out, between = jobs(
        {"prompt": "a"}, {"prompt": "a", "image": "x", "size": "64x64"},
        {"prompt": "a", "image": "x", "mode": "outpaint", "pad_top": 8},
        {"prompt": "a", "prompt_to": "b", "mode": "interpolate", "frames": 2}, defaults=defaults,
    )[:4]  # fmt: skip
    assert (text.request.mode, text.request.size) == ("text-to-image", "96x64")
    assert (edit.request.structure_strength, edit.request.size) == (0.7, "64x64")
    assert out.request.size == "auto" and between.request.negative_prompt is None


@pytest.mark.parametrize(
    "values, words",
    [
        ({"steps": 1.5}, "an integer"),
        ({"steps": True}, "an integer"),
        ({"prompt": 3}, "text"),
        ({"cfg": "x"}, "a number"),
        ({"prompt": "a", "caption": "b"}, "there twice"),
        ({"width": 64}, "width and height"),
        ({"images": [1]}, "text"),
    ],
)
def test_wrong_types(values, words):
    with pytest.raises(InputError, match=words):
        parse(values)


def test_openai_bodies_have_the_apis_defaults():
    line = {"custom_id": "c", "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "a", "quality": "low"}}
    (job,) = jobs(line, defaults={"size": "96x64"})
    assert job.request == requests.PictureRequest(prompt="a", sampling=requests.sampling(6)) and job.id == "c"
    for body, code in [
        ({"prompt": "a", "background": "transparent"}, "unsupported_value"),
        ({"prompt": "a", "response_format": "url"}, "unsupported_value"),
        ({"prompt": "a", "strength": 1}, "unknown_parameter"),
        ({"prompt": "a", "quality": "low", "num_inference_steps": 2}, "invalid_value"),
        ({"prompt": "a", "n": 11}, "invalid_value"),
    ]:
        with pytest.raises(InputError) as error:
            opened(line | {"body": body})
        assert error.value.code == code
    with pytest.raises(InputError, match="POST"):
        opened(line | {"url": "/v1/chat/completions"})


def test_units_have_the_same_names_again_and_jobs_only_if_needed():
    rows = [{"prompt": str(number)} for number in range(10)]
    first = list(units(jobs(*rows), 4, set()))
    assert [unit.num_jobs for unit in first] == [4, 4, 2]
    again = list(units(jobs(*rows), 4, {first[1].part}))
    assert [unit.name for unit in again] == [unit.name for unit in first]
    assert [bool(unit.packed) for unit in again] == [True, False, True]
    assert [job.request.prompt for job in again[2].jobs()] == ["8", "9"]


def test_settings_are_plain_json():
    request = requests.PictureRequest(mode="blend", images=("a", "b"), weights=(1.0, 0.5))
    assert json.loads(json.dumps(request.settings))["weights"] == [1.0, 0.5]
