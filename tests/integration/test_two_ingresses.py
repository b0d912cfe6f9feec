"""Two ingresses on the same workers: neither is blind to what the other does, and a new one learns from the old one."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial

import pytest

from backends import simulated
from backends.engine import KVEventSource, LaunchSpec, Role, Sampling
from backends.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent, KVEventBatch
from backends.kv_publisher import KVEventPublisher
from backends.simulated import SimulatedEngine
from dynamo_ray.cluster.replicas import Replicas
from dynamo_ray.cluster.worker import WorkerServer
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.events import zmq
from dynamo_ray.events.peers import Peers
from dynamo_ray.events.zmq import KVEventSubscriber
from dynamo_ray.request.dispatch import Dispatch
from dynamo_ray.request.generation import Generation
from dynamo_ray.request.membership import Membership
from dynamo_ray.routing.block_hash import block_hashes, chain_seed
from dynamo_ray.routing.kv_index import KVIndex, Snapshot
from dynamo_ray.routing.load import LoadTable
from dynamo_ray.routing.ranks import Holder, Ranks

SECRET = b"s" * 32
HOST = "127.0.0.1"
BLOCK = 16
RANK = Holder("aggregated-0", 1, 0)


async def until(condition: Callable[[], bool], within_s: float = 20.0) -> float:
    """How long it took."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < within_s
        await asyncio.sleep(0.005)
    return time.monotonic() - began_s


class Deployment:
    """One simulated worker, an orchestrator's answers, and any number of ingresses."""

    def __init__(self) -> None:
        self.config = DeploymentConfig.model_validate(
            {"model": {"name": "m", "path": "/"}, "backend": "simulated", "aggregated": {"replicas": 1}}
        )
        self.engine = SimulatedEngine(
            LaunchSpec(RANK.worker, Role.AGGREGATED, "m", "", engine_args={"step_s": 0.002, "block_size": BLOCK})
        )
        self.server = WorkerServer(self.engine, worker=RANK.worker, epoch=1, secret=SECRET, host=HOST)
        self.ingresses: list[Dispatch] = []
        self._replicas = Replicas(lease_s=30.0)
        self._version = 1
        self._changed = asyncio.Condition()

    async def ingress(self) -> Dispatch:
        made: Dispatch

        async def watch(version: int) -> Membership:
            async with self._changed:
                if made.peer is not None and self._replicas.seen(made.peer, 0.0):
                    self._version += 1
                    self._changed.notify_all()
                await self._changed.wait_for(lambda: self._version != version)
            assert self.server.info is not None
            return Membership(self._version, SECRET, (self.server.info,), (), self._replicas.peers)

        made = Dispatch(self.config, watch, HOST)
        self.ingresses.append(made)
        await made.start()
        await until(lambda: made.ready() is None)
        return made


@asynccontextmanager
async def deployment() -> AsyncIterator[Deployment]:
    made = Deployment()
    await made.server.start(await made.engine.start())  # type: ignore[arg-type]
    try:
        yield made
    finally:
        for ingress in made.ingresses:
            await ingress.close()
        await made.server.stop()
        await made.engine.stop()


def prompt(number: int) -> list[int]:
    return [number * 1_000 + token for token in range(4 * BLOCK)]


async def ask(ingress: Dispatch, number: int, max_tokens: int = 1) -> None:
    request = Generation(f"r{number}", prompt(number), Sampling(max_tokens, temperature=0.0, ignore_eos=True))
    async with aclosing(ingress.generate(request)) as chunks:
        async for _ in chunks:
            pass


def overlaps(ingress: Dispatch, count: int) -> list[int]:
    """Of so many prompts."""
    chains = (block_hashes(prompt(n), BLOCK, chain_seed("m")) for n in range(count))
    return [ingress.router.index.overlap(chain).get(RANK, 0) for chain in chains]


async def test_what_one_ingress_has_in_flight_the_other_counts() -> None:
    async with deployment() as it:
        a, b = await it.ingress(), await it.ingress()
        await until(lambda: a.peers is not None and b.peers is not None and len(b.peers.bookings) == 1)
        request = asyncio.create_task(ask(a, 0, max_tokens=100))
        await until(lambda: b.router.table.load(RANK).num_requests == 1)
        assert b.router.table.num_bookings == 0
        await request
        assert await until(lambda: b.router.table.load(RANK).num_requests == 0) < 0.5
        names = {name: value for name, _, labels, value in b.readings() if labels in ({}, {"outcome": "taken"})}
        assert names["dynamo_ray_peer_replicas"] == 1
        assert names["dynamo_ray_booking_statements_total"] >= 3


async def test_a_new_ingress_learns_from_another_what_the_engine_can_no_longer_replay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simulated, "KVEventPublisher", partial(KVEventPublisher, buffer_batches=3))
    async with deployment() as it:
        a = await it.ingress()
        for number in range(20):
            await ask(a, number)
        await until(lambda: overlaps(a, 20) == [4] * 20)
        b = await it.ingress()
        assert await until(lambda: overlaps(b, 20) == [4] * 20) < 10.0
        await asyncio.gather(*(ask(random.choice([a, b]), number) for number in range(20, 40)))
        await until(lambda: overlaps(a, 40) == overlaps(b, 40) == [4] * 40)
        assert b.router.index.doubtful == frozenset()
        assert (a.peers.num_snapshots, b.peers.num_snapshots) == (0, 1)  # type: ignore[union-attr]


