"""The ingress replicas' own event plane: who has booked what, and what a rank holds, over ZeroMQ under CurveZMQ."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Callable, Iterable, Iterator

import zmq
import zmq.asyncio

from dynamo_ray.events import snapshots
from dynamo_ray.events.bookings import FULL_EVERY_S, OwnBookings, Peer, PeerBookings
from dynamo_ray.events.curve import SecureContext
from dynamo_ray.events.snapshots import Answers, NoSnapshot, SnapshotOf
from dynamo_ray.routing.kv_index import Snapshot
from dynamo_ray.routing.load import LoadTable
from dynamo_ray.routing.ranks import Holder
from dynamo_ray.telemetry import Reading

log = logging.getLogger(__name__)

COALESCE_S = 0.010
"""At most one statement in this time."""
MAX_STATEMENT_BYTES = 8 * 1024 * 1024
FIRST_WORD_S = 1.5 * FULL_EVERY_S
"""A replica that lives is heard within that time."""
FAREWELL_MS = 200
"""For the last statement to leave."""
MAX_FETCHES = 2
"""Ranks asked for at the same time: taking them in is work for the loop that serves."""


class Peers:
    """This replica among the others: says what it has booked, takes what they say, and gives and asks for snapshots.

    Booking costs nothing here: every 10 ms a task looks at what changed in `table`. `changed` is called when others
    have booked or freed. Nothing is bound before `reconcile` was told the deployment's secret.
    """

    def __init__(self, host: str, table: LoadTable, changed: Callable[[], None], snapshot_of: SnapshotOf) -> None:
        self.replica = secrets.token_hex(8)
        """Never used again: a replica that comes back in its place is another one."""
        self.me: Peer | None = None
        """What the others are to be told, once there is something."""
        self.bookings = PeerBookings(self.replica, table.peer, table.forget)
        self.answers = Answers(snapshot_of)
        self.num_published = 0
        self.num_snapshots = 0
        """Taken from other replicas."""
        self._host, self._table, self._changed = host, table, changed
        self._own = OwnBookings(self.replica)
        self._listed: dict[str, Peer] = {}
        self._known: dict[str, Peer] = {}
        self._full_s = 0.0
        """When everything is to be said again."""
        self._spoken = asyncio.Event()
        """Others have said something."""
        self._fetches = asyncio.Semaphore(MAX_FETCHES)
        self._sockets: _Sockets | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def reconcile(self, secret: bytes, listed: Iterable[Peer]) -> None:
        """Listen to the replicas that are listed; and to one that is not for as long as it is heard.

        So an orchestrator that has just begun, and knows of nobody yet, takes no replica from another.
        """
        self._listed = {peer.replica: peer for peer in listed if peer.replica != self.replica}
        if self._sockets is None:
            await self._open(secret)
        self._refresh()

    async def resync(self, holder: Holder) -> Snapshot | None:
        """What another replica knows for certain of a rank, from the first that does; None if none does.

        Asks only those that are heard; one that stopped answering just now takes `ANSWER_S`.
        """
        await self._first_word()
        asked: set[str] = set()
        while True:
            async with self._fetches:
                peers = [peer for peer in self._audible() if peer.replica not in asked]
                if not peers or self._sockets is None:
                    return None
                peer = random.choice(peers)
                asked.add(peer.replica)
                try:
                    snapshot = await snapshots.fetch(self._sockets.context, peer.snapshots, holder)
                except NoSnapshot as error:
                    log.info("ingress replica %s has no snapshot of %s: %s", peer.replica, holder, error)
                    continue
            self.num_snapshots += 1
            return snapshot

    def readings(self) -> Iterator[Reading]:
        """What this replica knows of the others, for /metrics."""
        answers = self.answers
        yield from self.bookings.readings(self.num_published)
        for outcome, count in (
            ("taken", self.num_snapshots),
            ("served", answers.num_served),
            ("refused", answers.num_refused),
        ):
            labels = {"outcome": outcome}
            yield "dynamo_ray_peer_snapshots_total", "What ranks hold, between ingress replicas", labels, count

    def check_health(self) -> None:
        """Raises RuntimeError when this replica has stopped speaking or listening, as it never should."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"the task {task.get_name()} has ended: {task}")

    async def close(self) -> None:
        """Say goodbye, so that the others need not wait for the lease to end."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        sockets, self._sockets, self.me = self._sockets, None, None
        if sockets is not None:
            await sockets.publish(self._own.full({}, leaving=True))
            await sockets.context.close()

    async def _open(self, secret: bytes) -> None:
        context = SecureContext(secret)
        try:
            self._sockets = sockets = _Sockets(context, self._host)
        except OSError as error:
            log.error("this ingress replica cannot tell the others what it has booked: %s: %s", self._host, error)
            await context.close()
            return
        self.me = Peer(self.replica, sockets.bookings, sockets.snapshots)
        self._tasks = [
            asyncio.create_task(self._publish(sockets), name="bookings-out"),
            asyncio.create_task(self._welcome(sockets), name="bookings-newcomers"),
            asyncio.create_task(self._hear(sockets), name="bookings-in"),
            asyncio.create_task(snapshots.serve(sockets.router, self.answers), name="snapshots"),
        ]

    def _refresh(self) -> None:
        """Connect to new replicas and let go of those that left."""
        if self._sockets is None:
            return
        self._known = {peer.replica: peer for peer in self._audible()} | self._listed
        self._sockets.listen({peer.bookings for peer in self._known.values()})

    def _audible(self) -> list[Peer]:
        return [peer for peer in self._known.values() if peer.replica in self.bookings]

    async def _first_word(self) -> None:
        """Whoever has just begun knows of others and has heard none yet: give them a moment, if they live."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_WORD_S):
                while self._known and not self._audible():
                    self._spoken.clear()
                    await self._spoken.wait()

    async def _publish(self, sockets: _Sockets) -> None:
        """Everything once a second and to every newcomer, changes as soon as there are some."""
        loop = asyncio.get_running_loop()
        while True:
            changed = self._table.take_changes()
            if loop.time() >= self._full_s:
                self._full_s = loop.time() + FULL_EVERY_S
                await sockets.publish(self._own.full(self._table.ours()))
                self.num_published += 1
            elif changed:
                await sockets.publish(self._own.changes(changed))
                self.num_published += 1
            await asyncio.sleep(COALESCE_S)

    async def _welcome(self, sockets: _Sockets) -> None:
        while True:
            await sockets.newcomer()
            self._full_s = 0.0

    async def _hear(self, sockets: _Sockets) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout_at(self.bookings.expires_s):
                    self.bookings.take(await sockets.sub.recv(), loop.time())
            except TimeoutError:
                # We may have been the one that was stopped: take what has arrived meanwhile before judging.
                while await sockets.sub.poll(0):
                    self.bookings.take(await sockets.sub.recv(), loop.time())
                if self.bookings.expire(loop.time()):
                    self._refresh()
            self._spoken.set()
            self._changed()


