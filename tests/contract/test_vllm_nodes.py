"""vLLM over two nodes, each a process with an engine of its own, as node actors have them: DP2 + EP, and TP2."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import pytest_asyncio
from engines import (
    TINY_DEEPSEEK,
    Answer,
    answer,
    collect,
    greedy,
    place,
    prompt,
    request,
    running,
    spec,
    wait_until_idle,
)
from node_process import RemoteNode, node_process
from reference import answers_of_transformers

from backends.engine import (
    Command,
    Engine,
    EngineError,
    EngineInfo,
    EngineStartError,
    GenerateRequest,
    Pause,
    Resume,
    Role,
    UpdateWeights,
)
from backends.vllm import VLLMEngine

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.filterwarnings("default")]

ANSWER_TOKENS = 16
PROMPTS = [prompt(length, seed=7, vocabulary=(0, 256)) for length in (1, 2, 15, 16, 17, 40, 129, 300)]
ENGINE_ARGS = {"block_size": 16, "max_model_len": 1024, "kv_cache_memory_bytes": 64 * 1024 * 1024}


@dataclass(frozen=True)
class Worker:
    """A decode worker of two nodes, and the prefill engine that hands over to it."""

    first: VLLMEngine
    second: RemoteNode
    infos: tuple[EngineInfo, EngineInfo]
    prefill: Engine

    async def answer(self, node: int, made: GenerateRequest) -> Answer:
        return await collect(self.first, made) if node == 0 else Answer(await self.second.chunks(made))

    async def decode(self, node: int, ids: list[int], max_tokens: int = ANSWER_TOKENS) -> Answer:
        prefilled = await collect(self.prefill, request(ids, greedy(1), leg=Role.PREFILL))
        leg = request(ids, greedy(max_tokens), leg=Role.DECODE, dp_rank=0, handoff=prefilled.handoff)
        return await self.answer(node, leg)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return answers_of_transformers(PROMPTS, ANSWER_TOKENS)


@asynccontextmanager
async def two_nodes(role: Role, **shape: Any) -> AsyncIterator[tuple[VLLMEngine, RemoteNode]]:
    """Both started."""
    nodes = (place(), place())
    specs = [
        spec("vllm", role, TINY_DEEPSEEK, node_rank=rank, cores=(rank,), nodes=nodes, engine_args=ENGINE_ARGS, **shape)
        for rank in range(len(nodes))
    ]
    first = VLLMEngine(specs[0])
    async with node_process(specs[1], "vllm") as second:
        try:
            await asyncio.gather(first.start(), second.start())
            yield first, second
        finally:
            await first.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def worker() -> AsyncIterator[Worker]:
    async with AsyncExitStack() as stack:
        first, second = await stack.enter_async_context(two_nodes(Role.DECODE, attn_dp=2, moe_ep=2))
        assert first.info is not None
        assert second.info is not None
        prefill, _ = await stack.enter_async_context(
            running(spec("vllm", Role.PREFILL, TINY_DEEPSEEK, engine_args=ENGINE_ARGS), "vllm")
        )
        yield Worker(first, second, (first.info, second.info), prefill)


async def test_each_node_serves_its_own_rank(worker: Worker) -> None:
    assert [(info.first_dp_rank, info.attn_dp_size) for info in worker.infos] == [(0, 1), (1, 1)]
    assert [rank.dp_rank for rank in worker.first.load()] == [0]
    assert [rank.dp_rank for rank in await worker.second.load()] == [0]


@pytest.mark.parametrize("node", [0, 1])
async def test_each_nodes_rank_answers_as_transformers_does(
    worker: Worker, expected: list[list[int]], node: int
) -> None:
    legs = [request(ids, greedy(ANSWER_TOKENS), dp_rank=0) for ids in PROMPTS]
    got = await asyncio.gather(*(worker.answer(node, leg) for leg in legs))
    assert [each.tokens for each in got] == expected


async def test_both_nodes_together_answer_handed_over_prompts_as_transformers_does(
    worker: Worker, expected: list[list[int]]
) -> None:
    got = await asyncio.gather(*(worker.decode(i % 2, ids) for i, ids in enumerate(PROMPTS)))
    assert [each.tokens for each in got] == expected
    assert [each.chunks[0].transferred_tokens for each in got][1:] == [len(ids) for ids in PROMPTS[1:]]
    await wait_until_idle(worker.prefill)
    await wait_until_idle(worker.first)


async def test_a_request_runs_on_the_node_that_it_was_sent_to(worker: Worker) -> None:
    leg = asyncio.create_task(worker.answer(1, request(PROMPTS[5], greedy(200), dp_rank=0)))
    while not (await worker.second.load())[0].num_running:
        await asyncio.sleep(0.005)
    assert worker.first.load()[0].num_running == 0
    assert len((await leg).tokens) == 200


async def test_commands_to_all_nodes_at_once_are_carried_out(worker: Worker, expected: list[list[int]]) -> None:
    """Two ranks pause together, or not at all."""

    async def tell(command: Command) -> None:
        told = asyncio.gather(worker.first.control(command), worker.second.control(command))
        await asyncio.wait_for(told, 60.0)

    inside = [asyncio.create_task(worker.decode(node, PROMPTS[5])) for node in (0, 1)]
    await tell(Pause())
    await tell(UpdateWeights(worker.first.spec.model_path))
    await tell(Resume())
    assert [(await leg).tokens for leg in inside] == [expected[5]] * 2
    await tell(UpdateWeights(worker.first.spec.model_path))
    got = [await worker.decode(node, PROMPTS[6]) for node in (0, 1)]
    assert [each.tokens for each in got] == [expected[6]] * 2


async def test_a_nodes_dead_rank_ends_its_engine_at_once_and_the_other_nodes_with_its_next_step(
    worker: Worker,
) -> None:
    running_here = asyncio.create_task(worker.answer(0, request(PROMPTS[5], greedy(900), dp_rank=0)))
    while not worker.first.load()[0].num_running:
        await asyncio.sleep(0.005)
    os.kill(worker.second.pids[0], signal.SIGKILL)
    assert "EngineCore_DP1" in await asyncio.wait_for(worker.second.died(), 5.0)
    with pytest.raises(EngineError, match="died"):
        await asyncio.wait_for(running_here, 30.0)
    assert "EngineCore_DP0" in await asyncio.wait_for(worker.first.died(), 10.0)


async def test_one_ranks_devices_on_two_nodes_answer_through_the_leader_as_transformers_does(
    expected: list[list[int]],
) -> None:
    async with two_nodes(Role.AGGREGATED, attn_tp=2) as (leader, other):
        assert leader.info is not None
        assert (leader.info.attn_dp_size, other.info) == (1, None)
        got = await asyncio.gather(*(answer(leader, ids, greedy(ANSWER_TOKENS)) for ids in PROMPTS))
        assert [each.tokens for each in got] == expected
        os.kill(other.pids[0], signal.SIGKILL)
        assert "VllmWorker-1" in await asyncio.wait_for(other.died(), 5.0)
        with pytest.raises(EngineError, match="died"):
            await asyncio.wait_for(answer(leader, PROMPTS[0], greedy(ANSWER_TOKENS)), 30.0)


@pytest.mark.parametrize(
    ("shape", "node_rank", "titles"),
    [
        ({"attn_dp": 2, "moe_ep": 2}, 0, {"EngineCore_DP0", "DPCoordinator"}),
        ({"attn_dp": 2, "moe_ep": 2}, 1, {"EngineCore_DP1"}),
        ({"attn_tp": 2}, 0, {"EngineCore", "Worker"}),
        ({"attn_tp": 2}, 1, {"Worker"}),
    ],
)
async def test_a_node_that_waits_for_another_can_be_given_up_and_leaves_nothing(
    shape: dict[str, int], node_rank: int, titles: set[str]
) -> None:
    alone = spec("vllm", model=TINY_DEEPSEEK, nodes=(place(), place()), node_rank=node_rank, cores=(0,), **shape)
    engine = VLLMEngine(alone)
    before = children()
    start = asyncio.create_task(engine.start())
    await wait_until_they_wait(before, titles)
    assert not start.done(), start
    started, stopping = children() - before, time.monotonic()
    await engine.stop()
    assert time.monotonic() - stopping < 10.0
    with pytest.raises(EngineStartError, match="stopped while it was starting"):
        await start
    _, alive = psutil.wait_procs(started, timeout=3.0)
    assert alive == []


def children() -> set[psutil.Process]:
    """Ours, but for multiprocessing's resource tracker, which is Python's and ends with us."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "resource_tracker" not in " ".join(child.cmdline()):
                found.add(child)
    return found


async def wait_until_they_wait(before: set[psutil.Process], titles: set[str]) -> None:
    """Until the processes with these titles are there, and have used no more than a moment's CPU in a second."""
    used_s = -1.0
    while True:
        await asyncio.sleep(1.0)
        found = {child.name().removeprefix("VLLM::"): sum(child.cpu_times()[:2]) for child in children() - before}
        if titles <= found.keys() and sum(found.values()) - used_s < 0.1:
            return
        used_s = sum(found.values())
