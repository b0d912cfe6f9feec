"""What the workers' publishers say on NATS, followed by an ingress: exact once a rank's State or beginning was read."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from backends.engine import KVEventSource
from dynamo_ray.config import NatsConfig
from dynamo_ray.events.nats import wire
from dynamo_ray.events.nats.follower import Follower, Verdict
from dynamo_ray.events.nats.link import REQUEST_TIMEOUT_S, Link, Stream, end
from dynamo_ray.events.nats.wire import Subjects
from dynamo_ray.events.plane import Listener
from dynamo_ray.events.snapshots import in_turns
from dynamo_ray.routing.ranks import Holder
from dynamo_ray.telemetry import Reading

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
MISSED_HEARTBEATS = 3
TICK_S = 0.25
FIRST_ASK_S = 0.25
LAST_ASK_S = 10.0
MAX_REPLAYED = 2_000
"""Messages of a worker. With more in the stream, who starts asks for all that its ranks hold, which is less to read."""
MAX_PENDING_BYTES = 64 * 1024 * 1024
"""Of one worker's messages that are not read yet; the server holds back what would not fit (flow control)."""


class NatsSubscriber:
    """The event plane of an ingress over NATS: an ordered JetStream consumer for every worker.

    A new one reads what the stream keeps, and asks where that does not begin with all a rank holds. Connections are
    made again and consumers go on where they stood; whatever is found missing is asked for.

    Raises:
        ConfigError: As `dynamo_ray.events.nats.link.options`, when constructed.
    """

    def __init__(self, config: NatsConfig, app: str, listener: Listener) -> None:
        self.subjects = Subjects(config.prefix, app)
        self.listener = listener
        self.link = Link(config, self.subjects, f"{app}/ingress", self._serve)
        self.num_gaps = self.asks = self.consumers = self.unreadable = self.received = 0
        self.lag_s = 0.0
        self._workers: dict[tuple[str, int], _Worker] = {}
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._client: Client | None = None
        self._counts: dict[str, wire.Load] = {}
        self._started = False

    def subscribe(self, worker: str, epoch: int, sources: Sequence[KVEventSource]) -> None:
        if not self._started:
            self._started = True
            self.link.start()
        key = (worker, epoch)
        if key not in self._workers:
            self._workers[key] = _Worker(self, worker, epoch, tuple(source.dp_rank for source in sources))
            self._follow(key)

    def unsubscribe(self, worker: str, epoch: int) -> None:
        left = self._workers.pop((worker, epoch), None)
        if left is not None:
            left.left = True
        self._counts.pop(worker, None)
        task = self._tasks.pop((worker, epoch), None)
        if task is not None:
            task.cancel()

    def next_sequence(self, holder: Holder) -> int | None:
        worker = self._workers.get((holder.worker, holder.epoch))
        follower = None if worker is None else worker.followers.get(holder.dp_rank)
        return None if follower is None else follower.next_sequence

    def readings(self) -> Iterator[Reading]:
        yield "dynamo_ray_nats_connected", "1 while a NATS server answers", {}, float(self.link.connected)
        yield "dynamo_ray_nats_connections_total", "Connections made to NATS", {}, self.link.num_connections
        yield "dynamo_ray_nats_messages_total", "Messages on KV events that were read", {}, self.received
        yield "dynamo_ray_nats_unreadable_total", "Messages that no version of ours writes", {}, self.unreadable
        yield "dynamo_ray_nats_resyncs_total", "Times that a rank was asked to say all it holds", {}, self.asks
        yield "dynamo_ray_nats_consumers_total", "Consumers made, one a worker unless lost", {}, self.consumers
        yield "dynamo_ray_nats_lag_seconds", "Age of the newest KV event when it was read", {}, self.lag_s
        doubtful = sum(not f.exact for worker in self._workers.values() for f in worker.followers.values())
        yield "dynamo_ray_nats_doubtful_ranks", "Ranks whose holdings are not known", {}, doubtful
        for name, load in self._counts.items():
            labels = {"worker": name}
            yield "dynamo_ray_nats_published_total", "Messages that NATS confirmed to a worker", labels, load.published
            yield "dynamo_ray_nats_dropped_total", "Batches not sent for lack of room", labels, load.dropped
            yield "dynamo_ray_nats_restated_total", "Times a worker said all a rank holds", labels, load.restated

    async def close(self) -> None:
        for key in list(self._workers):
            self.unsubscribe(*key)
        await self.link.close()

    def complain(self, subject: str, error: Exception) -> None:
        self.unreadable += 1
        if self.unreadable == 1:
            log.error("%s carries what we cannot read, ignored and counted: %s", subject, error)

    async def _serve(self, client: Client) -> None:
        """One connection's time."""
        stream = await self.link.stream(client.jetstream(timeout=REQUEST_TIMEOUT_S))
        await client.subscribe(self.subjects.load(), cb=self._heard)
        self._client = client
        try:
            for key, worker in self._workers.items():
                worker.found(stream)
                self._follow(key)
            await asyncio.Event().wait()
        finally:
            self._client = None
            tasks = list(self._tasks.values())
            self._tasks.clear()
            await end(tasks)

    def _follow(self, key: tuple[str, int]) -> None:
        if self._client is not None:
            task = asyncio.create_task(self._workers[key].follow(self._client), name=f"nats-kv-{key[0]}")
            self._tasks[key] = task

    async def _heard(self, message: Msg) -> None:
        try:
            load = wire.decode(message.data)
        except wire.UnreadableMessage as error:
            self.complain(message.subject, error)
            return
        if isinstance(load, wire.Load) and (load.worker, load.epoch) in self._workers:
            self._workers[load.worker, load.epoch].told(load.next_sequences)
            self._counts[load.worker] = load
            for rank in load.loads:
                self.listener.load(Holder(load.worker, load.epoch, rank.dp_rank), rank)


