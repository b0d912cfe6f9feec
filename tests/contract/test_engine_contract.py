"""One suite for every engine: what backends.engine promises."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pickle
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq
import zmq.asyncio
from engines import (
    KINDS,
    Site,
    answer,
    collect,
    crash,
    engine_processes,
    greedy,
    hand_over,
    listens,
    meet,
    place,
    prompt,
    request,
    running,
    spec,
    used_blocks,
    wait_for_load,
    wait_until_idle,
)
from node_process import RemoteNode, node_process
from tokenizers import Tokenizer

from backends import create
from backends.engine import (
    Command,
    Engine,
    EngineError,
    EngineInfo,
    EngineStartError,
    Feature,
    GenerateRequest,
    KVEventSource,
    KVHandoff,
    Pause,
    RankLoad,
    Resume,
    Role,
    Sampling,
    Sleep,
    Structure,
    TokenChunk,
    UpdateWeights,
    Wake,
)
from backends.kv_events import BlockStored, KVEventBatch, decoder
from dynamo_ray.events.zmq import KVEventSubscriber
from dynamo_ray.routing.kv_index import Holder

STRUCTURES = {
    Feature.JSON_OBJECT: Structure("json_object"),
    Feature.JSON_SCHEMA: Structure("json_schema", '{"type": "integer"}'),
    Feature.REGEX: Structure("regex", "[a-z]+"),
    Feature.GRAMMAR: Structure("grammar", 'root ::= "yes" | "no"'),
}

BEGINNINGS = {
    Feature.JSON_OBJECT: r"\s*\{.*",
    Feature.JSON_SCHEMA: r"\s*-?\d*\s*",
    Feature.REGEX: "[a-z]+",
    Feature.GRAMMAR: "yes|ye|y|no|n",
}
"""What an answer that was cut short may be."""
COMMANDS: dict[str, Command] = {
    "pause": Pause(),
    "resume": Resume(),
    "update_weights": UpdateWeights("/nowhere"),
    "sleep": Sleep(),
    "wake": Wake(),
}

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    # What vLLM and its libraries warn about is not ours to mend.
    pytest.mark.filterwarnings("default"),
]


async def test_an_engine_says_what_it_is(site: Site) -> None:
    engines = {Role.AGGREGATED: site.aggregated, Role.PREFILL: site.prefill, Role.DECODE: site.decode}
    for role, info in site.infos.items():
        assert (info.backend, info.role, info.attn_dp_size) == (site.kind.backend, role, 1)
        assert info.version
        assert info.block_size > 0
        assert info.kv_total_blocks * info.block_size >= info.max_model_len
        assert bool(info.kv_event_sources) == info.caches_prefixes
        assert [rank.kv_total_blocks for rank in engines[role].load()] == [info.kv_total_blocks]


async def test_both_sides_of_a_pair_hand_over_in_the_same_style(pair: Site) -> None:
    styles = {role: info.handoff for role, info in pair.infos.items()}
    assert styles.pop(Role.AGGREGATED) == "none"
    assert styles[Role.PREFILL] == styles[Role.DECODE] != "none"
    meets = {role: info.bootstrap_address is not None for role, info in pair.infos.items()}
    assert meets == dict.fromkeys(meets, False) | {Role.PREFILL: pair.hands_over == "concurrent"}


async def test_tokens_stream_and_only_the_last_chunk_has_a_finish_reason(site: Site) -> None:
    made = request(prompt(40), greedy(6))
    got = await collect(site.aggregated, made)
    assert len(got.tokens) == 6
    assert len(got.chunks) > 1
    assert all(chunk.token_ids for chunk in got.chunks)
    assert {chunk.request_id for chunk in got.chunks} == {made.request_id}
    assert [chunk.finish_reason for chunk in got.chunks] == [None] * (len(got.chunks) - 1) + ["length"]
    assert got.chunks[0].cached_tokens is not None
    assert all(chunk.cached_tokens is None for chunk in got.chunks[1:])


async def test_a_stop_token_ends_the_answer_and_is_its_last_token(site: Site) -> None:
    whole = (await answer(site.aggregated, prompt(30), greedy(12))).tokens
    stop = whole[5]
    got = await answer(site.aggregated, prompt(30), greedy(12, stop_token_ids=(stop,)))
    assert got.finish_reason == "stop"
    assert got.tokens == whole[: whole.index(stop) + 1]


async def test_min_tokens_outlasts_a_stop_token(site: Site) -> None:
    needs(site, Feature.MIN_TOKENS)
    first = (await answer(site.aggregated, prompt(30), greedy(1))).tokens[0]
    got = await answer(site.aggregated, prompt(30), greedy(8, stop_token_ids=(first,), min_tokens=3))
    assert len(got.tokens) >= 3


async def test_greedy_answers_repeat_alone_and_in_company(site: Site) -> None:
    prompts = [prompt(n) for n in (1, 15, 33, 64, 90)]
    alone = [(await answer(site.aggregated, ids, greedy(8))).tokens for ids in prompts]
    together = await asyncio.gather(*(answer(site.aggregated, ids, greedy(8)) for ids in prompts))
    assert [got.tokens for got in together] == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


async def test_a_seed_repeats_and_another_seed_differs(site: Site) -> None:
    needs(site, Feature.SEED)

    async def sample(seed: int) -> list[int]:
        return (await answer(site.aggregated, prompt(20), Sampling(max_tokens=12, temperature=1.0, seed=seed))).tokens

    first = await sample(7)
    assert await sample(7) == first
    assert await sample(8) != first


async def test_logprobs_come_with_as_many_alternatives_as_asked_for(site: Site) -> None:
    got = await answer(site.aggregated, prompt(20), greedy(4, logprobs=3))
    entries = [entry for chunk in got.chunks for entry in chunk.logprobs or ()]
    assert [entry.token_id for entry in entries] == got.tokens
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top) == 3
        assert entry.top[0][0] == entry.token_id, "a greedy token is the most likely one"
        assert [logprob for _, logprob in entry.top] == sorted((value for _, value in entry.top), reverse=True)
    none = await answer(site.aggregated, prompt(20), greedy(2, logprobs=0))
    assert [entry.top for chunk in none.chunks for entry in chunk.logprobs or ()] == [[], []]


@pytest.mark.parametrize("feature", Feature)
async def test_what_an_engine_has_it_does_and_what_it_has_not_it_refuses_by_name(site: Site, feature: Feature) -> None:
    sampling = Sampling(6, temperature=1.0)
    fields: dict[str, Any] = {}
    match feature:
        case Feature.CACHE_SALT:
            fields = {"cache_salt": "tenant"}
        case Feature.PRIORITY:
            fields = {"priority": 1}
        case Feature.SEED | Feature.MIN_P | Feature.MIN_TOKENS:
            values = {Feature.SEED: 7, Feature.MIN_P: 0.1, Feature.MIN_TOKENS: 1}
            sampling = msgspec.structs.replace(sampling, **{feature.value: values[feature]})
        case _:
            sampling = msgspec.structs.replace(sampling, structure=STRUCTURES[feature])
    if feature in site.info.features and feature in STRUCTURES:
        await keeps_to_its_structure(site, sampling, BEGINNINGS[feature])
    elif feature in site.info.features:
        assert (await answer(site.aggregated, prompt(9), sampling, **fields)).tokens
    else:
        field = "structure" if feature in STRUCTURES else feature.value
        await refused(site.aggregated, field, sampling=sampling, **fields)


async def test_an_adapter_that_is_not_there_is_refused(site: Site) -> None:
    assert "nobody" not in site.info.loras
    await refused(site.aggregated, "lora", lora="nobody")


async def test_more_logprobs_than_the_engine_has_are_refused(site: Site) -> None:
    limit = site.info.max_logprobs
    await refused(site.aggregated, "logprobs", sampling=greedy(2, logprobs=limit + 1))


async def test_a_rank_that_exists_is_taken_and_another_is_refused(site: Site) -> None:
    assert (await answer(site.aggregated, prompt(5), greedy(1), dp_rank=0)).tokens
    await refused(site.aggregated, "dp_rank", dp_rank=1)


async def test_a_prompt_that_cannot_fit_is_refused(site: Site) -> None:
    limit = site.info.max_model_len
    await refused(site.aggregated, "prompt", token_ids=prompt(limit))
    await refused(site.aggregated, "prompt", token_ids=[])


async def test_a_token_that_cannot_be_and_an_answer_without_tokens_are_refused(site: Site) -> None:
    await refused(site.aggregated, "prompt", token_ids=[5, -1])
    await refused(site.aggregated, "max_tokens", sampling=greedy(0))


async def test_a_decode_leg_without_a_handoff_is_refused(pair: Site) -> None:
    await refused(pair.decode, "handoff", leg=Role.DECODE)


async def test_a_leg_of_another_role_is_refused(pair: Site) -> None:
    await refused(pair.decode, "leg", leg=Role.PREFILL)
    await refused(pair.prefill, "leg", leg=Role.DECODE)
    await refused(pair.aggregated, "leg", leg=Role.PREFILL)


async def test_an_id_that_is_already_running_is_refused(site: Site) -> None:
    made = request(prompt(20), greedy(64))
    async with aclosing(site.aggregated.generate(made)) as chunks:
        await anext(chunks)
        with pytest.raises(EngineError) as refusal:
            await collect(site.aggregated, made)
        assert (refusal.value.retryable, refusal.value.field) == (False, "request_id")


async def test_a_repeated_prompt_is_found_in_the_cache_but_not_under_another_salt(site: Site) -> None:
    ids = prompt(100, seed=1)
    first = await answer(site.aggregated, ids, greedy(4))
    again = await answer(site.aggregated, ids, greedy(4))
    assert first.tokens == again.tokens
    assert first.chunks[0].cached_tokens == 0
    assert again.chunks[0].cached_tokens is not None
    if not site.info.caches_prefixes:
        assert again.chunks[0].cached_tokens == 0
        return
    assert 64 <= again.chunks[0].cached_tokens < 100
    needs(site, Feature.CACHE_SALT)
    salted = await answer(site.aggregated, ids, greedy(4), cache_salt="tenant")
    assert salted.chunks[0].cached_tokens == 0
    assert salted.tokens == first.tokens


async def test_a_handed_over_prompt_is_answered_as_by_one_engine(pair: Site) -> None:
    for ids in (prompt(70, seed=2), prompt(129, seed=2)):
        whole = await answer(pair.aggregated, ids, greedy(10))
        split = await hand_over(pair, ids, greedy(10))
        assert split.tokens == whole.tokens
        assert split.chunks[0].cached_tokens == 0
        assert split.chunks[0].transferred_tokens == len(ids)
    await wait_until_idle(pair.prefill)
    await wait_until_idle(pair.decode)


async def test_many_at_once_are_handed_over_each_to_its_own_answer(pair: Site) -> None:
    prompts = [prompt(n, seed=12) for n in (1, 31, 64, 90, 128, 200)]
    whole = [(await answer(pair.aggregated, ids, greedy(6))).tokens for ids in prompts]
    split = await asyncio.gather(*(hand_over(pair, ids, greedy(6)) for ids in prompts))
    assert [got.tokens for got in split] == whole
    await wait_until_idle(pair.prefill)
    await wait_until_idle(pair.decode)


async def test_a_decode_leg_fetches_only_what_it_has_not_cached(pair: Site) -> None:
    if not pair.infos[Role.DECODE].caches_prefixes:
        pytest.skip("this decode engine caches nothing, as it was started")
    ids = prompt(100, seed=9)
    await hand_over(pair, ids, greedy(4))
    again = (await hand_over(pair, ids, greedy(4))).chunks[0]
    assert again.cached_tokens is not None
    assert again.transferred_tokens is not None
    assert 64 <= again.cached_tokens < 100
    assert again.cached_tokens + again.transferred_tokens == len(ids)
    await wait_until_idle(pair.prefill)


async def test_a_prefill_leg_of_one_token_is_enough_for_an_answer_of_one(pair: Site) -> None:
    ids = prompt(50, seed=3)
    whole = await answer(pair.aggregated, ids, greedy(1))
    split = await hand_over(pair, ids, greedy(1))
    assert (split.tokens, split.finish_reason) == (whole.tokens, whole.finish_reason)
    await wait_until_idle(pair.prefill)


async def test_a_prefill_leg_holds_its_kv_until_it_is_released(pair: Site) -> None:
    takes(pair, "sequential")
    made = request(prompt(80, seed=4), greedy(10), leg=Role.PREFILL)
    await collect(pair.prefill, made)
    await wait_for_load(pair.prefill, lambda rank: rank.kv_used_blocks > 0)
    await pair.prefill.release(made.request_id)
    await wait_until_idle(pair.prefill)
    await pair.prefill.release(made.request_id)
    await pair.prefill.release("never seen")


async def test_a_release_right_after_the_handoff_frees_too(pair: Site) -> None:
    takes(pair, "sequential")
    made = [request(prompt(80, seed=10 + n), greedy(10), leg=Role.PREFILL) for n in range(6)]
    await asyncio.gather(*(compute_and_release(pair, leg) for leg in made))
    await wait_until_idle(pair.prefill)


@pytest.mark.parametrize("computing_s", [0.0, 0.02, 0.1])
async def test_closing_a_prefill_leg_around_its_handoff_frees_its_kv(pair: Site, computing_s: float) -> None:
    """Its hand-off is still to be made, on its way to us, or here and unread; nobody fetches it."""
    for turns in range(12):
        leg = asyncio.create_task(collect(pair.prefill, prefill_leg(pair, prompt(40, seed=200 + turns))))
        for _ in range(5):
            await asyncio.sleep(0)  # it goes to the engine
        time.sleep(computing_s)  # what is ready by then, this loop learns in its next turns
        for _ in range(turns):
            await asyncio.sleep(0)
        leg.cancel()
        await asyncio.gather(leg, return_exceptions=True)
        if not leg.cancelled():
            await pair.prefill.release(leg.result().chunks[0].request_id)
    await hand_over(pair, prompt(40), greedy(4))  # a later step reports the load
    await wait_until_idle(pair.prefill, timeout_s=2.0)
    await wait_until_idle(pair.decode)


async def test_a_release_before_the_handoff_is_made_harms_nothing(pair: Site) -> None:
    takes(pair, "sequential")
    made = request(prompt(40, seed=250), greedy(4), leg=Role.PREFILL)
    leg = asyncio.create_task(collect(pair.prefill, made))
    await asyncio.sleep(0)
    await pair.prefill.release(made.request_id)
    await pair.prefill.release((await leg).chunks[0].request_id)
    await wait_until_idle(pair.prefill)


@pytest.mark.parametrize("first", [Role.PREFILL, Role.DECODE])
async def test_either_leg_may_come_first(pair: Site, first: Role) -> None:
    takes(pair, "concurrent")
    ids = prompt(70, seed=20)
    whole = await answer(pair.aggregated, ids, greedy(5))
    meeting = meet(pair)
    computing = collect(pair.prefill, prefill_leg(pair, ids, meeting))
    decoding = answer(pair.decode, ids, greedy(5), leg=Role.DECODE, handoff=meeting)
    earlier, later = (computing, decoding) if first is Role.PREFILL else (decoding, computing)
    begun = asyncio.create_task(earlier)
    await asyncio.sleep(0.3)
    assert first is Role.PREFILL or not begun.done(), "it decodes what nobody computed"
    ended = (await later, await begun)
    decoded = ended[0] if first is Role.PREFILL else ended[1]
    assert decoded.tokens == whole.tokens
    await wait_until_idle(pair.prefill)
    await wait_until_idle(pair.decode)


async def test_closing_both_legs_before_they_meet_frees_both_engines(pair: Site) -> None:
    takes(pair, "concurrent")
    for ids in (prompt(60, seed=21), prompt(1000, seed=21)):
        computing = prefill_leg(pair, ids)
        waiting = request(ids, greedy(50), leg=Role.DECODE, handoff=meet(pair))  # for another room than that one
        legs = [
            asyncio.create_task(collect(pair.prefill, computing)),
            asyncio.create_task(collect(pair.decode, waiting)),
        ]
        await asyncio.sleep(0.2)
        assert not legs[1].done()
        for leg in legs:
            leg.cancel()
        await asyncio.gather(*legs, return_exceptions=True)
        await pair.prefill.release(computing.request_id)
    await hand_over(pair, prompt(40), greedy(2))
    await wait_until_idle(pair.prefill)
    await wait_until_idle(pair.decode)


async def test_a_decode_leg_whose_prefill_side_dies_is_lost_and_may_be_retried(pair: Site) -> None:
    takes(pair, "concurrent")
    async with running(spec(pair.backend, Role.PREFILL), pair.backend) as (engine, info):
        doomed = dataclasses.replace(pair, prefill=engine, infos={**pair.infos, Role.PREFILL: info})
        decode = asyncio.create_task(answer(pair.decode, prompt(60), greedy(5), leg=Role.DECODE, handoff=meet(doomed)))
        await asyncio.sleep(0.2)
        crash(engine)
        await engine.stop()  # as its worker does, when its engine has died
        with pytest.raises(EngineError) as lost:
            await asyncio.wait_for(decode, 60.0)
        assert lost.value.retryable
    await hand_over(pair, prompt(40), greedy(2))
    # SGLang keeps the blocks for 30 s longer: what did not say that it has stopped might still write into them.
    await wait_until_idle(pair.decode, timeout_s=45.0)


async def test_an_abort_ends_the_stream_and_frees_its_kv(site: Site) -> None:
    made = request(prompt(60, seed=5), greedy(1500))
    chunks: list[TokenChunk] = []
    async for chunk in site.aggregated.generate(made):
        chunks.append(chunk)
        if len(chunks) == 2:
            await wait_for_load(site.aggregated, lambda rank: rank.kv_used_blocks > 0)
            await site.aggregated.abort(made.request_id)
    assert chunks[-1].finish_reason == "abort"
    await wait_until_idle(site.aggregated, timeout_s=2.0)
    await site.aggregated.abort(made.request_id)
    await site.aggregated.abort("never seen")


async def test_closing_the_generator_frees_its_kv(site: Site) -> None:
    async with aclosing(site.aggregated.generate(request(prompt(60, seed=6), greedy(1500)))) as chunks:
        await anext(chunks)
    await wait_until_idle(site.aggregated, timeout_s=2.0)


async def test_closing_a_decode_leg_frees_both_engines(pair: Site) -> None:
    ids = prompt(90, seed=7)
    meeting = meet(pair) if pair.hands_over == "concurrent" else None
    computing = asyncio.create_task(collect(pair.prefill, prefill_leg(pair, ids, meeting, max_tokens=1500)))
    if meeting is None:
        meeting = (await computing).handoff
    leg = request(ids, greedy(1500), leg=Role.DECODE, handoff=meeting)
    async with aclosing(pair.decode.generate(leg)) as chunks:
        await anext(chunks)
    await computing
    await wait_until_idle(pair.decode, timeout_s=2.0)
    await wait_until_idle(pair.prefill, timeout_s=2.0)


async def test_cancelling_before_the_first_token_frees_its_kv(site: Site) -> None:
    task = asyncio.create_task(answer(site.aggregated, prompt(1000, seed=8), greedy(1000)))
    await asyncio.sleep(0)  # it runs up to the engine's door
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await answer(site.aggregated, prompt(5), greedy(1))  # a later step reports what the cancelled request left
    await wait_until_idle(site.aggregated)


async def test_events_tell_which_blocks_are_stored_and_can_be_replayed(site: Site) -> None:
    if not site.info.kv_event_sources:
        assert not site.info.caches_prefixes
        pytest.skip("this engine caches nothing, as it was started")
    (source,) = site.info.kv_event_sources
    block_size = site.info.block_size
    context = zmq.asyncio.Context()
    try:
        with context.socket(zmq.SUB) as live:
            live.subscribe(b"")
            live.connect(source.endpoint)
            ids, batch = await first_live_batch(site.aggregated, live, source, 4 * block_size + 3)
    finally:
        context.term()
    stored = [event for event in batch.events if isinstance(event, BlockStored)]
    assert [token for event in stored for token in event.token_ids] == ids[: 4 * block_size]
    assert not any(isinstance(event.token_ids, list) for event in stored), "integers, which every reader pays for"
    assert {event.block_size for event in stored} == {block_size}
    assert stored[0].parent_block_hash is None
    assert len({block for event in stored for block in event.block_hashes}) == 4
    replayed = await replayed_batches(source, until=batch)
    assert batch in replayed
    assert [each.sequence for each in replayed] == list(range(len(replayed)))


async def test_a_crash_is_reported_at_once_and_nothing_is_left(site: Site) -> None:
    async with running(spec(site.backend), site.backend) as (engine, info):
        left = Remains.of(engine, info)
        await engine.check_health()
        stream = asyncio.create_task(answer(engine, prompt(20), greedy(1500)))
        await wait_for_load(engine, lambda rank: rank.num_running > 0)
        death = asyncio.create_task(engine.died())
        crash(engine)
        assert await asyncio.wait_for(death, 5.0)  # a process that held gigabytes takes a while to be gone
        with pytest.raises(EngineError) as lost:
            await stream
        assert lost.value.retryable
        with pytest.raises(EngineError):
            await engine.check_health()
        with pytest.raises(EngineError):
            await answer(engine, prompt(5), greedy(1))
    await engine.stop()
    left.are_gone()


async def test_a_stop_ends_every_stream_and_nothing_is_left(site: Site) -> None:
    async with running(spec(site.backend), site.backend) as (engine, info):
        left = Remains.of(engine, info)
        streams = [asyncio.create_task(answer(engine, prompt(20, seed), greedy(1500))) for seed in range(3)]
        await wait_for_load(engine, lambda rank: rank.num_running > 0)
        await engine.stop()
        for stream in streams:
            with pytest.raises(EngineError) as lost:
                await asyncio.wait_for(stream, 1.0)
            assert lost.value.retryable
        with pytest.raises(EngineError):
            await answer(engine, prompt(5), greedy(1))
    left.are_gone()


async def test_a_stop_ends_a_start(site: Site) -> None:
    before = started_processes()
    engine = create(site.kind.backend, spec(site.backend, **site.kind.slow_start()))
    with site.kind.library():
        start = asyncio.create_task(engine.start())
        await asyncio.sleep(1.0)  # somewhere in the middle of it
        assert not start.done()
        await engine.stop()
        with pytest.raises(EngineStartError, match="stopped"):
            await asyncio.wait_for(start, 1.0)
    assert started_processes() <= before


async def test_a_start_that_cannot_succeed_says_why_and_leaves_nothing(site: Site) -> None:
    before = started_processes()
    engine = create(site.kind.backend, spec(site.backend, engine_args={"max_model_lenn": 5}))
    with site.kind.library(), pytest.raises(EngineStartError, match=r"engine_args\.max_model_lenn"):
        await engine.start()
    await engine.stop()
    assert started_processes() <= before


FAILING = [name for name, kind in KINDS.items() if kind.failing_start is not None]


@pytest.mark.parametrize("backend", FAILING)
async def test_a_start_that_fails_inside_ends_with_the_engines_own_words_and_leaves_nothing(backend: str) -> None:
    kind = KINDS[backend]
    assert kind.failing_start is not None
    before = started_processes()
    words = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    engine = create(kind.backend, spec(backend, attn_dp=2, moe_ep=2, **kind.failing_start(words)))
    with kind.library(), pytest.raises(EngineStartError, match="Tried to allocate") as failed:
        await asyncio.wait_for(engine.start(), 30.0)
    await engine.stop()
    assert pickle.loads(pickle.dumps(failed.value)).args == failed.value.args
    assert started_processes() <= before


@pytest.mark.parametrize("backend", [name for name in FAILING if KINDS[name].takes_ports])
async def test_a_port_that_is_taken_is_a_failed_start_that_says_so(backend: str) -> None:
    kind = KINDS[backend]
    launch = spec(backend)
    with socket.create_server((launch.place.address, launch.place.ports[0])):
        engine = create(kind.backend, launch)
        with kind.library(), pytest.raises(EngineStartError, match="Address already in use"):
            await asyncio.wait_for(engine.start(), 30.0)
        await engine.stop()


@pytest.mark.parametrize("name", COMMANDS)
async def test_a_command_that_the_engine_has_not_is_refused(site: Site, name: str) -> None:
    if name in site.info.controls:
        pytest.skip("it has it")
    with pytest.raises(EngineError) as refusal:
        await site.aggregated.control(COMMANDS[name])
    assert (refusal.value.retryable, refusal.value.field) == (False, "command")
    assert (await answer(site.aggregated, prompt(5), greedy(1))).tokens


async def test_a_paused_engine_stands_still_and_goes_on_where_it_was(site: Site) -> None:
    commands(site, "pause", "resume")
    sampling = greedy(40 if site.kind.pins_cores else 200)  # a real model's step takes longer than anything here
    whole = await answer(site.aggregated, prompt(33), sampling)
    seen: list[int] = []

    async def follow() -> None:
        async for chunk in site.aggregated.generate(request(prompt(33), sampling)):
            seen.extend(chunk.token_ids)

    following = asyncio.create_task(follow())
    await until(lambda: len(seen) > 2)
    await site.aggregated.control(Pause())
    try:
        await asyncio.sleep(0.3)  # what was on its way has arrived
        stood = len(seen)
        late = asyncio.create_task(answer(site.aggregated, prompt(5), greedy(1)))
        await asyncio.sleep(0.5)
        assert (len(seen), late.done()) == (stood, False)
        assert stood < sampling.max_tokens
    finally:
        await site.aggregated.control(Resume())
    await following
    assert seen == whole.tokens
    assert (await late).tokens


async def test_a_pause_that_aborts_leaves_nothing_inside(site: Site) -> None:
    commands(site, "pause", "resume")
    running_one = asyncio.create_task(answer(site.aggregated, prompt(33), greedy(1500)))
    await wait_for_load(site.aggregated, lambda rank: rank.num_running > 0)
    await site.aggregated.control(Pause(abort=True))
    try:
        assert (await asyncio.wait_for(running_one, 5.0)).finish_reason == "abort"
    finally:
        await site.aggregated.control(Resume())
    assert (await answer(site.aggregated, prompt(5), greedy(1))).tokens
    await wait_until_idle(site.aggregated)


async def test_updated_weights_forget_cached_prefixes(site: Site) -> None:
    commands(site, "update_weights")
    if spec(site.backend).engine_args.get("load_format") == "dummy":
        pytest.skip("weights that the engine made up are in no folder to be loaded from")
    ids = prompt(100, seed=30)
    before = await answer(site.aggregated, ids, greedy(4))
    await site.aggregated.control(UpdateWeights(spec(site.backend).model_path))
    after = await answer(site.aggregated, ids, greedy(4))
    assert after.tokens == before.tokens, "they are the same weights"
    assert after.chunks[0].cached_tokens == 0


async def test_weights_that_are_not_there_are_refused_and_the_engine_goes_on(site: Site) -> None:
    commands(site, "update_weights")
    before = await answer(site.aggregated, prompt(20), greedy(4))
    with pytest.raises(EngineError):
        await site.aggregated.control(UpdateWeights("/nowhere"))
    assert (await answer(site.aggregated, prompt(20), greedy(4))).tokens == before.tokens


async def test_two_ranks_answer_alike_and_each_has_its_own_cache(wide_site: Site) -> None:
    ids = prompt(200, seed=40)
    assert wide_site.info.attn_dp_size == 2
    first = [await answer(wide_site.aggregated, ids, greedy(6), dp_rank=rank) for rank in (0, 1)]
    again = [await answer(wide_site.aggregated, ids, greedy(6), dp_rank=rank) for rank in (1, 0)]
    assert len({tuple(got.tokens) for got in [*first, *again]}) == 1
    assert [got.chunks[0].cached_tokens for got in first] == [0, 0]
    assert all((got.chunks[0].cached_tokens or 0) >= 128 for got in again)
    await refused(wide_site.aggregated, "dp_rank", dp_rank=2)


async def test_load_is_told_for_the_rank_that_has_it(wide_site: Site) -> None:
    for rank in (0, 1):
        async with aclosing(wide_site.aggregated.generate(request(prompt(60), greedy(1500), dp_rank=rank))) as chunks:
            await anext(chunks)

            def only_there(load: RankLoad, rank: int = rank) -> bool:
                return (load.num_running == 1 and load.kv_used_blocks > 0) == (load.dp_rank == rank)

            await wait_for_load(wide_site.aggregated, only_there)
        await wait_until_idle(wide_site.aggregated, timeout_s=2.0)
    assert [load.dp_rank for load in wide_site.aggregated.load()] == [0, 1]


async def test_each_rank_tells_of_its_own_blocks(wide_site: Site) -> None:
    sources = wide_site.info.kv_event_sources
    assert [source.dp_rank for source in sources] == [0, 1]
    assert len({source.endpoint for source in sources}) == 2
    size = wide_site.info.block_size
    prompts = [prompt(2 * size + 1, seed=50 + rank) for rank in (0, 1)]
    for rank, ids in enumerate(prompts):
        await answer(wide_site.aggregated, ids, greedy(1), dp_rank=rank)
    for rank, ids in enumerate(prompts):
        batches = await replayed_batches(sources[rank], until=stores(ids[:size]))
        assert any(batch == stores(ids[:size]) for batch in batches)
        assert not any(batch == stores(prompts[1 - rank][:size]) for batch in batches)
        assert {batch.dp_rank for batch in batches} <= {rank, None}


@pytest.mark.parametrize(("prefill_rank", "decode_rank"), [(0, 1), (1, 0), (1, 1)])
async def test_any_rank_hands_over_to_any(wide_pair: Site, prefill_rank: int, decode_rank: int) -> None:
    ids = prompt(140, seed=60 + 2 * prefill_rank + decode_rank)
    whole = await answer(wide_pair.aggregated, ids, greedy(6), dp_rank=0)
    split = await hand_over(wide_pair, ids, greedy(6), prefill_rank, dp_rank=decode_rank)
    assert split.tokens == whole.tokens
    assert split.chunks[0].transferred_tokens == len(ids)
    again = await hand_over(wide_pair, ids, greedy(6), prefill_rank, dp_rank=decode_rank)
    assert again.tokens == whole.tokens
    await wait_until_idle(wide_pair.prefill)
    await wait_until_idle(wide_pair.decode)


async def test_the_death_of_any_process_is_the_death_of_the_engine(wide_site: Site) -> None:
    count = len(engine_processes(wide_site.aggregated))
    for n in range(count):
        async with running(spec(wide_site.backend, attn_dp=2, moe_ep=2), wide_site.backend) as (engine, info):
            left = Remains.of(engine, info)
            death = asyncio.create_task(engine.died())
            await asyncio.sleep(0)
            processes = engine_processes(engine)
            assert len(processes) == count
            processes[n].kill()
            assert await asyncio.wait_for(death, 2.0)
            with pytest.raises(EngineError):
                await engine.check_health()
        left.are_gone()


@pytest.mark.parametrize("backend", [name for name, kind in KINDS.items() if kind.several_nodes])
async def test_nodes_of_one_worker_serve_all_of_its_ranks_and_each_ends_by_itself(backend: str) -> None:
    async with worker_of_two_nodes(backend, attn_dp=2, moe_ep=2) as nodes:
        infos = [info for _, info in nodes if info is not None]
        assert nodes[0][1] is not None, "requests come by the leader at least"
        assert sum(info.attn_dp_size for info in infos) == 2
        assert [info.first_dp_rank for info in infos] == list(range(0, 2, infos[0].attn_dp_size))
        ids = prompt(140, seed=70)
        got = [
            await answer(engine, ids, greedy(6), dp_rank=rank)
            for engine, info in nodes
            if info is not None
            for rank in range(info.attn_dp_size)
        ]
        assert len({tuple(each.tokens) for each in got}) == 1
        assert [each.chunks[0].cached_tokens for each in got] == [0, 0], "each rank has its own cache"
        sources = [source for info in infos for source in info.kv_event_sources]
        assert len(sources) == len({source.endpoint for source in sources}) == 2
        for source in sources:
            await replayed_batches(source, until=stores(ids[:64]))
        last = nodes[1][0]
        death = asyncio.create_task(last.died())
        await asyncio.sleep(0)
        kill_one(last)
        assert await asyncio.wait_for(death, 2.0)


@pytest.mark.parametrize("backend", [name for name, kind in KINDS.items() if kind.several_nodes])
async def test_a_stop_ends_a_start_that_waits_for_another_node(backend: str) -> None:
    kind = KINDS[backend]
    if kind.double is None:
        pytest.skip("its nodes do not wait for each other")
    launch = spec(backend, Role.PREFILL, attn_dp=2, moe_ep=2, nodes=(place(), place()))
    before = started_processes()
    engine = create(kind.backend, launch)
    with kind.library():
        start = asyncio.create_task(engine.start())
        await asyncio.sleep(1.0)
        assert not start.done()
        await engine.stop()
        with pytest.raises(EngineStartError, match="stopped"):
            await asyncio.wait_for(start, 1.0)
    assert started_processes() <= before
    assert [port for port in launch.place.ports if listens(f"tcp://127.0.0.1:{port}")] == []


@asynccontextmanager
async def worker_of_two_nodes(backend: str, **fields: Any) -> AsyncIterator[list[tuple[Any, EngineInfo | None]]]:
    """The leader here and, where engines are processes, the other node in a process of its own, as it is in reality."""
    kind, places = KINDS[backend], (place(), place())
    launches = [spec(backend, node_rank=rank, nodes=places, **fields) for rank in (0, 1)]
    leader = create(kind.backend, launches[0])
    async with AsyncExitStack() as stack:
        stack.enter_context(kind.library())
        if kind.double is None:
            other: Any = create(kind.backend, launches[1])
            stack.push_async_callback(other.stop)
        else:
            other = await stack.enter_async_context(node_process(launches[1], kind.backend))
        stack.push_async_callback(leader.stop)
        infos = await asyncio.gather(leader.start(), other.start())
        yield list(zip((leader, other), infos, strict=True))


def started_processes() -> set[psutil.Process]:
    """Ours and theirs, without the one that multiprocessing keeps for itself."""
    children = psutil.Process().children(recursive=True)
    return {child for child in children if "resource_tracker" not in " ".join(child.cmdline())}


def kill_one(node: Any) -> None:
    """Of the node's own processes, wherever they are."""
    if isinstance(node, RemoteNode):
        psutil.Process(node.pids[0]).kill()
    else:
        crash(node)


