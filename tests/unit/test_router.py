"""Which requests skip prefill, what is counted and told, and that whatever ends one frees everything."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from data_path import PROMPT, Cluster, asked, cluster, collect, generation, send

from backends.engine import Pause, Resume, Role, Sampling
from backends.kv_events import KVEventBatch
from dynamo_ray.errors import NotReady
from dynamo_ray.request.generation import Generation
from dynamo_ray.request.tally import Tally
from dynamo_ray.routing.explanation import Route
from dynamo_ray.simulator import clock


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
