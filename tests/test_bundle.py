"""Bundles: what is saved is what is loaded, and what does not fit is named."""

import dataclasses
import json

import pytest
import torch
from conftest import running, small_config
from processes import free_ports
from safetensors.torch import load_file, save_file

import paella
from paella.bundle import load_bundle, load_vqgan, save_bundle
from paella.conditioning import TextEncoders, load_clip
from paella.config import TextConfig
from paella.storage import local_directory, new_directory, new_file
from paella.unet import Paella
from paella.vqgan import VQModel
from paella.weights import state_digest


def copied(bundle, tmp_path):
    import shutil

    return shutil.copytree(bundle, tmp_path / "bundle")


def test_round_trip(model_bundle):
    bundle = load_bundle(str(model_bundle))
    assert bundle.config == small_config()
    assert not bundle.unet.training
    tokens = bundle.generate_tokens(["a red circle", "b"], [1, 2])
    images = bundle.decode(tokens)
    assert images.shape == (2, 3, 64, 64)
    assert 0 <= images.min() <= images.max() <= 1
    again = load_bundle(str(model_bundle)).generate_tokens(["a red circle", "b"], [1, 2])
    assert torch.equal(tokens, again)


def test_a_unet_with_options_round_trips(tmp_path):
    torch.manual_seed(0)
    config, t = small_config(), torch.tensor([0.5])
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, leave_one_out=True, position_grid=16))
    text, unet = TextEncoders.create(config.text), Paella(config.unet).eval()
    torch.nn.init.normal_(unet.clf[1].weight)
    save_bundle(tmp_path / "b", config, {"unet": unet.state_dict(), "vqgan": VQModel(config.vqgan).state_dict()}, "card", text)
    loaded, tokens = load_bundle(str(tmp_path / "b")), torch.randint(32, (1, 16, 32))
    assert loaded.config == config and torch.equal(loaded.unet.positions, unet.positions)
    conditions = loaded.conditions("a red circle")
    with torch.inference_mode():
        assert torch.equal(loaded.unet(tokens, t, **conditions), unet(tokens, t, **conditions))
    half = load_bundle(str(tmp_path / "b"), dtype=torch.bfloat16)
    assert half.generate_tokens(["a red circle"], [1], size=(128, 64)).shape == (1, 16, 32)


def test_the_package_exports_the_documented_names():
    for name in ("Paella", "PaellaConfig", "VQModel", "VQConfig", "sample", "load_bundle"):
        assert hasattr(paella, name)


def test_importing_paella_does_not_import_ray():
    import subprocess
    import sys

    code = "import paella, paella.training, paella.parallel, sys; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_vqgan_alone(vqgan_bundle):
    _, digest = load_vqgan(str(vqgan_bundle))
    assert digest == state_digest(load_file(vqgan_bundle / "vqgan.safetensors"))
    with pytest.raises(ValueError, match="holds no U-Net"):
        load_bundle(str(vqgan_bundle))


def test_other_weights_than_the_config_says(model_bundle, tmp_path):
    bundle = copied(model_bundle, tmp_path)
    state = load_file(bundle / "vqgan.safetensors")
    state["out_block.0.bias"] += 1
    save_file(state, bundle / "vqgan.safetensors")
    with pytest.raises(ValueError, match=r"has digest \w{64}, but config.json says \w{64}"):
        load_bundle(str(bundle))