@dataclass(frozen=True)
class Remains:
    """What a started engine has that must not outlive it."""

    processes: list[psutil.Process]
    endpoints: list[str]

    @classmethod
    def of(cls, engine: Engine, info: EngineInfo) -> Remains:
        endpoints = [source.endpoint for source in info.kv_event_sources]
        assert endpoints or not info.caches_prefixes
        assert all(listens(endpoint) for endpoint in endpoints)
        return cls(engine_processes(engine), endpoints)

    def are_gone(self) -> None:
        assert psutil.wait_procs(self.processes, timeout=2.0)[1] == []
        assert not any(listens(endpoint) for endpoint in self.endpoints)


async def refused(engine: Engine, field: str, **fields: object) -> None:
    """The request is refused as the client's mistake, at once, and leaves nothing."""
    token_ids = fields.pop("token_ids", prompt(5))
    sampling = fields.pop("sampling", greedy(2))
    before = used_blocks(engine)
    with pytest.raises(EngineError) as refusal:
        await answer(engine, token_ids, sampling, **fields)  # type: ignore[arg-type]
    assert (refusal.value.retryable, refusal.value.field) == (False, field), str(refusal.value)
    assert used_blocks(engine) == before


async def keeps_to_its_structure(site: Site, sampling: Sampling, beginning: str) -> None:
    """It ends where the structure does, by the model's end token, or is the beginning of one that would."""
    model = Path(spec(site.backend).model_path)
    end = json.loads((model / "config.json").read_text())["eos_token_id"]
    sampling = msgspec.structs.replace(sampling, stop_token_ids=(end,))
    got = await answer(site.aggregated, prompt(9), sampling)
    text = Tokenizer.from_file(str(model / "tokenizer.json")).decode(got.tokens)
    assert re.fullmatch(beginning, text, re.DOTALL), text


