"""A step with own draws, balanced and stratified noise levels: the same on any number of workers and over a resume."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from process_groups import said, start_group
from test_parallel import CAPTIONS, new_model, small_training, tokens_of

from paella import parallel
from paella.checkpoint import TrainingState
from paella.ema import Ema
from paella.levels import LevelBalance
from paella.parallel import ParallelConfig, mean_over_workers, shard
from paella.training import NoiseConfig
from pipelines.recovery import Guard, RecoveryConfig
from pipelines.token_dataset import TokenBatch
from pipelines.train_config import TrainConfig
from pipelines.train_step import train_step

OPTIONS = {"balance": 0.5, "own_draws": 0.5, "stratified": True}
WAYS = {"parts": ParallelConfig(accumulate=2, reshard_after_forward=False, loss_chunk=100), "given back": ParallelConfig()}
STEPS, SAVED_AT, REFUSED = 6, 4, 2


def training(way: str = "parts", **options) -> TrainConfig:
    plain = small_training(WAYS[way], num_workers=2)
    return dataclasses.replace(plain, noise=NoiseConfig(**options))


class Run:
    """A model and what trains it, on this worker."""

    def __init__(self, config: TrainConfig, rank: int, num_workers: int) -> None:
        parallel.MIN_UNIT_PARAMETERS, parallel.MAX_UNITS = 0, 3  # units of several blocks, as in the large model
        self.config, self.model, size = config, new_model(config), 8 // num_workers
        self.mine, self.guard = slice(size * rank, size * rank + size), Guard(RecoveryConfig())
        if config.noise.balance:
            self.model.balance = LevelBalance()
        shard(self.model, torch.float32, config.parallel)
        self.optimizers, self.ema = config.optim.optimizers(self.model), Ema(self.model, 0.9)
        self.state = TrainingState(self.model, self.optimizers, self.ema)

    def step(self, step: int) -> float:
        """The loss over all workers; once, a gradient is no number."""
        if step == REFUSED:
            parameter = next(p for p in self.model.parameters() if p.requires_grad)
            parameter.grad = torch.full_like(parameter, float("nan"))
        captions = CAPTIONS[self.mine]
        batch = TokenBatch(tokens_of(step)[self.mine].numpy().astype(np.int64), captions, [""] * len(captions))
        sums, *_ = train_step(self.model, self.optimizers, self.config, step, batch, torch.device("cpu"), self.guard)
        self.ema.update(self.model, step)
        return mean_over_workers(sums)[1].item()


def _whole(rank: int, number: int, root: Path) -> None:
    """Curves of whole runs, in both ways and without options; a checkpoint on the way; what is known of the levels at the end."""
    found = {}
    for way in WAYS:
        run, curve = Run(training(way, **OPTIONS), rank, number), []
        for step in range(STEPS):
            if way == "parts" and number == 2 and step == SAVED_AT:
                run.state.save(root / "checkpoint").result()
            before = run.model.balance.means.clone()
            curve.append(run.step(step))
            assert torch.equal(run.model.balance.means, before) == (step == REFUSED)
        found[way] = curve, run.model.balance.means
    plain = Run(training(), rank, number)
    assert "balance.means" not in plain.model.state_dict()
    found["plain"] = [plain.step(step) for step in range(STEPS)], None
    torch.save(found, root / f"{number}-{rank}.pt")


def _resumed(rank: int, number: int, root: Path) -> None:
    run = Run(training(**OPTIONS), rank, number)
    run.state.load(str(root / "checkpoint"))
    assert run.model.balance.means.count_nonzero() > 10
    curve = [run.step(step) for step in range(SAVED_AT, STEPS)]
    torch.save((curve, run.model.balance.means), root / f"resumed-{number}-{rank}.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    for number in (1, 2):
        start_group(_whole, number, root, number, root)
    return root


def test_one_and_two_workers_learn_alike(whole):
    alone, first, second = (torch.load(whole / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for way in WAYS:
        (curve, means), (expected, expected_means) = first[way], alone[way]
        assert curve == pytest.approx(expected, abs=1e-5), way
        torch.testing.assert_close(means, expected_means, atol=1e-5, rtol=0)
        assert torch.equal(means, second[way][1]), "workers never disagree"
    assert alone["parts"][0] != pytest.approx(alone["plain"][0], abs=1e-2), "the options do something"
    assert "skip" in said(whole), "there was a bad step"


@pytest.mark.parametrize("number", [1, 2])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(whole, number):
    start_group(_resumed, number, whole, number, whole)
    curve, means = torch.load(whole / f"resumed-{number}-0.pt")
    expected, expected_means = torch.load(whole / "2-0.pt")["parts"]
    assert curve == pytest.approx(expected[SAVED_AT:], abs=1e-5)
    torch.testing.assert_close(means, expected_means, atol=1e-5, rtol=0)
