"""KV events straight from every rank's ZeroMQ publisher, in order and without gaps, into the index."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence

import zmq
import zmq.asyncio
from xxhash import xxh3_64_intdigest

from backends.engine import KVEventSource
from backends.kv_events import (
    MAX_PAYLOAD_BYTES,
    AllBlocksCleared,
    Decoder,
    KVEventBatch,
    KVEventDecodeError,
    decoder,
)
from backends.kv_publisher import END_OF_REPLAY
from dynamo_ray.events.snapshots import in_turns
from dynamo_ray.routing.anomalies import Anomalies, Anomaly
from dynamo_ray.routing.kv_index import Holder, Snapshot
from dynamo_ray.telemetry import Reading

log = logging.getLogger(__name__)

REPLAY_TIMEOUT_S = 2.0
"""Of silence: a replay may take longer."""
RESYNC_TIMEOUT_S = 60.0
"""Ranks take turns; each answer is bounded by who asks."""
RESYNC_RETRY_S = 5.0
"""A rank in doubt is asked for again so often, though it never falls silent."""
FIRST_CHECK_S = 0.5
LAST_CHECK_S = 30.0
"""A silent rank is asked whether we missed something, ever less often: a subscription takes effect unannounced."""
MAX_QUEUED = 1_000
"""Batches of one rank waiting here. Beyond, its publisher drops, and the next one shows the gap."""
MAX_REPLAYED = 20_000
"""Batches of one replay waiting here: vLLM and SGLang keep 10,000, and drop what a peer does not take at once."""
SLICE_S = 0.002
"""What is ready is taken for that long before others get their turn on the loop."""

AGAIN_S = 5.0
"""After a rank could not be followed."""

Apply = Callable[[Holder, KVEventBatch], None]
Resync = Callable[[Holder], Awaitable[Snapshot | None]]
"""Asks others that follow the rank what it holds; None where nobody knows."""


async def nobody_knows(holder: Holder) -> Snapshot | None:
    """A `Resync` without others."""
    return None


class KVEventSubscriber:
    """Follows any number of ranks, a task each.

    `apply(holder, batch)` is called for every batch in sequence. `uncertain(holder)` is called when batches are lost
    for good: all that the holder said before must be forgotten. Then `resync` is asked, again at every silence until
    it knows, and the steps of `restoring(holder, snapshot)` are gone through with its answer; batches wait meanwhile.
    """

    def __init__(
        self,
        apply: Apply,
        uncertain: Callable[[Holder], None],
        restoring: Callable[[Holder, Snapshot], Iterator[None]] | None = None,
        resync: Resync = nobody_knows,
        anomalies: Anomalies | None = None,
    ) -> None:
        self.apply, self.uncertain, self.restoring, self.resync = apply, uncertain, restoring, resync
        self.anomalies = Anomalies() if anomalies is None else anomalies
        self._context: zmq.asyncio.Context | None = None
        self._ranks: dict[Holder, _Rank] = {}
        self._tasks: dict[Holder, asyncio.Task[None]] = {}
        self.num_gaps = 0
        """Batches that did not come in turn; each one was fetched again, or made its rank uncertain."""

    def subscribe(self, worker: str, epoch: int, sources: Sequence[KVEventSource]) -> None:
        if self._context is None:
            self._context = zmq.asyncio.Context()
        for source in sources:
            holder = Holder(worker, epoch, source.dp_rank)
            rank = self._ranks[holder] = _Rank(holder, source, self._context, self)
            task = asyncio.create_task(rank.follow(), name=f"kv-events-{worker}-{source.dp_rank}")
            self._tasks[holder] = task

    def unsubscribe(self, worker: str, epoch: int) -> None:
        for holder in [h for h in self._tasks if (h.worker, h.epoch) == (worker, epoch)]:
            self._tasks.pop(holder).cancel()
            del self._ranks[holder]

    def next_sequence(self, holder: Holder) -> int | None:
        """The batch that a rank's state here lacks first: what a snapshot of it is called by. None: not followed."""
        rank = self._ranks.get(holder)
        return None if rank is None else rank.next_sequence

    def readings(self) -> Iterator[Reading]:
        """None of its own: the index and `anomalies` tell all there is."""
        return iter(())

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
        self._ranks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None


