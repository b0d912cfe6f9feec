"""The simulated engine alone, in virtual time: its memory, its hand-offs, its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from engines import answer, collect, greedy, request

from backends.engine import (
    EngineError,
    EngineStartError,
    KVHandoff,
    LaunchSpec,
    NodePlace,
    Pause,
    Resume,
    Role,
    Sleep,
    UpdateWeights,
    Wake,
)
from backends.simulated import SimulatedEngine
from dynamo_ray.simulator import clock


@asynccontextmanager
async def engine(role: Role = Role.AGGREGATED, **args: Any) -> AsyncIterator[SimulatedEngine]:
    made = SimulatedEngine(LaunchSpec(role, role, "m", "", kv_events=False, engine_args=args))
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


@asynccontextmanager
async def pair(**args: Any) -> AsyncIterator[tuple[SimulatedEngine, SimulatedEngine]]:
    async with engine(Role.PREFILL, **args) as prefill, engine(Role.DECODE, **args) as decode:
        yield prefill, decode


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return [1000 * seed + n for n in range(num_tokens)]


def room(prefill: SimulatedEngine, number: int) -> KVHandoff:
    assert prefill.info is not None
    return KVHandoff({"bootstrap_address": prefill.info.bootstrap_address, "bootstrap_room": number})


def test_requests_that_fit_alone_finish_when_together_they_do_not_fit() -> None:
    async def main() -> None:
        async with engine(kv_blocks=10, max_model_len=160) as made:
            prompts = [prompt(40, seed) for seed in range(3)]
            alone = [(await answer(made, ids, greedy(60))).tokens for ids in prompts]
            together = await asyncio.gather(*(answer(made, ids, greedy(60)) for ids in prompts))
            assert [got.tokens for got in together] == alone
            assert made.load()[0].kv_used_blocks == 0

    clock.run(main())


def test_a_request_may_fill_the_whole_memory() -> None:
    async def main() -> None:
        async with engine(kv_blocks=4, max_model_len=64) as made:
            assert len((await answer(made, prompt(50), greedy(100))).tokens) == 14

    clock.run(main())


def test_a_preempted_prompt_is_counted_once() -> None:
    async def main() -> None:
        async with engine(kv_blocks=10, max_model_len=160) as made:
            await asyncio.gather(*(answer(made, prompt(40, seed), greedy(60)) for seed in range(3)))
            assert made.computed_tokens == 3 * 40

    clock.run(main())


def test_a_decode_leg_holds_blocks_and_counts_as_waiting_while_its_kv_is_on_its_way() -> None:
    async def main() -> None:
        async with pair(transfer_tokens_per_s=100.0) as (prefill, decode):
            computed = await answer(prefill, prompt(100), greedy(5), leg=Role.PREFILL)
            leg = asyncio.create_task(answer(decode, prompt(100), greedy(5), leg=Role.DECODE, handoff=computed.handoff))
            await asyncio.sleep(0.5)
            (load,) = decode.load()
            assert (load.num_running, load.num_waiting, load.kv_used_blocks) == (0, 1, 7)
            assert len((await leg).tokens) == 5
            assert prefill.load()[0].kv_used_blocks == 0

    clock.run(main())


def test_a_decode_leg_fetches_nothing_before_there_is_room_for_it() -> None:
    async def main() -> None:
        async with pair(kv_blocks=10, max_model_len=160, transfer_tokens_per_s=100.0) as (prefill, decode):
            computed = await answer(prefill, prompt(100), greedy(5), leg=Role.PREFILL)
            other = asyncio.create_task(answer(decode, prompt(100, seed=1), greedy(40)))
            await asyncio.sleep(0.05)
            leg = asyncio.create_task(answer(decode, prompt(100), greedy(5), leg=Role.DECODE, handoff=computed.handoff))
            started = asyncio.get_running_loop().time()
            await other
            await leg
            assert asyncio.get_running_loop().time() - started > 0.35 + 1.0, "one after the other"

    clock.run(main())


def test_an_abort_during_the_transfer_ends_the_leg_at_once() -> None:
    async def main() -> None:
        async with pair(transfer_tokens_per_s=10.0) as (prefill, decode):
            computed = await answer(prefill, prompt(100), greedy(5), leg=Role.PREFILL)
            made = request(prompt(100), greedy(5), leg=Role.DECODE, handoff=computed.handoff)
            leg = asyncio.create_task(collect(decode, made))
            await asyncio.sleep(1.0)
            await decode.abort(made.request_id)
            aborted_at = asyncio.get_running_loop().time()
            assert (await leg).finish_reason == "abort"
            assert asyncio.get_running_loop().time() == aborted_at
            await asyncio.sleep(20.0)
            (load,) = decode.load()
            assert (load.num_running, load.num_waiting, load.kv_used_blocks) == (0, 0, 0)

    clock.run(main())


@pytest.mark.parametrize("moment_s", [0.0, 0.5], ids=["before", "during"])
def test_a_crash_takes_the_kv_along(moment_s: float) -> None:
    async def main() -> None:
        async with pair(transfer_tokens_per_s=100.0) as (prefill, decode):
            computed = await answer(prefill, prompt(100), greedy(5), leg=Role.PREFILL)
            asyncio.get_running_loop().call_later(moment_s, prefill.kill, "test")
            await asyncio.sleep(0)
            with pytest.raises(EngineError) as lost:
                await answer(decode, prompt(100), greedy(5), leg=Role.DECODE, handoff=computed.handoff)
            assert lost.value.retryable
            assert decode.load()[0].kv_used_blocks == 0

    clock.run(main())


def test_a_crashed_engine_takes_no_request_even_in_the_same_moment() -> None:
    async def main() -> None:
        async with engine() as made:
            made.kill("test")
            with pytest.raises(EngineError, match="test"):
                await answer(made, prompt(5), greedy(1))

    clock.run(main())


def test_decode_legs_that_leave_before_their_kv_was_offered_leave_nothing() -> None:
    async def main() -> None:
        async with pair(handoff="concurrent") as (prefill, decode):
            legs = [
                asyncio.create_task(
                    answer(decode, prompt(20), greedy(5), leg=Role.DECODE, handoff=room(prefill, number))
                )
                for number in range(5)
            ]
            await asyncio.sleep(1.0)
            assert len(prefill._fabric._peers) == len(prefill._fabric._offers) == 5
            for leg in legs:
                leg.cancel()
            await asyncio.sleep(1.0)
            assert not prefill._fabric._peers
            assert not prefill._fabric._offers
            assert decode.load()[0].kv_used_blocks == 0

    clock.run(main())


def test_a_stop_ends_a_decode_leg_whose_kv_is_on_its_way() -> None:
    async def main() -> None:
        async with pair(transfer_tokens_per_s=10.0) as (prefill, decode):
            computed = await answer(prefill, prompt(100), greedy(5), leg=Role.PREFILL)
            leg = asyncio.create_task(answer(decode, prompt(100), greedy(5), leg=Role.DECODE, handoff=computed.handoff))
            await asyncio.sleep(1.0)
            await decode.stop()
            with pytest.raises(EngineError, match="stopped"):
                await leg

    clock.run(main())


def test_without_prefix_caching_nothing_is_found_again_nor_told() -> None:
    async def main() -> None:
        made = SimulatedEngine(LaunchSpec("w", Role.AGGREGATED, "m", "", engine_args={"prefix_caching": False}))
        info = await made.start()
        assert info is not None
        assert (info.caches_prefixes, info.kv_event_sources) == (False, ())
        first, second = [await answer(made, prompt(40), greedy(10)) for _ in range(2)]
        assert first.tokens == second.tokens
        assert second.chunks[0].cached_tokens == 0
        assert [load.kv_used_blocks for load in made.load()] == [0]
        await made.stop()

    clock.run(main())


# Adapters and priorities.


def test_an_adapter_has_tokens_and_a_cache_of_its_own() -> None:
    async def main() -> None:
        launch = LaunchSpec("w", Role.AGGREGATED, "m", "", kv_events=False, loras={"sql": "/a", "poems": "/b"})
        made = SimulatedEngine(launch)
        info = await made.start()
        assert info is not None
        assert info.loras == ("sql", "poems")
        base, sql, poems = [await answer(made, prompt(40), greedy(10), lora=lora) for lora in (None, "sql", "poems")]
        assert len({tuple(got.tokens) for got in (base, sql, poems)}) == 3
        assert [got.chunks[0].cached_tokens for got in (base, sql, poems)] == [0, 0, 0]
        again = await answer(made, prompt(40), greedy(10), lora="sql")
        assert (again.tokens, again.chunks[0].cached_tokens) == (sql.tokens, 32)
        with pytest.raises(EngineError, match="it has sql, poems"):
            await answer(made, prompt(40), greedy(10), lora="prose")
        await made.stop()

    clock.run(main())


def test_a_greater_priority_runs_earlier_and_equals_in_order() -> None:
    async def main() -> None:
        async with engine(max_running=1) as made:
            ended: list[str] = []

            async def run(name: str, priority: int) -> None:
                await answer(made, prompt(20), greedy(3), priority=priority)
                ended.append(name)

            names = [("first", 0), ("low", -1), ("a", 0), ("high", 7), ("b", 0), ("higher", 8)]
            async with asyncio.TaskGroup() as group:
                for name, priority in names:
                    group.create_task(run(name, priority))
                    await asyncio.sleep(0.001)
            assert ended == ["first", "higher", "high", "a", "b", "low"]

    clock.run(main())


def test_a_preempted_request_goes_on_before_others_of_its_priority() -> None:
    async def main() -> None:
        async with engine(kv_blocks=10, max_model_len=160) as made:
            ended: list[int] = []

            async def run(number: int) -> None:
                await answer(made, prompt(40, number), greedy(60))
                ended.append(number)

            async with asyncio.TaskGroup() as group:
                for number in range(4):
                    group.create_task(run(number))
                    await asyncio.sleep(0.001)
            assert ended == [0, 1, 2, 3]

    clock.run(main())


# Commands.


def flushed(made: SimulatedEngine) -> bool:
    return not any(pool.cached_blocks(prompt(40)) for pool in made._ranks)


def test_a_pause_holds_what_is_inside_and_what_comes_and_resume_goes_on() -> None:
    async def main() -> None:
        async with engine() as made:
            expected = (await answer(made, prompt(40), greedy(50))).tokens
            tokens: list[int] = []

            async def read() -> None:
                async for chunk in made.generate(request(prompt(40), greedy(50))):
                    tokens.extend(chunk.token_ids)

            inside = asyncio.create_task(read())
            await asyncio.sleep(0.105)
            await made.control(Pause())
            before = len(tokens)
            assert 0 < before < 50
            later = asyncio.create_task(answer(made, prompt(40), greedy(5)))
            await asyncio.sleep(60.0)
            assert len(tokens) == before, "not even the step that was under way"
            assert made.load()[0].kv_used_blocks > 0
            await made.check_health()
            await made.control(Resume())
            await inside
            assert tokens == expected
            assert (await later).tokens == expected[:5]

    clock.run(main())


def test_a_pause_may_abort_what_is_inside() -> None:
    async def main() -> None:
        async with engine() as made:
            inside = asyncio.create_task(answer(made, prompt(40), greedy(50)))
            await asyncio.sleep(0.1)
            await made.control(Pause(abort=True))
            assert (await inside).finish_reason == "abort"
            assert made.load()[0].kv_used_blocks == 0
            later = asyncio.create_task(answer(made, prompt(40), greedy(5)))
            await asyncio.sleep(1.0)
            assert not later.done()
            await made.control(Resume())
            assert len((await later).tokens) == 5

    clock.run(main())


def test_other_weights_give_other_tokens_and_find_nothing_cached(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine() as made:
            old = await answer(made, prompt(40), greedy(10))
            assert not flushed(made)
            await made.control(UpdateWeights(str(tmp_path)))
            assert flushed(made)
            new = await answer(made, prompt(40), greedy(10))
            assert (new.tokens != old.tokens, new.chunks[0].cached_tokens) == (True, 0)
            await made.control(UpdateWeights(str(tmp_path)))
            assert (await answer(made, prompt(40), greedy(10))).tokens == new.tokens

    clock.run(main())


def test_weights_that_are_not_there_change_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine() as made:
            old = await answer(made, prompt(40), greedy(10))
            with pytest.raises(EngineError, match="no folder") as refused:
                await made.control(UpdateWeights(str(tmp_path / "missing")))
            assert (refused.value.retryable, refused.value.field) == (False, "path")
            assert (await answer(made, prompt(40), greedy(10))).tokens == old.tokens
            assert not flushed(made)

    clock.run(main())


@pytest.mark.parametrize("discard", [False, True])
def test_asleep_it_holds_nothing_and_takes_nothing(discard: bool, tmp_path: Path) -> None:
    async def main() -> None:
        async with engine() as made:
            tokens = (await answer(made, prompt(40), greedy(10))).tokens
            inside = asyncio.create_task(answer(made, prompt(40), greedy(50)))
            await asyncio.sleep(0.1)
            await made.control(Sleep(discard_weights=discard))
            assert (await inside).finish_reason == "abort"
            assert made.load()[0].kv_used_blocks == 0
            with pytest.raises(EngineError, match="asleep") as refused:
                await answer(made, prompt(40), greedy(10))
            assert refused.value.retryable
            with pytest.raises(EngineError, match="asleep"):
                await made.control(UpdateWeights(str(tmp_path)))
            await made.control(Wake())
            assert flushed(made)
            if discard:
                with pytest.raises(EngineError, match="no weights"):
                    await answer(made, prompt(40), greedy(10))
                await made.control(UpdateWeights(str(tmp_path)))
            assert ((await answer(made, prompt(40), greedy(10))).tokens == tokens) is not discard

    clock.run(main())


def test_a_sleeping_prefill_engine_gives_up_what_waits_for_decode() -> None:
    async def main() -> None:
        async with pair() as (prefill, decode):
            computed = await answer(prefill, prompt(100), greedy(5), leg=Role.PREFILL)
            assert prefill.load()[0].kv_used_blocks == 7
            await prefill.control(Sleep())
            assert prefill.load()[0].kv_used_blocks == 0
            with pytest.raises(EngineError, match="cannot be fetched") as lost:
                await answer(decode, prompt(100), greedy(5), leg=Role.DECODE, handoff=computed.handoff)
            assert lost.value.retryable

    clock.run(main())


# A worker over several nodes.


def nodes(serving: str, **fields: Any) -> list[SimulatedEngine]:
    """One engine a node, of a worker over two."""
    places = (NodePlace(), NodePlace())
    args = {"serving": serving, **fields.pop("engine_args", {})}
    return [
        SimulatedEngine(
            LaunchSpec("w", Role.AGGREGATED, "m", "", node_rank=rank, nodes=places, engine_args=args, **fields)
        )
        for rank in range(2)
    ]


def test_a_node_that_is_served_through_its_leader_lives_and_dies_but_takes_nothing() -> None:
    async def main() -> None:
        leader, other = nodes("leader", attn_dp=4, kv_events=False)
        infos = [await leader.start(), await other.start()]
        assert infos[0] is not None
        assert (infos[0].attn_dp_size, infos[1]) == (4, None)
        with pytest.raises(EngineError, match="through its leader"):
            await answer(other, prompt(5), greedy(1))
        assert other.load() == ()
        await other.check_health()
        for command in (Pause(), Resume(), Sleep(), Wake()):
            await other.control(command)
        died = asyncio.create_task(other.died())
        await asyncio.sleep(1.0)
        assert not died.done()
        other.kill("test")
        assert await died == "test"
        with pytest.raises(EngineError, match="test"):
            await other.check_health()
        with pytest.raises(EngineError, match="test"):
            await other.control(Pause())
        for node in (leader, other):
            await node.stop()

    clock.run(main())


def test_every_node_may_serve_its_own_ranks() -> None:
    async def main() -> None:
        made = nodes("every_node", attn_dp=4)
        infos = [await node.start() for node in made]
        assert [(info.first_dp_rank, info.attn_dp_size) for info in infos if info is not None] == [(0, 2), (2, 2)]
        assert [len(info.kv_event_sources) for info in infos if info is not None] == [2, 2]
        first, second = [await answer(node, prompt(20), greedy(5), dp_rank=1) for node in made]
        assert first.tokens == second.tokens
        with pytest.raises(EngineError, match="dp_rank 2"):
            await answer(made[1], prompt(5), greedy(1), dp_rank=2)
        for node in made:
            await node.stop()

    clock.run(main())


def test_ranks_that_do_not_divide_by_the_nodes_cannot_be_served_by_each() -> None:
    async def main() -> None:
        with pytest.raises(EngineStartError, match=r"engine_args\.serving.*attn_dp=3"):
            await nodes("every_node", attn_dp=3)[0].start()

    clock.run(main())