async def compute_and_release(site: Site, leg: GenerateRequest) -> None:
    await collect(site.prefill, leg)
    await site.prefill.release(leg.request_id)


async def first_live_batch(
    engine: Engine, live: zmq.asyncio.Socket, source: KVEventSource, num_tokens: int
) -> tuple[list[int], KVEventBatch]:
    """A subscription takes effect some time after connect, so prompts are sent until one's events arrive."""
    decode = decoder(source.wire_format)
    for seed in range(100, 140):
        ids = prompt(num_tokens, seed)
        await answer(engine, ids, greedy(2))
        while await live.poll(200):
            batch = decode(await live.recv_multipart())
            stored = [event for event in batch.events if isinstance(event, BlockStored)]
            if stored and stored[0].token_ids[0] == ids[0]:
                return ids, batch
    raise AssertionError("no event arrived for any of 40 prompts")


def stores(ids: list[int]) -> Matching:
    """Whatever batch stores a block of these tokens, at the start of a prompt."""
    return Matching(
        lambda batch: any(
            isinstance(event, BlockStored)
            and event.parent_block_hash is None
            and list(event.token_ids[: len(ids)]) == ids
            for event in batch.events
        )
    )


@dataclass(frozen=True, eq=False)
class Matching:
    """Equal to every batch for which it holds."""

    holds: Callable[[KVEventBatch], bool]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KVEventBatch) and self.holds(other)


