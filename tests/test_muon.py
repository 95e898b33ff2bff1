"""Muon: the same steps as torch's own on whole matrices, and the same again on shards."""

import itertools

import pytest
import torch
from process_groups import start_group
from torch.distributed.fsdp import fully_shard

from paella.muon import Muon, orthogonalize

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}


def train(optimizer_of, shard=lambda model: model):
    """Weights of two layers, one wide and one tall, with an odd number of rows, after four steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 7, bias=False), torch.nn.Linear(7, 5, bias=False))
    shard(model)
    optimizer = optimizer_of(model.parameters())
    inputs = torch.randn(8, 6)
    for _ in range(4):
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def ours(parameters):
    return Muon(parameters, **SETTINGS)


def test_steps_equal_torchs(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # what torch's own iterates in, on a CPU as well
    theirs = train(lambda p: torch.optim.Muon(p, **SETTINGS, adjust_lr_fn="match_rms_adamw"))
    for a, b in zip(train(ours), theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def _on_shards(rank):
    for a, b in zip(train(ours, fully_shard), train(ours), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_shards_step_as_the_whole(tmp_path):
    start_group(_on_shards, 2, tmp_path)


def test_orthogonalize_and_bad_input():
    torch.manual_seed(0)
    for shape, dtype in itertools.product(((20, 30), (30, 20)), (torch.float32, torch.bfloat16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), dtype).float())
        assert values.min() > 0.5 and values.max() < 1.4
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=1.0)
