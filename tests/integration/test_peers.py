"""Ingress replicas over real sockets: each knows what the others have booked, and nobody else hears or speaks."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from dynamo_ray.events import bookings, snapshots
from dynamo_ray.events import peers as peers_module
from dynamo_ray.events.bookings import LEASE_S, Peer, Statement
from dynamo_ray.events.curve import SecureContext
from dynamo_ray.events.peers import Peers
from dynamo_ray.routing.kv_index import Snapshot, TierSnapshot
from dynamo_ray.routing.load import LoadTable
from dynamo_ray.routing.ranks import Holder, Ranks

SECRET = b"s" * 32
RANK = Holder("w", 1, 0)
HELD = Snapshot(41, [TierSnapshot([b"a", -1], [1, 2], [(-1, 1)])])


class Replica:
    def __init__(self, holds: Snapshot | None = None, host: str = "127.0.0.1") -> None:
        self.table = LoadTable(Ranks())
        self.table.add_holder(RANK)
        self.changed = asyncio.Event()
        self.peers = Peers(host, self.table, self.changed.set, lambda holder: holds if holder == RANK else None)

    @property
    def me(self) -> Peer:
        assert self.peers.me is not None
        return self.peers.me

    @property
    def requests(self) -> float:
        """On the rank, whoever booked them."""
        return self.table.load(RANK).num_requests

    async def stop(self, how: str) -> None:
        if how == "leaves":
            await self.peers.close()
            return
        for task in self.peers._tasks:
            task.cancel()
        if how == "crashes":
            assert self.peers._sockets is not None
            self.peers._sockets.context._admission.stop()
            self.peers._sockets.context._context.destroy(linger=0)
            self.peers._sockets = None


class Plane:
    """Replicas, and what an orchestrator does for them."""

    def __init__(self) -> None:
        self.replicas: list[Replica] = []

    async def add(self, **options: Any) -> Replica:
        made = Replica(**options)
        await made.peers.reconcile(SECRET, [replica.me for replica in self.replicas])
        self.replicas.append(made)
        await self.announce()
        return made

    async def announce(self) -> None:
        for replica in self.replicas:
            await replica.peers.reconcile(SECRET, [each.me for each in self.replicas])


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    made = Plane()
    yield made
    for replica in made.replicas:
        await replica.peers.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def until(condition: Callable[[], bool], within_s: float = 10.0) -> float:
    """How long it took."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < within_s
        await asyncio.sleep(0.002)
    return time.monotonic() - began_s


async def test_what_one_books_the_others_count_until_it_frees(plane: Plane) -> None:
    a, b, c = [await plane.add() for _ in range(3)]
    booked = [a.table.book(RANK, 100, 200), a.table.book(RANK, 10, 20), b.table.book(RANK, 1, 2)]
    await until(lambda: [r.requests for r in (a, b, c)] == [3, 3, 3])
    a.table.prefilled(booked[0])
    async with asyncio.timeout(10):
        while c.table.load(RANK).queued_tokens != 11:
            c.changed.clear()
            await c.changed.wait()
    assert c.table.load(RANK).kv_tokens == 222
    a.table.free(booked[0])
    a.table.free(booked[1])
    b.table.free(booked[2])
    await until(lambda: [r.requests for r in (a, b, c)] == [0, 0, 0])
    assert c.table.ours() == {}


async def test_a_burst_is_one_statement_every_ten_milliseconds(plane: Plane) -> None:
    a, b = [await plane.add() for _ in range(2)]
    a.table.book(RANK, 1, 1)
    await until(lambda: b.requests == 1)
    before, began_s = a.peers.num_published, time.monotonic()
    for _ in range(200):
        a.table.free(a.table.book(RANK, 1, 1))
        await asyncio.sleep(0.001)
    a.table.book(RANK, 1, 1)
    await until(lambda: b.requests == 2)
    took_s = time.monotonic() - began_s
    assert 1 <= a.peers.num_published - before <= took_s / peers_module.COALESCE_S + took_s + 2


