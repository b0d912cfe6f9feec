"""The whole data path over simulated engines in virtual time: both hand-off styles, and every way a part can fail."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from data_path import PROMPT, Cluster, cluster, collect, generation

from backends.engine import (
    Command,
    Pause,
    Resume,
    Role,
    Sampling,
    Sleep,
    Structure,
    TokenChunk,
    UpdateWeights,
    Wake,
)
from backends.kv_events import BlockStored, KVEventBatch
from dynamo_ray.cluster.commands import Hold
from dynamo_ray.errors import ClientTooSlow, DeadlineExceeded, InvalidRequest, NotReady, Overloaded, WorkerLost
from dynamo_ray.request import connection
from dynamo_ray.request.generation import Generation
from dynamo_ray.request.wire import WorkerInfo
from dynamo_ray.routing.block_hash import block_hashes, chain_seed
from dynamo_ray.routing.kv_index import Holder
from dynamo_ray.simulator import clock


@pytest.fixture(params=["sequential", "concurrent"])
def style(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def aggregated_tokens(**sampling: Any) -> list[int]:
    async with cluster(prefill=0) as made:
        return await collect(made, generation(**sampling))


def test_disaggregated_tokens_equal_aggregated_ones(style: str) -> None:
    async def main() -> None:
        expected = await aggregated_tokens()
        async with cluster(handoff=style) as made:
            assert await collect(made, generation()) == expected
            prefill, decode = made.nodes["prefill-0"].engine, made.nodes["decode-0"].engine
            assert prefill.computed_tokens == len(PROMPT)
            assert decode.computed_tokens == 0
            await made.settle()

    clock.run(main())


def test_the_first_chunk_says_what_was_cached_and_what_was_transferred(style: str) -> None:
    async def main() -> None:
        async with cluster(handoff=style) as made:
            for cached in (0, 96):
                async with aclosing(made.dispatch.generate(generation())) as chunks:
                    first = await anext(aiter(chunks))
                assert first.cached_tokens == cached
                assert first.transferred_tokens == len(PROMPT) - cached, "the decode worker had cached as much"
                await made.settle()

    clock.run(main())


def test_the_first_chunk_says_how_long_the_engines_had_the_request(style: str) -> None:
    async def main() -> None:
        async with cluster(handoff=style) as made:
            began_s = asyncio.get_running_loop().time()
            async with aclosing(made.dispatch.generate(generation())) as chunks:
                first = await anext(aiter(chunks))
                first_s = asyncio.get_running_loop().time()
                second = await anext(aiter(chunks))
                assert second.engine_s is None
            took_s = asyncio.get_running_loop().time() - began_s
            assert first.engine_s is not None
            assert 0.01 < first.engine_s < took_s, "what is simulated takes some time, and the second token more"
            assert first.engine_s == pytest.approx(first_s - began_s)
            await made.settle()

    clock.run(main())


def test_a_client_that_leaves_frees_both_sides(style: str) -> None:
    async def main() -> None:
        async with cluster(handoff=style, transfer_tokens_per_s=200.0) as made:
            chunks = made.dispatch.generate(generation(max_tokens=10_000, tokens=list(range(50))))
            await anext(aiter(chunks))
            assert made.held_blocks() > 0
            await chunks.aclose()
            await made.settle()

    clock.run(main())


@pytest.mark.parametrize("leave_after_s", [0.0001, 0.0105, 0.02, 0.1, 0.3, 0.6])
def test_leaving_at_any_moment_before_the_first_token_frees_everything(style: str, leave_after_s: float) -> None:
    async def main() -> None:
        async with cluster(handoff=style, transfer_tokens_per_s=200.0, prefill_tokens_per_s=500.0) as made:
            task = asyncio.create_task(collect(made, generation()))
            await asyncio.sleep(leave_after_s)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(1.0)  # a decode that was still copying notices when the copy is there
            await made.settle()

    clock.run(main())


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 1.0, "seed": 7}, {"frequency_penalty": 0.5}],
    ids=["greedy", "seeded", "greedy and penalised"],
)
def test_a_decode_worker_that_dies_mid_stream_costs_no_token(style: str, sampling: dict[str, Any]) -> None:
    async def main() -> None:
        expected = await aggregated_tokens(max_tokens=40, **sampling)
        async with cluster(prefill=2, decode=2, handoff=style) as made:
            tokens: list[int] = []
            async with aclosing(made.dispatch.generate(generation(max_tokens=40, **sampling))) as chunks:
                async for chunk in chunks:
                    tokens += chunk.token_ids
                    if len(tokens) == 10:
                        victim = next(n for n in made.nodes.values() if n.info.role == "decode" and n.engine._live)
                        await victim.kill()
            assert tokens == expected
            assert made.dispatch.router.tally.retries == 1
            await made.settle()

    clock.run(main())


def test_a_prefill_worker_that_dies_costs_no_request(style: str) -> None:
    async def main() -> None:
        expected = await aggregated_tokens()
        async with cluster(prefill=2, decode=1, handoff=style, prefill_tokens_per_s=500.0) as made:
            task = asyncio.create_task(collect(made, generation()))
            await asyncio.sleep(0.1)
            victim = next(n for n in made.nodes.values() if n.info.role == "prefill" and n.engine._live)
            await victim.kill()
            assert await task == expected
            await made.settle()

    clock.run(main())


def test_a_penalised_unseeded_request_is_not_replayed_but_told_so() -> None:
    async def main() -> None:
        async with cluster(decode=2) as made:
            request = generation(temperature=1.0, frequency_penalty=0.5, max_tokens=100)
            with pytest.raises(WorkerLost, match="cannot be replayed"):
                async with aclosing(made.dispatch.generate(request)) as chunks:
                    await anext(aiter(chunks))
                    victim = next(n for n in made.nodes.values() if n.info.role == "decode" and n.engine._live)
                    await victim.kill()
                    async for _ in chunks:
                        pass
            await made.settle()

    clock.run(main())


def test_a_worker_that_never_comes_back_ends_in_a_clear_error() -> None:
    async def main() -> None:
        async with cluster() as made:
            chunks = made.dispatch.generate(generation(max_tokens=1000))
            await anext(aiter(chunks))
            await made.nodes["decode-0"].kill()
            with pytest.raises(NotReady, match="no decode worker is ready"):
                async for _ in chunks:
                    pass
            assert made.dispatch.ready() is not None

    clock.run(main())


def test_full_workers_are_answered_with_overloaded_after_the_others_were_asked() -> None:
    async def main() -> None:
        async with cluster(prefill=0, decode=2, max_queued_requests=1) as made:
            held = [made.dispatch.generate(generation(f"r{i}", max_tokens=1000)) for i in range(2)]
            for chunks in held:
                await anext(aiter(chunks))
            assert sorted(n.server.num_requests for n in made.nodes.values()) == [1, 1]
            with pytest.raises(Overloaded) as overloaded:
                await collect(made, generation("r3"))
            assert overloaded.value.retry_after_s is not None
            for chunks in held:
                await chunks.aclose()
            await made.settle()

    clock.run(main())


def test_the_deadline_ends_a_request_and_frees_it(style: str) -> None:
    async def main() -> None:
        async with cluster(handoff=style) as made:
            request = Generation("r", PROMPT, Sampling(10_000, temperature=0.0), deadline_s=0.5)
            with pytest.raises(DeadlineExceeded):
                await collect(made, request)
            assert asyncio.get_running_loop().time() < 1.0
            await made.settle()

    clock.run(main())


@pytest.mark.parametrize("turns", range(12))
def test_a_client_that_leaves_as_prefill_ends_frees_it(style: str, turns: int) -> None:
    """At every turn of the loop from the end of the leg at its worker on, while its last chunk is on its way here."""

    async def main() -> None:
        async with cluster(handoff=style) as made:
            server = made.nodes["prefill-0"].server
            task = asyncio.create_task(collect(made, generation(max_tokens=500)))
            while not server.num_requests:
                await asyncio.sleep(0.0001)
            await server._idle.wait()
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await made.settle()

    clock.run(main())


def test_a_prefill_worker_that_falls_silent_after_the_hand_off_is_left_within_seconds(style: str) -> None:
    """Decode waits for KV from a worker that hangs: its heartbeats end, its sockets stay open."""

    async def main() -> None:
        async with cluster(prefill=2, handoff=style, transfer_tokens_per_s=2.0) as made:
            task = asyncio.create_task(collect(made, generation()))
            await asyncio.sleep(1.0)
            busy = next(
                n for n in made.nodes.values() if n.info.role == "prefill" and n.engine.load()[0].kv_used_blocks
            )
            assert busy.server._heartbeats is not None
            busy.server._heartbeats.cancel()
            began_s = asyncio.get_running_loop().time()
            while not made.dispatch.router.tally.retries:
                await asyncio.sleep(0.1)
            assert asyncio.get_running_loop().time() - began_s < 7.0
            assert made.nodes["decode-0"].server.num_requests == 1, "the leg that waited is aborted"
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(0.1)
            assert made.nodes["decode-0"].server.num_requests == 0
            assert made.dispatch.router.table.num_bookings == 0

    clock.run(main())


def test_a_full_prefill_worker_leaves_nothing_running_on_decode(style: str) -> None:
    async def main() -> None:
        async with cluster(prefill=2, handoff=style, max_queued_requests=8, prefill_tokens_per_s=200.0) as made:
            made.nodes["prefill-0"].server.max_queued_requests = 1
            expected = await aggregated_tokens()
            answers = await asyncio.gather(*(collect(made, generation(f"r{i}")) for i in range(6)))
            assert answers == [expected] * 6
            await made.settle()

    clock.run(main())


def test_a_worker_with_room_is_found_however_many_are_full() -> None:
    async def main() -> None:
        async with cluster(prefill=0, decode=5, max_queued_requests=1, policy="round_robin") as made:
            made.nodes["decode-4"].server.max_queued_requests = 8
            answers = await asyncio.gather(*(collect(made, generation(f"r{i}")) for i in range(8)))
            assert {len(tokens) for tokens in answers} == {20}
            made.nodes["decode-4"].server.max_queued_requests = 0
            held = [asyncio.create_task(collect(made, generation(f"h{i}", max_tokens=500))) for i in range(4)]
            await asyncio.sleep(0.5)
            with pytest.raises(Overloaded):
                await collect(made, generation("one too many"))
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)
            await made.settle()

    clock.run(main())


def test_a_client_that_stops_reading_is_aborted_at_its_deadline() -> None:
    async def main() -> None:
        async with cluster() as made:
            request = Generation("r", PROMPT, Sampling(5000, temperature=0.0), deadline_s=2.0)
            chunks = made.dispatch.generate(request)
            await anext(aiter(chunks))
            await asyncio.sleep(3.0)
            assert made.held_blocks() == 0
            assert all(node.server.num_requests == 0 for node in made.nodes.values())
            with pytest.raises(DeadlineExceeded):
                async for _ in chunks:
                    pass
            await made.settle()

    clock.run(main())


def test_a_client_that_leaves_too_much_unread_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_PENDING_TOKENS", 100)

    async def main() -> None:
        async with cluster() as made:
            chunks = made.dispatch.generate(generation(max_tokens=5000))
            await anext(aiter(chunks))
            await asyncio.sleep(10.0)
            assert made.held_blocks() == 0
            with pytest.raises(ClientTooSlow):
                async for _ in chunks:
                    pass
            await made.settle()

    clock.run(main())


def test_a_prefill_rank_is_free_for_others_once_decode_has_begun(style: str) -> None:
    async def main() -> None:
        async with cluster(handoff=style) as made:
            async with aclosing(made.dispatch.generate(generation(max_tokens=500))) as chunks:
                await anext(aiter(chunks))
                assert made.dispatch.router.table.load(Holder("prefill-0", 1, 0)).num_requests == 0
                assert made.dispatch.router.table.load(Holder("decode-0", 1, 0)).num_requests == 1
            await made.settle()

    clock.run(main())


def test_what_the_engine_refuses_names_the_field(style: str) -> None:
    async def main() -> None:
        async with cluster(handoff=style, max_model_len=64) as made:
            with pytest.raises(InvalidRequest) as refused:
                await collect(made, generation())
            assert refused.value.field == "prompt"
            await made.settle()

    clock.run(main())


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_is_pinned_through_the_room_of_a_concurrent_hand_off(rank: int) -> None:
    async def main() -> None:
        async with cluster(handoff="concurrent", attn_dp=4, policy="round_robin") as made:
            for turn in range(rank + 1):
                await collect(made, generation(f"r{turn}", tokens=[turn] * 40))
            pools = made.nodes["prefill-0"].engine._ranks
            assert [bool(pool.cached_blocks([rank] * 40)) for pool in pools].index(True) == rank

    clock.run(main())


def test_a_slow_reader_gets_the_same_tokens_in_fewer_chunks() -> None:
    async def main() -> None:
        expected = await aggregated_tokens(max_tokens=50)
        async with cluster() as made:
            got: list[TokenChunk] = []
            async with aclosing(made.dispatch.generate(generation(max_tokens=50))) as chunks:
                async for chunk in chunks:
                    got.append(chunk)
                    await asyncio.sleep(0.2)
            assert [t for chunk in got for t in chunk.token_ids] == expected
            assert len(got) < 10

    clock.run(main())


@pytest.mark.parametrize(("policy", "expected"), [("blocks", [0, 96, 96, 96]), ("round_robin", [0, 0, 96, 96])])
def test_without_events_a_repeated_prompt_goes_where_it_was_sent_before(policy: str, expected: list[int]) -> None:
    async def main() -> list[int | None]:
        async with cluster(prefill=2, policy=policy) as made:
            return [await first_cached(made, f"r{i}") for i in range(4)]

    async def first_cached(made: Cluster, request_id: str) -> int | None:
        async with aclosing(made.dispatch.generate(generation(request_id))) as chunks:
            return (await anext(chunks)).cached_tokens

    assert clock.run(main()) == expected


# What an engine may lack.


@pytest.mark.parametrize(
    ("fields", "sampling", "field"),
    [
        ({}, {"structure": Structure("regex", "a")}, "structure"),
        ({}, {"min_p": 0.1, "temperature": 1.0}, "min_p"),
        ({"lora": "prose"}, {}, "lora"),
    ],
)
def test_what_no_worker_has_is_refused_before_any_is_asked(
    fields: dict[str, Any], sampling: dict[str, Any], field: str
) -> None:
    async def main() -> None:
        async with cluster(loras={"sql": "/"}) as made:
            request = Generation("r", PROMPT, Sampling(20, **{"temperature": 0.0, **sampling}), **fields)
            with pytest.raises(InvalidRequest, match=r"simulated 1 as it was started") as refused:
                await collect(made, request)
            assert refused.value.field == field
            assert made.dispatch.router.tally.retries == 0
            await made.settle()

    clock.run(main())


def test_only_workers_that_have_the_adapter_are_asked_for_it() -> None:
    async def main() -> None:
        async with cluster(prefill=0, decode=2, policy="round_robin") as made:
            await made.start("decode-2", Role.AGGREGATED, loras={"sql": "/"})
            made.announce()
            while len(made.dispatch.workers.of_role(Role.AGGREGATED)) < 3:
                await asyncio.sleep(0.01)
            base = await collect(made, generation())
            for turn in range(3):
                request = Generation(f"r{turn}", PROMPT, Sampling(20, temperature=0.0), lora="sql")
                tokens = await collect(made, request)
                assert len(tokens) == 20
                assert tokens != base
            assert made.dispatch.router.tally.retries == 0
            await made.settle()

    clock.run(main())


def test_prompts_of_an_adapter_are_not_taken_to_be_cached_for_the_model() -> None:
    async def main() -> None:
        async with cluster(prefill=0, decode=2, loras={"sql": "/"}) as made:

            async def cached(name: str, lora: str | None) -> int:
                request = Generation(name, PROMPT, Sampling(2, temperature=0.0), lora=lora)
                async with aclosing(made.dispatch.generate(request)) as chunks:
                    first = await anext(aiter(chunks))
                return first.cached_tokens or 0

            assert [await cached("a", "sql"), await cached("b", None), await cached("c", "sql")] == [0, 0, 96]
            await made.settle()

    clock.run(main())


# Commands.


def paused(made: Cluster) -> dict[str, float]:
    """As /metrics tells it."""
    readings = made.dispatch.readings()
    return {labels["worker"]: value for name, _, labels, value in readings if name == "dynamo_ray_worker_paused"}


def test_a_paused_worker_is_sent_nothing_and_what_it_has_goes_on_after_it() -> None:
    async def main() -> None:
        expected = await aggregated_tokens(max_tokens=40)
        async with cluster(prefill=0, decode=2) as made:
            task = asyncio.create_task(collect(made, generation(max_tokens=40)))
            await asyncio.sleep(0.2)
            (busy,) = [name for name, node in made.nodes.items() if node.engine._live]
            (other,) = set(made.nodes) - {busy}
            await made.control(Pause(), busy)
            for turn in range(4):
                assert await collect(made, generation(f"r{turn}", max_tokens=40)) == expected
            assert made.nodes[busy].server.num_requests == 1
            assert made.dispatch.router.tally.retries == 0, "nobody had to be refused to know it"
            assert not task.done()
            await made.control(Resume(), busy)
            assert await task == expected
            await made.control(Pause(), other)
            assert await collect(made, generation("last", max_tokens=40)) == expected
            await made.settle()

    clock.run(main())


@pytest.mark.parametrize(
    ("command", "undo", "words"),
    [(Pause(), Resume(), "decode-0 is paused; decode-1 is paused"), (Sleep(), Wake(), "decode-0 is asleep")],
)
def test_when_all_workers_of_a_role_are_halted_requests_are_told_to_come_again(
    style: str, command: Command, undo: Command, words: str
) -> None:
    async def main() -> None:
        async with cluster(decode=2, handoff=style) as made:
            await made.control(command, "decode-0", "decode-1")
            with pytest.raises(NotReady, match=words) as refused:
                await collect(made, generation())
            assert refused.value.retry_after_s is not None
            assert (made.dispatch.ready() or "").startswith("no decode worker is ready (decode-0 is")
            assert paused(made) == {"prefill-0": 0, "decode-0": 1, "decode-1": 1}
            await made.control(undo, "decode-0")
            assert made.dispatch.ready() is None
            assert paused(made) == {"prefill-0": 0, "decode-0": 0, "decode-1": 1}
            assert len(await collect(made, generation())) == 20
            await made.settle()

    clock.run(main())


def test_a_request_that_meets_a_pause_on_its_way_goes_elsewhere() -> None:
    async def main() -> None:
        async with cluster(prefill=0, decode=2, policy="round_robin") as made:
            made.nodes["decode-0"].server.holds = frozenset({Hold.PAUSED})  # no heartbeat has told of it yet
            assert await collect(made, generation()) == await aggregated_tokens()
            assert made.dispatch.router.tally.retries == 1
            await made.settle()

    clock.run(main())


@pytest.mark.parametrize("command", [Pause(abort=True), Sleep()])
def test_what_a_command_ends_is_answered_by_another_worker(style: str, command: Command) -> None:
    async def main() -> None:
        expected = await aggregated_tokens(max_tokens=40)
        async with cluster(prefill=2, decode=2, handoff=style) as made:
            task = asyncio.create_task(collect(made, generation(max_tokens=40)))
            await asyncio.sleep(0.3)
            (busy,) = [name for name, node in made.nodes.items() if node.info.role == "decode" and node.engine._live]
            await made.control(command, busy)
            assert await task == expected
            assert made.dispatch.router.tally.retries == 1
            await made.settle()

    clock.run(main())


def test_what_a_command_ends_and_nobody_can_answer_is_told_to_come_again() -> None:
    async def main() -> None:
        async with cluster() as made:
            task = asyncio.create_task(collect(made, generation(max_tokens=40)))
            await asyncio.sleep(0.3)
            await made.control(Pause(abort=True))
            with pytest.raises(NotReady, match="is paused"):
                await task
            await made.settle()

    clock.run(main())


def test_after_an_update_of_weights_nothing_is_taken_to_be_cached(style: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(handoff=style) as made:
            old = await collect(made, generation())
            prompt, now_s = block_hashes(PROMPT, 16, chain_seed("m")), asyncio.get_running_loop().time()
            router, holder = made.dispatch.router, Holder("prefill-0", 1, 0)
            router.index.apply(holder, KVEventBatch(0, 0, [BlockStored([1], None, PROMPT[:16], 16)]))
            assert router.index.overlap(prompt) == {holder: 1}
            assert router.chooser.guesses.overlap(prompt, now_s) == {holder: 6}
            await made.control(UpdateWeights(str(tmp_path)))
            assert router.index.overlap(prompt) == router.chooser.guesses.overlap(prompt, now_s) == {}
            new = await collect(made, generation())
            assert new != old
            assert await collect(made, generation()) == new
            await made.settle()

    clock.run(main())


def test_weights_that_cannot_be_loaded_leave_everything_as_it_was(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(prefill=0) as made:
            old = await collect(made, generation())
            missing = tmp_path / "missing"
            assert await made.control(UpdateWeights(str(missing))) == {
                "decode-0": f"node 0: there is no folder {missing}"
            }
            assert await collect(made, generation()) == old
            await made.settle()

    clock.run(main())


def test_a_worker_that_cannot_be_taken_in_is_logged_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with cluster(prefill=0) as made:
            up = made.dispatch.router.up

            def broken(info: WorkerInfo) -> None:
                monkeypatch.setattr(made.dispatch.router, "up", up)
                raise ValueError("unknown KV event format")

            monkeypatch.setattr(made.dispatch.router, "up", broken)
            await made.start("decode-1", Role.AGGREGATED)
            made.announce()
            await asyncio.sleep(5.0)
            assert len(made.dispatch.workers.of_role(Role.AGGREGATED)) == 2
            assert "unknown KV event format" in caplog.text
            assert made.dispatch.router.chooser.mask("decode-1")

    clock.run(main())
