"""Who goes next when ranks are busy, and how long that takes: order, bound and predicted wait. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

from dynamo_ray.config import QueueConfig

T = TypeVar("T")

RIVALS = 32
"""Of those that wait for one rank, so many are looked at to find the next; bounds what that costs."""
PACE_WEIGHT = 0.1
"""Of the newest gap in the mean of the gaps between two that went."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a request's place depends on."""

    priority: int
    arrived_s: float
    stuck: int = 0
    """Busy ranks that it waits for, as a mask; 0: not known yet."""


class Place(NamedTuple):
    before: int
    """Minus the priority."""
    arrived_s: float
    number: int
    """Of its arrival."""


class Line(Generic[T]):
    """Those that wait, first to last: greater priority first, then who came first.

    Under `QueueConfig.order: shortest`, `next_like` lets others go first; it counts every second of waiting as
    `ageing_tokens_per_s` fewer tokens, so that nobody is overtaken by those who come later than its tokens over that
    rate.
    """

    def __init__(self, config: QueueConfig) -> None:
        self._config = config
        self._places: list[Place] = []
        self._items: dict[Place, T] = {}
        self._number = 0
        self._pace_s: float | None = None
        """Mean time between two that went, while there was a line."""
        self._last_s = 0.0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[tuple[Place, T]]:
        """As it is now, without those that leave meanwhile."""
        for place in tuple(self._places):
            item = self._items.get(place)
            if item is not None:
                yield place, item

    @property
    def full(self) -> bool:
        return len(self._places) >= self._config.max_waiting

    def join(self, ticket: Ticket, item: T, now_s: float) -> Place:
        if not self._places:
            self._last_s = now_s
        place = self._place(ticket)
        self._number += 1
        insort(self._places, place)
        self._items[place] = item
        return place

    def leave(self, place: Place) -> None:
        """Without having gone; whoever is not there is ignored."""
        if self._items.pop(place, None) is not None:
            del self._places[bisect_left(self._places, place)]

    def went(self, place: Place, now_s: float) -> None:
        gap_s, self._last_s = now_s - self._last_s, now_s
        self._pace_s = gap_s if self._pace_s is None else self._pace_s + PACE_WEIGHT * (gap_s - self._pace_s)
        self.leave(place)

    def next_like(self, place: Place, alike: Callable[[T], bool], uncached: Callable[[T], int]) -> tuple[Place, T]:
        """Who goes first of one that may go now and those behind it that are of its priority and `alike`.

        Args:
            uncached: how many prompt tokens one has left to compute, as of now.
        """
        first = place, self._items[place]
        if self._config.order == "fcfs":
            return first
        start = bisect_left(self._places, place)
        same = ((p, self._items[p]) for p in islice(self._places, start, None) if p.before == place.before)
        rivals = list(islice(((p, item) for p, item in same if alike(item)), RIVALS))
        if len(rivals) < 2:
            return first
        return min(rivals, key=lambda one: one[0].arrived_s + uncached(one[1]) / self._config.ageing_tokens_per_s)

    def last_behind(self, priority: int) -> tuple[Place, T] | None:
        """The last of all, if its priority is lower than that."""
        last = self._places[-1] if self._places else None
        return (last, self._items[last]) if last is not None and -last.before < priority else None

    def predicted_wait_s(self, ticket: Ticket) -> float | None:
        """For one that would join now, by the pace of those before it; None before anybody went."""
        if self._pace_s is None:
            return None
        return self._pace_s * (bisect_left(self._places, self._place(ticket)) + 1)

    def _place(self, ticket: Ticket) -> Place:
        return Place(-ticket.priority, ticket.arrived_s, self._number)
