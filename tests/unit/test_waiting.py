"""Requests that wait for a rank, in virtual time: in order, bounded, and never in anybody's way once they have left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from dynamo_ray.config import QueueConfig
from dynamo_ray.errors import InvalidRequest, Overloaded
from dynamo_ray.request.queue import Ticket
from dynamo_ray.request.waiting import ASK_AGAIN_S, LOOK_AHEAD, Busy, WaitingRoom
from dynamo_ray.simulator import clock


class Ranks:
    """`free` has a bit a rank; a request takes the lowest that it may use."""

    def __init__(self, free: int, **options: Any) -> None:
        self.free = free
        self.up = True
        self.room: WaitingRoom[int] = WaitingRoom(QueueConfig(**options), self.release, lambda: ~self.free)

    def wants(self, mask: int) -> Callable[[int], int | Busy]:
        def go(kept: int) -> int | Busy:
            if not self.up:
                return Busy(0, everyone=True)
            usable = self.free & mask & ~kept
            if not usable:
                return Busy(mask)
            lowest = usable & -usable
            self.free &= ~lowest
            return lowest

        return go

    def release(self, rank: int) -> None:
        self.free |= rank
        self.room.wake()

    def enter(
        self,
        mask: int = 1,
        priority: int = 0,
        timeout_s: float = 60.0,
        again: bool = False,
        uncached: Callable[[], int] = lambda: 0,
    ) -> asyncio.Task[int]:
        now_s = asyncio.get_running_loop().time()
        ticket = Ticket(priority, now_s)
        entering = self.room.enter(self.wants(mask), lambda: ticket, now_s + timeout_s, again, uncached)
        return asyncio.create_task(entering)


async def turn() -> None:
    await asyncio.sleep(0.001)


def test_who_waits_goes_in_order_as_soon_as_a_rank_is_free() -> None:
    async def main() -> None:
        ranks = Ranks(free=1)
        first = ranks.enter()
        await turn()
        assert first.result() == 1
        low, high = ranks.enter(), ranks.enter(priority=1)
        await turn()
        assert len(ranks.room) == 2
        ranks.release(1)
        await turn()
        assert high.done()
        assert not low.done()
        ranks.release(1)
        await turn()
        assert low.done()
        assert ranks.room.num_waited == 2

    clock.run(main())


def test_of_those_that_wait_for_one_rank_who_has_the_least_to_compute_by_then_goes_first() -> None:
    async def main() -> None:
        ranks, uncached = Ranks(free=0), {"long": 900, "short": 10, "elsewhere": 1, "urgent": 5000}
        tasks = {
            name: ranks.enter(
                0b10 if name == "elsewhere" else 0b01, name == "urgent", uncached=lambda n=name: uncached[n]
            )
            for name in uncached
        }
        await turn()
        went = []
        for cached in ("", "", "long"):
            if cached:
                uncached[cached] = 1  # somebody before it has computed its prefix
                uncached["late"] = 5
                tasks["late"] = ranks.enter(0b01, uncached=lambda: uncached["late"])
                await turn()
            ranks.release(0b01)
            await turn()
            (name,) = [name for name, task in tasks.items() if task.done() and name not in went]
            went.append(name)
        assert went == ["urgent", "short", "long"]
        for task in tasks.values():
            task.cancel()

    clock.run(main())


def test_one_behind_goes_first_only_with_ranks_that_those_before_it_do_not_wait_for() -> None:
    async def main() -> None:
        ranks = Ranks(free=0)
        head, same, other = ranks.enter(0b001), ranks.enter(0b011), ranks.enter(0b100)
        await turn()
        ranks.release(0b100)
        await turn()
        assert other.done()
        ranks.release(0b001)
        await turn()
        assert (head.done(), same.done()) == (True, False)
        ranks.release(0b010)
        await turn()
        assert same.done()

    clock.run(main())


def test_however_many_wait_for_one_rank_nobody_waits_for_another_that_is_free() -> None:
    async def main() -> None:
        ranks = Ranks(free=0)
        many = [ranks.enter(0b01) for _ in range(3 * LOOK_AHEAD)]
        await turn()
        ranks.free = 0b10
        other = ranks.enter(0b10)
        await turn()
        assert other.result() == 0b10
        for task in many:
            ranks.release(0b01)
            await turn()
            assert task.done()

    clock.run(main())


def test_ranks_that_come_are_within_a_second_for_those_too_who_were_passed_over() -> None:
    async def main() -> None:
        ranks = Ranks(free=0)
        may = [0b01]

        def go(kept: int) -> int | Busy:
            return ranks.wants(may[0])(kept)

        first = ranks.enter(0b01)
        late = asyncio.create_task(ranks.room.enter(go, lambda: Ticket(0, 1.0), 60.0))
        await turn()
        may[0], ranks.free = 0b11, 0b10
        await asyncio.sleep(ASK_AGAIN_S)
        ranks.room.wake()  # a heartbeat
        await turn()
        assert (first.done(), late.done()) == (False, True)
        first.cancel()

    clock.run(main())


def test_who_waits_for_ranks_that_are_not_there_yet_has_them_when_they_come_and_those_behind_go_on() -> None:
    async def main() -> None:
        ranks, come = Ranks(free=0), [False]

        def go(kept: int) -> int | Busy:
            return ranks.wants(0b01)(kept) if come[0] else Busy(0)

        waiting = [asyncio.create_task(ranks.room.enter(go, lambda: Ticket(0, 0.0), 60.0)) for _ in range(40)]
        other = ranks.enter(0b10)
        await turn()
        ranks.release(0b10)
        await turn()
        assert other.done()
        come[0], ranks.free = True, 0b01
        ranks.room.wake(come=True)
        await turn()
        assert [task.done() for task in waiting] == [True] + [False] * 39
        for task in waiting:
            task.cancel()

    clock.run(main())


def test_nobody_behind_is_looked_at_where_nobody_could_go() -> None:
    async def main() -> None:
        ranks = Ranks(free=0)
        looks: list[int] = []

        def go(kept: int) -> int | Busy:
            looks.append(kept)
            return Busy(1, everyone=True)

        waiting = [asyncio.create_task(ranks.room.enter(go, lambda: Ticket(0, 0.0), 60.0)) for _ in range(50)]
        await turn()
        looks.clear()
        ranks.room.wake()
        await turn()
        assert looks == [0]
        for task in waiting:
            task.cancel()

    clock.run(main())


def test_who_leaves_frees_its_place_at_once_and_what_it_was_just_given() -> None:
    async def main() -> None:
        ranks = Ranks(free=0)
        leaving, staying = ranks.enter(), ranks.enter()
        await turn()
        leaving.cancel()
        await turn()
        assert len(ranks.room) == 1
        ranks.release(1)
        await asyncio.sleep(0)  # given to it, and cancelled before it could run
        staying.cancel()
        await turn()
        assert staying.cancelled()
        assert ranks.free == 1
        assert len(ranks.room) == 0

    clock.run(main())


def test_a_full_line_and_a_wait_beyond_the_deadline_are_refused_with_the_time_to_come_again() -> None:
    async def main() -> None:
        ranks = Ranks(free=0, max_waiting=2)
        waiting = [ranks.enter(), ranks.enter()]
        await asyncio.sleep(4.0)
        with pytest.raises(Overloaded, match="2 requests wait already") as full:
            await ranks.enter()
        assert full.value.retry_after_s == 1.0, "nobody has gone yet"
        ranks.release(1)
        await turn()
        with pytest.raises(Overloaded, match="beyond this request's deadline") as late:
            await ranks.enter(timeout_s=7.0)
        assert late.value.retry_after_s == pytest.approx(8.0, rel=0.01)
        again = ranks.enter(timeout_s=7.0, again=True)
        await turn()
        assert not again.done(), "who was let go once is not refused"
        assert ranks.room.num_refused == 2
        for task in (again, waiting[1]):
            task.cancel()

    clock.run(main())


def test_a_full_line_refuses_its_last_for_a_greater_priority() -> None:
    async def main() -> None:
        ranks = Ranks(free=0, max_waiting=2)
        first, last = ranks.enter(priority=1), ranks.enter()
        await turn()
        with pytest.raises(Overloaded):
            await ranks.enter()
        urgent = ranks.enter(priority=1)
        await turn()
        assert isinstance(last.exception(), Overloaded)
        assert len(ranks.room) == 2
        ranks.release(1)
        await turn()
        assert (first.done(), urgent.done()) == (True, False)
        ranks.release(1)
        await turn()
        assert urgent.result() == 1
        kept = ranks.enter(again=True)
        await turn()
        ranks.enter(priority=1).cancel()
        await turn()
        assert not kept.done(), "who was let go once is not refused"
        kept.cancel()

    clock.run(main())


def test_a_burst_of_greater_priority_takes_as_many_places_and_who_cannot_wait_takes_none() -> None:
    async def main() -> None:
        ranks = Ranks(free=0, max_waiting=2)
        low = [ranks.enter(), ranks.enter()]
        await asyncio.sleep(4.0)
        ranks.release(1)  # the pace is known from now on
        low.append(ranks.enter())
        await turn()
        with pytest.raises(Overloaded, match="deadline"):
            await ranks.enter(priority=1, timeout_s=1.0)
        assert [task.done() for task in low] == [True, False, False]
        urgent = [ranks.enter(priority=1), ranks.enter(priority=1)]
        await turn()
        assert all(isinstance(task.exception(), Overloaded) for task in low[1:])
        assert not any(task.done() for task in urgent)
        assert len(ranks.room) == 2
        for task in urgent:
            task.cancel()

    clock.run(main())


def test_the_deadline_ends_the_wait() -> None:
    async def main() -> None:
        ranks = Ranks(free=0)
        with pytest.raises(TimeoutError):
            await ranks.enter(timeout_s=5.0)
        assert asyncio.get_running_loop().time() == pytest.approx(5.0)
        assert len(ranks.room) == 0

    clock.run(main())


def test_workers_that_are_gone_are_waited_for_and_other_errors_end_only_their_own_request() -> None:
    async def main() -> None:
        ranks = Ranks(free=0)
        waiting = ranks.enter()

        def refuse(kept: int) -> int | Busy:
            if ranks.free:
                raise InvalidRequest("no", "lora")
            return Busy(1)

        refused = asyncio.create_task(ranks.room.enter(refuse, lambda: Ticket(1, 0.0), 60.0))
        await turn()
        ranks.up = False
        ranks.room.wake()
        await turn()
        assert not waiting.done()
        ranks.up = True
        ranks.release(1)
        await turn()
        assert waiting.result() == 1
        assert isinstance(refused.exception(), InvalidRequest)

    clock.run(main())


def test_a_defect_ends_the_request_that_meets_it_and_holds_up_nobody_behind() -> None:
    async def main() -> None:
        ranks = Ranks(free=0)

        def broken(kept: int) -> int | Busy:
            if ranks.free:
                raise KeyError("defect")
            return Busy(1)

        ends = asyncio.create_task(ranks.room.enter(broken, lambda: Ticket(1, 0.0), 60.0))
        behind = ranks.enter()
        await turn()
        ranks.release(1)
        await turn()
        assert isinstance(ends.exception(), KeyError)
        assert behind.result() == 1

    clock.run(main())
