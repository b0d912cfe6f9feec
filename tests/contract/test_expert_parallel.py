"""DP2 + EP on vLLM: attention data parallel over two ranks, experts spread over them, equal to transformers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import psutil
import pytest
import pytest_asyncio
from engines import (
    TINY_DEEPSEEK,
    Site,
    answer,
    engine_processes,
    greedy,
    hand_over,
    prompt,
    running,
    spec,
    wait_until_idle,
)
from reference import answers_of_transformers

from backends.engine import Role

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.filterwarnings("default")]

ANSWER_TOKENS = 16
PROMPTS = [prompt(length, seed=7, vocabulary=(0, 256)) for length in (1, 2, 15, 16, 17, 40, 129, 300)]
ENGINE_ARGS = {"block_size": 16, "max_model_len": 1024, "kv_cache_memory_bytes": 64 * 1024 * 1024}


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return answers_of_transformers(PROMPTS, ANSWER_TOKENS)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def dep_site() -> AsyncIterator[Site]:
    """The decode engine is DP2 + EP; the prefill engine has one rank. There is no aggregated engine."""
    async with AsyncExitStack() as stack:
        prefill, prefill_info = await stack.enter_async_context(
            running(spec("vllm", Role.PREFILL, TINY_DEEPSEEK, engine_args=ENGINE_ARGS), "vllm")
        )
        wide = spec("vllm", Role.DECODE, TINY_DEEPSEEK, attn_dp=2, moe_ep=2, cores=(0, 1), engine_args=ENGINE_ARGS)
        decode, decode_info = await stack.enter_async_context(running(wide, "vllm"))
        infos = {Role.PREFILL: prefill_info, Role.DECODE: decode_info}
        yield Site("vllm", decode, prefill, decode, infos)


@pytest.mark.parametrize("rank", [0, 1])
async def test_each_rank_answers_as_transformers_does(dep_site: Site, expected: list[list[int]], rank: int) -> None:
    got = await asyncio.gather(*(answer(dep_site.decode, ids, greedy(ANSWER_TOKENS), dp_rank=rank) for ids in PROMPTS))
    assert [each.tokens for each in got] == expected


async def test_both_ranks_together_answer_as_transformers_does(dep_site: Site, expected: list[list[int]]) -> None:
    got = await asyncio.gather(
        *(answer(dep_site.decode, ids, greedy(ANSWER_TOKENS), dp_rank=i % 2) for i, ids in enumerate(PROMPTS))
    )
    assert [each.tokens for each in got] == expected


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_prompt_handed_over_to_a_rank_is_answered_as_transformers_does(
    dep_site: Site, expected: list[list[int]], rank: int
) -> None:
    got = await asyncio.gather(*(hand_over(dep_site, ids, greedy(ANSWER_TOKENS), dp_rank=rank) for ids in PROMPTS))
    assert [each.tokens for each in got] == expected
    assert [each.chunks[0].transferred_tokens for each in got][1:] == [len(ids) for ids in PROMPTS[1:]]
    await wait_until_idle(dep_site.prefill)
    await wait_until_idle(dep_site.decode)


async def test_one_socket_of_the_first_rank_alone_listens_beyond_the_nodes_address(dep_site: Site) -> None:
    """torch's store, as backends.vllm says."""

    def elsewhere(process: psutil.Process, address: str) -> list[str]:
        listening = [each for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
        return [each.laddr.ip for each in listening if each.laddr.ip != address]

    address = dep_site.decode.spec.place.address  # type: ignore[attr-defined]
    first, *others = engine_processes(dep_site.decode)
    assert elsewhere(first, address) == ["::"]
    for process in (*others, *engine_processes(dep_site.prefill)):
        assert elsewhere(process, address) == []


async def test_a_pinned_request_runs_on_its_rank(dep_site: Site) -> None:
    for rank in (0, 1):
        leg = asyncio.create_task(answer(dep_site.decode, PROMPTS[5], greedy(200), dp_rank=rank))
        while not any(load.num_running for load in dep_site.decode.load()):
            await asyncio.sleep(0.005)
        assert [load.num_running for load in dep_site.decode.load()] == [int(rank == 0), int(rank == 1)]
        leg.cancel()
        await asyncio.gather(leg, return_exceptions=True)
        await wait_until_idle(dep_site.decode)


async def test_an_engine_that_caches_no_prefixes_publishes_no_events(dep_site: Site) -> None:
    assert dep_site.infos[Role.DECODE].kv_event_sources == ()
    assert not dep_site.infos[Role.DECODE].caches_prefixes
    assert dep_site.infos[Role.DECODE].attn_dp_size == 2
    assert [load.dp_rank for load in dep_site.decode.load()] == [0, 1]