async def test_a_new_replica_knows_all_bookings_at_once_and_not_a_second_later(plane: Plane) -> None:
    a = await plane.add()
    a.table.book(RANK, 100, 200)
    await asyncio.sleep(0.05)  # said, before there was anybody to hear it
    b = await plane.add()
    assert await until(lambda: b.requests == 1) < peers_module.FULL_EVERY_S / 2


async def test_the_bookings_of_replicas_that_crash_or_hang_vanish_within_the_lease(plane: Plane) -> None:
    crashing, hanging, left = [await plane.add() for _ in range(3)]
    crashing.table.book(RANK, 100, 200)
    hanging.table.book(RANK, 10, 20)
    await until(lambda: left.requests == 2)
    await crashing.stop("crashes")
    await hanging.stop("hangs")
    assert LEASE_S - 1.5 < await until(lambda: left.requests == 0) < LEASE_S + 0.5
    assert len(left.peers.bookings) == 0


async def test_one_that_leaves_takes_its_bookings_with_it_and_its_successor_on_another_port_begins_at_once(
    plane: Plane,
) -> None:
    a, b = [await plane.add() for _ in range(2)]
    a.table.book(RANK, 100, 200)
    await until(lambda: b.requests == 1)
    await a.stop("leaves")
    assert await until(lambda: b.requests == 0) < 1.0
    plane.replicas.remove(a)
    successor = await plane.add()
    successor.table.book(RANK, 1, 2)
    assert await until(lambda: b.requests == 1) < 1.0
    b.table.book(RANK, 1, 2)
    await until(lambda: successor.requests == 2)


async def test_a_new_orchestrator_that_knows_of_nobody_yet_takes_no_replica_from_another(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "FULL_EVERY_S", 0.05)
    monkeypatch.setattr(bookings, "LEASE_S", 0.5)
    a, b, c = [await plane.add() for _ in range(3)]
    await until(lambda: len(b.peers.bookings) == 2)
    await b.peers.reconcile(SECRET, [b.me])
    a.table.book(RANK, 1, 1)
    await until(lambda: b.requests == 1)
    await c.stop("crashes")
    plane.replicas.remove(c)
    await until(lambda: set(b.peers._known) == {a.me.replica})


def stranger(kind: int, how: str, context: zmq.asyncio.Context) -> zmq.asyncio.Socket:
    """A socket of somebody who has no secret, or only half of what it takes."""
    socket = context.socket(kind)
    socket.linger = 0
    if how != "no curve":
        ours, theirs = SecureContext(SECRET), SecureContext(b"x" * 32)
        socket.curve_serverkey = (theirs if how == "another secret" else ours)._server[0]
        socket.curve_publickey, socket.curve_secretkey = theirs._client
        for it in (ours, theirs):
            it._admission.stop()
            it._context.destroy(linger=0)
    if kind == zmq.SUB:
        socket.subscribe(b"")
    return socket


async def test_without_the_secret_nobody_hears_asks_or_is_heard(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peers_module, "FULL_EVERY_S", 0.05)
    a, b = [await plane.add(holds=HELD) for _ in range(2)]
    await until(lambda: len(b.peers.bookings) == 1)
    with zmq.asyncio.Context() as context:
        hows = ("no curve", "another secret", "our server's public key")
        listening = [stranger(zmq.SUB, how, context) for how in hows]
        asking = [stranger(zmq.DEALER, how, context) for how in hows]
        for socket in listening:
            socket.connect(a.me.bookings)
        for socket in asking:
            socket.connect(a.me.snapshots)
            await socket.send(snapshots.Assembly(RANK).ask())
        for endpoint in (a.me.bookings, a.me.snapshots):  # no ZeroMQ at all
            host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(secrets.token_bytes(100_000))
            writer.close()
        impostor = SecureContext(b"x" * 32)
        socket, endpoint = impostor.server(zmq.PUB, "127.0.0.1", 1_000)
        await b.peers.reconcile(SECRET, [a.me, Peer("impostor", endpoint, endpoint)])
        before = b.peers.bookings.num_taken
        while b.peers.bookings.num_taken < before + 10:  # ours goes on meanwhile
            await socket.send(msgspec.msgpack.encode(Statement("impostor", 1, True, False, [])))
            await asyncio.sleep(0.01)
        assert [await it.poll(0) for it in (*listening, *asking)] == [0] * 6
        assert "impostor" not in b.peers.bookings
        assert b.peers.bookings.num_refused == 0
        assert a.peers.answers.num_served == a.peers.answers.num_refused == 0
        await impostor.close()
        for it in (*listening, *asking):
            it.close()
    assert await b.peers.resync(RANK) == HELD


