"""Engines of every backend for tests, and the few ways tests drive them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import psutil
from doubles import loader

from backends import create
from backends.engine import (
    Engine,
    EngineInfo,
    GenerateRequest,
    KVHandoff,
    LaunchSpec,
    NodePlace,
    Role,
    Sampling,
    TokenChunk,
)
from backends.processes import free_consecutive_ports
from dynamo_ray import models
from dynamo_ray.request.transfer import rendezvous
from dynamo_ray.request.wire import WorkerInfo

SMOLLM2 = "smollm2-135m-instruct"
TINY_DEEPSEEK = "tiny-deepseek-v3"
FP32 = {"dtype": "float32", "max_model_len": 2048, "kv_cache_memory_bytes": 256 * 1024 * 1024}
EDGES = (1, 2, 3, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1500)
"""Around multiples of the block size (32), and both ends."""
PROMPT_LENGTHS = EDGES + tuple(random.Random(50).randrange(4, 200) for _ in range(50 - len(EDGES)))
NUM_PORTS = 24
"""More than any engine takes of one node's."""
CORES = {Role.AGGREGATED: (1,), Role.PREFILL: (0,), Role.DECODE: (1,)}


@dataclass(frozen=True)
class Kind:
    """An engine as tests run it here."""

    backend: str
    model_path: Callable[[str], str]
    """The folder of a model, by the model's key."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    version: str | None = None
    double: str | None = None
    """The environment variable that tells a double of the engine's library its version; None: the library itself."""
    pins_cores: bool = False
    slow_start: Callable[[], dict[str, Any]] = dict
    """Fields of a LaunchSpec with which a start takes longer than a second."""
    failing_start: Callable[[str], dict[str, Any]] | None = None
    """Fields with which an engine's process fails with these words."""
    launcher: Literal["processes", "ray"] = "processes"
    takes_ports: bool = True
    """Of those that a node is given."""
    several_ranks: bool = False
    """Whether it is cheap to start with two attention DP ranks."""
    several_nodes: bool = False
    """Whether several nodes' shares can run on one."""

    @contextmanager
    def library(self) -> Iterator[None]:
        """The engine's library is there to be started."""
        with nullcontext() if self.double is None else loader.library(self.double, self.version or ""):
            yield


def _byte_tokenizer(_: str) -> str:
    return str(models.folder("byte-tokenizer"))


SIMULATED = Kind(
    "simulated",
    _byte_tokenizer,
    {"step_s": 0.001},
    slow_start=lambda: {"engine_args": {"start_s": 60.0}},
    several_ranks=True,
    several_nodes=True,
)
KINDS: dict[str, Kind] = {
    "simulated": SIMULATED,
    "simulated-concurrent": dataclasses.replace(SIMULATED, engine_args={"step_s": 0.001, "handoff": "concurrent"}),
    "vllm": Kind("vllm", lambda model: str(models.prepare(model)), FP32, pins_cores=True),
}


def _doubled_model(_: str, **behaviour: Any) -> str:
    return loader.model("-".join(["doubled", *behaviour]), **behaviour)


def _double(backend: str, version: str, variable: str, **fields: Any) -> Kind:
    def slow() -> dict[str, Any]:
        return {"model_path": _doubled_model("", start_s=60.0)}

    def failing(words: str) -> dict[str, Any]:
        return {"model_path": _doubled_model("", failure=words)}

    return Kind(
        backend,
        _doubled_model,
        version=version,
        double=variable,
        slow_start=slow,
        failing_start=failing,
        **fields,
    )


for _version in ("0.5.16", "0.5.23"):
    KINDS[f"sglang-{_version}"] = _double(
        "sglang", _version, "SGLANG_DOUBLE_VERSION", several_ranks=True, several_nodes=True
    )
for _version in ("1.2", "1.3"):
    KINDS[f"trtllm-{_version}"] = _double(
        "trtllm", _version, "TRTLLM_DOUBLE_VERSION", several_ranks=True, launcher="ray", takes_ports=False
    )
REAL = os.environ.get("CONTRACT_BACKEND")
"""A backend whose library is installed here, for the contract suite to run on instead of all the others. Its model's
folder is CONTRACT_MODEL, its engine_args CONTRACT_ENGINE_ARGS (JSON), its roles CONTRACT_ROLES (all three, or only
aggregated), and CONTRACT_RANKS is 2 where there are devices for two ranks."""
if REAL is not None:
    KINDS = {
        REAL: Kind(
            REAL,
            lambda _: os.environ["CONTRACT_MODEL"],
            json.loads(os.environ.get("CONTRACT_ENGINE_ARGS", "{}")),
            several_ranks=os.environ.get("CONTRACT_RANKS") == "2",
        )
    }
