"""What only a real vLLM engine can get wrong: its processes, its memory, its failures to start."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from engines import TINY_DEEPSEEK, Site, answer, collect, engine_processes, greedy, hand_over, prompt, request, spec

from backends.engine import Engine, EngineError, EngineStartError, Role, UpdateWeights
from backends.vllm import VLLMEngine

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.filterwarnings("default")]

MIB = 1024 * 1024

START_AND_WAIT = """
import asyncio, sys
sys.path.insert(0, {support!r})
from engines import TINY_DEEPSEEK, spec
from backends.vllm import VLLMEngine

async def main():
    engine = VLLMEngine(spec("vllm", model=TINY_DEEPSEEK, attn_dp=2, moe_ep=2, cores=(0, 1)))
    await engine.start()
    print("pids", *(process.pid for process in engine.processes()), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def children() -> set[psutil.Process]:
    """Ours, but for multiprocessing's resource tracker, which is Python's and ends with us."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is none either: only its exit code is left
            if "resource_tracker" not in " ".join(child.cmdline()):
                found.add(child)
    return found


@dataclass(frozen=True)
class Idle:
    """What engines that have nothing to do take from a moment on."""

    processes: list[psutil.Process]
    before_s: list[float]
    since_s: float

    @classmethod
    def now(cls, *engines: Engine) -> Idle:
        processes = [process for engine in engines for process in engine_processes(engine)]
        return cls(processes, [cpu_s(process) for process in processes], time.monotonic())

    def share(self) -> float:
        """Of a core, of the one that took most."""
        used_s = [cpu_s(process) - before_s for process, before_s in zip(self.processes, self.before_s, strict=True)]
        return max(used_s) / (time.monotonic() - self.since_s)


def cpu_s(process: psutil.Process) -> float:
    user_s, system_s, *_ = process.cpu_times()
    return float(user_s + system_s)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def idle(vllm_site: Site) -> Idle:
    """The pair, from just after a hand-off; tests that ask for it leave the pair alone."""
    await hand_over(vllm_site, prompt(40, seed=77), greedy(2))
    return Idle.now(vllm_site.prefill, vllm_site.decode)


async def test_a_worker_stays_within_its_memory(vllm_site: Site) -> None:
    """fp32 SmolLM2 with 256 MiB of KV: a pair, Ray and the ingress are to fit 6 GiB."""
    (core,) = engine_processes(vllm_site.decode)
    pss_bytes = core.memory_full_info().pss
    assert pss_bytes < 1800 * MIB, f"{pss_bytes / MIB:.0f} MiB"


async def test_an_engine_computes_on_its_own_cores(vllm_site: Site) -> None:
    for engine in (vllm_site.prefill, vllm_site.decode):
        assert isinstance(engine, VLLMEngine)
        (process,) = engine_processes(engine)
        assert tuple(process.cpu_affinity()) == engine.spec.cores


async def test_a_decode_engine_also_computes_a_whole_request_to_the_same_tokens(vllm_site: Site) -> None:
    given = prompt(50, seed=91)
    expected = await answer(vllm_site.aggregated, given, greedy(6))
    assert (await answer(vllm_site.decode, given, greedy(6))).tokens == expected.tokens


async def test_a_token_id_outside_the_vocabulary_is_refused_and_not_computed(vllm_site: Site) -> None:
    with pytest.raises(EngineError) as refusal:
        await answer(vllm_site.aggregated, [5, 10**6], greedy(1))
    assert (refusal.value.retryable, refusal.value.field) == (False, "prompt")
    assert (await answer(vllm_site.aggregated, [5, 10], greedy(1))).tokens


async def test_a_request_over_the_users_queue_limit_is_an_error_to_retry(
    vllm_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(vllm_site.aggregated, VLLMEngine)
    with monkeypatch.context() as engine_args:
        engine_args.setattr(vllm_site.aggregated._llm.scheduler_config, "max_num_queued_reqs", 0)
        with pytest.raises(EngineError) as refusal:
            await answer(vllm_site.aggregated, [5, 10], greedy(1))
    assert refusal.value.retryable
    assert (await answer(vllm_site.aggregated, [5, 10], greedy(1))).tokens


async def test_new_weights_wait_until_what_is_handed_over_is_fetched(vllm_site: Site) -> None:
    """Its blocks are of the old ones, and decode may be reading them."""
    ids = prompt(70, seed=31)
    expected = (await answer(vllm_site.aggregated, ids, greedy(6))).tokens
    handoff = (await collect(vllm_site.prefill, request(ids, greedy(1), leg=Role.PREFILL))).handoff
    assert isinstance(vllm_site.prefill, VLLMEngine)
    update = asyncio.create_task(vllm_site.prefill.control(UpdateWeights(vllm_site.prefill.spec.model_path)))
    await asyncio.sleep(1.0)  # what is tested is that time passes and nothing is taken away
    assert not update.done()
    decoded = await answer(vllm_site.decode, ids, greedy(6), leg=Role.DECODE, handoff=handoff)
    assert decoded.tokens == expected
    await asyncio.wait_for(update, 20.0)
    again = await collect(vllm_site.prefill, request(ids, greedy(1), leg=Role.PREFILL))
    assert again.chunks[0].cached_tokens == 0
    await vllm_site.prefill.release(again.chunks[0].request_id)


async def test_the_cause_of_a_failed_start_is_named_and_nothing_is_left(idle: Idle) -> None:
    before = children()
    engine = VLLMEngine(spec("vllm", model=TINY_DEEPSEEK, engine_args={"kv_cache_memory_bytes": 1 * MIB}))
    with pytest.raises(EngineStartError) as failure:
        await engine.start()
    assert "one request of 2048 tokens needs 0.01 GiB; lower aggregated.engine_args.max_model_len" in str(failure.value)
    assert "| ValueError: To serve at least one request" in str(failure.value)
    await engine.stop()
    assert children() <= before


async def test_a_start_that_is_given_up_leaves_nothing(idle: Idle) -> None:
    before, cores_before = children(), set(multiprocessing.active_children())
    engine = VLLMEngine(spec("vllm", model=TINY_DEEPSEEK))
    start = asyncio.create_task(engine.start())
    while not set(multiprocessing.active_children()) - cores_before:
        assert not start.done(), start
        await asyncio.sleep(0.05)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert children() <= before
    await engine.stop()


async def test_nothing_outlives_a_killed_process(idle: Idle) -> None:
    """SIGKILL for the process that started a two-rank engine: both ranks and their coordinator end at once."""
    script = START_AND_WAIT.format(support=str(Path(__file__).parents[1] / "support"))
    starter = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=PIPE, stderr=DEVNULL)
    try:
        assert starter.stdout is not None
        line = b""
        while not line.startswith(b"pids"):
            line = await starter.stdout.readline()
            assert line, "it ended by itself"
        processes = [psutil.Process(int(pid)) for pid in line.split()[1:]]
        assert len(processes) == 3
    finally:
        starter.kill()
        await starter.wait()
    assert psutil.wait_procs(processes, timeout=10.0)[1] == []


async def test_idle_engines_that_have_handed_over_take_next_to_no_cpu(idle: Idle) -> None:
    """NIXL's progress thread polls without pause unless repaired; so it does after a keepalive of UCX, 20 s on."""
    await asyncio.sleep(idle.since_s + 24.0 - time.monotonic())  # what is measured is time passing
    assert idle.share() < 0.25