async def test_junk_from_one_who_has_the_secret_is_counted_and_hurts_nobody(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "FULL_EVERY_S", 0.05)
    a, b = [await plane.add(holds=HELD) for _ in range(2)]
    traitor = SecureContext(SECRET)
    socket, endpoint = traitor.server(zmq.PUB, "127.0.0.1", 1_000)
    await b.peers.reconcile(SECRET, [a.me, Peer("traitor", endpoint, endpoint)])
    asking = traitor.client(zmq.DEALER, 1_000)
    asking.connect(a.me.snapshots)
    await asking.send_multipart([b"one", b"too many"])
    await asking.send(b"junk")
    assert (await asking.recv()).startswith(b"\x92\xabunavailable")
    while b.peers.bookings.num_refused == 0:
        await socket.send_multipart([b"junk", b"\xff" * 100])
        await asyncio.sleep(0.01)
    await traitor.close()
    a.table.book(RANK, 1, 1)
    await until(lambda: b.requests == 1)
    assert await b.peers.resync(RANK) == HELD


async def test_a_snapshot_comes_from_whichever_replica_is_certain(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "ANSWER_S", 0.1)
    uncertain, gone, certain, asking = [await plane.add(holds=holds) for holds in (None, HELD, HELD, None)]
    await until(lambda: len(asking.peers.bookings) == 3)
    await gone.stop("hangs")
    for _ in range(5):  # in whatever order they are asked
        assert await asking.peers.resync(RANK) == HELD
    assert asking.peers.num_snapshots == certain.peers.answers.num_served == 5
    assert await asking.peers.resync(Holder("w", 2, 0)) is None
    assert uncertain.peers.answers.num_served == 0


async def test_a_replica_that_is_still_listed_though_dead_holds_no_newcomer_up(plane: Plane) -> None:
    dead, _ = [await plane.add(holds=HELD) for _ in range(2)]
    listed = [each.me for each in plane.replicas]
    await dead.stop("crashes")
    plane.replicas.remove(dead)
    newcomer = Replica()
    await newcomer.peers.reconcile(SECRET, listed)
    began_s = time.monotonic()
    assert await asyncio.gather(*(newcomer.peers.resync(RANK) for _ in range(20))) == [HELD] * 20
    assert time.monotonic() - began_s < snapshots.ANSWER_S
    await newcomer.peers.close()
    await dead.peers.close()


async def test_alone_there_is_no_snapshot(plane: Plane) -> None:
    assert await (await plane.add(holds=HELD)).peers.resync(RANK) is None


async def test_a_replica_at_an_impossible_address_has_no_snapshot() -> None:
    context = SecureContext(SECRET)
    try:
        with pytest.raises(snapshots.NoSnapshot, match="nowhere"):
            await snapshots.fetch(context, "nowhere", RANK)
    finally:
        await context.close()


async def test_an_address_that_is_not_ours_is_said_and_tried_again(
    plane: Plane, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = Replica(host="192.0.2.1")
    for _ in range(2):
        await elsewhere.peers.reconcile(SECRET, [])
    assert elsewhere.peers.me is None
    assert caplog.text.count("cannot tell the others") == 2
    await elsewhere.peers.close()


async def test_closing_while_a_snapshot_is_on_its_way_ends_both(plane: Plane) -> None:
    hung, asking = [await plane.add(holds=HELD) for _ in range(2)]
    await hung.stop("hangs")
    fetch = asyncio.create_task(asking.peers.resync(RANK))
    await asyncio.sleep(0.02)
    fetch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await fetch
    await asking.peers.close()
    await hung.peers.close()
