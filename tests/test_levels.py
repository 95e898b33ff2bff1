"""Losses by noise level: running means, and what images count by them."""

import pytest
import torch

from paella.levels import LevelBalance, level_of


def moved(balance: LevelBalance, step: int, t: list[float], losses: list[float], counts: bool = True) -> float:
    """The loss of a step, after which the means have moved."""
    loss = balance(torch.tensor(t), torch.tensor(losses), 1.0).item()
    balance.update(step, counts=counts)
    return loss


def test_levels_are_equal_parts_and_all_noise_is_in_the_last():
    assert level_of(torch.tensor([0.0, 0.049, 0.05, 0.949, 0.951, 1.0]), 20).tolist() == [0, 0, 1, 18, 19, 19]


def test_an_image_counts_by_the_means_of_the_steps_before():
    balance = LevelBalance()
    assert moved(balance, 0, [0.02, 1.0, 1.0], [0.1, 3.0, 5.0]) == pytest.approx(2.7), "nothing is known yet"
    assert balance.means[[0, 19]].tolist() == pytest.approx([0.1, 4.0]) and balance.means.count_nonzero() == 2
    assert balance.weights(1.0).tolist() == pytest.approx([10 / 5.125, *[1.0] * 18, 0.25 / 5.125])
    expected = (10 / 5.125 * 0.2 + 0.25 / 5.125 * 4.0 + 2.0) / 3
    assert moved(balance, 1, [0.02, 0.96, 0.52], [0.2, 4.0, 2.0]) == pytest.approx(expected)
    assert balance.means[[0, 10, 19]].tolist() == pytest.approx([0.1 * 2 / 11 + 0.2 * 9 / 11, 2.0, 4.0])
    moved(balance, 10_000, [0.52], [3.0])
    assert balance.means[10].item() == pytest.approx(0.98 * 2.0 + 0.02 * 3.0)


def test_a_power_below_one_balances_less_and_small_means_have_a_floor():
    root = LevelBalance()
    root.means[0], root.means[19] = 1e-6, 2.0
    weights = torch.tensor([0.02**-0.5, 2.0**-0.5])
    torch.testing.assert_close(root.weights(0.5)[[0, 19]], weights / weights.mean())


def test_a_refused_step_and_a_validation_leave_the_means_as_they_are():
    balance = LevelBalance()
    moved(balance, 0, [0.5, 1.0], [1.0, 2.0])
    before = balance.means.clone()
    moved(balance, 1, [0.5, 1.0], [float("nan"), 1.0], counts=False)
    assert torch.equal(balance.means, before)
    balance.eval()
    moved(balance, 2, [0.5], [9.0])
    assert torch.equal(balance.means, before)
    balance.train()
    moved(balance, 2, [1.0], [2.0])
    assert torch.equal(balance.means, before), "nothing is left of either"
