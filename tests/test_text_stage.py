"""Captions encoded by actors beside the training workers: the encoder's states, in the run's order, whatever dies."""

import dataclasses
import itertools
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from conftest import small_config
from process_groups import without_a_cluster
from test_stored_text import encoder, settings, tokens
from test_train_resume import curve

from pipelines import train
from pipelines.byt5_columns import Byt5Columns
from pipelines.text_stage import TextStage, start_actors

__all__ = ["encoder", "settings", "tokens"]


@pytest.fixture
def beside(settings):
    """The run of test_stored_text with two actors in place of what is stored."""
    return dataclasses.replace(settings, stored_text=False, text_actors=2)


def test_states_are_the_encoders_in_order_though_an_actor_is_killed(ray_session, beside):
    actors = start_actors(beside)
    first, second = (ray.get(actor.states.remote(["a", "bc"])) for actor in actors)
    assert all(np.array_equal(*pair) for pair in zip(first, second, strict=True))
    stream = beside.token_stream()
    plain = itertools.islice(stream.batches(0, 2), 40)
    encoder = Byt5Columns(beside.model.text, "cpu")
    through = TextStage(actors, 0, 2)(stream.batches(0, 2))
    for number, (batch, encoded) in enumerate(zip(plain, through, strict=False)):
        if number == 5:
            os.kill(ray.get(actors[0].__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
        assert encoded.ids == batch.ids and np.array_equal(encoded.tokens, batch.tokens)
        expected = [states for at in (0, 2) for states in encoder.states(batch.captions[at : at + 2])]
        for ours, theirs in zip(encoded.states, expected, strict=True):
            # half a unit of float16 where the threads of the two processes round otherwise
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-5)
    assert number == 39
    for actor in actors:
        ray.kill(actor)


def test_without_actors_nothing_changes(settings):
    batches = iter([])
    assert start_actors(settings) == [] and TextStage([], 0, 1)(batches) is batches


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text_actors": -1}, "text_actors=-1 is not allowed"),
        ({"text_actors": 0, "text_accelerator": "L4"}, "text_accelerator='L4' is not allowed without text_actors"),
        ({"stored_text": True}, "text_actors=2 is not allowed with stored_text"),
        ({"model": small_config()}, "this model trains its own text encoder"),
    ],
)
def test_what_does_not_go_together(beside, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(beside, **changes)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_with_the_encoder_on_another_kind_of_node(beside, settings, monkeypatch):
    """Two nodes, of which the second has "L4": the curve is that of the same run with stored states, up to float16."""
    from ray.cluster_utils import Cluster

    with without_a_cluster(train):
        train.run(settings)
    node = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"num_cpus": 2, "include_dashboard": False})
    other = cluster.add_node(**node, num_cpus=1, resources={"accelerator_type:L4": 1})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    nodes = []

    def noted(config):
        actors = start_actors(config)
        where = [actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for actor in actors]
        nodes.extend(ray.get(where))
        return actors

    monkeypatch.setattr(train, "start_actors", noted)
    output = settings.output + "-beside"
    try:
        train.run(dataclasses.replace(beside, text_actors=1, text_accelerator="L4", output=output))
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert nodes == [other.node_id]
    for name in ("loss", "validation_loss"):
        ours, theirs = (last(path, name) for path in (output, settings.output))
        assert ours == pytest.approx(theirs, abs=2e-3)
        assert torch.isfinite(torch.tensor(ours))


def last(output: str, name: str) -> float:
    found = curve(Path(output), name)
    return found[max(found)]
