"""Who goes next when every rank is busy, and how long that takes: order, bound and predicted wait. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from dynamo_ray.config import QueueConfig

T = TypeVar("T")

PACE_WEIGHT = 0.1
"""Of the newest gap in the mean of the gaps between two that went."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a request's place depends on."""

    priority: int
    uncached_tokens: int
    """Prompt tokens that no rank it may use has cached, when it came."""
    arrived_s: float


class _Place(NamedTuple):
    before: int
    """Minus the priority."""
    rank: float
    number: int
    """Of its arrival."""


class Line(Generic[T]):
    """Those that wait, first to last: greater priority first, then as `QueueConfig.order` says.

    `shortest` counts every second of waiting as `ageing_tokens_per_s` fewer tokens. All age alike, so that a place is
    fixed on arrival, and nobody is overtaken by those who come later than its tokens over that rate.
    """

    def __init__(self, config: QueueConfig) -> None:
        self._config = config
        self._places: list[_Place] = []
        self._items: dict[_Place, T] = {}
        self._number = 0
        self._pace_s: float | None = None
        """Mean time between two that went, while there was a line."""
        self._last_s = 0.0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[tuple[_Place, T]]:
        """As it is now, without those that leave meanwhile."""
        for place in tuple(self._places):
            item = self._items.get(place)
            if item is not None:
                yield place, item

    @property
    def full(self) -> bool:
        return len(self._places) >= self._config.max_waiting

    def join(self, ticket: Ticket, item: T, now_s: float) -> _Place:
        if not self._places:
            self._last_s = now_s
        place = self._place(ticket)
        self._number += 1
        insort(self._places, place)
        self._items[place] = item
        return place

    def leave(self, place: _Place) -> None:
        """Without having gone; whoever is not there is ignored."""
        if self._items.pop(place, None) is not None:
            del self._places[bisect_left(self._places, place)]

    def went(self, place: _Place, now_s: float) -> None:
        gap_s, self._last_s = now_s - self._last_s, now_s
        self._pace_s = gap_s if self._pace_s is None else self._pace_s + PACE_WEIGHT * (gap_s - self._pace_s)
        self.leave(place)

    def last_behind(self, priority: int) -> tuple[_Place, T] | None:
        """The last of all, if its priority is lower than that."""
        last = self._places[-1] if self._places else None
        return (last, self._items[last]) if last is not None and -last.before < priority else None

    def predicted_wait_s(self, ticket: Ticket) -> float | None:
        """For one that would join now, by the pace of those before it; None before anybody went."""
        if self._pace_s is None:
            return None
        return self._pace_s * (bisect_left(self._places, self._place(ticket)) + 1)

    def _place(self, ticket: Ticket) -> _Place:
        rank = ticket.arrived_s
        if self._config.order == "shortest":
            rank += ticket.uncached_tokens / self._config.ageing_tokens_per_s
        return _Place(-ticket.priority, rank, self._number)
