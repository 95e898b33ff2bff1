"""Released weights become bundles, and what does not fit is said in a sentence."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from paella import weights
from paella.bundle import load_bundle
from paella.config import PRESETS, PriorConfig
from paella.convert import main
from paella.prior import Prior
from paella.unet import Paella
from paella.vqgan import VQModel
from paella.weights import state_digest

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def byt5(tmp_path_factory) -> Path:
    """A T5 encoder as wide as the fixtures' conditions."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    path = tmp_path_factory.mktemp("byt5")
    T5EncoderModel(T5Config(vocab_size=384, d_model=40, d_kv=10, d_ff=40, num_layers=1, num_heads=4)).save_pretrained(path)
    ByT5Tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def run(monkeypatch, capsys, byt5):
    """The program in this process: its exit code, output and errors."""

    def _run(out: Path, **files: Path | str) -> SimpleNamespace:
        flags = {"unet": FIXTURES / "unet.pt", "vqgan": FIXTURES / "vqgan.pt", "config": FIXTURES / "configs.json", "byt5": byt5}
        flags |= {"clip": "", "out": out, "image_size": 64} | files
        command = ["convert", *(part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value)))]
        monkeypatch.setattr(sys, "argv", command)
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        out_and_err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out_and_err.out, stderr=out_and_err.err)

    return _run


def test_golden_numbers_through_a_bundle(tmp_path, run):
    done = run(tmp_path / "bundle", prior=FIXTURES / "prior.pt")
    assert done.returncode == 0, done.stderr
    assert "next: python pipelines/generate.py" in done.stdout
    bundle = load_bundle(str(tmp_path / "bundle"))
    assert f"SHA-256 {bundle.digest}" in done.stdout
    io = load_file(FIXTURES / "unet_io.safetensors")
    conditions = {name: io[name] for name in ("byt5", "clip", "clip_image")}
    with torch.inference_mode():
        logits = bundle.unet(io["x"], io["r"], **conditions)
    torch.testing.assert_close(logits, io["logits_byt5_clip_image"], atol=1e-4, rtol=0)
    vq = load_file(FIXTURES / "vqgan_io.safetensors")
    assert torch.equal(bundle.vqgan.encode(vq["image"]), vq["indices"].long())
    prior = load_file(FIXTURES / "prior_io.safetensors")
    assert bundle.prior is not None
    torch.testing.assert_close(bundle.prior(prior["x"], prior["r"], prior["c"]), prior["prediction"], atol=1e-4, rtol=0)
    assert bundle.generate_tokens(["a cat"], [0]).shape == (1, 16, 16)
    assert "converted" in (tmp_path / "bundle" / "model_card.md").read_text()


def test_half_the_size_in_bfloat16(tmp_path, run):
    assert run(tmp_path / "whole").returncode == 0
    assert run(tmp_path / "half", dtype="bfloat16").returncode == 0
    whole, half = ((tmp_path / name / "unet.safetensors").stat().st_size for name in ("whole", "half"))
    assert half < 0.6 * whole
    assert load_bundle(str(tmp_path / "half"), dtype=torch.bfloat16).unet.clf[1].weight.dtype == torch.bfloat16


def test_other_kinds_of_files(tmp_path, run):
    """Published state dicts without a wrapper: safetensors, and .pt of the format before zip files."""
    state = torch.load(FIXTURES / "unet.pt", weights_only=True)["state_dict"]
    save_file(state, tmp_path / "unet.safetensors")
    torch.save(state, tmp_path / "unet.pt", _use_new_zipfile_serialization=False)
    digests = set()
    for name in ("unet.safetensors", "unet.pt"):
        done = run(tmp_path / name.replace(".", "-"), unet=tmp_path / name)
        assert done.returncode == 0, done.stderr
        digests.add(load_bundle(str(tmp_path / name.replace(".", "-"))).digest)
    assert digests == {state_digest(state)}


class Evil:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('/tmp/paella-was-here').touch()",))


