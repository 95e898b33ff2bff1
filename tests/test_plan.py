"""Plans: what is counted against what PyTorch does, layouts that fit, and the tables that the README shows."""

import dataclasses

import pytest
import torch
import yaml
from conftest import ROOT, assert_one_sentence, small_config
from test_cluster import CLUSTER, parsed

from paella import memory
from paella.config import PRESETS
from paella.parallel import ParallelConfig, count_parameters
from paella.training import TextToTokens
from paella.unet import Paella
from pipelines import plan, plan_tables
from pipelines.gloo_rates import gloo_rates


def kept_by(unet: Paella, images: int) -> int:
    """Bytes of what autograd keeps in a real pass, by the storages' addresses."""
    side, storages = PRESETS["tiny"].image_size // PRESETS["tiny"].vqgan.downsampling, {}
    weights = {value.untyped_storage().data_ptr() for value in unet.parameters()}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        out = unet.features(
            torch.zeros(images, side, side, dtype=torch.long),
            torch.ones(images),
            byt5=torch.zeros(images, memory.TEXT_TOKENS, unet.config.byt5_embd),
            byt5_mask=torch.ones(images, memory.TEXT_TOKENS, dtype=torch.bool),
        )
    assert out.requires_grad
    return sum(storage.nbytes() for address, storage in storages.items() if address not in weights)


def test_counted_activations_are_those_of_a_real_pass():
    unet = dataclasses.replace(PRESETS["tiny"].unet, self_attn=True, leave_one_out=True, position_grid=8)  # stretched to 16
    config = dataclasses.replace(PRESETS["tiny"], unet=unet)
    unet = Paella(config.unet)
    text = memory._kept_of_text(config, torch.float32)
    counted = memory.kept(config, torch.float32).activations - text
    assert kept_by(unet, 2) == pytest.approx(2 * counted, rel=0.02)


def test_counted_parameters_are_the_models():
    config = small_config()
    size = memory.sizes(config)
    assert size.trained == count_parameters(TextToTokens(config)) and size.frozen == 0
    assert memory.sizes(PRESETS["paella-1b"]).trained == 1_008_350_592


def test_memory_is_traded():
    config, keeps = PRESETS["tiny"], memory.kept(PRESETS["tiny"], torch.float32)
    assert keeps.recomputed < keeps.activations
    assert memory.kept(config, torch.bfloat16, "cuda").activations < keeps.activations / 2, "no scores are kept on GPUs"

    def total(images: int = 8, num_shards: int = 1, **parallel) -> float:
        return memory.worker_memory(
            config, images, torch.float32, num_shards=num_shards, parallel=ParallelConfig(**parallel)
        ).total

    assert total(num_shards=4) < total() < total(images=16)
    assert total(activation_checkpointing=True) < total()
    assert total(loss_chunk=256) < total()


def test_a_plan_fits_or_says_so():
    config = plan.presets()["tiny"]
    config = dataclasses.replace(config, gpu="L4", gpu_memory_gb=4.0, num_gpus=1)
    found = plan.layout(config)
    assert found.memory.total <= 0.9 * 4e9
    assert found.images * found.parallel.accumulate == config.global_batch_size
    smaller = plan.layout(dataclasses.replace(config, gpu_memory_gb=3.6))
    assert smaller.parallel.accumulate > found.parallel.accumulate
    with pytest.raises(ValueError, match="cannot train this model"):
        plan.plan(dataclasses.replace(config, gpu_memory_gb=1.0))


def test_hours_follow_from_arithmetic():
    config = dataclasses.replace(plan.presets()["tiny"], gpu="A100", num_gpus=2, mfu=0.5, gpu_hour=3.0)
    numbers = plan.plan(config)
    flops = plan.unet_flops(config.model) + plan.text_flops(config.model)
    assert numbers["images_per_s"] == pytest.approx(2 * 0.5 * 312e12 / flops)
    assert numbers["train_hours"] == pytest.approx(1400 * 64 / numbers["images_per_s"] / 3600)
    assert numbers["train_cost"] == pytest.approx(numbers["train_hours"] * 2 * 3.0)
    assert numbers["tokens_bytes"] == config.images * (2 * 16 * 16 + plan.ROW_BYTES)


def test_workers_on_cpus_share_cores_and_exchange_weights(monkeypatch):
    monkeypatch.setattr(plan, "timed", lambda model, optim, images, threads: (images / (10 * threads), 0.5))
    monkeypatch.setattr(plan.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(plan, "copy_rate", lambda: 1e9)
    monkeypatch.setattr(plan, "gloo_rates", lambda: (0.5e9, 0.25e9))
    monkeypatch.setattr(plan, "compute_dtype", lambda *_: torch.bfloat16)
    config = dataclasses.replace(plan.presets()["tiny"], gpu="cpu", num_gpus=1, global_batch_size=64)
    weights = 4 * memory.sizes(config.model).trained
    for reshard, gathers, in_four in ((False, 1, 2), (True, 2, 9)):  # gradients are exchanged once a step, kept weights too
        parallel = dataclasses.replace(config.parallel, reshard_after_forward=reshard)
        one = dataclasses.replace(config, parallel=parallel)
        assert plan.cpu_rate(one, 16) == pytest.approx(64 / (64 / 20 + (4 * 4 + in_four) * weights / 1e9 + 0.5))
        two, exchanged = dataclasses.replace(one, num_gpus=2), weights / 2 * (gathers / 2 / 0.5e9 + 1 / 0.25e9)
        assert plan.cpu_rate(two, 32) == pytest.approx(64 / (32 / 10 + exchanged + 4 * weights / 1e9 + 0.5))
    four = dataclasses.replace(config, num_gpus=4)
    assert plan.cpu_rate(four, 16) < plan.cpu_rate(dataclasses.replace(config, num_gpus=2), 16), "more workers than cores"


def test_this_machine_exchanges_something():
    assert all(1e6 < rate < 1e12 for rate in gloo_rates())


def test_the_readme_has_these_tables():
    first, last = plan_tables.MARKS
    text = (ROOT / "cluster" / "README.md").read_text()
    assert text.split(first)[1].split(last)[0].strip() == plan_tables.tables()


@pytest.mark.parametrize("overlay", ["a100-node", "a100-16x8"])
def test_what_the_manifests_train_fits(overlay):
    """By the same arithmetic, in the 80 GB of their GPUs."""
    patches = yaml.safe_load((CLUSTER / "overlays" / overlay / "kustomization.yaml").read_text())["patches"]
    (patch,) = (patch["patch"] for patch in patches if patch["target"].get("name") == "train")
    config = parsed(yaml.safe_load(patch)[0]["value"])
    used = memory.worker_memory(
        config.model,
        config.global_batch_size // config.num_workers // config.parallel.accumulate,
        torch.bfloat16,
        num_shards=config.parallel.shard_group_size or config.num_workers,
        parallel=config.parallel,
        device="cuda",
    )
    assert 20e9 < used.total < plan.HEADROOM * 80e9


@pytest.mark.parametrize(
    "flags, words",
    [
        (("tiny", "--gpu", "A1000"), ("gpu='A1000'", "A100")),
        (("tiny", "--num-gpus", "7"), ("global_batch_size=64", "num_gpus=7")),
        (("huge",), ("no preset", "tiny, small, paella-1b")),
    ],
)
def test_bad_plans(program, flags, words):
    assert_one_sentence(program("plan", *flags), *words)
