"""The server as a user starts it, through the real openai client: pictures, every mode, errors in the client's own classes."""

import asyncio
import base64
import concurrent.futures
import io
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import openai
import psutil
import pytest
from conftest import ROOT
from PIL import Image

from paella import edits, requests
from paella.bundle import load_bundle
from paella.images import to_uint8
from paella.sampler import SamplingConfig, sample
from pipelines import prompts
from pipelines.generate_config import GenerateConfig
from pipelines.picture_jobs import Jobs, units
from pipelines.picture_stages import GeneratePictures


@pytest.fixture(scope="module")
def address(server):
    return server[0]


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="key-two", max_retries=0)


@pytest.fixture(scope="module")
def bundle(clip_bundle):
    return load_bundle(str(clip_bundle))


def pixels(item) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item.b64_json))))


def png(size=(64, 64), mode="RGB", color="red", kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, kind)
    return buffer.getvalue()


def half_mask(size=(64, 64)) -> bytes:
    """Alpha 0 in the right half: edited there."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (size[0] // 2, 0, *size))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return buffer.getvalue()


def expected(bundle, *canvases):
    """What the library makes of canvases."""
    tokens = sample(bundle.unet, canvases, codebook=bundle.vqgan.vquantizer)
    return [to_uint8(bundle.decode(row[None]))[0] for row in tokens]


def settings(steps=2):
    return SamplingConfig(num_inference_steps=steps, temperature=(1.0, 0.3), cfg=(4.0,))


def test_pictures_are_the_librarys(client, bundle):
    answer = client.images.generate(prompt="a red circle", n=2, extra_body={"seed": 7, "num_inference_steps": 2})
    wanted = [edits.text_to_image(bundle, "a red circle", seed=seed, config=settings()) for seed in (7, 8)]
    for item, picture in zip(answer.data, expected(bundle, *wanted), strict=True):
        assert np.array_equal(pixels(item), picture)
    assert [item.seed for item in answer.data] == [7, 8]
    assert answer.usage.output_tokens == 2 * 16 * 16
    assert answer.metrics["steps"] == 2
    text = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).text
    assert (text["prompt"], text["seed"], text["bundle"]) == ("a red circle", "7", bundle.digest)
    assert "made by a model" in text["generator"]


def test_a_job_and_the_library_give_the_same_file(client, clip_bundle, bundle, tmp_path):
    """The same requests to the server and as lines of a Batch file: the same bytes, and those that the library writes."""
    image, mask = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (png(), half_mask()))
    settings = {"seed": 7, "num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "blue"}
    bodies = [
        ("generations", {"prompt": "a red circle", "size": "64x32", **settings}),
        ("edits", {"prompt": "a red circle", "image": image, "mask": mask, **settings}),
    ]
    answers = [client.post(f"/images/{path}", cast_to=dict, body=body) for path, body in bodies]
    files = [base64.b64decode(answer["data"][0]["b64_json"]) for answer in answers]
    lines = [{"custom_id": path, "method": "POST", "url": f"/v1/images/{path}", "body": body} for path, body in bodies]
    (tmp_path / "batch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = GenerateConfig(model=str(clip_bundle), prompts=str(tmp_path / "batch.jsonl"), output=str(tmp_path / "out"))
    jobs = Jobs(prompts.read(str(config.prompts)), config.job_settings(bundle.digest))
    rows = [row for unit in units(jobs, 8, set()) for row in GeneratePictures(config, bundle.digest).make(unit)]
    assert [(tmp_path / "out" / row["file"]).read_bytes() for row in rows] == files
    sampling = SamplingConfig(num_inference_steps=2, cfg=(3.0,), temperature=(1.0, 0.3))
    request = requests.PictureRequest(prompt="a red circle", size="64x32", negative_prompt="blue", sampling=sampling)
    planned = requests.plan(bundle, request)
    picture = bundle.decode(sample(bundle.unet, [planned.canvas(bundle, seed=7)]))[0]
    assert planned.file(bundle, picture, seed=7) == files[0]


def test_the_same_seed_is_the_same_picture_in_any_company(client):
    """One picture alone, and again among eleven others of other sizes, steps and modes."""
    wanted = {"prompt": "a red circle", "extra_body": {"seed": 3, "num_inference_steps": 5}}
    alone = pixels(client.images.generate(**wanted).data[0])
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for seed in range(5):
            body = {"seed": seed, "num_inference_steps": 3 + seed}
            pool.submit(client.images.generate, prompt=f"other {seed}", size="32x64", extra_body=body)
            pool.submit(client.images.edit, image=png(), mask=half_mask(), prompt="x", extra_body=body)
        mixed = pool.submit(client.images.generate, **wanted)
        assert np.array_equal(pixels(mixed.result().data[0]), alone)


def test_inpainting_keeps_what_the_mask_keeps(client, bundle):
    answer = client.images.edit(
        image=png(), mask=half_mask(), prompt="a circle", extra_body={"seed": 1, "num_inference_steps": 2}
    )
    made = pixels(answer.data[0])
    assert (made[:, :32] == (255, 0, 0)).all()
    assert not (made[:, 40:] == (255, 0, 0)).all()
    assert answer.data[0].mode == "inpaint"


def test_all_modes_of_edits(client):
    one, two, body = png(), png(color="blue"), {"num_inference_steps": 1}
    made = client.images.edit(image=one, prompt="x", extra_body=body)
    assert made.data[0].mode == "structural"
    made = client.images.edit(image=[one, two], prompt="x", extra_body=body | {"weights": [1, 0.5], "text_weight": 0.5})
    assert made.data[0].mode == "blend"
    made = client.images.edit(image=one, prompt="x", extra_body=body | {"mode": "outpaint", "pad_left": 32, "pad_top": 8})
    assert pixels(made.data[0]).shape == (72, 96, 3)
    made = client.images.edit(image=[one, two], prompt="", extra_body=body | {"mode": "interpolate", "frames": 3})
    assert len(made.data) == 3
    made = client.images.create_variation(image=one, n=2)
    assert [item.mode for item in made.data] == ["variation", "variation"]
    url = "data:image/png;base64," + base64.b64encode(one).decode()
    made = client.post("/images/edits", cast_to=dict, body={"image": url, "prompt": "x", **body})
    assert made["data"][0]["mode"] == "structural"
    fields = {"mode": "interpolate", "prompt": "a", "prompt_to": "b", "frames": 2, **body}
    assert len(client.post("/images/edits", cast_to=dict, body=fields)["data"]) == 2


def test_sizes_formats_and_models(client):
    answer = client.images.generate(prompt="x", size="64x32", output_format="webp", quality="low")
    assert pixels(answer.data[0]).shape == (32, 64, 3)
    assert answer.metrics["steps"] == 6
    odd = client.images.edit(image=png((100, 50), kind="JPEG"), prompt="x", extra_body={"num_inference_steps": 1})
    width, height = (int(side) for side in odd.size.split("x"))
    assert width > height and width % 8 == height % 8 == 0
    assert [model.id for model in client.models.list()] == ["bundle"]
    assert client.models.retrieve("bundle").id == "bundle"


def test_streaming(client):
    arguments = {"prompt": "x", "stream": True, "partial_images": 3, "n": 2, "extra_body": {"seed": 5}}
    events = list(client.images.generate(**arguments))
    previews = [event for event in events if event.type == "image_generation.partial_image"]
    finals = [event for event in events if event.type == "image_generation.completed"]
    assert {(event.image_index, event.partial_image_index) for event in previews} == {(i, k) for i in range(2) for k in range(3)}
    assert sorted(event.seed for event in finals) == [5, 6]
    whole = client.images.generate(prompt="x", n=2, extra_body={"seed": 5})
    for event in finals:
        assert np.array_equal(pixels(event), pixels(whole.data[event.image_index]))
        assert event.usage.output_tokens == 256
    edit = list(client.images.edit(image=png(), prompt="x", stream=True, partial_images=1))
    assert [event.type for event in edit] == ["image_edit.partial_image", "image_edit.completed"]


def test_async_client(address):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="key-one", max_retries=0) as client:
            whole = await client.images.generate(prompt="x", extra_body={"num_inference_steps": 1})
            stream = await client.images.generate(prompt="x", stream=True, partial_images=1)
            return whole, [event.type async for event in stream]

    whole, types = asyncio.run(run())
    assert pixels(whole.data[0]).shape == (64, 64, 3)
    assert types == ["image_generation.partial_image", "image_generation.completed"]


BOMB = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xff\0\0\xff\xff\x08\x02\0\0\0\xd8\x1b\x8b\xf9\0\0\0\0IEND\xaeB`\x82"


@pytest.mark.parametrize(
    "arguments, code, param",
    [
        ({"extra_body": {"stepz": 3}}, "unknown_parameter", "stepz"),
        ({"size": "65x64"}, "invalid_value", "size"),
        ({"size": "9992x9992"}, "invalid_value", "size"),
        ({"size": "large"}, "invalid_value", "size"),
        ({"n": 11}, "invalid_value", "n"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": "x" * 32_001}, "invalid_value", "prompt"),
        ({"extra_body": {"seed": -1}}, "invalid_value", "seed"),
        ({"extra_body": {"seed": 2**32}}, "invalid_value", "seed"),
        ({"background": "transparent"}, "unsupported_value", "background"),
        ({"output_format": "gif"}, "unsupported_value", "output_format"),
        ({"output_format": "svg"}, "unsupported_value", "output_format"),
        ({"response_format": "url"}, "unsupported_value", "response_format"),
        ({"style": "vivid"}, "unsupported_value", "style"),
        ({"partial_images": 2}, "invalid_value", "partial_images"),
        ({"quality": "low", "extra_body": {"num_inference_steps": 3}}, "invalid_value", "num_inference_steps"),
    ],
)
def test_bad_requests(client, arguments, code, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(**{"prompt": "x"} | arguments)
    assert (error.value.code, error.value.param) == (code, param)
    assert error.value.request_id


@pytest.mark.parametrize(
    "files, extra, param",
    [
        ({"image": BOMB}, {}, "image"),
        ({"image": png()[:60]}, {}, "image"),
        ({"image": b"GIF89a"}, {}, "image"),
        ({"image": b"<svg/>"}, {}, "image"),
        ({"image": png(), "mask": png()}, {}, "mask"),
        ({"image": png(), "mask": half_mask((32, 32))}, {}, "mask"),
        ({"image": png(), "mask": png(mode="RGBA", color=(0, 0, 0, 255))}, {}, "mask"),
        ({"image": png()}, {"mode": "inpaint"}, "mask"),
        ({"image": png()}, {"mode": "outpaint"}, "pad_left"),
        ({"image": png()}, {"mode": "outpaint", "pad_left": 3}, "pad_left"),
        ({"image": [png(), png()]}, {"mode": "structural"}, "image"),
        ({"image": [png(), png()]}, {"weights": [1]}, "weights"),
        ({"image": png()}, {"frames": 3}, "frames"),
    ],
)
def test_bad_images(client, files, extra, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.images.edit(prompt="x", **files, extra_body=extra)
    assert (error.value.code, error.value.param) == ("invalid_value", param)


def test_images_of_every_kind_are_taken(client):
    for image in (png((1, 1)), png(mode="CMYK", color=(0, 255, 255, 0), kind="JPEG"), png(mode="RGBA"), png(mode="L", color=9)):
        assert client.images.edit(image=image, prompt="x", extra_body={"num_inference_steps": 1}).data


def post(address, path, body, kind="application/json"):
    """Status, headers and body of a request as it is, by no client's help."""
    headers = {"content-type": kind, "authorization": "Bearer key-one"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{address}{path}", body, headers), timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


@pytest.mark.parametrize(
    "path, body, kind, status, code",
    [
        ("generations", b'{"prompt": "x", "guidance_scale": NaN}', "application/json", 400, "invalid_value"),
        ("generations", b'{"prompt": ', "application/json", 400, "invalid_value"),
        ("generations", b"[" * 100_000, "application/json", 400, "invalid_value"),
        ("generations", b"[]", "application/json", 400, "invalid_value"),
        ("generations", b"prompt=x", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        ("edits", b"x", "multipart/form-data; boundary=no", 400, "invalid_value"),
        ("edits", b'{"image": "http://127.0.0.1:1/a.png", "prompt": "x"}', "application/json", 400, "invalid_value"),
        ("edits", b'{"image": ["' + b"data:image/png;base64," + b"A" * 28_000_000 + b'"]}', "application/json", 413, None),
        ("generations", b" " * 65_000_000, "application/json", 413, "payload_too_large"),
        ("nothing", b"", "application/json", 404, "not_found"),
    ],
)
def test_bad_bodies(address, path, body, kind, status, code):
    got, headers, answer = post(address, f"/v1/images/{path}", body, kind)
    error = json.loads(answer)["error"]
    assert got == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == (code or "payload_too_large")
    assert headers["x-request-id"]


def test_other_errors(client, address):
    with pytest.raises(openai.AuthenticationError) as error:
        client.with_options(api_key="wrong").models.list()
    assert (error.value.code, bool(error.value.request_id)) == ("invalid_api_key", True)
    with pytest.raises(openai.NotFoundError) as error:
        client.images.generate(prompt="x", model="other")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.APIStatusError) as error:
        client.with_options(max_retries=2).images.generate(prompt="x", extra_body={"timeout_ms": 1, "num_inference_steps": 100})
    assert (error.value.status_code, error.value.code) == (504, "deadline_exceeded")
    assert error.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.APIStatusError) as error:
        client.images.edit(image=b"\x89PNG\r\n\x1a\n" + bytes(20_000_001), prompt="x")
    assert (error.value.status_code, error.value.code) == (413, "payload_too_large")


