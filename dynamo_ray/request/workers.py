"""The ingress's live connections: kept equal to what the control path says, reconnected while it says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial

from backends.engine import RankLoad, Role
from dynamo_ray.request.connection import WorkerConnection
from dynamo_ray.request.membership import Membership
from dynamo_ray.request.wire import WorkerInfo

log = logging.getLogger(__name__)

RECONNECT_S = 0.5

Key = tuple[str, int]
"""A worker's name and epoch."""


class Workers:
    """Connections to every worker of the newest membership.

    `on_up` is called when a worker can take requests, `on_down` when it no longer can; each `on_up` is followed
    by at most one `on_down` of the same incarnation before the next. `on_load`, `on_turn` and `on_flush` are a
    connection's.
    """

    def __init__(
        self,
        heartbeat_timeout_s: float,
        on_up: Callable[[WorkerInfo], None],
        on_down: Callable[[WorkerInfo], None],
        on_load: Callable[[WorkerInfo, tuple[RankLoad, ...]], None],
        on_turn: Callable[[], None],
        on_flush: Callable[[WorkerInfo], None],
    ) -> None:
        self._timeout_s = heartbeat_timeout_s
        self._on_up, self._on_down = on_up, on_down
        self._on_load, self._on_turn, self._on_flush = on_load, on_turn, on_flush
        self._live: dict[str, WorkerConnection] = {}
        """By name, in order."""
        self._by_role: dict[Role, Sequence[WorkerConnection]] = {}
        self._keepers: dict[Key, asyncio.Task[None]] = {}

    def of_role(self, role: Role) -> Sequence[WorkerConnection]:
        """Those that take new requests now, by name: the same object again until they are others."""
        found = self._by_role.get(role)
        if found is None:
            found = tuple(connection for connection in self._serving(role) if connection.paused is None)
            self._by_role[role] = found
        return found

    def paused(self, role: Role) -> dict[str, str]:
        """Those that would, but for a command, and what it made of them."""
        return {c.info.worker: c.paused for c in self._serving(role) if c.paused is not None}

    def connection(self, worker: str) -> WorkerConnection:
        """Raises KeyError for a worker that is not connected."""
        return self._live[worker]

    def _serving(self, role: Role) -> list[WorkerConnection]:
        return [
            connection
            for connection in self._live.values()
            if connection.info.role is role and connection.alive and not connection.draining
        ]

    def reconcile(self, membership: Membership) -> None:
        """Start connecting to new workers and let go of those that left."""
        wanted = {(info.worker, info.epoch): info for info in membership.workers}
        for key in [key for key in self._keepers if key not in wanted]:
            self._keepers.pop(key).cancel()
        for key, info in wanted.items():
            if key not in self._keepers:
                keep = self._keep(info, membership.secret)
                self._keepers[key] = asyncio.create_task(keep, name=f"connection-{info.worker}")

    async def close(self) -> None:
        keepers = list(self._keepers.values())
        self._keepers.clear()
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    async def _keep(self, info: WorkerInfo, secret: bytes) -> None:
        """Hold one connection for as long as the worker is a member."""
        while True:
            lost = asyncio.Event()
            connection = WorkerConnection(
                info,
                secret,
                self._timeout_s,
                self._on_load,
                self._turned,
                self._on_flush,
                partial(self._lost, lost),
            )
            try:
                await connection.connect()
                if connection.alive:
                    self._live = dict(sorted({**self._live, info.worker: connection}.items()))
                    self._by_role.clear()
                    self._on_up(info)
                    await lost.wait()
                log.warning("lost the connection to %s epoch %d", info.worker, info.epoch)
            except OSError as error:
                log.warning("cannot connect to %s: %s", info.worker, error)
            except Exception:  # a defect here must not leave out a worker for good, unseen
                log.exception("the connection to %s is made again", info.worker)
            finally:
                connection.close()
            await asyncio.sleep(RECONNECT_S)

    def _turned(self) -> None:
        self._by_role.clear()
        self._on_turn()

    def _lost(self, lost: asyncio.Event, connection: WorkerConnection) -> None:
        if self._live.get(connection.info.worker) is connection:
            del self._live[connection.info.worker]
            self._by_role.clear()
            self._on_down(connection.info)
        lost.set()
