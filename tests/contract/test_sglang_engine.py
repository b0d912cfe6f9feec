"""What SGLang's adapter does beyond the common suite, on the double of both versions."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from doubles import loader
from engines import (
    KINDS,
    Site,
    answer,
    collect,
    greedy,
    hand_over,
    meet,
    prompt,
    request,
    running,
    spec,
    wait_until_idle,
)

from backends import create
from backends.engine import (
    Engine,
    EngineError,
    EngineStartError,
    Feature,
    KVHandoff,
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
from backends.sglang import SGLangEngine

NAMES = [name for name, kind in KINDS.items() if kind.backend == "sglang" and kind.double is not None]
POISON = 31_999

pytestmark = pytest.mark.parametrize("name", NAMES)


async def test_what_it_is_started_with_decides_what_requests_may_ask_for(name: str) -> None:
    args = {"enable_priority_scheduling": True, "grammar_backend": "xgrammar", "enable_deterministic_inference": True}
    async with running(spec(name, engine_args=args), name) as (engine, info):
        assert set(info.features) == set(Feature) - {Feature.MIN_P}
        structured = Sampling(3, structure=Structure("regex", "[a-z]+"))
        for sampling, fields in (
            (structured, {}),
            (Sampling(3, seed=5), {}),
            (Sampling(3, min_tokens=2, stop_token_ids=(1,)), {"priority": 3}),
        ):
            assert len((await answer(engine, prompt(9), sampling, **fields)).tokens) == 3


async def test_adapters_answer_differently_and_share_no_cache(name: str, tmp_path: Path) -> None:
    adapters = {lora: tmp_path / lora for lora in ("poet", "judge")}
    for folder in adapters.values():
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    launch = spec(name, loras={lora: str(folder) for lora, folder in adapters.items()})
    async with running(launch, name) as (engine, info):
        assert set(info.loras) == set(adapters)
        ids = prompt(140)
        got = [await answer(engine, ids, greedy(6), lora=lora) for lora in (None, "poet", "judge")]
        assert len({tuple(each.tokens) for each in got}) == 3
        assert [each.chunks[0].cached_tokens for each in got] == [0, 0, 0]
        again = await answer(engine, ids, greedy(6), lora="poet")
        assert again.tokens == got[1].tokens
        assert again.chunks[0].cached_tokens == 128
        with pytest.raises(EngineError) as refusal:
            await answer(engine, ids, greedy(1), lora="critic")
        assert (refusal.value.retryable, refusal.value.field) == (False, "lora")


async def begun(engine: Engine, max_tokens: int) -> asyncio.Task[list[TokenChunk]]:
    """A request that the scheduler has, and what comes after its first chunk."""
    stream = engine.generate(request(prompt(20), greedy(max_tokens)))
    first = await anext(stream)

    async def rest() -> list[TokenChunk]:
        return [first, *[chunk async for chunk in stream]]

    return asyncio.create_task(rest())


async def test_it_sleeps_and_wakes_where_it_was_started_to(name: str) -> None:
    args = {"enable_memory_saver": True, "enable_weights_cpu_backup": True}
    async with running(spec(name, engine_args=args), name) as (engine, info):
        assert {"sleep", "wake"} <= set(info.controls)
        before = await answer(engine, prompt(140), greedy(6))
        await engine.control(Sleep())
        await engine.control(Wake())
        after = await answer(engine, prompt(140), greedy(6))
        assert after.tokens == before.tokens
        assert after.chunks[0].cached_tokens == 0


async def test_sleep_aborts_what_is_inside_and_what_comes_waits_until_it_is_awake(name: str) -> None:
    """SGLang's schedulers end where a request is inside when they are told to."""
    args = {"enable_memory_saver": True, "enable_weights_cpu_backup": True}
    async with running(spec(name, engine_args=args), name) as (engine, _):
        inside = await begun(engine, 1500)
        await engine.control(Sleep())
        assert (await asyncio.wait_for(inside, 2.0))[-1].finish_reason == "abort"
        await engine.control(Sleep())
        late = asyncio.create_task(answer(engine, prompt(20), greedy(3)))
        with pytest.raises(EngineError, match="wake") as refusal:
            await engine.control(UpdateWeights(loader.model("other")))
        assert not refusal.value.retryable
        for command in (Pause(abort=True), Resume()):
            await engine.control(command)
        await asyncio.sleep(0.2)
        assert not late.done()
        for _ in range(2):
            await engine.control(Wake())
        assert len((await asyncio.wait_for(late, 2.0)).tokens) == 3


