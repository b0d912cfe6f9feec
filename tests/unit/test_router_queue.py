"""Which requests wait here while ranks are busy or their worker is gone, who goes first, and what ends the wait."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from data_path import Cluster, asked, cluster, collect, send

from backends.engine import Pause, Resume, Role
from dynamo_ray.errors import DeadlineExceeded, NotReady, Overloaded, RequestError
from dynamo_ray.request.generation import Generation
from dynamo_ray.request.occupancy import STALLED_S
from dynamo_ray.routing.ranks import Holder
from dynamo_ray.simulator import clock


def held(**options: Any) -> dict[str, Any]:
    return {"queue": {"busy_requests": 1, **options}}


def test_requests_wait_here_while_every_rank_is_busy_and_the_greatest_priority_goes_first() -> None:
    async def main() -> None:
        async with cluster(prefill=0, decode=2, features=(), router=held()) as made:
            order: list[str] = []
            waited: dict[str, float] = {}

            def asked_and_told(name: str) -> Generation:
                return replace(asked(name, int(name)), told=lambda route: waited.update({name: route.waited_s}))

            sent = {name: send(made, asked_and_told(name)) for name in map(str, range(6))}
            for name, task in sent.items():
                task.add_done_callback(lambda _, name=name: order.append(name))
            while not all(task.done() for task in sent.values()):
                await asyncio.sleep(0.01)
                assert all(node.server.num_requests <= 1 for node in made.nodes.values())
            assert len({tuple(task.result()) for task in sent.values()}) == 1
            waits = [waited[name] for name in order]
            assert waits == sorted(waits)
            assert waits[1] == 0 < waits[2], "the first two found a free rank"
            assert order[2:] == ["5", "4", "3", "2"]
            assert made.dispatch.router.room.num_waited == 4
            assert asyncio.get_running_loop().time() < 1.0, "each went when a rank was free, not with a heartbeat"
            await made.settle()

    clock.run(main())


def test_without_a_queue_an_engine_without_priorities_refuses_one() -> None:
    async def main() -> None:
        async with cluster(prefill=0, decode=1, features=(), router={"queue": None}) as made:
            with pytest.raises(RequestError) as refused:
                await collect(made, asked("r", priority=1))
            assert refused.value.field == "priority"

    clock.run(main())


def test_the_shortest_uncached_prompt_goes_first_where_asked_for() -> None:
    async def main() -> None:
        router = held(order="shortest")
        async with cluster(prefill=0, decode=1, router=router) as made:
            busy = send(made, asked("busy", size=40))
            await asyncio.sleep(0.01)
            long, short = send(made, asked("long", size=400)), send(made, asked("short", size=20))
            await asyncio.wait((long, short), return_when=asyncio.FIRST_COMPLETED)
            assert busy.done()
            assert (long.done(), short.done()) == (False, True)
            await long

    clock.run(main())


def test_a_full_queue_and_a_deadline_end_the_wait_with_their_own_errors() -> None:
    async def main() -> None:
        async with cluster(prefill=0, decode=1, router=held(max_waiting=1), step_s=1.0) as made:
            now_s = asyncio.get_running_loop().time()
            running = send(made, asked("running"))
            await asyncio.sleep(0.01)
            waiting = send(made, asked("waiting", deadline_s=now_s + 3.0))
            await asyncio.sleep(0.01)
            with pytest.raises(Overloaded, match="1 requests wait already") as full:
                await collect(made, asked("too many"))
            assert full.value.retry_after_s is not None
            with pytest.raises(DeadlineExceeded):
                await waiting
            assert asyncio.get_running_loop().time() == pytest.approx(now_s + 3.0)
            await running
            await made.settle()

    clock.run(main())


def test_a_prompt_waits_here_for_a_decode_rank_before_which_as_much_waits_as_its_kv_holds() -> None:
    async def main() -> None:
        async with cluster(prefill=1, decode=1, kv_blocks=10, max_model_len=160, step_s=0.2) as made:
            running = send(made, asked("running", size=100))
            await asyncio.sleep(1.1)  # a heartbeat says what it holds
            ahead = send(made, asked("ahead", size=101))
            await asyncio.sleep(0.01)
            assert len(made.dispatch.router.room) == 0
            waiting = send(made, asked("waiting", size=101))
            await asyncio.sleep(0.01)
            assert len(made.dispatch.router.room) == 1
            assert [made.nodes[name].server.num_requests for name in ("prefill-0", "decode-0")] == [1, 1]
            assert [len(await each) for each in (running, ahead, waiting)] == [20] * 3
            await made.settle()

    clock.run(main())


def test_a_waiting_client_that_leaves_is_forgotten_and_a_worker_that_comes_back_takes_the_next() -> None:
    async def main() -> None:
        async with cluster(prefill=0, decode=1, router=held(), step_s=1.0) as made:
            running = send(made, asked("running"))
            await asyncio.sleep(0.01)
            leaving, staying = send(made, asked("leaving")), send(made, asked("staying"))
            await asyncio.sleep(0.01)
            leaving.cancel()
            await asyncio.sleep(0.01)
            assert len(made.dispatch.router.room) == 1
            await made.nodes.pop("decode-0").kill()
            await asyncio.sleep(1.0)
            assert not staying.done(), "its worker may come back"
            await made.start("decode-0", Role.AGGREGATED, epoch=2)
            made.announce()
            assert len(await staying) == 20
            assert not isinstance(running.exception(), asyncio.CancelledError)
            await made.settle()

    clock.run(main())


def test_a_short_prompt_does_not_wait_for_prefill_ranks_that_it_does_not_need() -> None:
    async def main() -> None:
        async with cluster(router=held(busy_requests=2) | {"prefill_on_decode": {"max_uncached_tokens": 50}}) as made:
            router = made.dispatch.router
            prefill = Holder("prefill-0", 1, 0)
            taken = [router.table.book(prefill, 1000, 0) for _ in range(2)]
            long = send(made, asked("long", size=200))
            await asyncio.sleep(0.01)
            assert len(await collect(made, asked("short", size=50))) == 20
            assert not long.done()
            for booking in taken:
                router.table.free(booking)
            router.room.wake()
            await long
            await made.settle()

    clock.run(main())


def test_without_a_prefill_worker_a_short_prompt_waits_while_every_decode_rank_is_busy() -> None:
    async def main() -> None:
        async with cluster(router=held() | {"prefill_on_decode": {"max_uncached_tokens": 50}}) as made:
            await made.nodes.pop("prefill-0").kill()
            await asyncio.sleep(0.1)
            first, second = (send(made, asked(name, size=50)) for name in ("first", "second"))
            await asyncio.sleep(0.01)
            assert len(made.dispatch.router.room) == 1
            assert len(await first) == len(await second) == 20
            await made.settle()

    clock.run(main())


@pytest.mark.parametrize("role", ["prefill", "decode", "aggregated"])
def test_a_request_that_lost_its_worker_and_one_that_comes_both_wait_for_the_next_worker(role: str) -> None:
    async def main() -> None:
        prefill = int(role != "aggregated")
        name = "decode-0" if role == "aggregated" else f"{role}-0"
        async with cluster(prefill, router=held(), step_s=0.05, prefill_tokens_per_s=200.0) as made:
            expected = await collect(made, asked("before"))
            lost = send(made, asked("lost"))
            await asyncio.sleep(0.1)
            await made.nodes.pop(name).kill()
            made.announce()
            await asyncio.sleep(0.1)
            new = send(made, asked("new", size=101))
            await asyncio.sleep(30.0)
            assert len(made.dispatch.router.room) == 2
            assert not lost.done()
            assert made.dispatch.max_model_len > 0, "the front still knows what fits"
            await made.start(name, Role(role), epoch=2, step_s=0.05, prefill_tokens_per_s=200.0)
            made.announce()
            await asyncio.wait((lost, new), return_when=asyncio.FIRST_COMPLETED)
            assert (lost.done(), new.done()) == (True, False), "it came first"
            assert asyncio.get_running_loop().time() < 34.0
            assert lost.result() == expected
            assert len(await new) == 20
            await made.settle()

    clock.run(main())


def test_while_the_last_worker_drains_newcomers_wait_for_the_one_that_replaces_it() -> None:
    async def main() -> None:
        async with cluster(prefill=0, step_s=0.05) as made:
            inside = send(made, asked("inside"))
            await asyncio.sleep(0.1)
            old = made.nodes.pop("decode-0")
            draining = asyncio.create_task(old.server.drain(10.0))
            await asyncio.sleep(0.01)
            new = send(made, asked("new", size=101))
            assert len(await inside) == 20
            assert await draining
            await old.kill()
            await asyncio.sleep(5.0)
            assert not new.done()
            await made.start("decode-0", Role.AGGREGATED, epoch=2)
            made.announce()
            assert len(await new) == 20
            await made.settle()

    clock.run(main())


@pytest.mark.parametrize(("queue", "wait_s"), [({}, 60.0), ({"worker_wait_s": 5.0}, 5.0), (None, 0.0)])
def test_a_worker_that_does_not_come_is_waited_for_no_longer_than_configured(
    queue: dict[str, Any] | None, wait_s: float
) -> None:
    async def main() -> None:
        clock_s = asyncio.get_running_loop().time
        async with cluster(prefill=0, router={"queue": queue}, step_s=0.05) as made:
            lost = send(made, asked("lost"))
            await asyncio.sleep(0.1)
            await made.nodes.pop("decode-0").kill()
            died_s = clock_s()
            await asyncio.sleep(0.01)
            new = send(made, asked("new"))
            with pytest.raises(NotReady, match="no aggregated worker is ready"):
                await lost
            assert clock_s() == pytest.approx(died_s + wait_s, abs=0.1)
            for request in (new, send(made, asked("late"))):
                with pytest.raises(NotReady):
                    await request
            assert clock_s() == pytest.approx(died_s + wait_s, abs=0.1), "nobody waits any more"
            await made.start("decode-0", Role.AGGREGATED, epoch=2)
            made.announce()
            await asyncio.sleep(1.0)
            assert len(await collect(made, asked("after"))) == 20
            await made.settle()

    clock.run(main())


def test_a_role_that_never_had_a_worker_is_not_waited_for() -> None:
    async def main() -> None:
        async with cluster(prefill=0) as other:
            made = Cluster(other.config)
            await made.dispatch.start()
            with pytest.raises(NotReady, match="no aggregated worker is ready"):
                await collect(made, asked("early"))
            assert asyncio.get_running_loop().time() < 1.0
            await made.dispatch.close()

    clock.run(main())


def test_who_waits_goes_on_waiting_while_workers_are_halted_and_newcomers_are_told_to_come_again() -> None:
    async def main() -> None:
        async with cluster(prefill=0, router=held(), step_s=0.05) as made:
            running = send(made, asked("running"))
            await asyncio.sleep(0.01)
            waiting = send(made, asked("waiting"))
            await asyncio.sleep(0.01)
            await made.control(Pause())
            with pytest.raises(NotReady, match="decode-0 is paused"):
                await collect(made, asked("new"))
            await asyncio.sleep(100.0)
            assert not waiting.done()
            await made.control(Resume())
            assert len(await running) == len(await waiting) == 20
            await made.settle()

    clock.run(main())


def test_who_waits_for_a_prefill_rank_has_it_as_soon_as_a_prompt_is_computed() -> None:
    async def main() -> None:
        async with cluster(prefill=1, decode=2, router=held(), step_s=0.05) as made:
            first = send(made, asked("first"))
            await asyncio.sleep(0.01)
            waits: list[float] = []
            second = replace(asked("second", size=101), told=lambda route: waits.append(route.waited_s))
            await asyncio.gather(first, send(made, second))
            assert 0 < waits[0] < 0.3, "neither until a heartbeat nor until the first answer's end"
            await made.settle()

    clock.run(main())


def test_who_waits_for_a_rank_whose_engine_hangs_goes_elsewhere_and_who_waits_for_a_slow_one_stays() -> None:
    async def main(hangs: bool) -> list[str]:
        slow = {"step_s": 1.5, "block_size": 4}
        async with cluster(prefill=0, decode=2, policy="session", router=held(), **slow) as made:
            first, went = send(made, replace(asked("first"), session="s")), []
            await asyncio.sleep(2.0)
            busy = next(name for name, node in made.nodes.items() if node.server.num_requests)
            if hangs:
                await made.nodes[busy].engine.control(Pause())  # its worker knows nothing of that
            waiting = replace(asked("waiting"), session="s", told=lambda route: went.append(route.decode.worker))
            second = send(made, waiting)
            await asyncio.sleep(STALLED_S - 1.0)
            assert went == []
            assert len(await second) == 20
            assert first.done() is not hangs
            await made.nodes[busy].engine.control(Resume())
            await first
            await made.settle()
            return [name == busy for name in went]

    assert clock.run(main(hangs=True)) == [False]
    assert clock.run(main(hangs=False)) == [True]
