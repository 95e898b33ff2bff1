"""Checkpoints of two workers: whole or not at all, the newest intact one found, on disks that fill up and in object stores."""

import os
import resource
import time

import torch
import torch.distributed as dist
from process_groups import said, start_group
from torch import nn

from paella.checkpoint import TrainingState
from paella.ema import Ema
from paella.parallel import full_state_dict, shard
from pipelines.checkpoints import Checkpoints
from pipelines.recovery import Guard, RecoveryConfig, Vote
from pipelines.watchdog import EXIT_CODE, Watchdog


def make(value: float, outputs: int = 8) -> tuple[nn.Module, TrainingState]:
    """A sharded model whose weights, averages and optimizer state are all told by one number."""
    model = nn.Linear(64, outputs, bias=False)
    model.weight.data.fill_(value)
    shard(model, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    return model, TrainingState(model, [optimizer], Ema(model, 0.9))


def value_of(model: nn.Module) -> float:
    return full_state_dict(model).get("weight", torch.zeros(1)).flatten()[0].item()


def _save_and_damage(rank: int, uri: str) -> None:
    store = Checkpoints(uri, keep=2)
    assert store.load(make(0.0)[1]) is None
    for step in (10, 20, 30, 40):
        store.save(make(float(step))[1], step, {"note": step, "score": {10: 0.5, 30: 0.7}.get(step)})
        store.wait()
    assert store._agreed(store._steps) == [40, 30, 10], "the newest two, and the best"
    assert store.load(make(0.0)[1])["progress"] == {"note": 40, "score": None}
    if rank == 0:  # a byte of the newest goes wrong
        path = f"{store.root}/step-00000040/__1_0.distcp"
        with store.filesystem.open_input_stream(path) as stream:
            content = bytearray(stream.read())
        content[len(content) // 2] ^= 1
        with store.filesystem.open_output_stream(path) as stream:
            stream.write(bytes(content))
    dist.barrier()
    model, state = make(0.0)
    assert store.load(state)["step"] == 30
    weight = value_of(model)
    assert rank or weight == 30
    store.save(state, 40, {"note": "again"})
    store.wait()
    assert store.load(state)["progress"] == {"note": "again"}
    if rank == 0:  # killed before it was finished, and lost
        store.filesystem.delete_file(f"{store.root}/step-00000040/manifest.json")
        store.filesystem.delete_file(f"{store.root}/step-00000030/.metadata")
    dist.barrier()
    assert store.load(state)["step"] == 10


def _save_two_models_in_turn(rank: int, directory: str) -> None:
    for step, outputs in enumerate((8, 16, 16, 8)):  # what is agreed on of one is not right for the other
        store = Checkpoints(f"{directory}/{outputs}", keep=9)
        store.save(make(float(step), outputs)[1], step, {})
        store.wait()
        model, state = make(-1.0, outputs)
        assert store.load(state)["step"] == step
        weight = value_of(model)
        assert rank or weight == step


def test_two_models_of_one_process(tmp_path):
    start_group(_save_two_models_in_turn, 2, tmp_path, str(tmp_path))


def _load_alone(rank: int, uri: str) -> None:
    model, state = make(0.0)
    assert Checkpoints(uri, keep=2).load(state)["step"] == 10
    assert value_of(model) == 10


def test_the_newest_intact_checkpoint_is_found_again_on_any_number_of_workers(tmp_path):
    start_group(_save_and_damage, 2, tmp_path, str(tmp_path / "checkpoints"))
    assert "the checkpoint of step 40 is damaged (__1_0.distcp is not what was written); falling back" in said(tmp_path)
    assert "the checkpoint of step 40 is damaged (its manifest.json cannot be read)" in said(tmp_path)
    assert "the checkpoint of step 30 is damaged (.metadata is missing)" in said(tmp_path)
    start_group(_load_alone, 1, tmp_path, str(tmp_path / "checkpoints"))


def test_checkpoints_in_an_object_store(tmp_path, bucket):
    start_group(_save_and_damage, 2, tmp_path, f"{bucket}/run/checkpoints")
    assert "is not what was written" in said(tmp_path)
    start_group(_load_alone, 1, tmp_path, f"{bucket}/run/checkpoints")


def _fill_the_disk(rank: int, uri: str) -> None:
    store = Checkpoints(uri, keep=1)
    state = make(10.0)[1]
    store.save(state, 10, {})
    store.wait()
    if rank == 1:  # no file may grow above this, as on a disk without room
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    store.save(make(20.0)[1], 20, {})
    store.wait()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert store._agreed(store._steps) == [10], "nothing half written takes room"
    assert store.load(state)["step"] == 10
    store.save(state, 30, {})
    assert store.load(state)["step"] == 30


def test_a_full_disk_leaves_the_last_checkpoint_and_training_goes_on(tmp_path):
    start_group(_fill_the_disk, 2, tmp_path, str(tmp_path / "checkpoints"))
    assert "the checkpoint of step 20 could not be written (rank 1: " in said(tmp_path)
    assert "that of step 10 is intact; training goes on" in said(tmp_path)


def _vote_and_guard(rank: int) -> None:
    vote = Vote()
    assert [vote(2 * (rank == 1 and step == 2)) for step in range(5)] == [0, 0, 0, 2, 0]
    assert vote.finish() == 0
    guard = Guard(RecoveryConfig(spike=3, max_bad_steps=2))
    assert all(guard.allows(1.0, 1.0) for _ in range(16))
    assert not guard.allows(1.0, 3.1) and guard.end is None
    assert guard.allows(1.0, 2.9)
    assert not guard.allows(float("nan"), 1.0) and guard.end is None
    again = Guard(RecoveryConfig(spike=3))
    again.restore(guard.progress())
    assert again.progress() == guard.progress()
    assert not guard.allows(1.0, float("inf")) and guard.end is not None
    stopping = Guard(RecoveryConfig(on_bad_step="stop"))
    assert not stopping.allows(float("inf"), 1.0) and "not finite" in str(stopping.end)
    back = Guard(RecoveryConfig(on_bad_step="rollback"))
    assert not back.allows(float("inf"), 1.0) and back.rollback


def test_workers_agree_on_what_to_do_and_on_what_is_a_bad_step(tmp_path):
    start_group(_vote_and_guard, 2, tmp_path)
    assert "WARNING: the loss has jumped to 3.1, from a median of 1: skip" in said(tmp_path)


def _get_stuck(rank: int) -> None:
    dog = Watchdog(stuck_after_s=3, every_s=0.2)
    dog.at(8, "training")
    dist.barrier()
    if rank == 1:
        dog.at(8, "reading data")
        time.sleep(60)
    dist.barrier()


def test_a_stuck_worker_is_named(tmp_path):
    context = start_group(_get_stuck, 2, tmp_path, join=False)
    deadline = time.monotonic() + 60
    while any(process.is_alive() for process in context.processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert context.processes[1].exitcode == EXIT_CODE
    assert context.processes[0].exitcode in (EXIT_CODE, 1), "it may find that the other is gone while it tells us"
    assert "no step has been finished for 3 s: " in said(tmp_path)
    assert f"rank 1 ({os.uname().nodename}, process {context.processes[1].pid}) did not arrive" in said(tmp_path)
    assert "step 8, reading data" in said(tmp_path) and "rank 0 (" not in said(tmp_path)