def _damaged(kind: str, file: Path) -> None:
    state = torch.load(FIXTURES / "unet.pt", weights_only=True)["state_dict"]
    if kind == "missing":
        del state["clf.1.bias"]
    elif kind == "unknown":
        state["x"] = torch.zeros(1)
    elif kind == "shape":
        state["clf.1.bias"] = torch.zeros(3)
    elif kind == "integers":
        state["clf.1.bias"] = torch.zeros_like(state["clf.1.bias"], dtype=torch.int64)
    elif kind == "numbered":
        state = {0: torch.zeros(1)}
    elif kind == "sparse":
        state["clf.1.bias"] = state["clf.1.bias"].to_sparse()
    elif kind == "nan":
        state["clf.1.bias"][0] = float("nan")
    if kind in ("pickle", "old pickle"):
        torch.save({"state_dict": Evil()}, file, _use_new_zipfile_serialization=kind == "pickle")
    elif kind == "truncated":
        file.write_bytes((FIXTURES / "unet.pt").read_bytes()[:100_000])
    elif kind == "text":
        file.write_text("hello")
    elif kind == "list":
        torch.save([1, 2], file)
    else:
        torch.save(state, file)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", r"missing: clf\.1\.bias"),
        ("unknown", "unknown: x"),
        ("shape", r"of another shape: clf\.1\.bias \(3,\) where \(\d+,\) is expected"),
        ("integers", r"of another type: clf\.1\.bias torch\.int64"),
        ("numbered", "holds no state dict"),
        ("sparse", "holds no state dict"),
        ("nan", r"NaN or infinity: clf\.1\.bias"),
        ("pickle", "code in it has not been run"),
        ("old pickle", "code in it has not been run"),
        ("truncated", "cannot be read as weights"),
        ("text", "more than tensors, or is damaged|cannot be read as weights"),
        ("list", "holds no state dict"),
    ],
)
def test_what_does_not_fit(tmp_path, run, kind, message):
    _damaged(kind, tmp_path / "unet.pt")
    done = run(tmp_path / "bundle", unet=tmp_path / "unet.pt")
    assert done.returncode == 2
    assert re.search(message, done.stderr) and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "bundle").exists() and not Path("/tmp/paella-was-here").exists()


def test_missing_file_and_existing_output(tmp_path, run):
    assert "there is no file" in run(tmp_path / "b", vqgan=tmp_path / "none.pt").stderr
    (tmp_path / "b").mkdir()
    assert "exists already" in run(tmp_path / "b").stderr
    assert "does not fit" in run(tmp_path / "c", unet=FIXTURES / "vqgan.pt").stderr


def test_a_config_that_is_none(tmp_path, run):
    config = tmp_path / "config.json"
    for text, message in (
        ("{", "cannot be read"),
        ('{"unet": {"c_in": "wide"}}', "of another form"),
        ('{"unet": {"x": 1}}', "no field"),
    ):
        config.write_text(text)
        done = run(tmp_path / "b", config=config)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_full_disk_leaves_nothing(tmp_path, run, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", full)
    done = run(tmp_path / "b")
    assert done.returncode == 2 and "No space left" in done.stderr
    assert list(tmp_path.iterdir()) == []


MEASURED = """
import sys, re, torch
from pathlib import Path
sys.argv = ["convert", *sys.argv[1:]]
if sys.argv[1] == "load":
    from paella.bundle import load_bundle
    bundle = load_bundle(sys.argv[2], dtype=torch.float32)
    print(sum(p.numel() for p in bundle.unet.parameters()))
else:
    from paella.convert import main
    main()
status = Path("/proc/self/status").read_text()
print("peak", int(re.findall(r"VmHWM:\\s+(\\d+) kB", status)[0]) * 1024)
"""


@pytest.mark.slow
def test_the_full_size(tmp_path):
    """The published layout: 1 G parameters convert within 12 GB, and load without a second copy."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    wide = tmp_path / "byt5"
    T5EncoderModel(T5Config(vocab_size=384, d_model=2560, d_kv=8, d_ff=8, num_layers=1, num_heads=1)).save_pretrained(wide)
    ByT5Tokenizer().save_pretrained(wide)
    published = PRESETS["paella-1b"]
    generator = torch.Generator().manual_seed(0)
    makers = {
        "unet": lambda: Paella(published.unet),
        "vqgan": lambda: VQModel(published.vqgan),
        "prior": lambda: Prior(PriorConfig()),
    }
    for name, make in makers.items():
        with torch.device("meta"):
            shapes = make().state_dict()
        state = {
            key: torch.rand(value.shape, generator=generator)
            if value.is_floating_point()
            else torch.zeros(value.shape, dtype=value.dtype)
            for key, value in shapes.items()
        }
        torch.save(state, tmp_path / f"{name}.pt")
        del state
    flags = [part for name in makers for part in (f"--{name}", str(tmp_path / f"{name}.pt"))]
    command = [sys.executable, "-c", MEASURED, *flags, "--byt5", str(wide), "--clip", "", "--out", str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    converting = int(done.stdout.split()[-1])
    done = subprocess.run([*command[:-1], str(tmp_path / "half"), "--dtype", "bfloat16"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    halving = int(done.stdout.split()[-1])
    done = subprocess.run([sys.executable, "-c", MEASURED, "load", str(tmp_path / "bundle")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers, loading = int(done.stdout.split()[0]), int(done.stdout.split()[-1])
    on_disk = sum(file.stat().st_size for file in (tmp_path / "bundle").glob("*.safetensors"))
    peaks = {"converting": converting, "to bfloat16": halving, "loading": loading, "weights": on_disk}
    print(", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in peaks.items()))
    assert numbers == 1_008_350_592
    assert max(converting, halving) < 12e9
    assert loading < on_disk + 2e9
