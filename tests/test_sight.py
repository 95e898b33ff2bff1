"""What an operator sees: counted arithmetic and utilisation; rows that training never reads."""

import time

import pytest
import torch
from conftest import small_config

from paella.config import PRESETS
from paella.flops import matrix_rate, peak_flops, training_flops
from pipelines.held_out import split_rows
from pipelines.sight import Utilisation, steps_of


def test_flops_are_those_of_the_matrices():
    """`tiny` against its products summed by hand."""
    c = PRESETS["tiny"].unet
    by_hand = 0
    for level, width in enumerate(c.c_hidden):
        positions = (16 // 2**level) ** 2
        mlp = 2 * positions * width * 4 * width * 2
        keys = 2 * 77 * (c.c_cond * width + width * 2 * width)
        attention = 2 * positions * width * width * 2 + keys + 2 * 2 * positions * 77 * width
        by_hand += 2 * (mlp + attention)  # on the way down and up
    by_hand += 2 * 256 * (c.c_in * c.c_hidden[0] * 2 + c.c_out * c.num_labels) + 2 * 2 * 64 * c.c_hidden[0] * c.c_hidden[1] * 4
    by_hand += 2 * 77 * c.byt5_embd * c.c_cond
    assert training_flops(PRESETS["tiny"]) / 3 == pytest.approx(by_hand, rel=0.03)  # convolutions and noise levels are small
    assert peak_flops(torch.device("cpu"), torch.float32) == pytest.approx(matrix_rate(torch.float32), rel=0.9)


def test_utilisation_counts_waiting_and_steps():
    def slow():
        for number in range(4):
            time.sleep(0.02)
            yield number

    use = Utilisation(small_config(), torch.device("cpu"), torch.float32, 2)
    for _ in use.watched(slow()):
        time.sleep(0.005)
    first = use.metrics(images_per_s=10.0)
    assert 0.4 < first["data_wait"] <= 1
    assert first["tflops_per_worker"] == pytest.approx(5 * use.flops_per_image / 1e12)
    assert first["mfu"] == pytest.approx(5 * use.flops_per_image / use.peak)
    assert 0.02 < first["step_s"] <= first["slowest_step_s"]
    assert 0.05 < first["memory_gb"] < 50
    assert use.metrics(1.0)["data_wait"] == 0


@pytest.mark.parametrize("wrong", ["3", "5:2", "a:b", "1:2:3"])
def test_windows_of_a_trace(wrong):
    assert steps_of("10:20") == (10, 20)
    with pytest.raises(ValueError, match="profile="):
        steps_of(wrong)


@pytest.mark.parametrize(
    "shards, wanted, expected", [([100] * 40, 64, 64), ([1024] * 9 + [784], 128, 128), ([96], 100, 4), ([7], 5, 0)]
)
def test_rows_are_held_out_from_the_ends_of_some_shards(shards, wanted, expected):
    named = [(f"part-{i}", rows) for i, rows in enumerate(shards)]
    kept, pieces = split_rows(named, wanted)
    assert sum(end - first for _, first, end in pieces) == expected
    assert sum(rows for _, rows in kept) == sum(shards) - expected
    for shard, first, end in pieces:
        assert (kept[shard][1], shards[shard]) == (first, end), "training reads up to where the held-out rows begin"
    assert len({shard for shard, _, _ in pieces}) == min(len(shards), 16, expected)
    assert split_rows(named, 0) == (named, [])
