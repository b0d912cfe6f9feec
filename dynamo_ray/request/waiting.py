"""Requests that wait in this ingress for a rank to be free: the line of `queue.py` on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from dynamo_ray.config import QueueConfig
from dynamo_ray.errors import Overloaded
from dynamo_ray.request.queue import Line, Place, Ticket
from dynamo_ray.telemetry import Reading

T = TypeVar("T")

RETRY_AFTER_S = 1.0
"""Where nothing is known about how long it takes."""
LOOK_AHEAD = 32
"""How many that cannot go are asked, and passed over for those behind them that need other ranks; bounds what a wake
costs. Those need not be asked who could only use ranks that somebody before them waits for."""
ASK_AGAIN_S = 1.0
"""They are, after so long: there may be more ranks that they could use."""


@dataclass(frozen=True, slots=True)
class Busy:
    """Every rank that a request could use in some role is busy."""

    ranks: int
    """Those, as a mask: whoever stands behind it in the line leaves them alone. 0: there are none at the moment."""
    everyone: bool = False
    """Nobody else could use any other rank in that role, so that nobody behind needs to be looked at."""


Go = Callable[[int], T | Busy]
"""Takes what it needs of the ranks outside a mask, at once or not at all.

Raises:
    RequestError: There will be no such ranks, or not soon.
