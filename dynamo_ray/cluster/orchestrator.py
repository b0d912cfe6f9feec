"""The Serve deployment that keeps the workers as the configuration wants them.

It owns no process: groups and node actors are detached and found by name, so it can crash, restart or be replaced
without touching a worker. Only when its application is being deleted does it end them; should it be killed in that
very moment, the nodes' leases do (node.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import msgspec
from ray import serve

from backends.engine import Command
from dynamo_ray.cluster.fleet import Fleet
from dynamo_ray.cluster.lifecycle import (
    Died,
    Drain,
    Drained,
    Event,
    GroupLost,
    Instruction,
    Kill,
    NotReserved,
    Publish,
    Release,
    Reserve,
    Start,
    Started,
    StopAll,
    Tick,
)
from dynamo_ray.cluster.memory import Memory
from dynamo_ray.cluster.presence import ORCHESTRATOR, Presence, presence
from dynamo_ray.cluster.replicas import Replicas
from dynamo_ray.cluster.supervisor import Supervisor, Timings
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.events.bookings import Peer
from dynamo_ray.events.nats.wire import Lifecycle
from dynamo_ray.request.membership import Membership, WorkerStatus

if TYPE_CHECKING:
    from dynamo_ray.events.nats.lifecycle import LifecyclePublisher

log = logging.getLogger("ray.serve")

WATCH_S = 10.0
STOPPING_WATCH_S = 0.5
REPLICA_LEASE_S = 3 * WATCH_S
"""A living ingress replica asks again whenever it is answered."""
REPLICA_CHECK_S = 5.0
PRESENCE_POLL_S = 1.0
HEALTH_PERIOD_S = 5.0
GROUP_POLL_S = 2.0
RETRY_S = 1.0
START_MARGIN_S = 30.0
"""Beyond the limit of a start: to ask its nodes why."""
TEARDOWN_MARGIN_S = 60.0
"""Beyond draining: to stop engines, kill actors and release groups."""
MAX_WATCHERS = 10_000


Work = Callable[[], Coroutine[Any, Any, Event]]


async def outcome(work: Work, otherwise: Callable[[str], Event] | None = None) -> Event:
    """What came of an instruction, always: unanswered, it would hold its worker for ever.

    Work that raises is answered by `otherwise`, or is done again until it does not.
    """
    while True:
        try:
            return await work()
        except Exception as error:  # the border: whatever Ray raises
            log.exception("an instruction failed")
            if otherwise is not None:
                return otherwise(str(error) or repr(error))
        await asyncio.sleep(RETRY_S)


class Orchestrator:
    """One replica per application."""

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        checked = DeploymentConfig.model_validate(config)
        self._app = serve.get_replica_context().app_name
        self._clock_offset_s = time.time() - time.monotonic()
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()
        self._stopped = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._memory = Memory(self._app)
        secret = await asyncio.to_thread(self._memory.secret)
        epochs = await asyncio.to_thread(self._memory.epochs)
        self._fleet = Fleet(self._app, checked, self._memory, secret)
        roles = {worker: work.role for worker, work in self._fleet.works.items()}
        timings = Timings(start_timeout_s=checked.limits.start_timeout_s + START_MARGIN_S)
        self._supervisor = Supervisor(roles, epochs, timings, now_s=self._now_s())
        # Greater than any version that an earlier orchestrator of this application gave out.
        self._membership = Membership(int(time.time() * 1000), secret, (), self._supervisor.statuses())
        self._replicas = Replicas(REPLICA_LEASE_S)
        self._lifecycle: LifecyclePublisher | None = None
        if checked.nats_events is not None:
            from dynamo_ray.events.nats.lifecycle import LifecyclePublisher  # late: most need no nats-py

            self._lifecycle = LifecyclePublisher(checked.nats_events, self._app)
            self._lifecycle.start()
            self._tell_lifecycle()
        for adopted in await self._fleet.adopt():
            self._apply(adopted)
            self._watch(adopted.worker, adopted.epoch)
        self._spawn(self._tick_loop())
        self._spawn(self._repeat(PRESENCE_POLL_S, self._check_presence))
        self._spawn(self._repeat(HEALTH_PERIOD_S, self._check_health))
        self._spawn(self._repeat(GROUP_POLL_S, self._check_groups))
        self._spawn(self._repeat(REPLICA_CHECK_S, self._check_replicas))

    async def watch(self, version: int, peer: Peer | None = None) -> Membership:
        """The membership, as soon as its version is not `version`; the same one after 10 s.

        `peer` is the asking ingress replica, which the others learn of as long as it goes on asking.
        """
        if peer is not None and self._replicas.seen(peer, self._now_s()):
            log.info("ingress replica %s is at %s", peer.replica, peer.bookings)
            self._announce(peers=self._replicas.peers)
        try:
            async with asyncio.timeout(STOPPING_WATCH_S if self._supervisor.stopping else WATCH_S), self._changed:
                await self._changed.wait_for(lambda: self._membership.version != version)
        except TimeoutError:
            pass
        return self._membership

    async def status(self) -> list[WorkerStatus]:
        return list(self._supervisor.statuses())

    async def control(self, command: Command, target: str | None, limit_s: float) -> dict[str, str | None]:
        """Carry a command out on a worker, on a role's workers, or on all; None, or why it failed, by worker.

        Empty where there is no such worker or role.
        """
        return await self._fleet.control(command, target, limit_s)

    async def __del__(self) -> None:
        """End everything if the application is being deleted; leave everything if only this replica is replaced."""
        if not hasattr(self, "_supervisor"):
            return
        if await self._is_deleted():
            self._stop()
        if self._supervisor.stopping:
            await self._stopped.wait()
        if self._lifecycle is not None:
            await self._lifecycle.close()
        for task in list(self._tasks):
            task.cancel()

    def _now_s(self) -> float:
        """Unix seconds that never jump."""
        return time.monotonic() + self._clock_offset_s

    def _apply(self, event: Event) -> None:
        """Tell the supervisor, and do what it orders."""
        for instruction in self._supervisor.handle(event, self._now_s()):
            self._execute(instruction)
        self._wake.set()
        if self._supervisor.stopped and not self._stopped.is_set():
            self._spawn(self._forget())

    def _execute(self, instruction: Instruction) -> None:
        fleet = self._fleet
        match instruction:
            case Reserve(worker):
                self._answer(lambda: fleet.reserve(worker), lambda why: NotReserved(worker, why))
            case Start(worker, epoch):
                self._answer(lambda: fleet.start(worker, epoch, self._apply), lambda why: Died(worker, epoch, why))
            case Drain(worker, epoch):
                self._answer(lambda: fleet.drain(worker, epoch), lambda _: Drained(worker, epoch))
            case Kill(worker, epoch):
                self._answer(lambda: fleet.kill(worker, epoch))
            case Release(worker):
                self._answer(lambda: fleet.release(worker))
            case Publish():
                self._publish()

    def _answer(self, work: Work, otherwise: Callable[[str], Event] | None = None) -> None:
        async def answer() -> None:
            event = await outcome(work, otherwise)
            self._apply(event)
            if isinstance(event, Started):
                self._watch(event.worker, event.epoch)

        self._spawn(answer())

    def _watch(self, worker: str, epoch: int) -> None:
        self._answer(lambda: self._fleet.watch(worker, epoch), lambda why: Died(worker, epoch, why))

    def _publish(self) -> None:
        before, statuses = self._membership, self._supervisor.statuses()
        for old, new in zip(before.statuses, statuses, strict=True):
            if (old.phase, old.detail) != (new.phase, new.detail):
                log.info("%s epoch %d is %s: %s", new.worker, new.epoch, new.phase, new.detail)
        self._announce(workers=self._supervisor.members(), statuses=statuses)
        self._tell_lifecycle()

    def _tell_lifecycle(self) -> None:
        if self._lifecycle is not None:
            self._lifecycle.tell(
                Lifecycle(s.worker, s.role, s.epoch, s.phase, s.detail, s.restarts, s.since_unix_s, time.time())
                for s in self._supervisor.statuses()
            )

    def _announce(self, **changes: Any) -> None:
        version = self._membership.version + 1
        self._membership = msgspec.structs.replace(self._membership, version=version, **changes)
        self._spawn(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _stop(self) -> None:
        if not self._supervisor.stopping:
            log.info("application %s is being deleted: ending its workers", self._app)
            self._apply(StopAll())

    async def _is_deleted(self) -> bool:
        return await asyncio.to_thread(presence, self._app) in (Presence.DELETING, Presence.ABSENT)

    async def _forget(self) -> None:
        try:
            if await self._is_deleted():  # deployed again meanwhile, it has a successor, who remembers
                await asyncio.to_thread(self._memory.forget)
        finally:
            self._stopped.set()

    async def _tick_loop(self) -> None:
        self._apply(Tick())
        while not self._supervisor.stopped:
            self._wake.clear()
            due_s = self._supervisor.next_wake_s
            try:
                async with asyncio.timeout(None if due_s is None else max(0.0, due_s - self._now_s())):
                    await self._wake.wait()
            except TimeoutError:
                self._apply(Tick())

    async def _repeat(self, every_s: float, check: Callable[[], Awaitable[None]]) -> None:
        while not self._supervisor.stopped:
            await asyncio.sleep(every_s)
            try:
                await check()
            except Exception:  # the border: Ray may be away for a moment, and the next check must come
                log.exception("a check of application %s failed", self._app)

    async def _check_presence(self) -> None:
        """Start to end everything as soon as deletion begins: Serve calls us last, after its own waits."""
        if await asyncio.to_thread(presence, self._app) is Presence.DELETING:
            self._stop()

    async def _check_health(self) -> None:
        checks = (self._fleet.check(worker, epoch) for worker, epoch in self._supervisor.serving())
        for health in await asyncio.gather(*checks):
            self._apply(health)

    async def _check_groups(self) -> None:
        for worker in await self._fleet.lost_groups():
            self._apply(GroupLost(worker, "a node of its placement group is lost"))

    async def _check_replicas(self) -> None:
        if self._replicas.expire(self._now_s()):
            self._announce(peers=self._replicas.peers)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the orchestrator failed", exc_info=task.exception())


def application(config: DeploymentConfig) -> serve.Application:
    """The orchestrator, bound to its configuration. It takes no CPU from Ray."""
    deployment = serve.deployment(
        Orchestrator,
        name=ORCHESTRATOR,
        num_replicas=1,
        max_ongoing_requests=MAX_WATCHERS,
        graceful_shutdown_timeout_s=config.limits.drain_timeout_s + TEARDOWN_MARGIN_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2.0,
        logging_config={"enable_access_log": False},
        ray_actor_options={"num_cpus": 0},
    )
    return deployment.bind(config.model_dump(mode="json"))