ROLES = [Role(role) for role in os.environ.get("CONTRACT_ROLES", "aggregated,prefill,decode").split(",")]


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
    """A key of KINDS."""
    aggregated: Engine
    prefill: Engine
    decode: Engine
    infos: dict[Role, EngineInfo]

    @property
    def kind(self) -> Kind:
        return KINDS[self.backend]

    @property
    def info(self) -> EngineInfo:
        """Of the aggregated engine."""
        return self.infos[Role.AGGREGATED]

    @property
    def hands_over(self) -> str:
        return self.infos[Role.PREFILL].handoff


def spec(backend: str, role: Role = Role.AGGREGATED, model: str = SMOLLM2, **fields: Any) -> LaunchSpec:
    """A launch spec of that kind of engine; engine_args in `fields` are added to the kind's own here."""
    kind = KINDS[backend]
    args = {**kind.engine_args, **fields.pop("engine_args", {})}
    path = fields.pop("model_path", None) or kind.model_path(model)
    cores = tuple(core for core in fields.pop("cores", CORES[role]) if core < (os.cpu_count() or 1)) or (0,)
    fields.setdefault("nodes", (place(),))
    return LaunchSpec(
        f"{role}-{backend}",
        role,
        model,
        path,
        cores=cores if kind.pins_cores else (),
        version=kind.version,
        launcher=kind.launcher,
        engine_args=args,
        **fields,
    )


_given_ports: set[int] = set()


def place() -> NodePlace:
    """This machine as one node, with ports that no other node of this process was given."""
    while True:
        first = free_consecutive_ports("127.0.0.1", NUM_PORTS)
        ports = range(first, first + NUM_PORTS)
        if _given_ports.isdisjoint(ports):
            _given_ports.update(ports)
            return NodePlace(ports=tuple(ports))


@asynccontextmanager
async def running(launch: LaunchSpec, backend: str) -> AsyncIterator[tuple[Engine, EngineInfo]]:
    kind = KINDS[backend]
    engine = create(kind.backend, launch)
    try:
        with kind.library():
            info = await engine.start()
        assert info is not None
        yield engine, info
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


async def hand_over(
    site: Site,
    token_ids: Sequence[int],
    sampling: Sampling,
    prefill_rank: int = 0,
    handed_over: Callable[[KVHandoff], None] = lambda _: None,
    **fields: Any,
) -> Answer:
    """Prefill on one engine, decode on the other, in the engines' own style; returns the decode leg.

    `handed_over` is called with what the decode side is told.
    """
    leg = partial(request, token_ids, sampling, leg=Role.PREFILL, dp_rank=prefill_rank)
    if site.hands_over == "sequential":
        (only,) = (computed := await collect(site.prefill, leg())).chunks
        assert only.token_ids == []
        handoff = computed.handoff
        handed_over(handoff)
        return await answer(site.decode, token_ids, sampling, leg=Role.DECODE, handoff=handoff, **fields)
    handoff = meet(site, prefill_rank)
    handed_over(handoff)
    computed, decoded = await asyncio.gather(
        collect(site.prefill, leg(handoff=handoff)),
        answer(site.decode, token_ids, sampling, leg=Role.DECODE, handoff=handoff, **fields),
    )
    (only,) = computed.chunks
    assert (only.token_ids, only.handoff) == ([], None)
    return decoded


def meet(site: Site, prefill_rank: int = 0) -> KVHandoff:
    """What the ingress tells both legs of a concurrent hand-off."""
    return rendezvous(WorkerInfo("prefill", 1, "", site.infos[Role.PREFILL]), prefill_rank)


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
    """The processes a real engine started, or a double's in place of its Ray actors; a simulated one starts none."""
    started = getattr(engine, "processes", getattr(engine, "workers", list))()
    return [psutil.Process(process.pid) for process in started]


def crash(engine: Engine) -> None:
    """Have it die as by a crash: SIGKILL for one of its processes."""
    processes = engine_processes(engine)
    if processes:
        os.kill(processes[0].pid, signal.SIGKILL)
    else:
        engine.kill("test")  # type: ignore[attr-defined]
