"""What TensorRT-LLM's adapter does beyond the common suite, on the double of the library."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from engines import (
    KINDS,
    Answer,
    Site,
    answer,
    collect,
    greedy,
    hand_over,
    prompt,
    request,
    running,
    spec,
    wait_for_load,
    wait_until_idle,
)

from backends import create
from backends.engine import EngineError, EngineStartError, Feature, KVHandoff, Sampling, Structure

NAMES = [name for name, kind in KINDS.items() if kind.backend == "trtllm"]
PRIORITY = {"scheduler_config": {"waiting_queue_policy": "priority"}}

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.filterwarnings("default")]


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest) -> Site:
    made: Site = request.getfixturevalue(f"{request.param}_site")
    return made


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    made: str = request.param
    return made


@pytest.mark.parametrize("max_tokens", [1, 8])
async def test_a_token_of_prefill_that_ends_the_answer_is_all_of_it(pair: Site, max_tokens: int) -> None:
    """TensorRT-LLM's decode side does not look at it, and goes on."""
    ids = prompt(60, seed=300)
    first = (await answer(pair.aggregated, ids, greedy(1))).tokens[0]
    got = await hand_over(pair, ids, greedy(max_tokens, stop_token_ids=(first,)))
    assert (got.tokens, got.finish_reason) == ([first], "stop")
    await wait_until_idle(pair.decode)
    await wait_until_idle(pair.prefill)


async def test_a_stop_token_of_decodes_own_ends_the_answer(pair: Site) -> None:
    ids = prompt(61, seed=301)
    whole = (await answer(pair.aggregated, ids, greedy(8))).tokens
    assert whole.index(whole[3]) == 3
    got = await hand_over(pair, ids, greedy(8, stop_token_ids=(whole[3],)))
    assert (got.tokens, got.finish_reason) == (whole[:4], "stop")


async def test_what_is_handed_over_survives_the_wire_as_it_is(pair: Site) -> None:
    seen: list[KVHandoff] = []
    await hand_over(pair, prompt(62, seed=302), greedy(2), handed_over=seen.append)
    (handoff,) = seen
    assert isinstance(handoff.params["opaque_state"], bytes)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(handoff), type=KVHandoff) == handoff


async def test_logprobs_over_a_hand_off_begin_with_prefills_token_or_are_refused(pair: Site) -> None:
    ids = prompt(63, seed=303)
    if pair.backend.endswith("1.2"):
        with pytest.raises(EngineError) as refusal:
            await hand_over(pair, ids, greedy(4, logprobs=2))
        assert (refusal.value.retryable, refusal.value.field) == (False, "logprobs")
        return
    whole = await answer(pair.aggregated, ids, greedy(4, logprobs=2))
    got = await hand_over(pair, ids, greedy(4, logprobs=2))
    assert logprobs(got) == logprobs(whole)
    assert [each.token_id for each in logprobs(got)] == got.tokens


async def test_structures_adapters_and_priorities_reach_it_where_it_was_started_for_them(name: str) -> None:
    args = {"guided_decoding_backend": "xgrammar"} | ({} if name.endswith("1.2") else PRIORITY)
    launch = spec(name, engine_args=args, loras={"french": "/loras/french", "german": "/loras/german"})
    async with running(launch, name) as (engine, info):
        assert info.loras == ("french", "german")
        assert (Feature.PRIORITY in info.features) == (not name.endswith("1.2"))
        given: list[dict[str, Any]] = []
        llm = engine._llm  # type: ignore[attr-defined]
        generate = llm._generate
        llm._generate = lambda call: (given.append(call), generate(call))[1]
        ids = prompt(40, seed=304)
        plain = await answer(engine, ids, greedy(4))
        french = await answer(engine, ids, greedy(4), lora="french")
        german = await answer(engine, ids, greedy(4), lora="german")
        assert len({tuple(each.tokens) for each in (plain, french, german)}) == 3
        loras = [call["lora_request"] for call in given]
        assert [lora and (lora.lora_name, lora.lora_int_id, lora.lora_path) for lora in loras] == [
            None,
            ("french", 1, "/loras/french"),
            ("german", 2, "/loras/german"),
        ]
        await answer(engine, ids, Sampling(2, structure=Structure("regex", "a+")))
        assert given[-1]["sampling_params"].guided_decoding.regex == "a+"
        if Feature.PRIORITY in info.features:
            await answer(engine, ids, greedy(2), priority=3)
            assert given[-1]["priority"] == 0.875
        with pytest.raises(EngineError) as refusal:
            await answer(engine, ids, greedy(2), lora="nobody")
        assert refusal.value.field == "lora"