def counted_images(address, outcome):
    lines = urllib.request.urlopen(f"{address}/metrics").read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if "paella_images_total{" in line and f'"{outcome}"' in line)


def test_overload_is_refused_at_once(client, address):
    """Ten times as many images as there is room for: 200 or 429 with retry-after, and service as before. All are counted, those
    too that the ingress has turned away."""

    def ask(index):
        try:
            client.images.generate(prompt=f"{index}", n=10, extra_body={"num_inference_steps": 20})
            return 200
        except openai.RateLimitError as error:
            assert error.code == "queue_full"
            assert int(error.response.headers["retry-after"]) >= 1
            return 429

    def insist(index):  # the second time the ingress knows
        first = ask(index)
        return [first] if first == 200 else [first, ask(index)]

    before = counted_images(address, "queue_full")  # of other tests of this server
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        outcomes = [status for statuses in pool.map(insist, range(40)) for status in statuses]
    assert set(outcomes) == {200, 429}
    assert client.images.generate(prompt="x").data
    refused, deadline = 10 * outcomes.count(429), time.monotonic() + 60  # Ray's exporters report every few seconds
    while (counted := counted_images(address, "queue_full") - before) < refused:
        assert time.monotonic() < deadline, (counted, refused)
        time.sleep(1)
    assert counted == refused


