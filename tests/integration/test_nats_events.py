"""KV events through a real nats-server that dies, hangs, forgets and loses: every index ends exact, nobody waits."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import nats
import pytest
from kv_ranks import NATS_TOKEN, SIZE, Engine, Index, nats_config, until
from nats_servers import cluster, with_accounts

from backends.engine import RankLoad
from backends.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch
from dynamo_ray.config import NatsConfig
from dynamo_ray.errors import ConfigError
from dynamo_ray.events import bookings
from dynamo_ray.events.nats import lifecycle, link, peers, publisher, subscriber, wire
from dynamo_ray.events.nats.lifecycle import LifecyclePublisher
from dynamo_ray.events.nats.peers import NatsPeers
from dynamo_ray.events.nats.publisher import Publisher
from dynamo_ray.events.nats.server import PrivateServer
from dynamo_ray.events.nats.subscriber import NatsSubscriber
from dynamo_ray.events.nats.wire import Subjects
from dynamo_ray.routing.kv_index import Snapshot
from dynamo_ray.routing.load import LoadTable
from dynamo_ray.routing.ranks import Holder, Ranks

HEAL_S = 8.0
names = itertools.count()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in production, but sooner."""
    for name, value in (("PROBE_EVERY_S", 0.2), ("PROBE_TIMEOUT_S", 0.5), ("CONNECT_TIMEOUT_S", 0.5), ("RETRY_S", 0.1)):
        monkeypatch.setattr(link, name, value)
    monkeypatch.setattr(publisher, "MIN_RESTATE_S", 0.1)


class Rig:
    """Two ranks of one worker, its publisher, and as many ingresses as a test asks for."""

    def __init__(self, config: NatsConfig, app: str) -> None:
        self.config, self.app = config, app
        self.subjects = Subjects(self.config.prefix, self.app)
        self.engines = [Engine(Holder("prefill-0.1", 7, rank)) for rank in range(2)]
        self.publisher = Publisher(self.config, self.app, "m", "prefill-0.1", 7, lambda: (RankLoad(0, 1, 2, 3, 4),))
        self.replicas: list[tuple[Index, NatsSubscriber]] = []

    def start(self) -> None:
        self.publisher.start([engine.source for engine in self.engines])

    def replica(self) -> Index:
        index = Index([engine.holder for engine in self.engines])
        plane = NatsSubscriber(self.config, self.app, index)
        plane.subscribe("prefill-0.1", 7, [engine.source for engine in self.engines])
        self.replicas.append((index, plane))
        return index

    def read(self, index: Index, engine: Engine) -> bool:
        """That rank, to its last batch."""
        plane = next(plane for known, plane in self.replicas if known is index)
        follower = plane._workers[engine.holder.worker, engine.holder.epoch].followers[engine.holder.dp_rank]
        if engine.holder in index.index.doubtful:  # it is being restored
            return False
        return follower.next_sequence == self.publisher._ranks[engine.holder.dp_rank].next_sequence >= engine.sequence

    async def exact(self, timeout_s: float = HEAL_S) -> None:
        """Every replica, within that time; and what it takes for exact is."""

        def healed() -> bool:
            return all(self.read(index, engine) for index, _ in self.replicas for engine in self.engines)

        try:
            await until(healed, timeout_s)
        except TimeoutError:
            raise AssertionError(f"not exact after {timeout_s:g} s: {self.progress}") from None
        for index, _ in self.replicas:
            for engine in self.engines:
                assert index.blocks(engine.holder) == engine.truth.blocks(engine.holder)

    @property
    def progress(self) -> object:
        said = [
            (engine.sequence, rank.next_sequence)
            for engine, rank in zip(self.engines, self.publisher._ranks.values(), strict=True)
        ]
        read = [
            [f.next_sequence for worker in plane._workers.values() for f in worker.followers.values()]
            for _, plane in self.replicas
        ]
        return {"said, mirrored": said, "read": read, "published": self.publisher.published}

    async def close(self) -> None:
        for _, plane in self.replicas:
            await plane.close()
        await self.publisher.close()
        for engine in self.engines:
            await engine.close()