async def test_weights_are_refused_while_requests_stand_inside_and_wait_for_running_ones(name: str) -> None:
    """SGLang 0.5.16's schedulers end where one is inside when its cache cannot be emptied."""
    async with running(spec(name), name) as (engine, _):
        inside = await begun(engine, 400)
        await engine.control(Pause())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("backends.sglang_control.EMPTY_S", 0.2)
            with pytest.raises(EngineError, match="resume it") as refusal:
                await engine.control(UpdateWeights(loader.model("other")))
        assert (refusal.value.retryable, refusal.value.field) == (False, "command")
        await engine.control(Resume())
        with pytest.raises(EngineError) as nowhere:
            await engine.control(UpdateWeights("/nowhere"))
        assert (nowhere.value.field, inside.done()) == ("path", False), "nothing is waited for in vain"
        await engine.control(UpdateWeights(loader.model("other")))
        assert inside.done()
        assert sum(len(chunk.token_ids) for chunk in await inside) == 400


async def test_a_pause_that_aborts_ends_what_stands_in_a_paused_engine(name: str) -> None:
    async with running(spec(name), name) as (engine, _):
        inside = await begun(engine, 1500)
        await engine.control(Pause())
        await asyncio.wait_for(engine.control(Pause(abort=True)), 5.0)
        assert (await inside)[-1].finish_reason == "abort"
        await engine.control(Resume())
        assert (await answer(engine, prompt(5), greedy(1))).tokens


async def test_what_waits_for_the_end_of_a_pause_can_be_aborted_closed_and_stopped(name: str) -> None:
    async with running(spec(name), name) as (engine, _):
        await engine.control(Pause())
        waiting = [request(prompt(20, seed), greedy(3)) for seed in range(3)]
        aborted, closed, stopped = (asyncio.create_task(collect(engine, each)) for each in waiting)
        await asyncio.sleep(0.1)
        await engine.abort(waiting[0].request_id)
        (chunk,) = (await asyncio.wait_for(aborted, 1.0)).chunks
        assert (chunk.token_ids, chunk.finish_reason) == ([], "abort")
        closed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closed
        manager = engine._engine.tokenizer_manager  # type: ignore[attr-defined]
        assert len(manager.rid_to_state) == 1
        await engine.stop()
        with pytest.raises(EngineError, match="stopped"):
            await asyncio.wait_for(stopped, 1.0)


async def test_requests_that_come_together_are_each_handed_to_sglang_at_once(name: str) -> None:
    async with running(spec(name), name) as (engine, _):
        assert isinstance(engine, SGLangEngine)
        sent = engine._engine.tokenizer_manager.rid_to_state
        made = [request(prompt(8, seed=number), greedy(1)) for number in range(3)]
        answers = [asyncio.create_task(collect(engine, each)) for each in made]
        await asyncio.sleep(0)
        assert len(sent) == 3
        assert [len((await each).tokens) for each in answers] == [1, 1, 1]


async def test_a_pause_that_aborts_makes_way_for_weights_that_wait(name: str) -> None:
    async with running(spec(name), name) as (engine, _):
        inside = await begun(engine, 1500)
        loading = asyncio.create_task(engine.control(UpdateWeights(loader.model("other"))))
        await asyncio.sleep(0.2)
        assert not loading.done()
        await asyncio.wait_for(engine.control(Pause(abort=True)), 2.0)
        await asyncio.wait_for(loading, 2.0)
        assert (await inside)[-1].finish_reason == "abort"
        await engine.control(Resume())


async def test_a_command_does_not_outwait_the_engine(name: str) -> None:
    async with running(spec(name), name) as (engine, _):
        inside = await begun(engine, 1500)
        loading = asyncio.create_task(engine.control(UpdateWeights(loader.model("other"))))
        await asyncio.sleep(0.1)
        psutil.Process(engine.processes()[0].pid).kill()  # type: ignore[attr-defined]
        with pytest.raises(EngineError, match="died"):
            await asyncio.wait_for(loading, 2.0)
        with pytest.raises(EngineError, match="died"):
            await inside


async def test_no_file_is_left_of_an_engine_nor_of_a_start_that_failed(name: str) -> None:
    before = set(Path("/dev/shm").glob("sglang_loads_*"))
    async with running(spec(name), name):
        assert set(Path("/dev/shm").glob("sglang_loads_*")) > before
    failing = create("sglang", spec(name, model_path=loader.model("failing", failure="no")))
    with KINDS[name].library(), pytest.raises(EngineStartError):
        await failing.start()
    assert set(Path("/dev/shm").glob("sglang_loads_*")) <= before


async def test_other_weights_answer_otherwise(name: str) -> None:
    async with running(spec(name), name) as (engine, _):
        before = await answer(engine, prompt(20), greedy(6))
        await engine.control(UpdateWeights(loader.model("other")))
        assert (await answer(engine, prompt(20), greedy(6))).tokens != before.tokens