class _Sockets:
    """The four of one replica; ends with its context."""

    def __init__(self, context: SecureContext, host: str) -> None:
        self.context = context
        self.sub = context.client(zmq.SUB, MAX_STATEMENT_BYTES)
        self.sub.subscribe(b"")
        self._pub, self.bookings = context.server(zmq.XPUB, host, snapshots.MAX_ASK_BYTES)
        self._pub.xpub_verbose = True
        self._pub.linger = FAREWELL_MS
        self.router, self.snapshots = context.server(zmq.ROUTER, host, snapshots.MAX_ASK_BYTES)
        self._heard: set[str] = set()

    def listen(self, endpoints: set[str]) -> None:
        for endpoint in self._heard - endpoints:
            self.sub.disconnect(endpoint)
            self._heard.discard(endpoint)
        for endpoint in endpoints - self._heard:
            try:
                self.sub.connect(endpoint)
            except zmq.ZMQError as error:
                log.error("cannot listen to the ingress replica at %s: %s", endpoint, error)
            else:
                self._heard.add(endpoint)

    async def publish(self, statement: bytes) -> None:
        """Never waits: for a replica that does not read, the newest is dropped, which its next full one mends."""
        await self._pub.send(statement)

    async def newcomer(self) -> None:
        """Somebody has begun to listen."""
        while not (await self._pub.recv()).startswith(b"\1"):
            pass