class _Rank:
    """One rank's stream, from its first batch on."""

    def __init__(
        self, holder: Holder, source: KVEventSource, context: zmq.asyncio.Context, owner: KVEventSubscriber
    ) -> None:
        self._holder, self._source, self._context, self._owner = holder, source, context, owner
        self._decode: Decoder = decoder(source.wire_format)
        self.next_sequence = 0
        self._in_doubt = False
        self._ask_again_s = 0.0
        self._live = _NEVER
        """Sequence and mark of what the publisher sent last; what it replays does not count."""
        self._marks = _Marks()
        self._slice_ends_s = 0.0

    async def follow(self) -> None:
        """For ever: whatever goes wrong, the rank is in doubt and followed anew after a pause."""
        while True:
            try:
                await self._listen()
            except Exception as error:  # no file for a socket, a defect of ours: none may end this unseen
                what = "%s: its KV events are followed anew in %g s: %r"
                log.error(what, self._holder, AGAIN_S, error, exc_info=not self._in_doubt)
                self._owner.uncertain(self._holder)
                self._in_doubt = True
            await asyncio.sleep(AGAIN_S)

    async def _listen(self) -> None:
        socket = self._socket(zmq.SUB, MAX_QUEUED)
        try:
            socket.subscribe(b"")
            socket.connect(self._source.endpoint)
            silence_s = FIRST_CHECK_S
            while True:
                frames = await self._receive(socket, silence_s)
                if frames is not None:
                    await self._take_live(frames)
                    if self._in_doubt and asyncio.get_running_loop().time() >= self._ask_again_s:
                        await self._ask_others(self.next_sequence)
                    continue
                missed = await self._heal()
                if self._in_doubt:
                    await self._ask_others(self.next_sequence)
                silence_s = FIRST_CHECK_S if missed else min(2 * silence_s, LAST_CHECK_S)
        finally:
            socket.close(linger=0)

    def _socket(self, kind: int, max_queued: int) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.RCVHWM, max_queued)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)  # The connection of who sends more is dropped.
        return socket

    async def _receive(self, socket: zmq.asyncio.Socket, silence_s: float) -> list[bytes] | None:
        """The next message, at once if it is there and this rank had not its turn for long; None after a silence."""
        loop = asyncio.get_running_loop()
        if loop.time() > self._slice_ends_s:
            await asyncio.sleep(0)
            self._slice_ends_s = loop.time() + SLICE_S
        try:
            return zmq.Socket.shadow(socket).recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            pass
        try:
            async with asyncio.timeout(silence_s):
                return await socket.recv_multipart()
        except TimeoutError:
            return None

    async def _take_live(self, frames: list[bytes]) -> None:
        batch = self._decoded(frames)
        if batch is None:
            return
        number, live = batch.sequence, (batch.sequence, _mark(frames))
        if number <= self._live[0]:
            self._owner.anomalies.saw(Anomaly.SEQUENCE, self._holder, f"batch {number} came after {self._live[0]}")
            if live == self._live:
                return
            self._begin_anew()  # a publisher numbers upwards
        elif self._contradicted(*live):
            self._begin_anew()
        self._live = live
        if number > self.next_sequence:
            self._owner.num_gaps += 1
            await self._heal()
        if number > self.next_sequence:
            await self._lose(number)
        if number == self.next_sequence:
            self._marks.clear()  # what comes live from here on is beyond them
            self._take(batch, live[1])

    def _take(self, batch: KVEventBatch, mark: int) -> None:
        self._owner.apply(self._holder, batch)
        self._marks.add(batch.sequence, mark)
        self.next_sequence = batch.sequence + 1

    def _contradicted(self, sequence: int, mark: int) -> bool:
        """That batch was another one before; a publisher says one thing by one number."""
        found = self._marks.contradict(sequence, mark)
        if found:
            self._owner.anomalies.saw(Anomaly.SEQUENCE, self._holder, f"batch {sequence} is not what it was before")
        return found

    def _begin_anew(self) -> None:
        """Its publisher is another one, which holds what it says. Should it be the same, its buffer tells."""
        self._owner.apply(self._holder, KVEventBatch(0, None, [AllBlocksCleared()]))
        self.next_sequence = 0
        self._live = _NEVER
        self._marks.clear()

    async def _lose(self, resume_at: int) -> None:
        lost = f"{self.next_sequence} to {resume_at - 1}"
        log.warning("%s: KV events %s are lost; it starts anew", self._holder, lost)
        self._owner.uncertain(self._holder)
        self._in_doubt = True
        self.next_sequence = resume_at
        await self._ask_others(resume_at)

    async def _ask_others(self, at_least: int) -> None:
        """Go on from what another follower of this rank knows, if that is not older."""
        try:
            async with asyncio.timeout(RESYNC_TIMEOUT_S):
                snapshot = await self._owner.resync(self._holder)
        except TimeoutError:
            snapshot = None
        self._ask_again_s = asyncio.get_running_loop().time() + RESYNC_RETRY_S
        if snapshot is not None and snapshot.sequence >= at_least and self._owner.restoring is not None:
            await in_turns(self._owner.restoring(self._holder, snapshot))
            self.next_sequence = snapshot.sequence
            self._in_doubt = False

    async def _heal(self) -> bool:
        """Fetch all from the next sequence on, and again what was dropped on the way; whether there was any.

        The one before it is asked for too, where it is known: if it is not the same, the publisher began anew.
        """
        taken = False
        while self._source.replay_endpoint is not None:
            before = self.next_sequence
            start = before - self._marks.knows(before - 1)
            socket = self._socket(zmq.DEALER, MAX_REPLAYED)
            try:
                socket.connect(self._source.replay_endpoint)
                await socket.send_multipart([b"", start.to_bytes(8, "big")])
                complete = await self._take_replay(socket)
            finally:
                socket.close(linger=0)
            if self.next_sequence == before:
                break
            taken = True
            if complete:
                break
        return taken

    async def _take_replay(self, socket: zmq.asyncio.Socket) -> bool:
        """Whether it came to its end without a gap."""
        began_at = self.next_sequence
        while True:
            frames = await self._receive(socket, REPLAY_TIMEOUT_S)
            if frames is None:
                detail = f"{self._source.replay_endpoint} does not answer"
                self._owner.anomalies.saw(Anomaly.NO_REPLAY, self._holder, detail)
                return False
            frames = frames[1:]
            if len(frames) == 2:  # SGLang 0.5.16 replays without the topic (disaggregation/kv_events.py).
                frames.insert(0, b"")
            if len(frames) == 3 and frames[1] == END_OF_REPLAY:
                return True
            batch = self._decoded(frames)
            if batch is None:
                continue
            mark = _mark(frames)
            if self._contradicted(batch.sequence, mark):
                self._begin_anew()
                return False
            if batch.sequence > self.next_sequence:
                if self.next_sequence > began_at:
                    return False
                await self._lose(batch.sequence)
            if batch.sequence == self.next_sequence:
                self._take(batch, mark)

    def _decoded(self, frames: list[bytes]) -> KVEventBatch | None:
        try:
            return self._decode(frames)
        except KVEventDecodeError as error:
            self._owner.anomalies.saw(Anomaly.UNREADABLE, self._holder, f"a KV event we cannot read: {error}")
            return None


_NEVER = (-1, 0)


def _mark(frames: list[bytes]) -> int:
    return xxh3_64_intdigest(frames[2])


class _Marks:
    """What of a rank's newest batches is remembered, to tell them from others by the same numbers. 8 bytes each."""

    def __init__(self) -> None:
        self._first = 0
        self._marks = array("Q")

    def clear(self) -> None:
        self._marks = array("Q")

    def add(self, sequence: int, mark: int) -> None:
        """Of the batch after the last one; any other is the first of new ones."""
        if sequence != self._first + len(self._marks):
            self._marks = array("Q")
        if not self._marks:
            self._first = sequence
        self._marks.append(mark)

    def knows(self, sequence: int) -> bool:
        return 0 <= sequence - self._first < len(self._marks)

    def contradict(self, sequence: int, mark: int) -> bool:
        """That batch was another one."""
        return self.knows(sequence) and self._marks[sequence - self._first] != mark
