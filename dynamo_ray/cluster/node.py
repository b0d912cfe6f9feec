"""One node's share of one worker: a Ray actor that owns its part of the engine, and its data plane where it has one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import ray

import backends
from backends.engine import Command, Engine, EngineError, EngineStartError, LaunchSpec, NodePlace, Role
from backends.failures import Failure, explain, start_error
from dynamo_ray.cluster.commands import Hold
from dynamo_ray.cluster.ports import PortBlock, reserve_ports
from dynamo_ray.cluster.presence import Presence, presence
from dynamo_ray.cluster.processes import kill_predecessors
from dynamo_ray.cluster.worker import WorkerServer
from dynamo_ray.config import LimitsConfig, NatsConfig
from dynamo_ray.priority import restore_priority
from dynamo_ray.request.wire import WorkerInfo, endpoint_name
from placement import reserve
from placement.plan import Bundle

if TYPE_CHECKING:
    from dynamo_ray.events.nats.publisher import Publisher

log = logging.getLogger(__name__)

ENGINE_STOP_TIMEOUT_S = 20.0
LEASE_CHECK_S = 5.0
NUM_LAST_LINES = 50
"""Of an engine that has died, among which the cause is looked for: older ones tell of what it survived."""
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
    """On a node that takes requests, once it does."""
    pid: int


@contextmanager
def border() -> Iterator[None]:
    """Raise what an engine raises as our own error: its classes may exist in no other process, or not survive the way.

    Raises:
        EngineError: Anything was raised inside; an EngineStartError stays one.
    """
    try:
        yield
    except EngineStartError as error:
        raise EngineStartError(str(error)) from None
    except EngineError as error:
        raise EngineError(error.message, error.retryable, error.field) from None
    except (Exception, SystemExit) as error:
        log.exception("the engine failed")
        raise EngineError(_words(error)) from None


class EngineNode:
    """Life: prepare, start, then sentinel / renew / describe at will, drain, stop. All on one event loop.

    Whatever fails in a method is raised as an EngineError or EngineStartError, which every process can read.
    """

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._ports: PortBlock | None = None
        self._backend = ""
        self._role = Role.AGGREGATED
        self._engine: Engine | None = None
        self._server: WorkerServer | None = None
        self._publisher: Publisher | None = None
        self._info: WorkerInfo | None = None
        self._started = asyncio.Event()
        self._ending = False
        self._renewed_s = time.monotonic()
        self._lease: asyncio.Task[None] | None = None

    async def prepare(self, num_ports: int) -> NodePlace:
        """Take ports, and make sure that nothing of an earlier incarnation still runs on this node.

        Raises:
            EngineError: There are not so many free ports in a row, or what was left does not end.
        """
        self._lease = asyncio.create_task(self._keep_lease(), name="lease")
        restore_priority()
        with border():
            await asyncio.to_thread(kill_predecessors)
            address = ray.util.get_node_ip_address()
            self._ports = reserve_ports(address, num_ports)
        return NodePlace(address, self._ports.ports)

    async def start(
        self,
        backend: str,
        spec: LaunchSpec,
        secret: bytes,
        limits: LimitsConfig,
        nats: NatsConfig | None = None,
    ) -> WorkerInfo | None:
        """Start this node's share of the engine; where it takes requests, serve it, and say where.

        With `nats`, what its ranks hold and how busy they are is published there.

        Raises:
            EngineStartError: It cannot; nothing is left running.
        """
        self._backend, self._role = backend, spec.role
        try:
            await self._start(backend, spec, secret, limits)
            self._publish(spec, nats)
        except (Exception, SystemExit) as error:
            log.exception("%s could not start", spec.worker)
            explained = error if isinstance(error, EngineStartError) else self._explain_start(error)
            with contextlib.suppress(EngineError):
                await self.stop()
            raise EngineStartError(str(explained)) from None
        self._started.set()
        return self._info

    async def _start(self, backend: str, spec: LaunchSpec, secret: bytes, limits: LimitsConfig) -> None:
        self._engine = backends.create(backend, spec)
        engine_info = await self._engine.start()
        if engine_info is None:
            return
        self._server = WorkerServer(
            self._engine,
            worker=endpoint_name(spec.worker, spec.node_rank),
            epoch=self._assignment.epoch,
            secret=secret,
            host=spec.place.address,
            max_queued_requests=limits.queued_requests(engine_info.attn_dp_size),
        )
        self._info = await self._server.start(engine_info)

    def _publish(self, spec: LaunchSpec, nats: NatsConfig | None) -> None:
        """Raises ConfigError where this node has not what it takes to reach NATS."""
        if nats is None or self._server is None or self._engine is None or self._info is None:
            return
        from dynamo_ray.events.nats.publisher import Publisher  # late: most need no nats-py

        info = self._info
        publisher = Publisher(nats, self._assignment.app, spec.model, info.worker, info.epoch, self._engine.load)
        publisher.start(info.engine.kv_event_sources)
        self._server.on_flush = publisher.flushed
        self._publisher = publisher

    async def unready(self) -> Failure | None:
        """What its engine's last lines tell of a start that takes too long; None once it is ready."""
        if self._started.is_set():
            return None
        with border():
            return explain(self._last_lines(), self._backend, self._role)

    async def sentinel(self) -> str:
        """Return, with the reason, only when this node's engine has died; raised by Ray when this process has."""
        await self._started.wait()
        assert self._engine is not None
        with border():
            reason = await self._engine.died()
            failure = explain([*self._last_lines()[-NUM_LAST_LINES:], reason], self._backend, self._role)
        quoted = failure.lines[:-1]  # the reason itself comes first
        return replace(failure, lines=quoted).message(reason) if quoted or failure.cause else reason

    async def renew(self) -> str | None:
        """An orchestrator is there; raises EngineError when the engine is not healthy.

        Returns:
            Why a command keeps requests away from here, as a predicate of its name.
        """
        self._renewed_s = time.monotonic()
        if self._started.is_set() and self._engine is not None:
            with border():
                await self._engine.check_health()
        return None if self._server is None else self._server.paused

    async def describe(self) -> Description:
        self._renewed_s = time.monotonic()
        started = self._started.is_set() and not self._ending
        return Description(self._assignment, started, self._info, os.getpid())

    async def hold(self, holds: frozenset[Hold]) -> frozenset[Hold]:
        return frozenset() if self._server is None else self._server.hold(holds)

    async def unhold(self, holds: frozenset[Hold]) -> None:
        if self._server is not None:
            self._server.unhold(holds)

    async def control(self, command: Command) -> bool:
        """Have this node's share of the engine carry it out; whether requests come meanwhile is up to `hold`.

        Returns:
            As `commands.Node.control`.
        """
        with border():
            if self._engine is None or not self._started.is_set():
                raise EngineError("its engine does not run")
            serves = self._server is not None
            await (self._server or self._engine).control(command)
            return serves

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests from now on and wait for those inside; False when some were left at the end."""
        self._ending = True
        with border():
            return self._server is None or await self._server.drain(timeout_s)

    async def stop(self) -> None:
        """Stop serving and the engine; safe to call twice. The caller kills this actor next."""
        self._ending = True
        server, engine, publisher = self._server, self._engine, self._publisher
        self._server = self._engine = self._publisher = None
        with border():
            try:
                if publisher is not None:
                    await publisher.close()
                if server is not None:
                    await server.stop()
            finally:
                if engine is not None:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(ENGINE_STOP_TIMEOUT_S):
                            await engine.stop()

    def _last_lines(self) -> tuple[str, ...]:
        return () if self._engine is None else self._engine.last_lines()

    def _explain_start(self, error: BaseException) -> EngineStartError:
        """Of an engine that did not explain it itself."""
        words = _words(error)
        try:
            return start_error([*self._last_lines(), *words.splitlines()], self._backend, self._role)
        except Exception:  # the border: the engine that fails here has failed already
            log.exception("its last lines cannot be read")
            return EngineStartError(words)

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
        with contextlib.suppress(EngineError):
            await self.stop()
        # Ends this process too: it runs inside the group.
        await reserve.release(self._assignment.group)
        os._exit(0)


def _words(error: BaseException) -> str:
    """What an error says; its own words may fail too."""
    try:
        return str(error) or repr(error)
    except Exception:  # noqa: BLE001 - whatever class it is
        return type(error).__name__
