"""What an ingress does with a request until its ranks are chosen, as `request/router.py` does it on an event loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from backends.engine import RankLoad, Role
from dynamo_ray.config import DeploymentConfig, QueueConfig
from dynamo_ray.request.occupancy import Occupancy
from dynamo_ray.request.queue import Line, Place, Ticket
from dynamo_ray.request.selection import Selection
from dynamo_ray.request.wish import Wish
from dynamo_ray.routing.chooser import Booked, Choice, Chooser, WorkerFacts
from dynamo_ray.routing.policy import Ask
from dynamo_ray.routing.ranks import Holder
from dynamo_ray.simulator.traces import TraceRequest


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as it comes to the ingress."""

    number: int
    asked: TraceRequest
    ask: Ask
    wish: Wish


@dataclass(frozen=True, slots=True)
class Placed:
    arrival: Arrival
    choice: Choice
    booked: Booked


class Router:
    """The ingress's chooser, line and occupancy. Every request may use every rank, nobody leaves, and no worker dies.

    As in `request/waiting.py`, nobody takes a rank that somebody before it in the line waits for.
    """

    def __init__(self, config: DeploymentConfig) -> None:
        """Raises ValueError when the configuration names no policy."""
        self.chooser = Chooser(config.model.name, config.router)
        self._selection = Selection(self.chooser, config.router.prefill_on_decode)
        self._held = config.router.queue is not None
        queue = config.router.queue or QueueConfig()
        self._line: Line[Arrival] = Line(queue)
        self._occupancy = Occupancy.of(queue, config.limits, self.chooser.ranks, self.chooser.table)
        self._masks = dict.fromkeys(Role, 0)
        self._waits = self.chooser.policy.waits
        self.num_refused = 0
        """Requests that came while the line was full."""
        self.decision_cpu_s = 0.0
        """Choosing and booking, all requests together."""

    @property
    def any_waits(self) -> bool:
        return bool(self._line)

    def up(self, facts: WorkerFacts) -> None:
        self.chooser.up(facts)
        self._occupancy.up(facts)
        self._masks[facts.role] |= self.chooser.mask(facts.name)

    def heard(self, holder: Holder, load: RankLoad, now_s: float) -> None:
        self.chooser.heard(holder, load)
        self._occupancy.heard(holder, load, now_s)

    def enter(self, arrival: Arrival, now_s: float) -> Placed | None:
        """Where it goes at once, booked; None: it waits, or was refused and counted."""
        placed = None if self._line else self._go(arrival, 0, now_s)
        if placed is None and self._line.full:
            arrival.wish.free()
            self.num_refused += 1
        elif placed is None:
            self._line.join(self._ticket(arrival, now_s), arrival, now_s)
        return placed

    def leaving(self, now_s: float) -> Iterator[Placed]:
        """Those that wait and can go now, in their order, booked one after the other."""
        kept = 0
        for place, arrival in self._line:
            while not arrival.wish.stuck or arrival.wish.stuck & ~kept:
                at, first = self._next(place, arrival, kept, now_s)
                placed = self._go(first, kept, now_s)
                if placed is None:
                    kept |= first.wish.stuck
                    continue
                self._line.went(at, now_s)
                yield placed
                if first is arrival:
                    break
            if not all(mask & ~kept for mask in self._needed):
                return

    def _next(self, place: Place, arrival: Arrival, kept: int, now_s: float) -> tuple[Place, Arrival]:
        """Who is to be asked in this one's turn: itself, or one that waits for the same and goes first."""
        stuck = arrival.wish.stuck
        if not stuck & ~kept & ~self._occupancy.busy(0):
            return place, arrival
        began_s = time.thread_time()
        found = self._line.next_like(
            place, lambda other: other.wish.stuck in (stuck, 0), lambda other: other.wish.uncached(other.ask, now_s)
        )
        self.decision_cpu_s += time.thread_time() - began_s
        return found

    def _ticket(self, arrival: Arrival, now_s: float) -> Ticket:
        began_s = time.thread_time()
        if not self._waits:
            arrival.wish.uncached_tokens = self._best(arrival.ask, now_s, *self._roles).uncached_tokens
        else:
            busy = self._occupancy.busy(len(arrival.ask.token_ids))
            able = self._occupancy.able(*self._roles, busy)
            arrival.wish.hold(partial(self._best, arrival.ask, now_s), *able, busy)
        self.decision_cpu_s += time.thread_time() - began_s
        return Ticket(0, now_s)

    def _go(self, arrival: Arrival, kept: int, now_s: float) -> Placed | None:
        began_s = time.thread_time()
        busy = kept | self._occupancy.busy(len(arrival.ask.token_ids)) if self._held else 0
        able = self._occupancy.able(*self._roles, busy)
        if self._waits:
            choice = arrival.wish.seek(partial(self._best, arrival.ask, now_s), *able, busy)
        else:
            is_short = partial(self._is_short, arrival.ask, now_s)
            found = self._selection.free(arrival.ask, *able, busy, is_short, now_s)
            choice = None if isinstance(found, int) else found
            arrival.wish.stuck = found if isinstance(found, int) else 0
        placed = None if choice is None else Placed(arrival, choice, self.chooser.book(choice, now_s))
        self.decision_cpu_s += time.thread_time() - began_s
        return placed

    @property
    def _roles(self) -> tuple[int | None, int]:
        """Masks of the prefill ranks and of those that decode."""
        return self._masks[Role.PREFILL] or None, self._masks[Role.AGGREGATED] or self._masks[Role.DECODE]

    @property
    def _needed(self) -> list[int]:
        """Masks of the roles that every request needs."""
        prefill, decode = self._roles
        return [decode] if prefill is None or self._selection.short is not None else [prefill, decode]

    def _best(self, ask: Ask, now_s: float, prefill: int | None, decode: int) -> Choice:
        choice = self._selection.best(ask, prefill, decode, now_s)
        assert choice is not None, "no worker dies"
        return choice

    def _is_short(self, ask: Ask, now_s: float, prefill_lives: bool) -> bool:
        return self._selection.alone(ask, self._roles[1], prefill_lives, now_s) is not None
