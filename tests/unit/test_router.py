"""Which requests are held while all ranks are busy, which skip prefill, and that whatever ends one frees everything."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from data_path import PROMPT, Cluster, cluster, collect, generation

from backends.engine import Pause, Resume, Role, Sampling
from backends.kv_events import KVEventBatch
from dynamo_ray.errors import DeadlineExceeded, NotReady, Overloaded, RequestError
from dynamo_ray.request.generation import Generation
from dynamo_ray.request.occupancy import STALLED_S
from dynamo_ray.request.tally import Tally
from dynamo_ray.routing.explanation import Route
from dynamo_ray.routing.ranks import Holder
from dynamo_ray.simulator import clock


def held(**options: Any) -> dict[str, Any]:
    return {"queue": {"busy_requests": 1, **options}}


def asked(request_id: str, priority: int = 0, deadline_s: float | None = None, size: int = 100) -> Generation:
    sampling = Sampling(max_tokens=20, temperature=0.0)
    return Generation(request_id, list(range(size)), sampling, priority=priority, deadline_s=deadline_s)


def send(made: Cluster, request: Generation) -> asyncio.Task[list[int]]:
    return asyncio.create_task(collect(made, request))


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


@pytest.mark.parametrize("style", ["sequential", "concurrent"])
def test_a_short_uncached_prompt_is_computed_by_the_decode_worker_to_the_same_tokens(style: str) -> None:
    async def main() -> None:
        async with cluster(prefill=0) as alone:
            expected = [await collect(alone, asked("r", size=size)) for size in (50, 200)]
        router = {"prefill_on_decode": {"max_uncached_tokens": 50}}
        async with cluster(handoff=style, router=router) as made:
            prefill, decode = made.nodes["prefill-0"].engine, made.nodes["decode-0"].engine
            assert await collect(made, asked("short", size=50)) == expected[0]
            assert (prefill.computed_tokens, decode.computed_tokens) == (0, 50)
            assert await collect(made, asked("long", size=200)) == expected[1]
            assert prefill.computed_tokens == 200
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


@pytest.mark.parametrize("halted", [False, True])
def test_without_a_prefill_worker_the_prompts_that_need_none_are_served(halted: bool) -> None:
    async def main() -> None:
        router = {"prefill_on_decode": {"max_uncached_tokens": 50, "max_uncached_tokens_without_prefill": 100}}
        async with cluster(router=router) as made:
            expected = {size: await collect(made, asked("before", size=size)) for size in (50, 100)}
            if halted:
                await made.control(Pause(), "prefill-0")
            else:
                await made.nodes.pop("prefill-0").kill()
                await asyncio.sleep(0.1)
            assert (made.dispatch.ready() or "").startswith("no prefill worker is ready")
            for size, tokens in expected.items():
                assert await collect(made, asked("after", size=size)) == tokens
                assert made.dispatch.explain(asked("why", size=size)).prefill is None
            refusal = "no prefill worker is ready.* decode workers compute prompts of at most 100 uncached tokens"
            with pytest.raises(NotReady, match=refusal) as refused:
                await collect(made, asked("long", size=500))
            assert refused.value.retry_after_s is not None
            with pytest.raises(NotReady, match=refusal):
                made.dispatch.explain(asked("why", size=500))
            if halted:
                await made.control(Resume(), "prefill-0")
            else:
                await made.start("prefill-0", Role.PREFILL, epoch=2)
                made.announce()
                await asyncio.sleep(1.0)
            assert len(await collect(made, asked("long", size=500))) == 20
            assert made.nodes["prefill-0"].engine.computed_tokens >= 400
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


def test_a_defect_between_choosing_and_sending_leaves_nothing_booked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with cluster(prefill=0, decode=1) as made:
            connection = made.dispatch.workers.connection
            monkeypatch.setattr(made.dispatch.workers, "connection", {}.__getitem__)
            with pytest.raises(KeyError):
                await collect(made, asked("r"))
            assert made.dispatch.router.table.num_bookings == 0
            monkeypatch.setattr(made.dispatch.workers, "connection", connection)
            await collect(made, asked("again"))

    clock.run(main())


def test_a_try_teaches_only_by_the_tokens_that_it_generated_itself() -> None:
    async def main() -> None:
        async with cluster(prefill=0, decode=2, step_s=0.05) as made:
            told: list[Route] = []
            running = send(made, replace(asked("r"), told=told.append))
            await asyncio.sleep(0.6)
            await made.nodes.pop(told[0].decode.worker).kill()
            made.announce()
            assert len(await running) == 20
            (step,) = [line for line in made.dispatch.router.chooser.speeds.step.values() if line.num_samples]
            assert len(told) == 2
            assert step.num_samples == 1
            assert made.dispatch.router.chooser.speeds.answer_tokens == pytest.approx(128 - 0.05 * (128 - 10), abs=0.3)

    clock.run(main())


def test_the_route_reaches_who_asked_for_it() -> None:
    async def main() -> None:
        async with cluster(prefill=1, decode=2) as made:
            told: list[Route] = []
            request = Generation("r", PROMPT, Sampling(max_tokens=2), told=told.append)
            async with aclosing(made.dispatch.generate(request)) as chunks:
                async for _ in chunks:
                    assert made.dispatch.router.table.num_bookings
            (route,) = told
            assert route.prefill is not None
            assert (route.policy, route.prefill.worker) == ("blocks", "prefill-0")

    clock.run(main())


class Walk:
    """Anything that happens to requests and workers, in any order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tasks: list[asyncio.Task[Any]] = []
        self.epochs = 1

    async def run(self, made: Cluster) -> None:
        for step in range(24):
            act = self.random.choice((self.ask, self.ask, self.ask, self.leave, self.die, self.rest))
            await act(made, step)
        for name in [name for name in ("prefill-0", "decode-0") if name not in made.nodes]:
            await self.start(made, name)
        made.announce()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await made.settle()

    async def ask(self, made: Cluster, step: int) -> None:
        sampling = Sampling(max_tokens=self.random.choice((1, 5, 30)), temperature=0.0)
        now_s, limit_s = asyncio.get_running_loop().time(), self.random.choice((0.05, 1.0, 600.0))
        prompt = list(range(self.random.choice((10, 100, 300))))
        request = Generation(f"r{step}", prompt, sampling, deadline_s=now_s + limit_s, priority=step % 2)
        self.tasks.append(send(made, request))

    async def leave(self, made: Cluster, step: int) -> None:
        if self.tasks:
            self.random.choice(self.tasks).cancel()

    async def die(self, made: Cluster, step: int) -> None:
        name = self.random.choice(("prefill-0", "decode-0"))
        if name in made.nodes:
            await made.nodes.pop(name).kill()
        else:
            await self.start(made, name)
        made.announce()

    async def start(self, made: Cluster, name: str) -> None:
        self.epochs += 1
        await made.start(name, Role(name.partition("-")[0]), epoch=self.epochs, attn_dp=2)

    async def rest(self, made: Cluster, step: int) -> None:
        await asyncio.sleep(self.random.choice((0.001, 0.05, 0.5, 2.0)))


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_left_booked_waiting_or_held_whatever_happens(seed: int) -> None:
    async def main() -> None:
        style = ("sequential", "concurrent")[seed % 2]
        router = {"queue": {"busy_requests": 2, "max_waiting": 4}, "prefill_on_decode": {"max_uncached_tokens": 50}}
        async with cluster(prefill=2, decode=2, handoff=style, attn_dp=2, router=router) as made:
            await Walk(seed).run(made)

    clock.run(main())


