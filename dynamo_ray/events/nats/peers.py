"""What the ingress replicas have booked, said to each other on NATS; see dynamo_ray.events.bookings for how."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator

from nats.aio.client import Client
from nats.aio.msg import Msg

from dynamo_ray.config import NatsConfig
from dynamo_ray.events.bookings import FULL_EVERY_S, OwnBookings, Peer, PeerBookings
from dynamo_ray.events.nats.link import Link, end
from dynamo_ray.events.nats.wire import Subjects
from dynamo_ray.routing.kv_index import Snapshot
from dynamo_ray.routing.load import LoadTable
from dynamo_ray.routing.ranks import Holder
from dynamo_ray.telemetry import Reading

log = logging.getLogger(__name__)

COALESCE_S = 0.010
GOODBYE_S = 0.5
MAX_STATEMENT_BYTES = 1_000_000


class NatsPeers:
    """This replica among the others; nobody needs to list them.

    While NATS is away, the others' bookings lapse with their lease and each replica goes by its own; the first
    statements after that are whole.

    Raises:
        ConfigError: As `dynamo_ray.events.nats.link.options`, when constructed.
    """

    def __init__(self, config: NatsConfig, app: str, table: LoadTable, changed: Callable[[], None]) -> None:
        self.me: Peer | None = None
        self.replica = secrets.token_hex(8)
        self.bookings = PeerBookings(self.replica, table.peer, table.forget)
        self.num_published = 0
        self._subjects = Subjects(config.prefix, app)
        self._link = Link(config, self._subjects, f"{app}/ingress bookings", self._serve)
        self._table, self._changed = table, changed
        self._own = OwnBookings(self.replica)
        self._full_s = 0.0
        self._client: Client | None = None
        self._expirer: asyncio.Task[None] | None = None

    async def reconcile(self, secret: bytes, listed: Iterable[Peer]) -> None:
        if self._expirer is None:
            self._expirer = asyncio.create_task(self._expire(), name="bookings-expiry")
            self._link.start()

    async def resync(self, holder: Holder) -> Snapshot | None:
        """Nobody is asked: the worker's own publisher knows better."""
        return None

    def readings(self) -> Iterator[Reading]:
        return self.bookings.readings(self.num_published)

    def check_health(self) -> None:
        if self._expirer is not None and self._expirer.done():
            raise RuntimeError(f"the task {self._expirer.get_name()} has ended")

    async def close(self) -> None:
        if self._client is not None:
            try:
                async with asyncio.timeout(GOODBYE_S):
                    await self._say(self._client, self._own.full({}, leaving=True))
                    await self._client.flush()
            except Exception as error:  # noqa: BLE001 - whatever NATS does: the lease says goodbye too
                log.debug("no goodbye: %s", error)
        await self._link.close()
        if self._expirer is not None:
            await end([self._expirer])

    async def _serve(self, client: Client) -> None:
        """One connection's time: everything once a second and to every newcomer, changes as soon as there are some."""
        await client.subscribe(self._subjects.bookings(), cb=self._heard)
        self._client, self._full_s = client, 0.0
        loop = asyncio.get_running_loop()
        try:
            while True:
                changed = self._table.take_changes()
                if loop.time() >= self._full_s:
                    self._full_s = loop.time() + FULL_EVERY_S
                    await self._say(client, self._own.full(self._table.ours()))
                elif changed:
                    await self._say(client, self._own.changes(changed))
                await asyncio.sleep(COALESCE_S)
        finally:
            self._client = None

    async def _say(self, client: Client, statement: bytes) -> None:
        if len(statement) > MAX_STATEMENT_BYTES:
            log.error("a statement of %d bytes is more than NATS takes: the others do not hear it", len(statement))
            return
        await client.publish(self._subjects.bookings(self.replica), statement)
        self.num_published += 1

    async def _heard(self, message: Msg) -> None:
        if message.subject == self._subjects.bookings(self.replica):
            return  # our own
        known = len(self.bookings)
        self.bookings.take(message.data, asyncio.get_running_loop().time())
        if len(self.bookings) > known:
            self._full_s = 0.0
        self._changed()

    async def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(FULL_EVERY_S / 4)
            if self.bookings.expire(loop.time()):
                self._changed()
