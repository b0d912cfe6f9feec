"""Engines of every backend for tests, and the few ways tests drive them."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from backends import create
from backends.engine import Engine, EngineInfo, GenerateRequest, KVHandoff, LaunchSpec, Role, Sampling, TokenChunk
from dynamo_ray import models

SMOLLM2 = "smollm2-135m-instruct"
TINY_DEEPSEEK = "tiny-deepseek-v3"
FP32 = {"dtype": "float32", "max_model_len": 2048, "kv_cache_memory_bytes": 256 * 1024 * 1024}
_EDGES = (1, 2, 3, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1500)
"""Around multiples of the block size (32), and both ends."""
PROMPT_LENGTHS = _EDGES + tuple(random.Random(50).randrange(4, 200) for _ in range(50 - len(_EDGES)))
CORES = {Role.AGGREGATED: (1,), Role.PREFILL: (0,), Role.DECODE: (1,)}


@dataclass(frozen=True)
class Answer:
    """All chunks of one leg."""

    chunks: list[TokenChunk]

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def finish_reason(self) -> str | None:
        return self.chunks[-1].finish_reason

    @property
    def handoff(self) -> KVHandoff:
        handoff = self.chunks[-1].handoff
        assert handoff is not None
        return handoff


@dataclass(frozen=True)
class Site:
    """An aggregated engine, and a prefill and a decode engine of the same model that hand over to each other."""

    backend: str
    aggregated: Engine
    prefill: Engine
    decode: Engine
    infos: dict[Role, EngineInfo]

    @property
    def info(self) -> EngineInfo:
        """Of the aggregated engine."""
        return self.infos[Role.AGGREGATED]


def spec(backend: str, role: Role = Role.AGGREGATED, model: str = SMOLLM2, **fields: Any) -> LaunchSpec:
    """A launch spec of that backend; engine_args in `fields` are added to the backend's own here."""
    real = backend == "vllm"
    args = {**(FP32 if real else {"step_s": 0.001}), **fields.pop("engine_args", {})}
    path = models.prepare(model) if real else models.folder("byte-tokenizer")
    cores = tuple(core for core in fields.pop("cores", CORES[role]) if core < (os.cpu_count() or 1)) or (0,)
    return LaunchSpec(
        f"{role}-{backend}", role, model, str(path), cores=cores if real else (), engine_args=args, **fields
    )


@asynccontextmanager
async def running(launch: LaunchSpec, backend: str) -> AsyncIterator[tuple[Engine, EngineInfo]]:
    engine = create(backend, launch)
    try:
        yield engine, await engine.start()
    finally:
        await engine.stop()


def prompt(num_tokens: int, seed: int = 0, vocabulary: tuple[int, int] = (1000, 20000)) -> list[int]:
    rng = random.Random(f"{num_tokens}-{seed}")
    return [rng.randrange(*vocabulary) for _ in range(num_tokens)]


def greedy(max_tokens: int, **fields: Any) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, **fields)


_numbers = iter(range(10**9))


def request(token_ids: Sequence[int], sampling: Sampling, **fields: Any) -> GenerateRequest:
    return GenerateRequest(fields.pop("request_id", f"request-{next(_numbers)}"), list(token_ids), sampling, **fields)


async def answer(engine: Engine, token_ids: Sequence[int], sampling: Sampling, **fields: Any) -> Answer:
    return await collect(engine, request(token_ids, sampling, **fields))


async def collect(engine: Engine, made: GenerateRequest) -> Answer:
    return Answer([chunk async for chunk in engine.generate(made)])


async def hand_over(site: Site, token_ids: Sequence[int], sampling: Sampling, **fields: Any) -> Answer:
    """Prefill on one engine, decode on the other; returns the decode leg."""
    computed = await answer(site.prefill, token_ids, sampling, leg=Role.PREFILL)
    return await answer(site.decode, token_ids, sampling, leg=Role.DECODE, handoff=computed.handoff, **fields)


def used_blocks(engine: Engine) -> int:
    return sum(rank.kv_used_blocks for rank in engine.load())


async def wait_for_load(engine: Engine, condition: Any, timeout_s: float = 10.0) -> None:
    """Wait until `condition` holds for the engine's load of every rank; load has no event, so it is polled."""
    deadline = time.monotonic() + timeout_s
    while not all(condition(rank) for rank in engine.load()):
        assert time.monotonic() < deadline, f"after {timeout_s} s the load is still {engine.load()}"
        await asyncio.sleep(0.01)


async def wait_until_idle(engine: Engine, timeout_s: float = 10.0) -> None:
    def idle(rank: Any) -> bool:
        return not (rank.kv_used_blocks or rank.num_running or rank.num_waiting)

    await wait_for_load(engine, idle, timeout_s)


def listens(endpoint: str) -> bool:
    """Whether anybody accepts connections there; `endpoint` is `tcp://host:port`."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def engine_processes(engine: Engine) -> list[psutil.Process]:
    """The processes a real engine started; a simulated one starts none."""
    started = getattr(engine, "processes", list)()
    return [psutil.Process(process.pid) for process in started]


def crash(engine: Engine) -> None:
    """Have it die as by a crash: SIGKILL for one of its processes."""
    processes = engine_processes(engine)
    if processes:
        os.kill(processes[0].pid, signal.SIGKILL)
    else:
        engine.kill("test")  # type: ignore[attr-defined]
