"""One suite for every engine: what backends.engine promises."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass

import psutil
import pytest
import zmq
import zmq.asyncio
from engines import (
    Site,
    answer,
    collect,
    crash,
    engine_processes,
    greedy,
    hand_over,
    listens,
    prompt,
    request,
    running,
    spec,
    used_blocks,
    wait_for_load,
    wait_until_idle,
)

from backends import create
from backends.engine import (
    Engine,
    EngineError,
    EngineInfo,
    EngineStartError,
    GenerateRequest,
    KVEventSource,
    Role,
    Sampling,
    TokenChunk,
)
from backends.kv_events import BlockStored, KVEventBatch, decoder

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    # What vLLM and its libraries warn about is not ours to mend.
    pytest.mark.filterwarnings("default"),
]


SLOW_START: dict[str, dict[str, object]] = {"simulated": {"start_s": 60.0}, "vllm": {}}


async def test_an_engine_says_what_it_is(site: Site) -> None:
    for engine, role in ((site.aggregated, Role.AGGREGATED), (site.prefill, Role.PREFILL), (site.decode, Role.DECODE)):
        info = site.infos[role]
        assert (info.backend, info.role, info.attn_dp_size) == (site.backend, role, 1)
        assert info.version
        assert info.block_size > 0
        assert info.kv_total_blocks * info.block_size >= info.max_model_len
        assert info.handoff == ("none" if role is Role.AGGREGATED else "sequential")
        assert [rank.kv_total_blocks for rank in engine.load()] == [info.kv_total_blocks]


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


async def test_a_decode_leg_without_a_handoff_is_refused(site: Site) -> None:
    await refused(site.decode, "handoff", leg=Role.DECODE)


async def test_a_leg_of_another_role_is_refused(site: Site) -> None:
    await refused(site.decode, "leg", leg=Role.PREFILL)
    await refused(site.prefill, "leg", leg=Role.DECODE)
    await refused(site.aggregated, "leg", leg=Role.PREFILL)


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
    salted = await answer(site.aggregated, ids, greedy(4), cache_salt="tenant")
    assert first.chunks[0].cached_tokens == 0
    assert again.chunks[0].cached_tokens is not None
    assert 64 <= again.chunks[0].cached_tokens < 100
    assert salted.chunks[0].cached_tokens == 0
    assert first.tokens == again.tokens == salted.tokens


async def test_a_handed_over_prompt_is_answered_as_by_one_engine(site: Site) -> None:
    for ids in (prompt(70, seed=2), prompt(129, seed=2)):
        whole = await answer(site.aggregated, ids, greedy(10))
        split = await hand_over(site, ids, greedy(10))
        assert split.tokens == whole.tokens
        assert split.chunks[0].cached_tokens == 0
        assert split.chunks[0].transferred_tokens == len(ids)
    await wait_until_idle(site.prefill)
    await wait_until_idle(site.decode)


async def test_a_decode_leg_fetches_only_what_it_has_not_cached(site: Site) -> None:
    ids = prompt(100, seed=9)
    await hand_over(site, ids, greedy(4))
    again = (await hand_over(site, ids, greedy(4))).chunks[0]
    assert again.cached_tokens is not None
    assert again.transferred_tokens is not None
    assert 64 <= again.cached_tokens < 100
    assert again.cached_tokens + again.transferred_tokens == len(ids)
    await wait_until_idle(site.prefill)


async def test_a_prefill_leg_is_one_chunk_without_tokens(site: Site) -> None:
    computed = await answer(site.prefill, prompt(50, seed=3), greedy(10), leg=Role.PREFILL)
    assert len(computed.chunks) == 1
    assert computed.tokens == []
    assert computed.finish_reason is not None
    decoded = await answer(site.decode, prompt(50, seed=3), greedy(3), leg=Role.DECODE, handoff=computed.handoff)
    assert len(decoded.tokens) == 3
    await wait_until_idle(site.prefill)


async def test_a_prefill_leg_holds_its_kv_until_it_is_released(site: Site) -> None:
    made = request(prompt(80, seed=4), greedy(10), leg=Role.PREFILL)
    await collect(site.prefill, made)
    await wait_for_load(site.prefill, lambda rank: rank.kv_used_blocks > 0)
    await site.prefill.release(made.request_id)
    await wait_until_idle(site.prefill)
    await site.prefill.release(made.request_id)
    await site.prefill.release("never seen")


async def test_a_release_right_after_the_handoff_frees_too(site: Site) -> None:
    made = [request(prompt(80, seed=10 + n), greedy(10), leg=Role.PREFILL) for n in range(6)]
    await asyncio.gather(*(compute_and_release(site, leg) for leg in made))
    await wait_until_idle(site.prefill)


@pytest.mark.parametrize("computing_s", [0.0, 0.02, 0.2])
async def test_closing_a_prefill_leg_around_its_handoff_frees_its_kv(site: Site, computing_s: float) -> None:
    """Its hand-off is still to be made, on its way to us, or here and unread."""
    for turns in range(12):
        leg = asyncio.create_task(answer(site.prefill, prompt(40, seed=200 + turns), greedy(4), leg=Role.PREFILL))
        for _ in range(5):
            await asyncio.sleep(0)  # it goes to the engine
        time.sleep(computing_s)  # what is ready by then, this loop learns in its next turns
        for _ in range(turns):
            await asyncio.sleep(0)
        leg.cancel()
        await asyncio.gather(leg, return_exceptions=True)
        if not leg.cancelled():
            await site.prefill.release(leg.result().chunks[0].request_id)
    await compute_and_release(site, request(prompt(40), greedy(4), leg=Role.PREFILL))  # a later step reports the load
    await wait_until_idle(site.prefill, timeout_s=2.0)


async def test_a_release_before_the_handoff_is_made_harms_nothing(site: Site) -> None:
    made = request(prompt(40, seed=250), greedy(4), leg=Role.PREFILL)
    leg = asyncio.create_task(collect(site.prefill, made))
    await asyncio.sleep(0)
    await site.prefill.release(made.request_id)
    await site.prefill.release((await leg).chunks[0].request_id)
    await wait_until_idle(site.prefill)


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


async def test_closing_a_decode_leg_frees_both_engines(site: Site) -> None:
    ids = prompt(90, seed=7)
    computed = await answer(site.prefill, ids, greedy(1500), leg=Role.PREFILL)
    leg = request(ids, greedy(1500), leg=Role.DECODE, handoff=computed.handoff)
    async with aclosing(site.decode.generate(leg)) as chunks:
        await anext(chunks)
    await wait_until_idle(site.decode, timeout_s=2.0)
    await wait_until_idle(site.prefill, timeout_s=2.0)


async def test_cancelling_before_the_first_token_frees_its_kv(site: Site) -> None:
    task = asyncio.create_task(answer(site.aggregated, prompt(1000, seed=8), greedy(1000)))
    await asyncio.sleep(0)  # it runs up to the engine's door
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await answer(site.aggregated, prompt(5), greedy(1))  # a later step reports what the cancelled request left
    await wait_until_idle(site.aggregated)


async def test_events_tell_which_blocks_are_stored_and_can_be_replayed(site: Site) -> None:
    (source,) = site.info.kv_event_sources
    block_size = site.info.block_size
    context = zmq.asyncio.Context()
    try:
        with context.socket(zmq.SUB) as live:
            live.subscribe(b"")
            live.connect(source.endpoint)
            ids, batch = await first_live_batch(site.aggregated, live, source, 4 * block_size + 3)
        replayed = await replay(context, source)
    finally:
        context.term()
    stored = [event for event in batch.events if isinstance(event, BlockStored)]
    assert [token for event in stored for token in event.token_ids] == ids[: 4 * block_size]
    assert {event.block_size for event in stored} == {block_size}
    assert stored[0].parent_block_hash is None
    assert len({block for event in stored for block in event.block_hashes}) == 4
    assert batch in replayed
    numbers = [each.sequence for each in replayed]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


async def test_a_crash_is_reported_at_once_and_nothing_is_left(site: Site) -> None:
    async with running(spec(site.backend), site.backend) as (engine, info):
        left = Remains.of(engine, info)
        await engine.check_health()
        stream = asyncio.create_task(answer(engine, prompt(20), greedy(1500)))
        await wait_for_load(engine, lambda rank: rank.num_running > 0)
        death = asyncio.create_task(engine.died())
        crash(engine)
        assert await asyncio.wait_for(death, 1.0)
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
    before = set(psutil.Process().children(recursive=True))
    engine = create(site.backend, spec(site.backend, engine_args=SLOW_START[site.backend]))
    start = asyncio.create_task(engine.start())
    await asyncio.sleep(1.0)  # somewhere in the middle of it
    assert not start.done()
    await engine.stop()
    with pytest.raises(EngineStartError, match="stopped"):
        await asyncio.wait_for(start, 1.0)
    assert set(psutil.Process().children(recursive=True)) <= before


async def test_a_start_that_cannot_succeed_says_why_and_leaves_nothing(site: Site) -> None:
    before = set(psutil.Process().children(recursive=True))
    engine = create(site.backend, spec(site.backend, engine_args={"max_model_lenn": 5}))
    with pytest.raises(EngineStartError, match=r"engine_args\.max_model_lenn"):
        await engine.start()
    await engine.stop()
    assert set(psutil.Process().children(recursive=True)) <= before


@dataclass(frozen=True)
class Remains:
    """What a started engine has that must not outlive it."""

    processes: list[psutil.Process]
    endpoints: list[str]

    @classmethod
    def of(cls, engine: Engine, info: EngineInfo) -> Remains:
        endpoints = [source.endpoint for source in info.kv_event_sources]
        assert endpoints
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


async def replay(context: zmq.asyncio.Context, source: KVEventSource) -> list[KVEventBatch]:
    decode = decoder(source.wire_format)
    batches = []
    assert source.replay_endpoint is not None
    with context.socket(zmq.DEALER) as socket:
        socket.connect(source.replay_endpoint)
        await socket.send_multipart([b"", (0).to_bytes(8, "big")])
        while True:
            _, *frames = await asyncio.wait_for(socket.recv_multipart(), 5.0)
            if int.from_bytes(frames[1], "big", signed=True) == -1:
                return batches
            batches.append(decode(frames))