async def test_a_request_without_a_rank_goes_where_the_fewest_are(name: str) -> None:
    async with running(spec(name, attn_dp=2, moe_ep=2), name) as (engine, _):
        async with (
            aclosing(engine.generate(request_of(1500))) as first,
            aclosing(engine.generate(request_of(1500))) as second,
        ):
            await anext(first)
            await anext(second)
            await wait_for_load(engine, lambda rank: rank.num_running == 1 and rank.kv_used_blocks > 0)
        await wait_until_idle(engine)


async def test_a_request_that_it_refuses_is_the_clients_and_one_that_it_loses_is_not(name: str) -> None:
    async with running(spec(name), name) as (engine, _):
        llm = engine._llm  # type: ignore[attr-defined]
        generate = llm._generate

        def refuse(call: dict[str, Any]) -> Any:
            raise type("RequestError", (RuntimeError,), {})("The sum of prompt length exceeds max_num_tokens\nat ...")

        llm._generate = refuse
        with pytest.raises(EngineError, match=r"max_num_tokens$") as refusal:
            await answer(engine, prompt(9), greedy(2))
        assert (refusal.value.retryable, refusal.value.field) == (False, "prompt")
        llm._generate = generate
        made = request_of(1500)
        async with aclosing(engine.generate(made)) as chunks:
            await anext(chunks)
            lose = next(iter(engine._inside.values())).output  # type: ignore[attr-defined]
            lose.put(type("RequestError", (RuntimeError,), {})("KV cache transfer failed"))
            with pytest.raises(EngineError, match="KV cache transfer failed") as lost:
                async for _ in chunks:
                    pass
        assert (lost.value.retryable, lost.value.field) == (True, None)
        assert (await answer(engine, prompt(9), greedy(2))).tokens, "the engine goes on"
        await wait_until_idle(engine)


async def test_an_executor_that_shuts_itself_down_is_a_death(name: str) -> None:
    async with running(spec(name), name) as (engine, _):
        llm = engine._llm  # type: ignore[attr-defined]
        going = asyncio.create_task(collect(engine, request_of(1500)))
        await wait_for_load(engine, lambda rank: rank.num_running == 1)
        await asyncio.to_thread(llm.shutdown)
        assert await asyncio.wait_for(engine.died(), 2.0)
        with pytest.raises(EngineError, match="died"):
            await asyncio.wait_for(going, 2.0)


async def test_a_death_reaches_a_stream_that_nobody_reads_at_the_time(name: str) -> None:
    async with running(spec(name), name) as (engine, _):
        stream = engine.generate(request_of(1500))
        await anext(stream)
        engine.workers()[0].kill()  # type: ignore[attr-defined]
        assert await asyncio.wait_for(engine.died(), 2.0)
        queue = next(iter(engine._inside.values())).output._queue  # type: ignore[attr-defined]
        while not queue.empty():
            queue.get_nowait()

        async def rest() -> None:
            async for _ in stream:
                pass

        reading = asyncio.create_task(rest())
        assert reading in (await asyncio.wait([reading], timeout=1.0))[0], "it waits without end"
        with pytest.raises(EngineError, match="died"):
            await reading


async def test_a_model_that_fails_to_load_on_a_rank_is_told_in_its_words(name: str) -> None:
    fields = KINDS[name].failing_start
    assert fields is not None
    words = "RuntimeError: CUDA out of memory. Tried to allocate 9 GiB"
    engine = create("trtllm", spec(name, **fields(words)))
    with KINDS[name].library(), pytest.raises(EngineStartError) as failed:
        await engine.start()
    assert "CUDA out of memory" in str(failed.value)
    assert "kv_cache_config.free_gpu_memory_fraction" in str(failed.value), "what would mend it"
    await engine.stop()


def request_of(max_tokens: int) -> Any:
    return request(prompt(40, seed=305), greedy(max_tokens))


def logprobs(got: Answer) -> list[Any]:
    return [each for chunk in got.chunks for each in chunk.logprobs or ()]
