"""What the HTTP front asks for tokens: the pipeline over the live workers, kept current by the control path."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

from backends.engine import EngineInfo, RankLoad, Role, TokenChunk
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.errors import NotReady
from dynamo_ray.events.bookings import Peer
from dynamo_ray.events.plane import event_plane, peer_plane
from dynamo_ray.request.attempt import Attempt
from dynamo_ray.request.generation import Generation
from dynamo_ray.request.membership import Membership, Phase
from dynamo_ray.request.pipeline import serve
from dynamo_ray.request.readings import of_index, of_workers
from dynamo_ray.request.router import Router
from dynamo_ray.request.wire import WorkerInfo
from dynamo_ray.request.workers import Workers
from dynamo_ray.routing.explanation import Explanation
from dynamo_ray.routing.kv_index import Snapshot
from dynamo_ray.routing.ranks import Holder
from dynamo_ray.telemetry import Reading

log = logging.getLogger(__name__)

WATCH_RETRY_S = 1.0


class Dispatch:
    """The data path of one ingress process.

    `watch(version)` returns the membership as soon as it differs from `version`, or the same one after a while.
    An orchestrator that does not answer changes nothing: the workers known last go on serving. Other ingress processes
    find this one on `host` if `watch` tells the orchestrator of `peer`; None: it is alone.
    """

    def __init__(
        self,
        config: DeploymentConfig,
        watch: Callable[[int], Awaitable[Membership]],
        host: str | None = None,
        app: str = "default",
    ) -> None:
        self.config = config
        self.membership: Membership | None = None
        self._watch = watch
        self._follower: asyncio.Task[None] | None = None
        self._known: dict[str, EngineInfo] = {}
        """Of each worker the newest engine there was, though it may be gone."""
        self._least: tuple[int, int] | None = None
        """`_limits` of the workers there are; None: they have changed."""
        self.workers = Workers(
            config.limits.heartbeat_timeout_s, self._up, self._down, self._heard, self._turned, self._flushed
        )
        self.router = Router(config, self.workers)
        table, wake, anomalies = self.router.table, self.router.room.wake, self.router.index.anomalies
        self.events = event_plane(config, app, self.router, self._resync, anomalies)
        self.peers = None if host is None else peer_plane(config, app, host, table, wake, self._snapshot)

    async def start(self) -> None:
        self._follower = asyncio.create_task(self._follow(), name="membership")

    async def close(self) -> None:
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        if self.peers is not None:
            await self.peers.close()
        await self.workers.close()
        await self.events.close()

    def check_health(self) -> None:
        """Raises RuntimeError when this replica can no longer learn who serves, or what the others do."""
        if self._follower is None or self._follower.done():
            raise RuntimeError("the membership follower has ended")
        if self.peers is not None:
            self.peers.check_health()

    @property
    def peer(self) -> Peer | None:
        """This process, as other ingress processes find it; None before it listens."""
        return None if self.peers is None else self.peers.me

    @property
    def max_model_len(self) -> int:
        """The smallest of all workers', in tokens; while there are none, of the last ones.

        Raises:
            NotReady: No worker was there yet to say.
        """
        return self._limits()[0]

    @property
    def max_logprobs(self) -> int:
        return self._limits()[1]

    def ready(self) -> str | None:
        """None when every role has a worker; else what is missing, for a person."""
        missing = [role for role in self.config.roles if not self.workers.of_role(role)]
        if not missing:
            return None
        return "; ".join(self._explain(role) for role in missing)

    def generate(self, request: Generation) -> AsyncGenerator[TokenChunk]:
        limits = self.config.limits
        return serve(request, self.router, limits.request_timeout_s, limits.max_retries)

    def explain(self, request: Generation) -> Explanation:
        """Where it would go now, and why; nothing is booked or sent.

        Raises:
            RequestError: It would go nowhere.
        """
        return self.router.explain(Attempt(request, float("inf")))

    def readings(self) -> Iterator[Reading]:
        """What this process knows of the workers and of its own index, for /metrics."""
        yield from of_workers(self.router, self.workers, tuple(self.config.roles))
        yield from of_index(self.router, self.events)
        yield from self.events.readings()
        yield from self.router.tally.readings()
        yield from self.router.room.readings()
        if self.peers is not None:
            yield from self.peers.readings()

    def _snapshot(self, holder: Holder) -> Snapshot | None:
        sequence = self.events.next_sequence(holder)
        return self.router.index.snapshot(holder, sequence) if sequence else None

    async def _resync(self, holder: Holder) -> Snapshot | None:
        return None if self.peers is None else await self.peers.resync(holder)

    def _limits(self) -> tuple[int, int]:
        """The least `max_model_len` and `max_logprobs`."""
        if self._least is None:
            engines = [c.info.engine for role in self.config.roles for c in self.workers.of_role(role)]
            if not engines and not (engines := list(self._known.values())):
                raise NotReady(self.ready() or "no worker is ready", retry_after_s=5.0)
            self._least = min(e.max_model_len for e in engines), min(e.max_logprobs for e in engines)
        return self._least

    def _explain(self, role: Role) -> str:
        statuses = () if self.membership is None else self.membership.statuses
        phases = [f"{s.worker} is {s.phase}: {s.detail}" for s in statuses if s.role is role and s.phase != Phase.READY]
        phases += [f"{worker} {why}" for worker, why in self.workers.paused(role).items()]
        return f"no {role} worker is ready ({', '.join(phases) or 'none has been started yet'})"

    async def _follow(self) -> None:
        version = -1
        while True:
            try:
                membership = await self._watch(version)
            except Exception as error:  # noqa: BLE001 - whatever the control path does, the data path goes on
                log.warning("the orchestrator does not answer: %s", error)
                await asyncio.sleep(WATCH_RETRY_S)
                continue
            version = membership.version
            self.membership = membership
            if self.peers is not None:
                await self.peers.reconcile(membership.secret, membership.peers)
            self.workers.reconcile(membership)

    def _up(self, info: WorkerInfo) -> None:
        self._known[info.worker], self._least = info.engine, None
        self.router.up(info)
        if self.config.events != "none":
            self.events.subscribe(info.worker, info.epoch, info.engine.kv_event_sources)

    def _down(self, info: WorkerInfo) -> None:
        self._least = None
        self.events.unsubscribe(info.worker, info.epoch)
        self.router.down(info)

    def _heard(self, info: WorkerInfo, loads: tuple[RankLoad, ...]) -> None:
        self.router.heard(info, loads)

    def _turned(self) -> None:
        self._least = None
        self.router.turned()

    def _flushed(self, info: WorkerInfo) -> None:
        self.router.flushed(info)
