"""Who goes next, and how long it takes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_ray.config import QueueConfig
from dynamo_ray.request.queue import Line, Ticket


def line(**options: Any) -> Line[str]:
    return Line(QueueConfig(**options))


def names(queue: Line[str]) -> list[str]:
    return [name for _, name in queue]


def test_greater_priority_first_then_arrival() -> None:
    queue = line()
    for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 5)):
        queue.join(Ticket(priority, 10, arrived_s=1.0), name, 1.0)
    assert names(queue) == ["b", "d", "a", "c"]


def test_shortest_first_counts_uncached_tokens_within_a_priority() -> None:
    queue = line(order="shortest")
    for name, priority, tokens in (("long", 0, 900), ("short", 0, 10), ("urgent", 1, 5000)):
        queue.join(Ticket(priority, tokens, arrived_s=1.0), name, 1.0)
    assert names(queue) == ["urgent", "short", "long"]


@given(st.integers(0, 100_000), st.lists(st.tuples(st.floats(0, 200), st.integers(0, 100_000)), max_size=30))
def test_nobody_is_overtaken_by_those_who_come_later_than_its_tokens_take_to_age(
    tokens: int, others: list[tuple[float, int]]
) -> None:
    queue = line(order="shortest", ageing_tokens_per_s=1000.0)
    queue.join(Ticket(0, tokens, arrived_s=0.0), "this", 0.0)
    for after_s, theirs in others:
        queue.join(Ticket(0, theirs, arrived_s=after_s), f"{after_s}", after_s)
    order = names(queue)
    ahead = [float(name) for name in order[: order.index("this")]]
    assert all(after_s <= tokens / 1000.0 for after_s in ahead)


def test_the_wait_is_predicted_from_the_pace_of_those_before() -> None:
    queue = line(max_waiting=4)
    places = [queue.join(Ticket(0, 1, arrived_s=10.0), str(i), 10.0) for i in range(4)]
    assert queue.full
    assert queue.predicted_wait_s(Ticket(0, 1, 10.0)) is None, "nobody has gone yet"
    queue.went(places[0], 12.0)
    queue.went(places[1], 14.0)
    assert queue.predicted_wait_s(Ticket(0, 1, 14.0)) == pytest.approx(2.0 * 3)
    assert queue.predicted_wait_s(Ticket(1, 1, 14.0)) == pytest.approx(2.0), "before those two"
    queue.leave(places[2])
    queue.leave(places[2])
    assert names(queue) == ["3"]
    queue.went(places[3], 16.0)
    queue.join(Ticket(0, 1, 99.0), "later", 99.0)
    assert queue.predicted_wait_s(Ticket(1, 1, 99.0)) == pytest.approx(2.0), "a time without a line is no pace"
