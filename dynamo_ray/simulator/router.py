"""What an ingress does with a request until its ranks are chosen, as `request/router.py` does it on an event loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from backends.engine import RankLoad, Role
from dynamo_ray.config import DeploymentConfig, QueueConfig
from dynamo_ray.request.occupancy import Occupancy
from dynamo_ray.request.queue import Line, Ticket
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


@dataclass(frozen=True, slots=True)
class Placed:
    arrival: Arrival
    choice: Choice
    booked: Booked


class Router:
    """The ingress's chooser, line and occupancy. Every request may use every rank, nobody leaves, and no worker dies.

    As in `request/waiting.py`, the first that cannot go holds up all behind it: they need the same ranks.
    """

    def __init__(self, config: DeploymentConfig) -> None:
        """Raises ValueError when the configuration names no policy."""
        self.chooser = Chooser(config.model.name, config.router)
        self._held = config.router.queue is not None
        queue = config.router.queue or QueueConfig()
        most = config.limits.max_queued_requests
        self._line: Line[Arrival] = Line(queue)
        self._occupancy = Occupancy(self.chooser.ranks, self.chooser.table, queue.busy_requests or most, most)
        self._masks = dict.fromkeys(Role, 0)
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

    def heard(self, holder: Holder, load: RankLoad) -> None:
        self.chooser.heard(holder, load)
        self._occupancy.heard(holder, load)

    def enter(self, arrival: Arrival, now_s: float) -> Placed | None:
        """Where it goes at once, booked; None: it waits, or was refused and counted."""
        placed = None if self._line else self._go(arrival, now_s)
        if placed is None and self._line.full:
            self.num_refused += 1
        elif placed is None:
            self._line.join(self._ticket(arrival, now_s), arrival, now_s)
        return placed

    def leaving(self, now_s: float) -> Iterator[Placed]:
        """Those that wait and can go now, in their order, booked one after the other."""
        for place, arrival in self._line:
            placed = self._go(arrival, now_s)
            if placed is None:
                return
            self._line.went(place, now_s)
            yield placed

    def _ticket(self, arrival: Arrival, now_s: float) -> Ticket:
        began_s = time.thread_time()
        choice = self._choose(arrival.ask, 0, now_s)
        self.decision_cpu_s += time.thread_time() - began_s
        assert choice is not None, "where no rank is busy, there is one"
        return Ticket(0, (choice.prefill or choice.decode).uncached_tokens, now_s)

    def _go(self, arrival: Arrival, now_s: float) -> Placed | None:
        began_s = time.thread_time()
        busy = self._occupancy.busy(len(arrival.ask.token_ids)) if self._held else 0
        choice = self._choose(arrival.ask, busy, now_s)
        placed = None if choice is None else Placed(arrival, choice, self.chooser.book(choice, now_s))
        self.decision_cpu_s += time.thread_time() - began_s
        return placed

    def _choose(self, ask: Ask, busy: int, now_s: float) -> Choice | None:
        """None: all ranks of a role are busy."""
        prefill = self._masks[Role.PREFILL]
        decode = self._masks[Role.AGGREGATED] or self._masks[Role.DECODE]
        free, free_decode = prefill & ~busy, decode & ~busy
        if not free_decode or (prefill and not free):
            return None
        return self.chooser.choose(ask, free or None, free_decode, now_s)
