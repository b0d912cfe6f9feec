"""Tells NATS where every worker is between nothing and serving; runs beside who decides that."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from nats.aio.client import Client

from dynamo_ray.config import NatsConfig
from dynamo_ray.events.nats import wire
from dynamo_ray.events.nats.link import REQUEST_TIMEOUT_S, Link
from dynamo_ray.events.nats.wire import Lifecycle, Subjects

AGAIN_EVERY_S = 30.0
"""Everything is said again: whatever NATS has lost is there again."""


class LifecyclePublisher:
    """Says each change as soon as NATS takes it, and everything on every connection and twice a minute.

    Raises:
        ConfigError: As `dynamo_ray.events.nats.link.options`, when constructed.
    """

    def __init__(self, config: NatsConfig, app: str) -> None:
        self._subjects = Subjects(config.prefix, app)
        self._link = Link(config, self._subjects, f"{app}/orchestrator", self._serve)
        self._newest: dict[str, Lifecycle] = {}
        self._unsaid: set[str] = set()
        self._wake = asyncio.Event()

    def start(self) -> None:
        self._link.start()

    def tell(self, statuses: Iterable[Lifecycle]) -> None:
        """Never waits; of one worker only the newest is kept."""
        for status in statuses:
            before = self._newest.get(status.worker)
            self._newest[status.worker] = status
            if before is None or (before.phase, before.epoch, before.detail) != (
                status.phase,
                status.epoch,
                status.detail,
            ):
                self._unsaid.add(status.worker)
        self._wake.set()

    async def close(self) -> None:
        """What was told last may be on its way: give it a moment."""
        if self._unsaid and self._link.connected:
            await asyncio.sleep(0.1)
        await self._link.close()

    async def _serve(self, client: Client) -> None:
        jetstream = client.jetstream(timeout=REQUEST_TIMEOUT_S)
        await self._link.stream(jetstream)
        while True:
            self._unsaid = set(self._newest)
            again_s = asyncio.get_running_loop().time() + AGAIN_EVERY_S
            while asyncio.get_running_loop().time() < again_s:
                self._wake.clear()
                for worker in sorted(self._unsaid):
                    await jetstream.publish(self._subjects.lifecycle(worker), wire.encode(self._newest[worker]))
                    self._unsaid.discard(worker)
                try:
                    async with asyncio.timeout_at(again_s):
                        await self._wake.wait()
                except TimeoutError:
                    break
