"""The served model, through the real openai client: pictures, errors in its own classes, the page, a clean end."""

import base64
import io
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import openai
import pytest
from conftest import ROOT
from PIL import Image

from paella.bundle import load_bundle
from paella.images import to_uint8
from paella.sampler import SamplingConfig


@pytest.fixture(scope="module")
def address(model_bundle):
    """A server as a user starts it, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "serve.run", "--model", model_bundle, "--port", str(port)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    lines = []
    while process.poll() is None and not any("serving" in line for line in lines):
        lines.append(process.stdout.readline())
    assert process.poll() is None, lines
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert process.poll() == 0


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def pixels(item) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item.b64_json))))


def test_pictures_are_the_librarys(client, model_bundle):
    answer = client.images.generate(prompt="a red circle", n=2, extra_body={"seed": 7, "num_inference_steps": 2})
    assert len(answer.data) == 2
    sampling = SamplingConfig(num_inference_steps=2, temperature=(1.0, 0.3), cfg=(4.0, 4.0))
    bundle = load_bundle(str(model_bundle))
    tokens = bundle.generate_tokens(["a red circle"] * 2, [7, 8], sampling=sampling)
    for item, expected in zip(answer.data, to_uint8(bundle.decode(tokens)), strict=True):
        assert np.array_equal(pixels(item), expected)
    assert answer.usage.output_tokens == 2 * 16 * 16


def test_sizes_and_models(client):
    answer = client.images.generate(prompt="x", size="64x32", extra_body={"num_inference_steps": 1})
    assert pixels(answer.data[0]).shape == (32, 64, 3)
    assert [model.id for model in client.models.list()] == ["bundle"]


@pytest.mark.parametrize(
    "arguments, code, param",
    [
        ({"extra_body": {"stepz": 3}}, "unknown_parameter", "stepz"),
        ({"size": "65x64"}, "invalid_value", "size"),
        ({"size": "large"}, "invalid_value", "size"),
        ({"n": 11}, "invalid_value", "n"),
        ({"extra_body": {"seed": -1}}, "invalid_value", "seed"),
    ],
)
def test_bad_requests(client, arguments, code, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(prompt="x", **arguments)
    assert (error.value.code, error.value.param) == (code, param)
    assert error.value.request_id


def test_unknown_model_and_page(client, address):
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="x", model="other")
    page = urllib.request.urlopen(address).read().decode()
    assert "<form" in page
    assert "http://" not in page and "https://" not in page


def test_missing_model(tmp_path):
    command = [sys.executable, "-m", "serve.run", "--model", tmp_path / "none"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert "make demo" in line
