"""The data path of one ingress over simulated workers, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from backends.engine import Command, LaunchSpec, Role, Sampling
from backends.simulated import SimulatedEngine
from dynamo_ray.cluster.commands import Hold, Teller
from dynamo_ray.cluster.worker import WorkerServer
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.request.dispatch import Dispatch
from dynamo_ray.request.generation import Generation
from dynamo_ray.request.membership import Membership
from dynamo_ray.request.wire import WorkerInfo

SECRET = b"k" * 32
PROMPT = list(range(100))


@dataclass
class Node:
    """One simulated worker: what a node actor holds."""

    engine: SimulatedEngine
    server: WorkerServer
    info: WorkerInfo

    async def kill(self) -> None:
        self.engine.kill("SIGKILL")
        await self.server.stop()
        await self.engine.stop()

    async def hold(self, holds: frozenset[Hold]) -> frozenset[Hold]:
        return self.server.hold(holds)

    async def unhold(self, holds: frozenset[Hold]) -> None:
        self.server.unhold(holds)

    async def control(self, command: Command) -> None:
        await self.server.control(command)


class Cluster:
    """Workers and one ingress's dispatch on them."""

    def __init__(self, config: DeploymentConfig) -> None:
        self.config = config
        self.nodes: dict[str, Node] = {}
        self._version = 0
        self._changed = asyncio.Event()
        self.dispatch = Dispatch(config, self._watch)

    async def start(self, worker: str, role: Role, **options: Any) -> None:
        max_queued, epoch = options.pop("max_queued_requests", 256), options.pop("epoch", 1)
        features = options.pop("features", None)
        fields = {"attn_dp": options.pop("attn_dp", 1), "loras": options.pop("loras", {})}
        spec = LaunchSpec(worker, role, "m", "", kv_events=False, engine_args=options, **fields)
        engine = SimulatedEngine(spec)
        info = await engine.start()
        if features is not None:
            info = msgspec.structs.replace(info, features=features)
        server = WorkerServer(
            engine, worker=worker, epoch=epoch, secret=SECRET, host="127.0.0.1", max_queued_requests=max_queued
        )
        self.nodes[worker] = Node(engine, server, await server.start(info))

    def announce(self) -> None:
        self._version += 1
        self._changed.set()

    async def _watch(self, version: int) -> Membership:
        while version == self._version:
            self._changed.clear()
            await self._changed.wait()
        return Membership(self._version, SECRET, tuple(node.info for node in self.nodes.values()), ())

    async def control(self, command: Command, *workers: str) -> dict[str, str | None]:
        nodes = {worker: [self.nodes[worker]] for worker in workers or self.nodes}
        answers = await Teller(limit_s=60.0).carry_out(command, nodes)
        await asyncio.sleep(0.001)  # the heartbeats are on their way
        return answers

    def held_blocks(self) -> int:
        return sum(load.kv_used_blocks for node in self.nodes.values() for load in node.engine.load())

    async def settle(self) -> None:
        """A few steps, after which nothing that should be free is held."""
        await asyncio.sleep(0.1)
        assert self.held_blocks() == 0
        assert self.dispatch.router.table.num_bookings == 0
        assert len(self.dispatch.router.room) == 0
        assert all(node.server.num_requests == 0 for node in self.nodes.values())


@asynccontextmanager
async def cluster(prefill: int = 1, decode: int = 1, **options: Any) -> AsyncIterator[Cluster]:
    router = {"policy": options.pop("policy", "blocks"), **options.pop("router", {})}
    limits = {"max_retries": 2, **options.pop("limits", {})}
    roles: dict[str, Any] = {"prefill": {"replicas": prefill}, "decode": {"replicas": decode}}
    if not prefill:
        roles = {"aggregated": {"replicas": decode}}
    config = DeploymentConfig.model_validate(
        {
            "model": {"name": "m", "path": "/"},
            "backend": "simulated",
            "router": router,
            "limits": limits,
            **roles,
        }
    )
    made = Cluster(config)
    for index in range(prefill):
        await made.start(f"prefill-{index}", Role.PREFILL, **options)
    for index in range(decode):
        await made.start(f"decode-{index}", Role.DECODE if prefill else Role.AGGREGATED, **options)
    made.announce()
    await made.dispatch.start()
    while made.dispatch.ready() is not None:
        await asyncio.sleep(0.01)
    try:
        yield made
    finally:
        await made.dispatch.close()
        for node in made.nodes.values():
            await node.server.stop()
            await node.engine.stop()


def generation(request_id: str = "r", tokens: list[int] | None = None, **sampling: Any) -> Generation:
    options = {"max_tokens": 20, "temperature": 0.0, **sampling}
    return Generation(request_id, PROMPT if tokens is None else tokens, Sampling(**options))


async def collect(made: Cluster, request: Generation) -> list[int]:
    tokens: list[int] = []
    async with aclosing(made.dispatch.generate(request)) as chunks:
        async for chunk in chunks:
            tokens += chunk.token_ids
    return tokens


def asked(request_id: str, priority: int = 0, deadline_s: float | None = None, size: int = 100) -> Generation:
    sampling = Sampling(max_tokens=20, temperature=0.0)
    return Generation(request_id, list(range(size)), sampling, priority=priority, deadline_s=deadline_s)


def send(made: Cluster, request: Generation) -> asyncio.Task[list[int]]:
    return asyncio.create_task(collect(made, request))
