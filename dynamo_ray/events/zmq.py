"""KV events straight from every rank's ZeroMQ publisher, in order and without gaps, into the index."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import zmq
import zmq.asyncio

from backends.engine import KVEventSource
from backends.kv_events import Decoder, KVEventBatch, KVEventDecodeError, decoder
from backends.kv_publisher import END_OF_REPLAY
from dynamo_ray.routing.ranks import Holder

log = logging.getLogger(__name__)

REPLAY_TIMEOUT_S = 2.0
FIRST_CHECK_S = 0.5
LAST_CHECK_S = 30.0
"""A silent rank is asked whether we missed something, ever less often: a subscription takes effect unannounced."""


class KVEventSubscriber:
    """Follows any number of ranks, a task each.

    `apply(holder, batch)` is called for every batch in sequence. `uncertain(holder)` is called when batches are
    lost for good: all that the holder said before must be forgotten.
    """

    def __init__(self, apply: Callable[[Holder, KVEventBatch], None], uncertain: Callable[[Holder], None]) -> None:
        self._apply, self._uncertain = apply, uncertain
        self._context: zmq.asyncio.Context | None = None
        self._tasks: dict[Holder, asyncio.Task[None]] = {}
        self.num_gaps = 0
        """Batches that did not come in turn; each one was fetched again, or made its rank uncertain."""

    def subscribe(self, worker: str, epoch: int, sources: Sequence[KVEventSource]) -> None:
        if self._context is None:
            self._context = zmq.asyncio.Context()
        for source in sources:
            holder = Holder(worker, epoch, source.dp_rank)
            rank = _Rank(holder, source, self._context, self)
            self._tasks[holder] = asyncio.create_task(rank.follow(), name=f"kv-events-{worker}-{source.dp_rank}")

    def unsubscribe(self, worker: str, epoch: int) -> None:
        for holder in [h for h in self._tasks if (h.worker, h.epoch) == (worker, epoch)]:
            self._tasks.pop(holder).cancel()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
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
        self._next = 0
        """The sequence that comes next."""

    async def follow(self) -> None:
        socket = self._context.socket(zmq.SUB)
        try:
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.subscribe(b"")
            socket.connect(self._source.endpoint)
            silence_s = FIRST_CHECK_S
            while True:
                try:
                    async with asyncio.timeout(silence_s):
                        frames = await socket.recv_multipart()
                except TimeoutError:
                    missed = await self._replay()
                    silence_s = FIRST_CHECK_S if missed else min(2 * silence_s, LAST_CHECK_S)
                    continue
                await self._take_live(frames)
        finally:
            socket.close(linger=0)

    async def _take_live(self, frames: list[bytes]) -> None:
        batch = self._decoded(frames)
        if batch is None or batch.sequence < self._next:
            return
        if batch.sequence > self._next:
            self._owner.num_gaps += 1
            await self._replay()
        if batch.sequence > self._next:
            self._lose(batch.sequence)
        if batch.sequence == self._next:
            self._take(batch)

    def _take(self, batch: KVEventBatch) -> None:
        self._owner._apply(self._holder, batch)
        self._next = batch.sequence + 1

    def _lose(self, resume_at: int) -> None:
        log.warning("%s: KV events %d to %d are lost; it starts anew", self._holder, self._next, resume_at - 1)
        self._owner._uncertain(self._holder)
        self._next = resume_at

    async def _replay(self) -> int:
        """Fetch everything from the next sequence on; how many batches that were new."""
        if self._source.replay_endpoint is None:
            return 0
        socket = self._context.socket(zmq.DEALER)
        taken = 0
        try:
            socket.connect(self._source.replay_endpoint)
            await socket.send_multipart([b"", self._next.to_bytes(8, "big")])
            async with asyncio.timeout(REPLAY_TIMEOUT_S):
                while True:
                    _, *frames = await socket.recv_multipart()
                    if len(frames) == 2:  # SGLang 0.5.16 replays without the topic (disaggregation/kv_events.py).
                        frames.insert(0, b"")
                    if frames[1] == END_OF_REPLAY:
                        return taken
                    batch = self._decoded(frames)
                    if batch is None or batch.sequence < self._next:
                        continue
                    if batch.sequence > self._next:
                        self._lose(batch.sequence)
                    self._take(batch)
                    taken += 1
        except TimeoutError:
            log.warning("%s: its replay endpoint %s does not answer", self._holder, self._source.replay_endpoint)
            return taken
        finally:
            socket.close(linger=0)

    def _decoded(self, frames: list[bytes]) -> KVEventBatch | None:
        try:
            return self._decode(frames)
        except KVEventDecodeError as error:
            log.error("%s sent a KV event we cannot read: %s", self._holder, error)
            return None