def test_clients_that_hang_up_leave_room(client):
    """In the ingress's count of what is under way too, which refuses by itself what the test before had too much of."""
    for number in range(20):
        arguments = {"prompt": f"{number}", "n": 10, "stream": True, "partial_images": 1}
        with client.images.generate(**arguments, extra_body={"num_inference_steps": 4}) as stream:
            assert next(iter(stream)).type == "image_generation.partial_image"
    assert len(client.images.generate(prompt="x", n=10).data) == 10


@pytest.mark.skipif(sys.platform != "linux", reason="Ray brings HAProxy on Linux alone")
def test_clients_come_in_through_haproxy_and_from_this_machine_alone(address, server):
    processes = {child.pid: " ".join(child.cmdline()) for child in psutil.Process(server[1].pid).children(recursive=True)}
    (line,) = [line for line in processes.values() if "haproxy.cfg" in line]
    assert " -dS " in line  # or a client that hangs up behind a long body is not missed (`benchmarks/overload.py`)
    ports = {int(address.rsplit(":", 1)[1]), *range(30_000, 31_000)}  # its own, and those at which it finds ingresses
    listening = [c.laddr for c in psutil.net_connections("tcp") if c.pid in processes and c.status == psutil.CONN_LISTEN]
    found = {place.ip for place in listening if place.port in ports}
    assert found == {"127.0.0.1"}