async def test_a_decode_engine_may_cache_but_cannot_tell_whose_tokens_were_cached(name: str) -> None:
    args = {"disaggregation_decode_enable_radix_cache": True}
    async with (
        running(spec(name), name) as (aggregated, _),
        running(spec(name, Role.PREFILL), name) as (prefill, prefill_info),
        running(spec(name, Role.DECODE, engine_args=args), name) as (decode, info),
    ):
        assert info.caches_prefixes
        assert info.kv_event_sources
        infos = {Role.PREFILL: prefill_info, Role.DECODE: info}
        site = Site(name, aggregated, prefill, decode, infos)
        ids = prompt(140)
        whole = await answer(aggregated, ids, greedy(5))
        split = await hand_over(site, ids, greedy(5))
        assert split.tokens == whole.tokens
        assert (split.chunks[0].cached_tokens, split.chunks[0].transferred_tokens) == (None, None)


async def test_a_cache_that_sglang_does_without_is_not_told_of(name: str) -> None:
    """It decides so for some models and attention backends, whatever the configuration says."""
    engine = create("sglang", spec(name))
    with KINDS[name].library(), pytest.MonkeyPatch.context() as patch:
        args = importlib.import_module("sglang.srt.server_args")
        patch.setitem(args.DEFAULTS, "disable_radix_cache", True)
        info = await engine.start()
    assert info is not None
    assert not info.caches_prefixes
    assert info.kv_event_sources == ()
    await engine.stop()


async def test_a_room_of_another_rank_is_refused_by_prefill_and_both_legs_may_be_retried(name: str) -> None:
    """What the dispatcher's choice of rooms avoids (SGLang: follow_bootstrap_room)."""
    async with (
        running(spec(name, Role.PREFILL, attn_dp=2, moe_ep=2), name) as (prefill, prefill_info),
        running(spec(name, Role.DECODE), name) as (decode, info),
    ):
        site = Site(name, decode, prefill, decode, {Role.PREFILL: prefill_info, Role.DECODE: info})
        params = meet(site, prefill_rank=0).params
        astray = KVHandoff({**params, "bootstrap_room": params["bootstrap_room"] + 1, "prefill_dp_rank": 1})
        leg = request(prompt(30), greedy(3), leg=Role.PREFILL, handoff=astray, dp_rank=0)
        with pytest.raises(EngineError, match="conflict") as lost:
            await collect(prefill, leg)
        assert lost.value.retryable
        assert (await hand_over(site, prompt(30), greedy(3), prefill_rank=1)).tokens
        await wait_until_idle(prefill)


async def test_a_step_that_fails_ends_the_engine_and_not_us(name: str) -> None:
    """SGLang's schedulers then send their parent SIGQUIT, which would end it."""
    launch = spec(name, model_path=loader.model("poisoned", poison=POISON))
    async with running(launch, name) as (engine, _):
        beside = asyncio.create_task(answer(engine, prompt(20), greedy(1500)))
        await asyncio.sleep(0.1)
        with pytest.raises(EngineError) as lost:
            await asyncio.wait_for(answer(engine, [5, POISON], greedy(2)), 5.0)
        assert lost.value.retryable
        assert await asyncio.wait_for(engine.died(), 5.0)
        with pytest.raises(EngineError):
            await beside
        assert any("illegal memory access" in line for line in engine.last_lines())


async def test_another_version_than_the_one_asked_for_is_refused(name: str) -> None:
    (other,) = [each for each in NAMES if each != name]
    engine = create("sglang", dataclasses.replace(spec(name), version=KINDS[other].version))
    with KINDS[name].library(), pytest.raises(EngineStartError, match=r"engine_version.*0\.5"):
        await engine.start()
    await engine.stop()


async def test_a_version_that_nobody_knows_is_refused_with_those_that_are(name: str) -> None:
    engine = create("sglang", dataclasses.replace(spec(name), version=None))
    variable = KINDS[name].double
    assert variable is not None
    with loader.library(variable, "0.4.9"), pytest.raises(EngineStartError, match=r"0\.5\.16.*0\.5\.23"):
        await engine.start()
    await engine.stop()


START_AND_WAIT = """
import asyncio, sys
sys.path.insert(0, {support!r})
from engines import KINDS, spec
from backends import create

async def main():
    engine = create("sglang", spec({name!r}, attn_dp=2, moe_ep=2))
    with KINDS[{name!r}].library():
        await engine.start()
    print("pids", *(process.pid for process in engine.processes()), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_nothing_outlives_a_killed_process(name: str) -> None:
    """SIGKILL for the process that started a two-rank engine: its controller, schedulers and detokenizer end too."""
    command = [
        sys.executable,
        "-c",
        START_AND_WAIT.format(support=str(Path(__file__).parents[1] / "support"), name=name),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL) as starter:
        try:
            assert starter.stdout is not None
            words = next(line for line in starter.stdout if line.startswith("pids")).split()[1:]
            processes = [psutil.Process(int(pid)) for pid in words]
            assert len(processes) == 4
        finally:
            starter.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(processes, timeout=10.0)[1] == []
