"""One node's share of one worker: a Ray actor that owns its part of the engine, and on the leader its data plane."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass

import ray

import backends
from backends.engine import Engine, EngineStartError, LaunchSpec, NodePlace
from dynamo_ray.cluster.ports import PortBlock, reserve_ports
from dynamo_ray.cluster.presence import Presence, presence
from dynamo_ray.cluster.processes import kill_predecessors
from dynamo_ray.cluster.worker import WorkerServer
from dynamo_ray.request.wire import WorkerInfo
from placement import reserve
from placement.plan import Bundle

log = logging.getLogger(__name__)

ENGINE_STOP_TIMEOUT_S = 20.0
LEASE_CHECK_S = 5.0
MAX_LEASE_MISSES = 3


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one node actor is for; never changes during its life."""

    app: str
    worker: str
    epoch: int
    config_hash: str
    """Of everything that shaped this worker: another hash, another worker."""
    group: str
    """The name of its placement group."""
    bundle: Bundle
    """Where in the worker this node stands."""
    lease_timeout_s: float
    """Without any orchestrator for this long, it looks for its application, and ends if that is gone."""


@dataclass(frozen=True, slots=True)
class Description:
    """Enough for a new orchestrator to adopt this node."""

    assignment: Assignment
    started: bool
    """It runs its share of the engine, and has not been told to drain or stop."""
    info: WorkerInfo | None
    """On the leader, once it serves."""
    pid: int


class EngineNode:
    """Life: prepare, start, then sentinel / renew / describe at will, drain, stop. All on one event loop."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._ports: PortBlock | None = None
        self._engine: Engine | None = None
        self._server: WorkerServer | None = None
        self._info: WorkerInfo | None = None
        self._started = asyncio.Event()
        self._ending = False
        self._renewed_s = time.monotonic()
        self._lease: asyncio.Task[None] | None = None

    async def prepare(self, num_ports: int) -> NodePlace:
        """Take ports, and make sure that nothing of an earlier incarnation still runs on this node.

        Raises:
            OSError: There are not so many free ports in a row.
        """
        self._lease = asyncio.create_task(self._keep_lease(), name="lease")
        await asyncio.to_thread(kill_predecessors)
        address = ray.util.get_node_ip_address()
        self._ports = reserve_ports(address, num_ports)
        return NodePlace(address, self._ports.ports)

    async def start(self, backend: str, spec: LaunchSpec, secret: bytes, max_queued_requests: int) -> WorkerInfo | None:
        """Start this node's share of the engine; on the leader, serve it, and say where.

        Raises:
            EngineStartError: It cannot; nothing is left running.
        """
        try:
            self._engine = backends.create(backend, spec)
            engine_info = await self._engine.start()
            if engine_info is not None:
                self._server = WorkerServer(
                    self._engine,
                    worker=spec.worker,
                    epoch=self._assignment.epoch,
                    secret=secret,
                    host=spec.place.address,
                    max_queued_requests=max_queued_requests,
                )
                self._info = await self._server.start(engine_info)
        except Exception as error:  # the border: its cause must reach the user from a process of its own
            log.exception("%s could not start", spec.worker)
            await self.stop()
            raise EngineStartError(str(error) or repr(error)) from None
        self._started.set()
        return self._info

    async def sentinel(self) -> str:
        """Return, with the reason, only when this node's engine has died; raised by Ray when this process has."""
        await self._started.wait()
        assert self._engine is not None
        return await self._engine.died()

    async def renew(self) -> None:
        """An orchestrator is there; raises EngineError when the engine is not healthy."""
        self._renewed_s = time.monotonic()
        if self._started.is_set() and self._engine is not None:
            await self._engine.check_health()

    async def describe(self) -> Description:
        self._renewed_s = time.monotonic()
        started = self._started.is_set() and not self._ending
        return Description(self._assignment, started, self._info, os.getpid())

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests from now on and wait for those inside; False when some were left at the end."""
        self._ending = True
        return self._server is None or await self._server.drain(timeout_s)

    async def stop(self) -> None:
        """Stop serving and the engine; safe to call twice. The caller kills this actor next."""
        self._ending = True
        server, engine = self._server, self._engine
        self._server = self._engine = None
        if server is not None:
            await server.stop()
        if engine is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ENGINE_STOP_TIMEOUT_S):
                    await engine.stop()

    async def _keep_lease(self) -> None:
        """End this node when nobody is left who would."""
        timeout_s, misses = self._assignment.lease_timeout_s, 0
        while misses < MAX_LEASE_MISSES:
            await asyncio.sleep(min(LEASE_CHECK_S, timeout_s / 4))
            if time.monotonic() - self._renewed_s < timeout_s:
                misses = 0
                continue
            found = await asyncio.to_thread(presence, self._assignment.app)
            # A controller that recovers knows no application for a moment; one answer does not end a worker.
            misses = misses + 1 if found in (Presence.DELETING, Presence.ABSENT) else 0
        log.warning("application %s is gone and nobody ended %s", self._assignment.app, self._assignment.worker)
        await self.stop()
        # Ends this process too: it runs inside the group.
        await reserve.release(self._assignment.group)
        os._exit(0)