@asynccontextmanager
async def rig_on(config: NatsConfig, app: str) -> AsyncIterator[Rig]:
    made = Rig(config, app)
    try:
        made.start()
        yield made
    finally:
        await made.close()


@pytest.fixture
async def rig(nats_server: PrivateServer) -> AsyncIterator[Rig]:
    async with rig_on(nats_config(nats_server), f"app {next(names)}") as made:
        yield made


def reading(rig: Rig, name: str) -> float:
    _, plane = rig.replicas[0]
    return sum(value for found, _, _, value in plane.readings() if found == name)


async def test_replicas_are_exact_from_their_first_seconds_however_late_they_start(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = rig.engines
    first.store(*range(0, 300))
    rig.replica()
    second.store(*range(300, 600))
    await rig.exact()
    first.say(BlockRemoved(list(range(0, 300, 2))))
    second.say(AllBlocksCleared(), BlockStored([1], None, [1] * SIZE, SIZE))
    rig.replica()
    await rig.exact(2.0)
    await until(lambda: rig.replicas[0][0].loads == {first.holder: RankLoad(0, 1, 2, 3, 4)})
    assert reading(rig, "dynamo_ray_nats_connected") == 1
    await until(lambda: reading(rig, "dynamo_ray_nats_published_total") > 0)
    assert rig.replicas[1][1].num_gaps == 0
    monkeypatch.setattr(subscriber, "MAX_REPLAYED", 0)
    rig.replica()  # asks, where there is much to read
    await rig.exact(3.0)
    assert rig.replicas[2][1].asks > 0


async def test_what_is_said_while_a_rank_is_restored_is_taken_afterwards_even_if_the_connection_is_lost(
    rig: Rig, nats_server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber, "MAX_REPLAYED", 0)  # all ask
    first, second = rig.engines
    first.store(*range(200))
    await until(lambda: rig.publisher.idle and rig.publisher.published > 0)
    index = rig.replica()
    begun, going = asyncio.Event(), set[Holder]()
    restoring, apply = index.index.restoring, index.index.apply

    def slowly(holder: Holder, snapshot: Snapshot) -> Iterator[None]:
        going.add(holder)
        if holder == first.holder:
            first.say(BlockRemoved(list(range(0, 200, 2))))
            _kill(nats_server)
            begun.set()
        ends_s = time.monotonic() + 2.0
        while time.monotonic() < ends_s:
            time.sleep(0.001)
            yield
        yield from restoring(holder, snapshot)
        going.discard(holder)

    def apply_only_afterwards(holder: Holder, batch: KVEventBatch) -> None:
        assert holder not in going
        apply(holder, batch)

    monkeypatch.setattr(index.index, "restoring", slowly)
    monkeypatch.setattr(index.index, "apply", apply_only_afterwards)
    async with asyncio.timeout(HEAL_S):
        await begun.wait()
    await until(lambda: not rig.replicas[0][1].link.connected)
    assert first.holder not in going
    monkeypatch.setattr(index.index, "restoring", restoring)
    nats_server.start()
    await rig.exact()
    second.store(300)
    await rig.exact()


async def test_a_killed_server_that_comes_back_with_its_data_costs_nothing(
    rig: Rig, nats_server: PrivateServer
) -> None:
    rig.replica()
    rig.engines[0].store(*range(0, 100))
    await rig.exact()
    _kill(nats_server)
    rig.engines[0].store(*range(100, 200))
    await until(lambda: not reading(rig, "dynamo_ray_nats_connected"))
    rig.engines[1].say(BlockStored([1], None, [1] * SIZE, SIZE))
    nats_server.start()
    rig.replica()
    await rig.exact()
    rig.engines[1].store(*range(200, 210))
    await rig.exact()


async def test_a_server_that_comes_back_empty_is_told_everything_again(rig: Rig, nats_server: PrivateServer) -> None:
    rig.replica()
    rig.engines[0].store(*range(0, 100))
    await rig.exact()
    _kill(nats_server)
    shutil.rmtree(nats_server.log.parent / "jetstream")
    nats_server.start()
    rig.engines[1].store(*range(100, 110))
    rig.replica()  # knows only what is said from now on
    await rig.exact()


async def test_a_hanging_server_keeps_nobody_waiting(
    rig: Rig, nats_server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in rig.publisher._ranks.values():
        monkeypatch.setattr(rank, "_max_queued_bytes", 20_000)
    monkeypatch.setattr(publisher, "MAX_UNCONFIRMED", 8)
    index = rig.replica()
    rig.engines[0].store(*range(0, 50))
    await rig.exact()
    assert nats_server.process is not None
    nats_server.process.send_signal(signal.SIGSTOP)
    try:
        worst_s = 0.0
        for block in range(50, 1050):
            began_s = time.perf_counter()
            rig.engines[0].say(BlockStored([block], None, [block] * SIZE, SIZE))
            await asyncio.sleep(0)
            worst_s = max(worst_s, time.perf_counter() - began_s)
        await until(lambda: not reading(rig, "dynamo_ray_nats_connected"))
        await until(lambda: rig.publisher._ranks[0].next_sequence == 1050)
        assert worst_s < 0.25
        assert rig.publisher.dropped > 0  # bounded
        assert len(index.blocks(rig.engines[0].holder)) == 50  # what was known still is
    finally:
        nats_server.process.send_signal(signal.SIGCONT)
    await rig.exact()


async def test_a_purged_stream_is_noticed_by_who_starts_after_it(rig: Rig) -> None:
    rig.replica()
    rig.engines[0].store(*range(0, 100))
    await rig.exact()
    async with _client(rig) as client:
        await client.jetstream().purge_stream(rig.subjects.stream)
    rig.engines[0].say(BlockRemoved([5]))
    rig.replica()
    await rig.exact(2.0)
    assert rig.replicas[0][1].asks == 0


async def test_a_message_lost_on_its_way_is_a_gap_and_is_asked_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.replica()
    rig.engines[0].store(*range(0, 10))
    await rig.exact()
    taken = rig.publisher._ranks[0].take
    lost: list[int] = []

    def lose_one() -> wire.Events:
        message = taken()
        if lost:
            return message
        lost.append(message.sequence)
        return msgspec.structs.replace(message, sequence=0, events=[])  # old: nobody takes it

    monkeypatch.setattr(rig.publisher._ranks[0], "take", lose_one)
    rig.engines[0].say(BlockRemoved([3]))
    await until(lambda: bool(lost))
    rig.engines[0].say(BlockRemoved([4]))
    await until(lambda: rig.replicas[0][1].num_gaps > 0)
    await rig.exact()
    assert reading(rig, "dynamo_ray_nats_resyncs_total") >= 1


async def test_a_reader_too_slow_for_its_messages_reads_them_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriber, "MAX_PENDING_BYTES", 3_000)
    monkeypatch.setattr(publisher, "COALESCED_BYTES", 500)
    monkeypatch.setattr(publisher, "PART_BLOCKS", 50)
    rig.replica()
    rig.engines[0].store(*range(0, 400))
    await rig.exact(30.0)  # a few messages a consumer
    assert reading(rig, "dynamo_ray_nats_consumers_total") > 1


async def test_the_last_message_lost_is_noticed_though_nothing_follows(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.replica()
    rig.engines[0].store(*range(0, 10))
    await rig.exact()
    taken = rig.publisher._ranks[0].take
    monkeypatch.setattr(rig.publisher._ranks[0], "take", lambda: msgspec.structs.replace(taken(), sequence=0))
    rig.engines[0].say(BlockRemoved([3]))
    await rig.exact()


async def test_bookings_lapse_while_nats_is_away_and_are_whole_afterwards(
    nats_server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bookings, "LEASE_S", 0.5)
    monkeypatch.setattr(peers, "FULL_EVERY_S", 0.1)
    holder, config = Holder("w", 1, 0), nats_config(nats_server)
    tables = [LoadTable(Ranks()), LoadTable(Ranks())]
    replicas = [NatsPeers(config, "lease", table, lambda: None) for table in tables]
    try:
        for table, replica in zip(tables, replicas, strict=True):
            table.add_holder(holder)
            await replica.reconcile(b"", ())
        tables[0].book(holder, 100, 200)
        await until(lambda: tables[1].load(holder).num_requests == 1)
        _kill(nats_server)
        await until(lambda: tables[1].load(holder).num_requests == 0)
        tables[0].book(holder, 100, 200)
        nats_server.start()
        await until(lambda: tables[1].load(holder).num_requests == 2)
    finally:
        for replica in replicas:
            await replica.close()


async def test_lifecycle_is_kept_and_told_again_to_a_server_that_lost_it(
    nats_server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "AGAIN_EVERY_S", 0.3)
    config = nats_config(nats_server)
    subjects, told = Subjects(config.prefix, "life"), LifecyclePublisher(config, "life")

    async def kept() -> list[str]:
        client = await nats.connect(nats_server.url, token=NATS_TOKEN)
        try:
            stream = client.jetstream()
            found = [await stream.get_last_msg(subjects.stream, subjects.lifecycle(worker)) for worker in ("a.1", "b")]
        except nats.js.errors.NotFoundError:
            return []
        finally:
            await client.close()
        return [wire.decode(each.data or b"").phase for each in found]  # type: ignore[union-attr]

    async def until_kept(phases: list[str]) -> None:
        async with asyncio.timeout(HEAL_S):
            while await kept() != phases:
                await asyncio.sleep(0.05)

    told.start()
    try:
        told.tell([state("a.1", "starting"), state("b", "starting")])
        told.tell([state("a.1", "ready")])
        await until_kept(["ready", "starting"])
        client = await nats.connect(nats_server.url, token=NATS_TOKEN)
        await client.jetstream().purge_stream(subjects.stream)
        await client.close()
        await until_kept(["ready", "starting"])
    finally:
        await told.close()


def state(worker: str, phase: str) -> wire.Lifecycle:
    return wire.Lifecycle(worker, "prefill", 1, phase, "", 0, 0.0, 0.0)


async def test_what_others_publish_there_is_counted_and_changes_nothing(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    index = rig.replica()
    rig.engines[0].store(*range(0, 20))
    await rig.exact()
    before = index.blocks(rig.engines[0].holder)
    async with _client(rig) as client:
        for payload in (b"", b"\xc1", b"\x80", b"x" * 100_000):
            await client.jetstream().publish(rig.subjects.kv("prefill-0.1", 7, 0), payload)
        await client.publish(rig.subjects.load("prefill-0.1"), b"\x93")
        await client.publish(rig.subjects.ask("prefill-0.1", 7), b"\x93")
    await until(lambda: reading(rig, "dynamo_ray_nats_unreadable_total") == 5)
    assert index.blocks(rig.engines[0].holder) == before
    assert caplog.text.count("cannot read, ignored") == 1


async def test_who_is_refused_says_so_once_and_tries_again(
    nats_server: PrivateServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NATS_TOKEN", "wrong")
    config = NatsConfig(urls=(nats_server.url,), token="${NATS_TOKEN}")
    plane = NatsSubscriber(config, "refused", Index([]))
    plane.subscribe("w", 1, [])
    try:
        await asyncio.sleep(1.0)
        assert not plane.link.connected
        assert caplog.text.count("trying again") == 1
        assert "uthorization" in caplog.text
        assert "wrong" not in caplog.text
    finally:
        await plane.close()
    monkeypatch.delenv("NATS_TOKEN")
    with pytest.raises(ConfigError, match=r"nats.token: the environment variable NATS_TOKEN is not set"):
        NatsSubscriber(config, "refused", Index([]))


async def test_a_user_with_credentials_needs_no_more_than_the_documented_subjects(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = "dynamo_ray.accounts.>"
    server, file = with_accounts(tmp_path / "accounts", [ours, "$JS.API.>", "$JS.FC.>"], [ours, "_INBOX.>"])
    server.start()
    try:
        async with rig_on(NatsConfig(urls=(server.url,), creds_file=str(file)), "accounts") as rig:
            for block in range(50):  # 5 MB, more than a server sends without hearing that it was read
                rig.engines[0].say(BlockStored([block], None, [block] * 25_000, 25_000))
            rig.replica()
            await rig.exact()
            rig.replica()
            await rig.exact()
            rig.engines[1].store(1, 2, 3)
            await rig.exact()
            assert "violation" not in caplog.text
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("subscribe", "replicas", "said"),
    [
        (["_INBOX.>"], 1, 'permissions violation for subscription to "dynamo_ray.refused.load.*"; docs/events.md says'),
        ([">"], 3, "replicas > 1 not supported in non-clustered mode"),
    ],
)
async def test_what_a_server_does_not_grant_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, subscribe: list[str], replicas: int, said: str
) -> None:
    server, file = with_accounts(tmp_path / "accounts", [">"], subscribe)
    server.start()
    plane = NatsSubscriber(
        NatsConfig(urls=(server.url,), creds_file=str(file), replicas=replicas), "refused", Index([])
    )
    try:
        plane.subscribe("w", 1, [])
        await until(lambda: said in caplog.text)
        _kill(server)
        await until(lambda: not plane.link.connected)
        server.start()
        await until(lambda: plane.link.num_connections > 1)
        await asyncio.sleep(0.5)
        assert caplog.text.count(said) == 1
    finally:
        await plane.close()
        server.stop()


async def test_a_cluster_that_loses_the_server_all_are_on_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = link.options
    monkeypatch.setattr(link, "options", lambda config: {**options(config), "dont_randomize": True})
    servers = cluster(tmp_path, 3)
    try:
        for server in servers:
            server.start()
        config = NatsConfig(urls=tuple(server.url for server in servers), token=NATS_TOKEN, replicas=3)
        async with rig_on(config, "clustered") as rig:
            index = rig.replica()
            rig.engines[0].store(*range(100))
            await rig.exact(15.0)
            await _until_copies(rig, 3)
            _kill(servers[0])
            rig.engines[0].store(*range(100, 200))
            rig.engines[1].say(BlockStored([1], None, [1] * SIZE, SIZE))
            assert index.blocks(rig.engines[0].holder) >= set(range(100))
            rig.replica()
            await rig.exact(15.0)
            assert {plane._client.connected_url.port for _, plane in rig.replicas if plane._client} == {servers[1].port}
            servers[0].start()
            await _until_copies(rig, 3)
    finally:
        for server in servers:
            server.stop()


async def _until_copies(rig: Rig, count: int) -> None:
    async with asyncio.timeout(15.0):
        while await _copies(rig) != count:
            await asyncio.sleep(0.1)


async def _copies(rig: Rig) -> int:
    """Servers that have all of the stream; 0 while there is none to say so."""
    async with _client(rig) as client:
        try:
            found = (await client.jetstream().stream_info(rig.subjects.stream)).cluster
        except (nats.errors.Error, TimeoutError):
            return 0
        return 0 if found is None else 1 + sum(bool(other.current) for other in found.replicas or ())


def _kill(nats_server: PrivateServer) -> None:
    assert nats_server.process is not None
    nats_server.process.kill()
    nats_server.process.wait(5)


@asynccontextmanager
async def _client(rig: Rig) -> AsyncIterator[nats.aio.client.Client]:
    client = await nats.connect(**link.options(rig.config))
    try:
        yield client
    finally:
        await client.close()