async def replayed_batches(source: KVEventSource, until: object) -> list[KVEventBatch]:
    """Everything from the first batch on, as the router's subscriber takes it, until that batch has come."""
    batches: list[KVEventBatch] = []
    arrived = asyncio.Event()

    def take(_: Holder, batch: KVEventBatch) -> None:
        batches.append(batch)
        if until == batch:
            arrived.set()

    subscriber = KVEventSubscriber(take, lambda _: pytest.fail("batches are lost"))
    subscriber.subscribe("engine", 1, [source])
    try:
        await asyncio.wait_for(arrived.wait(), 10.0)
    finally:
        await subscriber.close()
    return batches


def needs(site: Site, feature: Feature) -> None:
    if feature not in site.info.features:
        pytest.skip(f"this engine has no {feature}, as it was started, and says so in another test")


def takes(pair: Site, style: str) -> None:
    if pair.hands_over != style:
        pytest.skip(f"only of a {style} hand-off")


def commands(site: Site, *names: str) -> None:
    if not set(names) <= set(site.info.controls):
        pytest.skip("this engine has no such command, and says so in another test")


def prefill_leg(
    pair: Site, token_ids: list[int], handoff: KVHandoff | None = None, max_tokens: int = 10
) -> GenerateRequest:
    """As the engine takes it: in the concurrent style it is told where to meet."""
    if pair.hands_over == "concurrent" and handoff is None:
        handoff = meet(pair)
    return request(token_ids, greedy(max_tokens), leg=Role.PREFILL, handoff=handoff)


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
