"""The contract of every event plane, over real sockets: what is told arrives once, in order, from the beginning."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from kv_ranks import MODEL, NATS_TOKEN, Engine, Index, until

from backends.kv_events import BlockRemoved
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.events.nats.publisher import Publisher
from dynamo_ray.events.nats.server import PrivateServer
from dynamo_ray.events.plane import EventPlane, PeerPlane, event_plane, peer_plane
from dynamo_ray.events.zmq import nobody_knows
from dynamo_ray.routing.anomalies import Anomalies
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
        document["nats"] = {"urls": [server.url], "token": NATS_TOKEN}
    return DeploymentConfig.model_validate(document)


class Ingress(Index):
    """An index and its plane."""

    def __init__(self, config: DeploymentConfig, app: str) -> None:
        super().__init__([RANK])
        self.plane: EventPlane = event_plane(config, app, self, nobody_knows, Anomalies())

    def holds(self) -> set[int]:
        return self.blocks(RANK)


@asynccontextmanager
async def running(config: DeploymentConfig) -> AsyncIterator[tuple[Engine, Callable[[], Ingress]]]:
    """A rank, beside it whatever the plane has at the worker's side, and as many ingresses as are asked for."""
    app, made, publisher = f"planes-{next(names)}", list[Ingress](), None
    rank = Engine(RANK)
    if config.nats_events is not None:
        publisher = Publisher(config.nats_events, app, MODEL, RANK.worker, RANK.epoch, lambda: ())
        publisher.start([rank.source])

    def ingress() -> Ingress:
        made.append(Ingress(config, app))
        made[-1].plane.subscribe(RANK.worker, RANK.epoch, [rank.source])
        return made[-1]

    try:
        yield rank, ingress
    finally:
        for each in made:
            await each.plane.close()
        if publisher is not None:
            await publisher.close()
        await rank.close()
        async with asyncio.timeout(5):
            while asyncio.all_tasks() != {asyncio.current_task()}:
                await asyncio.sleep(0.02)


async def test_an_ingress_knows_what_was_told_before_it_and_since(config: DeploymentConfig) -> None:
    async with running(config) as (rank, ingress):
        rank.store(1, 2, 3)
        first = ingress()
        await until(lambda: first.holds() == {1, 2, 3})
        rank.say(BlockRemoved([2]))
        rank.store(4)
        second = ingress()
        await until(lambda: first.holds() == second.holds() == {1, 3, 4})
        assert not first.index.doubtful
        assert (first.plane.next_sequence(RANK) or 0) >= 5


async def test_an_engine_that_begins_anew_holds_only_what_it_says_since(config: DeploymentConfig) -> None:
    async with running(config) as (rank, ingress):
        known = ingress()
        rank.store(1, 2, 3)
        await until(lambda: known.holds() == {1, 2, 3})
        rank.store(6)
        await until(lambda: known.holds() == {1, 2, 3, 6})
        rank.begin_anew()
        rank.store(4, 5)
        late = ingress()
        await until(lambda: known.holds() == late.holds() == {4, 5})


async def test_a_worker_that_is_let_go_of_is_heard_no_more_and_can_be_followed_again(config: DeploymentConfig) -> None:
    async with running(config) as (rank, ingress):
        known = ingress()
        rank.store(1)
        await until(lambda: known.holds() == {1})
        known.plane.unsubscribe(RANK.worker, RANK.epoch)
        known.index.remove_holder(RANK)
        known.index.add_holder(RANK)
        other = ingress()
        rank.store(2)
        await until(lambda: other.holds() == {1, 2})
        assert known.holds() == set()
        known.plane.subscribe(RANK.worker, RANK.epoch, [rank.source])
        await until(lambda: known.holds() == {1, 2})


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
