"""Tells NATS what the ranks of one endpoint hold and how busy they are; runs beside its engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from backends.engine import KVEventSource, RankLoad
from backends.kv_events import KVEventBatch
from dynamo_ray.config import NatsConfig
from dynamo_ray.events.nats import wire
from dynamo_ray.events.nats.link import REQUEST_TIMEOUT_S, Link, Stream
from dynamo_ray.events.nats.wire import Subjects
from dynamo_ray.events.zmq import KVEventSubscriber
from dynamo_ray.routing.kv_index import KVIndex, Snapshot
from dynamo_ray.routing.ranks import Holder, Ranks

log = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 8 * 1024 * 1024
"""Of one rank's events that are not sent yet; with more, all it holds is said instead."""
COALESCED_BYTES = 256 * 1024
"""Events that wait are sent in messages of up to this."""
PART_BLOCKS = 8192
"""Of a State: a message of 100 to 400 kB, by what the engine's hashes are."""
MAX_MESSAGE_BYTES = 900 * 1024
"""Larger is not sent: NATS takes 1 MiB. All that the rank holds is said instead, in parts."""
MAX_TAIL_BYTES = 16 * 1024 * 1024
"""With more sent since it was last said, and twice as much as it is, all that a rank holds is said again, so that who
starts has less to read."""
MAX_UNCONFIRMED = 512
CONFIRM_TIMEOUT_S = 5.0
LOAD_EVERY_S = 1.0
MIN_RESTATE_S = 0.5
"""Between two of one rank, however many ask."""


class Rank:
    """One rank's events on their way: what it holds, and what of it is still to be sent. Bounded, and never waits."""

    def __init__(self, holder: Holder, index: KVIndex, max_queued_bytes: int = MAX_QUEUED_BYTES) -> None:
        self.holder = holder
        self.dropped = 0
        self.due = True
        """All it holds is to be said, in place of what is queued."""
        self.next_sequence = 0
        self.tail_bytes = 0
        """Sent since all was last said."""
        self.state_bytes = 0
        """What it took to say all."""
        self.restated_s = float("-inf")
        self._index = index
        self._max_queued_bytes = max_queued_bytes
        self._queue: deque[tuple[int, list[wire.Event], int]] = deque()
        self._queued_bytes = 0

    @property
    def waiting(self) -> bool:
        return bool(self._queue)

    def apply(self, batch: KVEventBatch) -> None:
        """Take what its engine said next; what was said before it was not lost, or `lose` was called."""
        self._index.apply(self.holder, batch)
        sequence, self.next_sequence = self.next_sequence, self.next_sequence + 1
        if self.holder in self._index.doubtful:
            self.lose()
        if self.due:
            return
        events = [packed for event in batch.events if (packed := wire.packed(event)) is not None]
        size = sum(wire.size_bytes(event) for event in events) + 60
        self._queue.append((sequence, events, size))
        self._queued_bytes += size
        if self._queued_bytes > self._max_queued_bytes:
            self.dropped += len(self._queue)
            self.restate()

    def lose(self) -> None:
        """What it said so far is no longer so."""
        self._index.clear_holder(self.holder)
        self.next_sequence += 1  # to be taken by everybody, as a batch would be
        self.restate()

    def state(self) -> list[wire.State]:
        """All that it holds now, in parts; what comes after follows them."""
        snapshot = self._index.snapshot(self.holder, self.next_sequence) or Snapshot(self.next_sequence, [])
        pieces = wire.parts(snapshot, PART_BLOCKS)
        self.due, now_s = False, time.time()
        return [
            wire.State(*self.holder, self.next_sequence, number, len(pieces), piece, now_s)
            for number, piece in enumerate(pieces)
        ]

    def restate(self) -> None:
        """Say all again; nothing queued is needed beside that."""
        self.due = True
        self._queue.clear()
        self._queued_bytes = 0

    def take(self) -> wire.Events:
        """One message: as many batches as are queued and fit."""
        first, events, size = self._queue.popleft()
        merged, count, total = list(events), 1, size
        while self._queue and total + self._queue[0][2] <= COALESCED_BYTES:
            _, events, size = self._queue.popleft()
            merged += events
            count += 1
            total += size
        self._queued_bytes -= total
        self.tail_bytes += total
        return wire.Events(*self.holder, first, count, merged, time.time())


