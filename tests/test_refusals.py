"""Orders that are turned away at the edge: which, with what, and for how long."""

import pytest

from serve.refusals import Refusals
from serve.schemas import ApiError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("wait_s", "lasts_s"), [(4.0, 0.4), (600.0, 1.0), (None, 0.0)])
def test_a_full_engine_is_left_alone_for_a_tenth_of_its_work(wait_s, lasts_s):
    clock = Clock()
    refusals, error = Refusals(clock), ApiError(429, "queue_full", "the queue is full", retry_after_s=wait_s)
    assert refusals.of("tiny", 1) is None
    refusals.add("tiny", 2, error)
    for after, refused in ((0.99 * lasts_s, lasts_s > 0), (1.01 * lasts_s, False)):
        clock.now = 100.0 + after
        for images in (2, 10):
            answer = refusals.of("tiny", images)
            assert (answer is not None) == refused
            assert answer is None or (answer is not error and answer.headers == error.headers and answer.body == error.body)


def test_others_are_not_refused():
    """An order of fewer images may have room, and another model has a queue of its own."""
    refusals = Refusals(Clock())
    refusals.add("tiny", 3, ApiError(429, "queue_full", "the queue is full", retry_after_s=5))
    assert refusals.of("tiny", 2) is None and refusals.of("small", 3) is None and refusals.of("tiny", 3) is not None
