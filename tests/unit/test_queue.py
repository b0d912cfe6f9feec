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
        queue.join(Ticket(priority, arrived_s=1.0), name, 1.0)
    assert names(queue) == ["b", "d", "a", "c"]


def order(queue: Line[str], uncached: dict[str, int]) -> list[str]:
    """In which they go, all for one rank."""
    went = []
    while len(queue):
        place, first = queue.next_like(next(iter(queue))[0], lambda name: True, uncached.__getitem__)
        queue.leave(place)
        went.append(first)
    return went


@pytest.mark.parametrize(("by", "expected"), [("shortest", "urgent short long"), ("fcfs", "urgent long short")])
def test_shortest_first_counts_uncached_tokens_within_a_priority(by: str, expected: str) -> None:
    queue = line(order=by)
    uncached = {"long": 900, "short": 10, "urgent": 5000}
    for name in uncached:
        queue.join(Ticket(int(name == "urgent"), arrived_s=1.0), name, 1.0)
    assert order(queue, uncached) == expected.split()


def test_only_those_that_are_alike_go_before_one() -> None:
    queue = line()
    for name in ("a1", "b1", "a2"):
        queue.join(Ticket(0, arrived_s=1.0), name, 1.0)
    first = next(iter(queue))[0]
    uncached = {"a1": 10, "b1": 1, "a2": 5}.__getitem__
    assert queue.next_like(first, lambda name: name.startswith("a"), uncached)[1] == "a2"
    assert queue.next_like(first, lambda name: name == "a1", uncached)[1] == "a1"


@given(st.integers(0, 100_000), st.lists(st.tuples(st.floats(0, 200), st.integers(0, 100_000)), max_size=30))
def test_nobody_is_overtaken_by_those_who_come_later_than_its_tokens_take_to_age(
    tokens: int, others: list[tuple[float, int]]
) -> None:
    queue = line(ageing_tokens_per_s=1000.0)
    queue.join(Ticket(0, arrived_s=0.0), "this", 0.0)
    uncached = {"this": tokens}
    for after_s, theirs in others:
        uncached[f"{after_s}"] = theirs
        queue.join(Ticket(0, arrived_s=after_s), f"{after_s}", after_s)
    went = order(queue, uncached)
    ahead = [float(name) for name in went[: went.index("this")]]
    assert all(after_s <= tokens / 1000.0 for after_s in ahead)


def test_the_wait_is_predicted_from_the_pace_of_those_before() -> None:
    queue = line(max_waiting=4)
    places = [queue.join(Ticket(0, arrived_s=10.0), str(i), 10.0) for i in range(4)]
    assert queue.full
    assert queue.predicted_wait_s(Ticket(0, 10.0)) is None, "nobody has gone yet"
    queue.went(places[0], 12.0)
    queue.went(places[1], 14.0)
    assert queue.predicted_wait_s(Ticket(0, 14.0)) == pytest.approx(2.0 * 3)
    assert queue.predicted_wait_s(Ticket(1, 14.0)) == pytest.approx(2.0), "before those two"
    queue.leave(places[2])
    queue.leave(places[2])
    assert names(queue) == ["3"]
    queue.went(places[3], 16.0)
    queue.join(Ticket(0, 99.0), "later", 99.0)
    assert queue.predicted_wait_s(Ticket(1, 99.0)) == pytest.approx(2.0), "a time without a line is no pace"
