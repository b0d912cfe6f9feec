"""The contract of every event plane, over real sockets: what is told arrives once, in order, from the beginning."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from backends.engine import KVEventSource, RankLoad
from backends.kv_events import BlockRemoved, BlockStored, KVEvent, KVEventBatch
from backends.kv_publisher import KVEventPublisher
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.events.nats.publisher import Publisher
from dynamo_ray.events.nats.server import PrivateServer
from dynamo_ray.events.plane import EventPlane, PeerPlane, event_plane, peer_plane
from dynamo_ray.routing.anomalies import Anomalies
from dynamo_ray.routing.block_hash import block_hashes, chain_seed
from dynamo_ray.routing.kv_index import KVIndex, Snapshot
from dynamo_ray.routing.load import LoadTable
from dynamo_ray.routing.ranks import Holder, Ranks

RANK = Holder("w", 1, 0)
SECRET = b"s" * 32
names = itertools.count()


@pytest.fixture(params=["zmq", "nats"])
def config(request: pytest.FixtureRequest) -> DeploymentConfig:
    document = {
        "model": {"name": "m", "path": "/models/m"},
        "backend": "simulated",
        "aggregated": {},
        "events": request.param,
    }
    if request.param == "nats":
        server: PrivateServer = request.getfixturevalue("nats_server")
        document["nats"] = {"urls": [server.url], "token": "for tests"}
    return DeploymentConfig.model_validate(document)


class Ingress:
    """An index and its plane."""

    def __init__(self, config: DeploymentConfig, app: str) -> None:
        self.index = KVIndex("m", Ranks())
        self.index.add_holder(RANK)
        self.plane: EventPlane = event_plane(config, app, self, self._resync, Anomalies())

    async def _resync(self, holder: Holder) -> Snapshot | None:
        return None

    def apply(self, holder: Holder, batch: KVEventBatch) -> None:
        self.index.apply(holder, batch)

    def uncertain(self, holder: Holder) -> None:
        self.index.doubt(holder)

    def restore(self, holder: Holder, snapshot: Snapshot) -> None:
        self.index.restore(holder, snapshot)

    def load(self, holder: Holder, load: RankLoad) -> None:
        return

    def holds(self) -> list[int]:
        seed = chain_seed("m", None, None)
        return [n for n in range(20) if self.index.overlap(block_hashes([n, n], 2, seed)).get(RANK)]


class Rank:
    """A rank's publisher on loopback, and beside it whatever the plane has at the worker's side."""

    def __init__(self, config: DeploymentConfig, app: str) -> None:
        self._zmq = KVEventPublisher("127.0.0.1")
        self._sequence = 0
        self.sources = [KVEventSource(0, self._zmq.endpoint, self._zmq.replay_endpoint, "simulated-1")]
        self._publisher = None
        if config.nats_events is not None:
            self._publisher = Publisher(config.nats_events, app, "m", RANK.worker, RANK.epoch, lambda: ())
            self._publisher.start(self.sources)

    def say(self, *events: KVEvent) -> None:
        self._zmq.publish(KVEventBatch(self._sequence, 0, list(events)))
        self._sequence += 1

    def store(self, *blocks: int) -> None:
        for block in blocks:
            self.say(BlockStored([block], None, [block, block], 2))

    def begin_anew(self) -> None:
        """As an engine restarted under the same name: an empty buffer, and numbers from 0."""
        self._sequence = 0
        self._zmq._buffer.clear()

    async def close(self) -> None:
        if self._publisher is not None:
            await self._publisher.close()
        await self._zmq.close()


@asynccontextmanager
async def running(config: DeploymentConfig) -> AsyncIterator[tuple[Rank, Callable[[], Ingress]]]:
    app, made = f"planes-{next(names)}", list[Ingress]()
    rank = Rank(config, app)

    def ingress() -> Ingress:
        made.append(Ingress(config, app))
        made[-1].plane.subscribe(RANK.worker, RANK.epoch, rank.sources)
        return made[-1]

    try:
        yield rank, ingress
    finally:
        for each in made:
            await each.plane.close()
        await rank.close()
        async with asyncio.timeout(5):
            while asyncio.all_tasks() != {asyncio.current_task()}:
                await asyncio.sleep(0.02)


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def test_an_ingress_knows_what_was_told_before_it_and_since(config: DeploymentConfig) -> None:
    async with running(config) as (rank, ingress):
        rank.store(1, 2, 3)
        first = ingress()
        await until(lambda: first.holds() == [1, 2, 3])
        rank.say(BlockRemoved([2]))
        rank.store(4)
        second = ingress()
        await until(lambda: first.holds() == second.holds() == [1, 3, 4])
        assert not first.index.doubtful
        assert (first.plane.next_sequence(RANK) or 0) >= 5


async def test_an_engine_that_begins_anew_holds_only_what_it_says_since(config: DeploymentConfig) -> None:
    async with running(config) as (rank, ingress):
        known = ingress()
        rank.store(1, 2, 3)
        await until(lambda: known.holds() == [1, 2, 3])
        rank.store(6)
        await until(lambda: known.holds() == [1, 2, 3, 6])
        rank.begin_anew()
        rank.store(4, 5)
        late = ingress()
        await until(lambda: known.holds() == late.holds() == [4, 5])


async def test_a_worker_that_is_let_go_of_is_heard_no_more_and_can_be_followed_again(config: DeploymentConfig) -> None:
    async with running(config) as (rank, ingress):
        known = ingress()
        rank.store(1)
        await until(lambda: known.holds() == [1])
        known.plane.unsubscribe(RANK.worker, RANK.epoch)
        known.index.remove_holder(RANK)
        known.index.add_holder(RANK)
        other = ingress()
        rank.store(2)
        await until(lambda: other.holds() == [1, 2])
        assert known.holds() == []
        known.plane.subscribe(RANK.worker, RANK.epoch, rank.sources)
        await until(lambda: known.holds() == [1, 2])


class Replica:
    def __init__(self, config: DeploymentConfig, app: str) -> None:
        self.table = LoadTable(Ranks())
        self.table.add_holder(RANK)
        self.peers: PeerPlane = peer_plane(config, app, "127.0.0.1", self.table, lambda: None, lambda holder: None)

    @property
    def requests(self) -> float:
        return self.table.load(RANK).num_requests


async def test_replicas_count_what_the_others_have_booked_until_they_free_it_or_leave(config: DeploymentConfig) -> None:
    app = f"peers-{secrets.token_hex(4)}"
    a, b, c = replicas = [Replica(config, app) for _ in range(3)]
    try:
        for _ in range(2):
            for replica in replicas:
                listed = [each.peers.me for each in replicas if each.peers.me is not None]
                await replica.peers.reconcile(SECRET, listed)
        booked = a.table.book(RANK, 100, 200)
        b.table.book(RANK, 1, 2)
        await until(lambda: [r.requests for r in replicas] == [2, 2, 2])
        a.table.free(booked)
        await until(lambda: [r.requests for r in replicas] == [1, 1, 1])
        await b.peers.close()
        await until(lambda: [a.requests, c.requests] == [0, 0], 1.0)  # it said goodbye: no lease is waited for
        a.peers.check_health()
    finally:
        for replica in replicas:
            await replica.peers.close()
