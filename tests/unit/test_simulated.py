"""The simulated engine alone, in virtual time: its memory, its hand-offs, its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from engines import answer, collect, greedy, request

from backends.engine import EngineError, KVHandoff, LaunchSpec, Role
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