class Publisher:
    """Says on NATS what one endpoint's ranks hold, from their own event sockets, and each second how busy they are.

    Neither engine nor requests ever wait for it: what cannot be sent is bounded, and said as a whole later.

    Args:
        loads: the endpoint's, now.

    Raises:
        ConfigError: As `dynamo_ray.events.nats.link.options`.
    """

    def __init__(
        self,
        config: NatsConfig,
        app: str,
        model: str,
        worker: str,
        epoch: int,
        loads: Callable[[], tuple[RankLoad, ...]],
    ) -> None:
        self._subjects = Subjects(config.prefix, app)
        self._worker, self._epoch, self._loads = worker, epoch, loads
        self._link = Link(config, self._subjects, f"{app}/{worker}", self._serve)
        self._index = KVIndex(model, Ranks())
        self._sources = KVEventSubscriber(self.apply, self.lost, anomalies=self._index.anomalies)
        self._ranks: dict[int, Rank] = {}
        self._wake = asyncio.Event()
        self._stream: Stream | None = None
        self._unconfirmed: dict[asyncio.Future[Any], tuple[Rank, float]] = {}
        self.published = 0
        self.restated = 0

    @property
    def dropped(self) -> int:
        return sum(rank.dropped for rank in self._ranks.values())

    @property
    def idle(self) -> bool:
        """All that was said is confirmed."""
        return not self._unconfirmed and not any(rank.due or rank.waiting for rank in self._ranks.values())

    def next_sequence(self, holder: Holder) -> int | None:
        """The batch that a rank says next; None: not one of ours."""
        rank = self._ranks.get(holder.dp_rank)
        return None if rank is None or rank.holder != holder else rank.next_sequence

    def start(self, sources: Sequence[KVEventSource]) -> None:
        for source in sources:
            holder = Holder(self._worker, self._epoch, source.dp_rank)
            self._index.add_holder(holder)
            self._ranks[source.dp_rank] = Rank(holder, self._index)
        self._sources.subscribe(self._worker, self._epoch, sources)
        self._link.start()

    async def close(self) -> None:
        await self._sources.close()
        await self._link.close()

    def apply(self, holder: Holder, batch: KVEventBatch) -> None:
        self._ranks[holder.dp_rank].apply(batch)
        self._wake.set()

    def lost(self, holder: Holder) -> None:
        self._ranks[holder.dp_rank].lose()
        self._wake.set()

    def flushed(self) -> None:
        """A command has emptied the engine's caches."""
        for rank in self._ranks.values():
            rank.lose()
        self._wake.set()

    async def _serve(self, client: Client) -> None:
        """One connection's time. What was not confirmed on the one before is said again as a whole."""
        self._restate_unconfirmed()
        jetstream = client.jetstream(timeout=REQUEST_TIMEOUT_S)
        stream = await self._link.stream(jetstream)
        if not stream.continues(self._stream):
            self.restate_all()
        self._stream = stream
        await client.subscribe(self._subjects.ask(self._worker, self._epoch), cb=self._asked)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tell_loads(client))
            tasks.create_task(self._check_confirmed())
            tasks.create_task(self._pump(jetstream))

    async def _pump(self, jetstream: JetStreamContext) -> None:
        while True:
            self._wake.clear()
            for rank in self._ranks.values():
                if rank.due and time.monotonic() - rank.restated_s >= MIN_RESTATE_S:
                    await self._restate(jetstream, rank)
                while rank.waiting:
                    await self._send_events(jetstream, rank)
            late = any(rank.due for rank in self._ranks.values())
            try:
                async with asyncio.timeout(MIN_RESTATE_S if late else None):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _send_events(self, jetstream: JetStreamContext, rank: Rank) -> None:
        payload = wire.encode(rank.take())
        if len(payload) > MAX_MESSAGE_BYTES:
            rank.restate()
            return
        await self._send(jetstream, rank, payload)
        if rank.tail_bytes > max(MAX_TAIL_BYTES, 2 * rank.state_bytes):
            rank.restate()

    async def _restate(self, jetstream: JetStreamContext, rank: Rank) -> None:
        rank.tail_bytes = rank.state_bytes = 0
        rank.restated_s = time.monotonic()
        first: asyncio.Future[Any] | None = None
        for message in rank.state():
            payload = wire.encode(message)
            rank.state_bytes += len(payload)
            sent = await self._send(jetstream, rank, payload)
            first = first or sent
        self.restated += 1
        if first is not None:
            await self._discard_before(jetstream, rank, first)

    async def _discard_before(self, jetstream: JetStreamContext, rank: Rank, first: asyncio.Future[Any]) -> None:
        """What was said before a State is of use to nobody any more; left there, it only costs reading."""
        subject = self._subjects.kv(*rank.holder)
        try:
            confirmed = await asyncio.wait_for(asyncio.shield(first), CONFIRM_TIMEOUT_S)
            await jetstream.purge_stream(self._subjects.stream, seq=confirmed.seq, subject=subject)
        except (nats.errors.Error, TimeoutError) as error:
            log.debug("%s: old events of rank %d stay in the stream: %s", self._worker, rank.holder.dp_rank, error)

    async def _send(self, jetstream: JetStreamContext, rank: Rank, payload: bytes) -> asyncio.Future[Any]:
        try:
            while len(self._unconfirmed) >= MAX_UNCONFIRMED:
                await asyncio.wait(self._unconfirmed, return_when=asyncio.FIRST_COMPLETED)
            future = await jetstream.publish_async(self._subjects.kv(*rank.holder), payload)
        except BaseException:  # it may have been taken from the queue already
            rank.restate()
            raise
        self._unconfirmed[future] = (rank, time.monotonic())
        future.add_done_callback(self._confirmed)
        return future

    def _confirmed(self, future: asyncio.Future[Any]) -> None:
        entry = self._unconfirmed.pop(future, None)
        if entry is None:
            return
        if future.cancelled() or future.exception() is not None:
            entry[0].restate()
            self._wake.set()
            return
        self.published += 1
        sequence = future.result().seq
        if self._stream is not None and sequence <= self._stream.last_sequence:
            self.restate_all()  # a stream that counts anew has lost everything
        if self._stream is not None:
            self._stream = Stream(self._stream.created, sequence)

    async def _check_confirmed(self) -> None:
        """Raises TimeoutError when NATS confirms nothing for too long; the connection is then made anew."""
        while True:
            await asyncio.sleep(1.0)
            oldest = next(iter(self._unconfirmed.values()), None)
            if oldest is not None and time.monotonic() - oldest[1] > CONFIRM_TIMEOUT_S:
                raise TimeoutError(f"no confirmation for {CONFIRM_TIMEOUT_S:g} s")

    async def _tell_loads(self, client: Client) -> None:
        subject = self._subjects.load(self._worker)
        while True:
            told = {dp_rank: rank.next_sequence for dp_rank, rank in self._ranks.items()}
            counts = (self.published, self.dropped, self.restated)
            message = wire.Load(self._worker, self._epoch, self._loads(), told, *counts, time.time())
            await client.publish(subject, wire.encode(message))
            await asyncio.sleep(LOAD_EVERY_S)

    async def _asked(self, message: Msg) -> None:
        try:
            asked = wire.decode(message.data)
        except wire.UnreadableMessage as error:
            log.warning("%s was asked something it cannot read: %s", self._worker, error)
            return
        for rank in self._ranks.values():
            if isinstance(asked, wire.Ask) and rank.holder.dp_rank in asked.dp_ranks:
                rank.restate()
        self._wake.set()

    def restate_all(self) -> None:
        """Say again all that every rank holds."""
        for rank in self._ranks.values():
            rank.restate()
        self._wake.set()

    def _restate_unconfirmed(self) -> None:
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        for rank, _ in unconfirmed.values():
            rank.restate()