"""


@dataclass(slots=True, eq=False)
class _Waiter(Generic[T]):
    go: Go[T]
    came: asyncio.Future[T]
    again: bool
    """It may not be refused."""
    uncached: Callable[[], int]
    stuck: int = 0
    """The ranks that it could use, and that were busy, when it was asked last, as a mask."""
    stuck_until_s: float = 0.0
    """For so long that is taken to be so."""


class WaitingRoom(Generic[T]):
    """Lets requests go in order, each as soon as its `go` takes something.

    `give_back` is called with what was taken for a request that has left in the same moment; `busy` says which ranks
    nobody can use. Nothing here polls: whoever frees a rank, or hears that one is free or has come, calls `wake`.
    """

    def __init__(self, config: QueueConfig, give_back: Callable[[T], None], busy: Callable[[], int]) -> None:
        self._line: Line[_Waiter[T]] = Line(config)
        self._give_back, self._busy = give_back, busy
        self._woken = False
        self.num_waited = 0
        """Requests that had to wait, whatever became of them."""
        self.num_refused = 0
        """Those for whom there was no place, or too long a wait."""
        self.waited_s = 0.0
        """By all of them."""

    def __len__(self) -> int:
        return len(self._line)

    async def enter(
        self,
        go: Go[T],
        ticket: Callable[[], Ticket],
        deadline_s: float,
        again: bool = False,
        uncached: Callable[[], int] = lambda: 0,
    ) -> T:
        """What `go` takes, when it is this request's turn; leaving (cancelled, or failed) takes nothing.

        Args:
            ticket: what its place depends on; asked for only if it has to wait, and raises if it may not.
            deadline_s: on the loop's clock; one whose predicted wait goes beyond is refused at once.
            again: it was let go before, and is never refused.
            uncached: how many prompt tokens the rank that it waits for would have to compute now.

        Raises:
            Overloaded: The line is full, or the wait too long; says when to come again. A full line makes room for a
                greater priority by refusing who is last in it.
            TimeoutError: The deadline has passed.
            RequestError: What `go` or `ticket` raises.
        """
        if not self._line:
            taken = go(0)
            if not isinstance(taken, Busy):
                return taken
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        at = ticket()
        if not again:
            self._admit(at, deadline_s - began_s)
        waiter: _Waiter[T] = _Waiter(go, loop.create_future(), again, uncached, at.stuck)
        place = self._line.join(at, waiter, began_s)
        self.num_waited += 1
        self.wake()  # it may stand before all others, or need other ranks than they do
        try:
            async with asyncio.timeout_at(deadline_s):
                return await waiter.came
        except BaseException:
            self._left(waiter)
            raise
        finally:
            self._line.leave(place)
            self.waited_s += loop.time() - began_s

    def wake(self, come: bool = False) -> None:
        """Something may be free: look, as soon as the caller is done. `come`: there may be other ranks than before."""
        if come:
            for _, waiter in self._line:
                waiter.stuck_until_s = 0.0
        if self._line and not self._woken:
            self._woken = True
            asyncio.get_running_loop().call_soon(self._look)

    def readings(self) -> Iterator[Reading]:
        """For /metrics."""
        yield "dynamo_ray_queue_requests", "Requests that wait for a rank", {}, len(self)
        yield "dynamo_ray_queue_waited_total", "Requests that had to wait", {}, self.num_waited
        what = "Requests refused: the queue was full, or the wait too long"
        yield "dynamo_ray_queue_refused_total", what, {}, self.num_refused
        yield "dynamo_ray_queue_wait_seconds_total", "How long those waited that no longer do", {}, self.waited_s

    def _look(self) -> None:
        """Ask each in its turn, and before it those that go first with the ranks that it waits for."""
        self._woken = False
        kept, stuck, asked_anew, now_s = 0, 0, False, asyncio.get_running_loop().time()
        for place, waiter in self._line:
            while not waiter.came.done() and (waiter.stuck & ~kept or now_s >= waiter.stuck_until_s):
                at, first = self._next(place, waiter, kept)
                busy = self._ask(at, first, kept, now_s)
                if busy is None:
                    continue
                if busy.everyone:
                    return
                asked_anew |= now_s >= first.stuck_until_s
                first.stuck_until_s = max(first.stuck_until_s, now_s + ASK_AGAIN_S)
                first.stuck = busy.ranks
                kept |= busy.ranks
                stuck += 1
                if stuck >= LOOK_AHEAD:
                    if asked_anew:  # so that the next look comes further
                        self.wake()
                    return

    def _next(self, place: Place, waiter: _Waiter[T], kept: int) -> tuple[Place, _Waiter[T]]:
        """Who is to be asked in this one's turn: itself, or one that waits for the same and goes first."""
        if not waiter.stuck & ~kept & ~self._busy():
            return place, waiter
        return self._line.next_like(
            place,
            lambda other: other.stuck in (waiter.stuck, 0) and not other.came.done(),
            lambda other: other.uncached(),
        )

    def _ask(self, place: Place, waiter: _Waiter[T], kept: int, now_s: float) -> Busy | None:
        """None: it has left the line."""
        try:
            taken = waiter.go(kept)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends this request, and nobody behind it
            self._line.leave(place)
            waiter.came.set_exception(error)
            return None
        if isinstance(taken, Busy):
            return taken
        self._line.went(place, now_s)
        waiter.came.set_result(taken)
        return None

    def _left(self, waiter: _Waiter[T]) -> None:
        came = waiter.came
        if came.done() and not came.cancelled() and came.exception() is None:
            self._give_back(came.result())
        self.wake()

    def _admit(self, ticket: Ticket, remaining_s: float) -> None:
        """Make room in the line for a newcomer, or refuse it."""
        wait_s = self._line.predicted_wait_s(ticket)
        retry_after_s = max(RETRY_AFTER_S, wait_s or 0.0)
        if wait_s is not None and wait_s > remaining_s:
            self.num_refused += 1
            raise Overloaded(
                f"no rank is free, and the wait of about {wait_s:.1f} s goes beyond this request's deadline",
                retry_after_s=retry_after_s,
            )
        if self._line.full:
            self.num_refused += 1
            full = Overloaded(
                f"no rank is free, and {len(self._line)} requests wait already", retry_after_s=retry_after_s
            )
            last = self._line.last_behind(ticket.priority)
            if last is None or last[1].again:
                raise full
            place, waiter = last
            self._line.leave(place)
            if not waiter.came.done():  # else it is leaving by itself
                waiter.came.set_exception(full)
