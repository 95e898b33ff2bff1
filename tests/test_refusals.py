"""Orders that are turned away at the edge: which, with what, and until when."""

import contextlib

import pytest

from serve.refusals import GROWTH_PER_S, Refusals
from serve.schemas import ApiError

FULL = ApiError(429, "queue_full", "the queue is full", retry_after_s=4)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def refusals(clock):
    return Refusals(clock)


def refused(refusals, images, model="tiny"):
    try:
        with refusals.under_way_with(model, images):
            return False
    except ApiError as error:
        assert error is not FULL and error.headers == FULL.headers and error.body == FULL.body
        return True


def filled(refusals, number, order=1):
    """So many images are under way, an engine had no room for an order of more; returns them: one that is dropped has ended."""
    images = [contextlib.ExitStack() for _ in range(number)]
    for image in images:
        image.enter_context(refusals.under_way_with("tiny", 1))
    with refusals.under_way_with("tiny", order):
        refusals.add("tiny", FULL)
    return images


def test_a_place_that_is_free_again_is_given_once(refusals):
    images = filled(refusals, 5)
    assert refused(refusals, 1)
    images.pop()
    assert refused(refusals, 2)
    with refusals.under_way_with("tiny", 1):
        assert refused(refusals, 1)
    assert not refused(refusals, 1)


def test_others_are_not_refused(refusals):
    """An order of fewer images may have room, and another model has a queue of its own."""
    images = filled(refusals, 5, order=3)
    assert not refused(refusals, 2) and not refused(refusals, 100, "small") and refused(refusals, 3)
    images.clear()
    assert not refused(refusals, 3)


def test_a_full_engine_is_asked_now_and_then(refusals, clock):
    images = filled(refusals, 50)
    for share in (0, 0.99):
        clock.now = 100 + share / (51 * GROWTH_PER_S)
        assert refused(refusals, 1)
    clock.now = 100 + 1.01 / (51 * GROWTH_PER_S)
    assert not refused(refusals, 1) and refused(refusals, 2)
    with refusals.under_way_with("tiny", 1):  # and has no room yet
        refusals.add("tiny", FULL)
    assert refused(refusals, 1)
    images.clear()
    assert not refused(refusals, 1)


def test_an_order_that_fails_leaves_its_place(refusals):
    filled(refusals, 1).clear()
    with pytest.raises(ZeroDivisionError), refusals.under_way_with("tiny", 1):
        1 / 0  # noqa: B018
    assert not refused(refusals, 1)


def test_an_ingress_that_had_nothing_under_way_is_not_shut_out(refusals, clock):
    """The engine was full of what came by another one."""
    filled(refusals, 0)
    assert refused(refusals, 1)
    clock.now = 101.01
    assert not refused(refusals, 1)
