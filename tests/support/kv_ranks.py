"""Both ends of an event plane: a rank that tells of its blocks as engines do, and an index that is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

from backends.engine import KVEventSource, RankLoad
from backends.kv_events import BlockStored, KVEvent, KVEventBatch
from backends.kv_publisher import KVEventPublisher
from dynamo_ray.config import NatsConfig
from dynamo_ray.events.nats.server import PrivateServer
from dynamo_ray.routing.block_hash import block_hashes, chain_seed
from dynamo_ray.routing.kv_index import KVIndex, Snapshot
from dynamo_ray.routing.ranks import Holder, Ranks

MODEL = "m"
SIZE = 4
HASHES = {block: block_hashes([block] * SIZE, SIZE, chain_seed(MODEL, None, None)) for block in range(1100)}
NATS_TOKEN = "for tests"


def nats_config(server: PrivateServer) -> NatsConfig:
    return NatsConfig(urls=(server.url,), token=NATS_TOKEN)


class Index:
    """An ingress's index, as a Listener."""

    def __init__(self, holders: Iterable[Holder]) -> None:
        self.index = KVIndex(MODEL, Ranks())
        self.loads: dict[Holder, RankLoad] = {}
        for holder in holders:
            self.index.add_holder(holder)

    def apply(self, holder: Holder, batch: KVEventBatch) -> None:
        self.index.apply(holder, batch)

    def uncertain(self, holder: Holder) -> None:
        self.index.doubt(holder)

    def restoring(self, holder: Holder, snapshot: Snapshot) -> Iterator[None]:
        return self.index.restoring(holder, snapshot)

    def load(self, holder: Holder, load: RankLoad) -> None:
        self.loads[holder] = load

    def blocks(self, holder: Holder) -> set[int]:
        """Those of `Engine.store` that the rank holds."""
        return {block for block, hashes in HASHES.items() if self.index.overlap(hashes).get(holder)}


class Engine:
    """One rank's publisher on loopback, and what a listener that missed nothing would know of it."""

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        self.zmq = KVEventPublisher("127.0.0.1")
        self.truth = Index([holder])
        self.sequence = 0

    @property
    def source(self) -> KVEventSource:
        return KVEventSource(self.holder.dp_rank, self.zmq.endpoint, self.zmq.replay_endpoint, "simulated-1")

    def say(self, *events: KVEvent) -> None:
        batch = KVEventBatch(self.sequence, self.holder.dp_rank, list(events))
        self.sequence += 1
        self.zmq.publish(batch)
        self.truth.apply(self.holder, batch)

    def store(self, *blocks: int) -> None:
        """Each a batch of its own, and with a prompt of its own."""
        for block in blocks:
            self.say(BlockStored([block], None, [block] * SIZE, SIZE))

    def begin_anew(self) -> None:
        """As an engine restarted under the same name: an empty buffer, and numbers from 0."""
        self.sequence = 0
        self.zmq._buffer.clear()
        self.truth.index.clear_holder(self.holder)

    async def close(self) -> None:
        await self.zmq.close()


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