class _Worker:
    """One incarnation of one worker: how far each of its ranks, and the stream, have been read."""

    def __init__(self, owner: NatsSubscriber, worker: str, epoch: int, dp_ranks: tuple[int, ...]) -> None:
        self.followers = {dp_rank: Follower() for dp_rank in dp_ranks}
        self.left = False
        """Nobody follows it any more: a cancellation alone may be lost in nats-py 2.16, see `link.end`."""
        self._owner, self._worker, self._epoch = owner, worker, epoch
        self._stream: Stream | None = None
        self._told: dict[int, int] = {}
        """How far each rank said it was, a second or so ago."""
        self._behind: set[int] = set()
        self._read = 0
        """The stream's sequence of the newest message read."""
        self._ask_every_s = FIRST_ASK_S
        self._ask_at_s = self._taken_s = self._heard_s = 0.0
        self._consumed: int | None = None
        """Messages of the consumer being read; None: one of them is missing."""
        self._caught_up = False
        self._taking = False
        """A message that has come: until it is taken no other is heard, which is no silence."""
        self._wake = asyncio.Event()

    def found(self, stream: Stream) -> None:
        """The stream after a new connection. One that lost what it had is read from its beginning."""
        if self._stream is not None and (stream.created != self._stream.created or stream.last_sequence < self._read):
            self._read = 0
        self._stream = stream

    def told(self, next_sequences: dict[int, int]) -> None:
        """How far the ranks are. Who has not read by now what they said the last time never will."""
        self._behind = {
            dp_rank
            for dp_rank, before in self._told.items()
            if (follower := self.followers.get(dp_rank)) and before > (follower.next_sequence or 0)
        }
        self._told = next_sequences

    async def follow(self, client: Client) -> None:
        """Read on, with one consumer after the other, as long as the connection lasts."""
        jetstream = client.jetstream(timeout=REQUEST_TIMEOUT_S)
        while not (client.is_closed or self.left):
            try:
                self.found(await self._owner.link.stream(jetstream))
                if not self._read:
                    await self._skip(jetstream)
                await self._consume(client, jetstream)
            except (nats.errors.Error, TimeoutError) as error:
                log.info("%s: its consumer is made anew: %s", self._worker, error)
            except Exception:  # a defect must not end this unseen
                log.exception("%s: its consumer is made anew", self._worker)
            await asyncio.sleep(TICK_S * random.uniform(1.0, 2.0))

    async def _skip(self, jetstream: JetStreamContext) -> None:
        """Begin behind what the stream has, where that is much: to be told all that the ranks hold takes less."""
        subjects = self._owner.subjects
        found = await jetstream.stream_info(subjects.stream, subjects_filter=subjects.kv(self._worker, self._epoch))
        if sum((found.state.subjects or {}).values()) > MAX_REPLAYED:
            self._read = found.state.last_seq

    async def _consume(self, client: Client, jetstream: JetStreamContext) -> None:
        """Read one ordered consumer; returns when a message of it is missing, raises TimeoutError when it is silent."""
        self._consumed, self._heard_s, self._caught_up = 0, time.monotonic(), False
        self._ask_at_s = self._heard_s + FIRST_ASK_S
        self._wake.clear()
        async with _subscribed(client, self._heard) as subscription:
            self._owner.consumers += 1
            stream, config = self._owner.subjects.stream, self._consumer(subscription.subject)
            info = await jetstream.add_consumer(stream, config=config)
            self._caught_up = self._caught_up or not info.num_pending
            while self._consumed is not None:
                if not self._taking and time.monotonic() - self._heard_s > MISSED_HEARTBEATS * HEARTBEAT_S:
                    raise TimeoutError("it is silent")
                if self._caught_up and time.monotonic() >= self._ask_at_s:
                    await self._ask(client, time.monotonic())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S):
                        await self._wake.wait()
                self._wake.clear()

    async def _heard(self, message: Msg) -> None:
        """One message of the consumer being read: its number must be the one after the last one's."""
        if self._consumed is None:
            return
        self._heard_s = time.monotonic()
        headers = message.headers or {}
        if headers.get("Status") == "100":
            if message.reply:
                await message.respond(b"")  # flow control: what came before it has been read
                return
            whole = headers.get("Nats-Last-Consumer", str(self._consumed)) == str(self._consumed)
        else:
            number = message.metadata.sequence.consumer
            whole = number == self._consumed + 1
            if whole:
                self._consumed = number
                self._caught_up = self._caught_up or not message.metadata.num_pending
                await self._take(message)
        if not whole:
            self._consumed = None
            self._wake.set()

    def _consumer(self, inbox: str) -> ConsumerConfig:
        return ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE if self._read else DeliverPolicy.ALL,
            opt_start_seq=self._read + 1 if self._read else None,
            deliver_subject=inbox,
            filter_subject=self._owner.subjects.kv(self._worker, self._epoch),
            ack_policy=AckPolicy.NONE,
            max_deliver=1,
            flow_control=True,
            idle_heartbeat=HEARTBEAT_S,
            mem_storage=True,
            num_replicas=1,
            inactive_threshold=30.0,
        )

    async def _take(self, message: Msg) -> None:
        self._owner.received += 1
        self._taken_s = time.monotonic()
        self._taking = True
        try:
            await self._said(wire.decode(message.data))
        except wire.UnreadableMessage as error:
            self._owner.complain(message.subject, error)
        finally:
            self._taking, self._heard_s = False, time.monotonic()
        self._read = message.metadata.sequence.stream
        await asyncio.sleep(0)  # many in a row leave others their turn

    async def _said(self, message: wire.Message) -> None:
        """Raises UnreadableMessage, and nothing has changed."""
        if not isinstance(message, wire.Events | wire.State):
            raise wire.UnreadableMessage(f"{type(message).__name__} among KV events")
        follower = self.followers.get(message.dp_rank)
        if follower is None or (message.worker, message.epoch) != (self._worker, self._epoch):
            raise wire.UnreadableMessage(f"{message.worker} epoch {message.epoch} rank {message.dp_rank} is not here")
        owner, holder = self._owner, Holder(self._worker, self._epoch, message.dp_rank)
        batch = message.batch() if isinstance(message, wire.Events) else None
        verdict, snapshot = follower.judge(message)
        if verdict is Verdict.GAP:
            owner.num_gaps += 1
            self._ask_every_s, self._ask_at_s = FIRST_ASK_S, 0.0
            self._wake.set()
            owner.listener.uncertain(holder)
        elif snapshot is not None:
            await in_turns(owner.listener.restoring(holder, snapshot))
        elif verdict is Verdict.APPLY and batch is not None:
            owner.listener.apply(holder, batch)
        owner.lag_s = max(0.0, time.time() - message.at_unix_s)

    async def _ask(self, client: Client, now_s: float) -> None:
        """Have the ranks in doubt say all they hold; again, ever less often, while they do not."""
        silent = now_s - self._taken_s > LAST_ASK_S  # one that began to say all it holds is let finish
        doubtful = tuple(
            dp_rank
            for dp_rank, follower in self.followers.items()
            if (not follower.exact or dp_rank in self._behind) and (silent or not follower.building)
        )
        if not doubtful:
            self._ask_every_s = FIRST_ASK_S
        else:
            self._owner.asks += len(doubtful)
            await client.publish(self._owner.subjects.ask(self._worker, self._epoch), wire.encode(wire.Ask(doubtful)))
            self._ask_every_s = min(2 * self._ask_every_s, LAST_ASK_S)
        self._ask_at_s = now_s + self._ask_every_s


@contextlib.asynccontextmanager
async def _subscribed(client: Client, heard: Callable[[Msg], Awaitable[None]]) -> AsyncIterator[Subscription]:
    subscription = await client.subscribe(
        client.new_inbox(), cb=heard, pending_bytes_limit=MAX_PENDING_BYTES, pending_msgs_limit=-1
    )
    try:
        yield subscription
    finally:
        with contextlib.suppress(nats.errors.Error):
            await subscription.unsubscribe()