@pytest.mark.parametrize("damage", ["truncate", "remove", "shape", "pickle"])
def test_damaged_weights(model_bundle, tmp_path, damage):
    bundle = copied(model_bundle, tmp_path)
    file = bundle / "unet.safetensors"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "remove":
        file.unlink()
    elif damage == "shape":
        state = load_file(file)
        state["clf.1.bias"] = state["clf.1.bias"][:-1].clone()
        save_file(state, file)
    else:
        torch.save({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"unet\.safetensors cannot be loaded"):
        load_bundle(str(bundle))


def test_not_a_bundle(tmp_path):
    with pytest.raises(ValueError, match="there is no directory"):
        load_bundle(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="is not a bundle"):
        load_bundle(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(ValueError, match="bundle format 99"):
        load_bundle(str(tmp_path))


def test_bundle_from_a_uri(model_bundle):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(model_bundle) + "/", "/models/small/", recursive=True)
    bundle = load_bundle("memory://models/small")
    assert bundle.digest == load_bundle(str(model_bundle)).digest
    with pytest.raises(ValueError, match="there is nothing at"):
        local_directory("memory://models/other")


def test_bundle_on_s3(model_bundle, bucket):
    import s3fs

    uri, remote = f"{bucket}/models/small", f"{bucket.removeprefix('s3://')}/models/small"
    filesystem = s3fs.S3FileSystem()
    with pytest.raises(ValueError, match="there is nothing at"):
        load_bundle(uri)
    filesystem.put(str(model_bundle) + "/", remote + "/", recursive=True)
    bundle = load_bundle(uri)
    here = load_bundle(str(model_bundle))
    assert bundle.digest == here.digest
    assert torch.equal(bundle.generate_tokens(["a"], [1]), here.generate_tokens(["a"], [1]))
    local = local_directory(uri)
    before = (local / "unet.safetensors").stat()
    assert local_directory(uri) == local and (local / "unet.safetensors").stat() == before, "fetched again"
    filesystem.pipe_file(f"{remote}/unet.safetensors", (model_bundle / "unet.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"unet\.safetensors cannot be loaded"):
        load_bundle(uri)
    filesystem.rm_file(f"{remote}/unet.safetensors")
    with pytest.raises(ValueError, match=r"unet\.safetensors cannot be loaded"):
        load_bundle(uri)


def test_bundle_of_a_model_registry(model_bundle, tmp_path, monkeypatch):
    """From an MLflow server that keeps the artifacts itself."""
    import sys
    from pathlib import Path

    import mlflow

    from pipelines import tracking

    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    command = [
        Path(sys.executable).with_name("mlflow"), "server", "--workers", "1", "--port", str(port), "--host", "127.0.0.1",
        "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination", tmp_path / "artifacts",
    ]  # fmt: skip
    before = mlflow.get_tracking_uri()
    try:
        with running(command, f"{url}/health"):
            mlflow.set_tracking_uri(url)
            run = tracking.open_run(tmp_path, "test", {"a": 1})
            uri = tracking.finish_run(run, model_bundle, "small")
            assert uri == "models:/small@newest"
            assert load_bundle(uri).digest == load_bundle(str(model_bundle)).digest
            with pytest.raises(ValueError, match="models:/other@newest cannot be fetched"):
                load_bundle("models:/other@newest")
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.parametrize("missing", ["digests", "vqgan", "image_size"])
def test_incomplete_config(model_bundle, tmp_path, missing):
    bundle = copied(model_bundle, tmp_path)
    values = json.loads((bundle / "config.json").read_text())
    values.pop(missing)
    (bundle / "config.json").write_text(json.dumps(values))
    if missing == "image_size":
        assert load_bundle(str(bundle)).config.image_size == 256, "the published size"
        return
    with pytest.raises(ValueError, match="is incomplete"):
        load_bundle(str(bundle))
    with pytest.raises(ValueError, match="holds no VQGAN"):
        load_vqgan(str(bundle))


def test_weights_of_a_damaged_digest_load_without_verification(model_bundle, tmp_path):
    bundle = copied(model_bundle, tmp_path)
    values = json.loads((bundle / "config.json").read_text())
    values["digests"]["unet"] = "0" * 64
    (bundle / "config.json").write_text(json.dumps(values))
    assert load_bundle(str(bundle), verify=False).digest == "0" * 64


def test_outputs_appear_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), new_directory(tmp_path / "d") as directory:
        (directory / "x").write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), new_file(tmp_path / "f") as file:
        file.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_file(tmp_path / "f") as file:
        file.write_text("whole")
    assert (tmp_path / "f").read_text() == "whole"


def test_text_encoder_is_saved_in_the_hubs_format(model_bundle):
    from transformers import AutoTokenizer, T5EncoderModel

    directory = model_bundle / "encoders" / "byt5"
    assert type(AutoTokenizer.from_pretrained(directory)).__name__ == "ByT5Tokenizer"
    assert T5EncoderModel.from_pretrained(directory).config.d_model == 128


def test_byte_tokens_masks_and_truncation():
    text = TextEncoders.create(small_config().text)
    batch = text.tokenize(["ab", "x" * 500])
    assert batch.ids.shape == (2, 128)
    assert batch.ids[0, :3].tolist() == [ord("a") + 3, ord("b") + 3, 1]
    assert batch.mask.sum(1).tolist() == [3, 128]
    assert batch.truncated == (False, True)
    states = text(["ab", "a longer one"])["byt5"]
    torch.testing.assert_close(states[:1, :3], text(["ab"])["byt5"])
    assert (states[0, 3:] == 0).all()


@pytest.mark.parametrize("family", ["T5", "MT5"])
def test_any_encoder_of_the_t5_family(tmp_path, family):
    import transformers

    config = getattr(transformers, f"{family}Config")(vocab_size=384, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    saved = getattr(transformers, f"{family}EncoderModel")(config).eval()
    saved.save_pretrained(tmp_path / "encoder")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "encoder")
    text = TextEncoders.load(TextConfig(byt5="encoder"), tmp_path)
    assert type(text.byt5) is type(saved)
    batch = text.tokenize(["a red circle"])
    expected = saved(input_ids=batch.ids, attention_mask=batch.mask.long()).last_hidden_state
    assert torch.equal(text.states(batch.ids, batch.mask), expected)


def test_encoders_that_cannot_be_loaded(tmp_path):
    (tmp_path / "broken").mkdir()
    with pytest.raises(ValueError, match="the text encoder 'broken' cannot be loaded"):
        TextEncoders.load(TextConfig(byt5="broken"), tmp_path)
    with pytest.raises(ValueError, match="the CLIP model 'broken' cannot be loaded"):
        load_clip("broken", tmp_path)
    with pytest.raises(ValueError, match=r"text\.new_byt5 is not set"):
        TextEncoders.create(TextConfig())


def test_clip_through_open_clip(clip_bundle):
    """A small CLIP in open_clip's own format travels with the bundle, and reaches the U-Net by the same code as ViT-H-14."""
    loaded = load_bundle(str(clip_bundle))
    assert loaded.config.text.clip == "encoders/clip"
    conditions = loaded.text(["a red circle"])
    assert conditions["clip"].shape == (1, 64)
    tokens, t = torch.zeros(1, 16, 16, dtype=torch.long), torch.ones(1)
    with_clip = loaded.unet(tokens, t, **conditions)
    assert not torch.equal(with_clip, loaded.unet(tokens, t, **(conditions | {"clip": conditions["clip"] * 0})))
    with pytest.warns(UserWarning, match=r"1 prompt\(s\) are longer than CLIP takes"):
        loaded.prompts(["a " * 31])
    assert loaded.text.clip_truncated(["a " * 30, "a " * 31, ""]) == [False, True, False]


def test_an_empty_prompt_is_none(clip_bundle):
    bundle = load_bundle(str(clip_bundle))
    conditions = bundle.conditions("")
    assert not conditions["byt5"].any() and not conditions["clip"].any() and conditions["byt5_mask"].all()
    assert bundle.conditions("a")["clip"].any()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 0, 0), r"shape \(3, 0, 0\)"),
        ((1, 64, 64), r"shape \(1, 64, 64\)"),
        ((64, 64), r"shape \(64, 64\)"),
        ((3, 10_000, 10_001), "10001x10000 pixels, more than 50000000"),
    ],
)
def test_images_that_are_none(clip_bundle, shape, message):
    bundle, image = load_bundle(str(clip_bundle)), torch.zeros(1).expand(shape)  # expanded, so that 100 megapixels take no memory
    for look in (bundle.encode, lambda image: bundle.clip_image_embeddings([image])):
        with pytest.raises(ValueError, match=message):
            look(image)
    with pytest.raises(ValueError, match="not finite"):
        bundle.encode(torch.full((3, 64, 64), torch.nan))