def test_raw_bytes_health_and_metrics(client, address):
    request = urllib.request.Request(
        f"{address}/v1/images/generations",
        b'{"prompt": "x", "num_inference_steps": 1}',
        {"content-type": "application/json", "accept": "image/png", "authorization": "Bearer key-one"},
    )
    with urllib.request.urlopen(request) as answer:
        assert Image.open(answer).size == (64, 64)
    for path in ("health/live", "health/ready", "openapi.json", "", "page/page.js", "page/page.css"):
        assert urllib.request.urlopen(f"{address}/{path}").status == 200
    deadline = time.monotonic() + 60  # Ray's exporters report every few seconds
    while b"paella_images_total" not in (text := urllib.request.urlopen(f"{address}/metrics").read()):
        assert time.monotonic() < deadline, text
        time.sleep(1)


def test_a_killed_replica_comes_back(client, server):
    """What is under way fails with an error that may be retried; then there is service again, with nobody's help."""
    _, process = server
    replicas = [child for child in psutil.Process(process.pid).children(recursive=True) if "engine-" in " ".join(child.cmdline())]
    assert len(replicas) == 1
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        body = {"num_inference_steps": 100}
        asked = pool.submit(client.images.generate, prompt="x", n=10, extra_body=body)
        time.sleep(0.3)
        replicas[0].kill()
        with pytest.raises(openai.InternalServerError) as error:
            asked.result()
    assert (error.value.status_code, error.value.code) == (503, "starting")
    assert "retry-after" in error.value.response.headers
    deadline = time.monotonic() + 60
    while True:
        try:
            assert client.images.generate(prompt="x", timeout=20).data
            break
        except (openai.InternalServerError, openai.APITimeoutError):
            assert time.monotonic() < deadline
            time.sleep(0.5)


def test_missing_model(tmp_path):
    command = [sys.executable, "-m", "serve.run", "--model", tmp_path / "none"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert "make demo" in line