class Follower:
    """What an ingress has of one rank: index, subscription, and the other replicas."""

    def __init__(self) -> None:
        ranks = Ranks()
        self.index = KVIndex("m", ranks)
        self.index.add_holder(RANK)
        self.peers = Peers(HOST, LoadTable(ranks), lambda: None, self.snapshot_of)
        self.events = KVEventSubscriber(self.index.apply, self.index.doubt, self.index.restoring, self.peers.resync)

    def snapshot_of(self, holder: Holder) -> Snapshot | None:
        sequence = self.events.next_sequence(holder)
        return self.index.snapshot(holder, sequence) if sequence else None

    def holds(self) -> list[tuple[object, ...]]:
        return contents(self.index)

    async def close(self) -> None:
        await self.events.close()
        await self.peers.close()


def contents(index: KVIndex) -> list[tuple[object, ...]]:
    held = index.snapshot(RANK, 0)
    assert held is not None, "in doubt"
    return [(sorted(zip(t.theirs, t.ours, strict=True)), sorted(t.copies)) for t in held.tiers]


class Engine:
    """Stores, removes and forgets at random, as engines do; and what it then holds."""

    def __init__(self, publisher: KVEventPublisher, clears: float = 0.001) -> None:
        self._publisher, self._clears = publisher, clears
        self._random = random.Random(5)
        self._stored: list[BlockStored] = []
        self.truth = KVIndex("m", Ranks())
        self.truth.add_holder(RANK)
        self.sequence = 0

    def step(self) -> None:
        batch = KVEventBatch(self.sequence, 0, [self._event() for _ in range(self._random.randrange(1, 4))])
        self.sequence += 1
        self.truth.apply(RANK, batch)
        self._publisher.publish(batch)

    def _event(self) -> KVEvent:
        dice, medium = self._random.random(), self._random.choice(["GPU", "GPU", "CPU"])
        if dice < self._clears:
            self._stored.clear()
            return AllBlocksCleared()
        if dice < 0.25 and self._stored:
            return BlockRemoved([self._random.choice(self._stored).block_hashes[-1]], medium)
        if dice < 0.35 and self._stored:  # computed twice, side by side
            return self._random.choice(self._stored)
        tokens = [self._random.randrange(50) for _ in range(2 * BLOCK)]
        parent = self._random.choice(self._stored).block_hashes[-1] if self._stored and dice < 0.7 else None
        names: list[int | bytes] = [hash((parent, *tokens[:BLOCK])), hash((parent, *tokens))]
        self._stored.append(BlockStored(names, parent, tokens, BLOCK, medium))
        return self._stored[-1]


async def test_newcomers_are_exact_while_events_stream_that_nobody_can_replay() -> None:
    publisher = KVEventPublisher(HOST, buffer_batches=20)
    engine, source = Engine(publisher), KVEventSource(0, publisher.endpoint, publisher.replay_endpoint, "simulated-1")
    followers: list[Follower] = []
    try:
        for _ in range(4):
            follower = Follower()
            await follower.peers.reconcile(SECRET, [f.peers.me for f in followers if f.peers.me is not None])
            followers.append(follower)
            for each in followers:
                await each.peers.reconcile(SECRET, [f.peers.me for f in followers if f.peers.me is not None])
            follower.events.subscribe(RANK.worker, RANK.epoch, [source])
            while follower.events.next_sequence(RANK) != engine.sequence or engine.sequence < 200 * len(followers):
                engine.step()
                await asyncio.sleep(0.001)
            assert follower.holds() == contents(engine.truth)
        expected = contents(engine.truth)
        assert len(expected) == 2  # tiers
        await until(lambda: all(f.events.next_sequence(RANK) == engine.sequence for f in followers))
        for follower in followers:
            assert follower.holds() == expected
        assert [f.peers.num_snapshots for f in followers] == [0, 1, 1, 1]
    finally:
        for follower in followers:
            await follower.close()
        await publisher.close()


async def test_a_rank_that_never_falls_silent_is_asked_for_until_somebody_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zmq, "RESYNC_RETRY_S", 0.05)
    publisher = KVEventPublisher(HOST, buffer_batches=5)
    engine = Engine(publisher, clears=0.0)
    source = KVEventSource(0, publisher.endpoint, publisher.replay_endpoint, "simulated-1")
    knows, learns = Follower(), Follower()
    try:
        for follower in (knows, learns):
            await follower.peers.reconcile(SECRET, [])
        knows.events.subscribe(RANK.worker, RANK.epoch, [source])
        while engine.sequence < 50 or knows.events.next_sequence(RANK) != engine.sequence:
            engine.step()
            await asyncio.sleep(0.001)
        learns.events.subscribe(RANK.worker, RANK.epoch, [source])
        while RANK not in learns.index.doubtful:
            engine.step()
            await asyncio.sleep(0.001)
        assert knows.peers.me is not None
        await learns.peers.reconcile(SECRET, [knows.peers.me])
        began_s = time.monotonic()
        while RANK in learns.index.doubtful or learns.events.next_sequence(RANK) != engine.sequence:
            assert time.monotonic() - began_s < 10.0
            engine.step()
            await asyncio.sleep(0.001)
        assert learns.holds() == contents(engine.truth)
    finally:
        for follower in (knows, learns):
            await follower.close()
        await publisher.close()