def test_what_the_router_does_is_counted() -> None:
    async def main() -> dict[str, float]:
        async with cluster(prefill=1, decode=1, router={"prefill_on_decode": {"max_uncached_tokens": 4}}) as made:
            for _ in range(2):
                await collect(made, generation())
            return {name: value for name, _, labels, value in made.dispatch.readings() if not labels}

    found = clock.run(main())
    assert found["dynamo_ray_decisions_total"] == 2
    assert found["dynamo_ray_predicted_cached_tokens_total"] == 96
    assert found["dynamo_ray_prompts_without_prefill_worker_total"] == 0
    assert found["dynamo_ray_first_tokens_total"] == 2
    predicted, observed = (found[f"dynamo_ray_ttft_{name}_seconds_total"] for name in ("predicted", "observed"))
    assert predicted > 0
    assert observed > 0
    assert found["dynamo_ray_ttft_error_seconds_total"] >= abs(predicted - observed) * 0.999 > 0
    assert found["dynamo_ray_queue_requests"] == found["dynamo_ray_queue_waited_total"] == 0


def test_the_time_from_an_event_to_the_index_is_summed_where_its_publisher_says_when() -> None:
    tally = Tally()
    for published_unix_s in (time.time() - 2.0, None, time.time() + 60.0):
        tally.heard(KVEventBatch(0, 0, [], published_unix_s))
    assert tally.timed_batches == 2
    assert tally.lag_s == pytest.approx(2.0, abs=0.5)


def test_who_may_be_asked_is_found_out_once_until_workers_come_go_or_are_halted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async with cluster(prefill=2, decode=2) as made:
            looked: Counter[str] = Counter()
            eligible, mask_of = made.dispatch.router._eligible, made.dispatch.router.chooser.mask
            monkeypatch.setattr(eligible, "_mask_of", lambda worker: looked.update([worker]) or mask_of(worker))
            eligible.changed()
            for turn in range(5):
                for request in (generation(f"r{turn}"), generation(f"s{turn}", temperature=1.0, seed=7)):
                    assert len(await collect(made, request)) == 20
            assert looked == dict.fromkeys(made.nodes, 2), "for each of the two kinds of requests"
            await made.control(Pause(), "decode-0")
            assert len(await collect(made, generation("paused"))) == 20
            assert looked == {"prefill-0": 3, "prefill-1": 3, "decode-0": 2, "decode-1": 3}
            await made.control(Resume(), "decode-0")
            await made.nodes.pop("decode-1").kill()
            await asyncio.sleep(0.01)
            assert len(await collect(made, generation("alone"))) == 20
            assert (looked["decode-0"], looked["decode-1"]) == (3, 3)
            await made.settle()

    clock.run(main())


def test_requests_of_one_session_go_to_one_worker() -> None:
    async def main() -> None:
        async with cluster(prefill=0, decode=4, policy="session") as made:
            went: dict[str, set[str]] = {name: set() for name in "abcdefgh"}
            for turn in range(3):
                for name, workers in went.items():
                    told: list[Route] = []
                    prompt = [turn, ord(name), *PROMPT]
                    sampling = Sampling(max_tokens=1)
                    await collect(made, Generation("r", prompt, sampling, session=name, told=told.append))
                    workers.add(told[0].decode.worker)
            assert all(len(workers) == 1 for workers in went.values())
            assert len(set.union(*went.values())) > 1

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
