"""KV events over real ZeroMQ sockets: nothing missed, nothing twice, and loss never hidden."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
import zmq

from backends.engine import KVEventSource
from backends.kv_events import AllBlocksCleared, BlockRemoved, KVEventBatch, encode
from backends.kv_publisher import KVEventPublisher
from dynamo_ray.events import zmq as events
from dynamo_ray.events.zmq import KVEventSubscriber
from dynamo_ray.routing.anomalies import Anomaly
from dynamo_ray.routing.kv_index import Holder, Snapshot

HOLDER = Holder("w", 1, 0)


class Heard:
    def __init__(self) -> None:
        self.batches: list[KVEventBatch] = []
        self.uncertain: list[Holder] = []
        self.grew = asyncio.Event()

    def apply(self, holder: Holder, batch: KVEventBatch) -> None:
        assert holder == HOLDER
        self.batches.append(batch)
        self.grew.set()

    async def until(self, sequence: int) -> None:
        async with asyncio.timeout(10):
            while not self.batches or self.batches[-1].sequence < sequence:
                self.grew.clear()
                await self.grew.wait()

    @property
    def sequences(self) -> list[int]:
        return [batch.sequence for batch in self.batches]


def batch(sequence: int) -> KVEventBatch:
    return KVEventBatch(sequence, 0, [BlockRemoved([sequence])])


def source(publisher: KVEventPublisher, replay: bool = True) -> KVEventSource:
    return KVEventSource(0, publisher.endpoint, publisher.replay_endpoint if replay else None, "simulated-1")


@pytest.fixture
async def publisher() -> AsyncIterator[KVEventPublisher]:
    made = KVEventPublisher("127.0.0.1")
    yield made
    await made.close()


@pytest.fixture
async def heard() -> Heard:
    return Heard()


@pytest.fixture
async def subscriber(heard: Heard) -> AsyncIterator[KVEventSubscriber]:
    made = KVEventSubscriber(heard.apply, heard.uncertain.append)
    yield made
    await made.close()


async def test_what_was_published_before_the_subscription_is_replayed(
    publisher: KVEventPublisher, subscriber: KVEventSubscriber, heard: Heard
) -> None:
    for sequence in range(100):
        publisher.publish(batch(sequence))
    subscriber.subscribe("w", 1, [source(publisher)])
    await heard.until(99)
    publisher.publish(batch(100))
    await heard.until(100)
    assert heard.sequences == list(range(101))
    assert heard.uncertain == []


async def test_batches_published_while_subscribing_are_neither_lost_nor_doubled(
    publisher: KVEventPublisher, subscriber: KVEventSubscriber, heard: Heard
) -> None:
    subscriber.subscribe("w", 1, [source(publisher)])
    for sequence in range(500):
        publisher.publish(batch(sequence))
        if sequence % 50 == 0:
            await asyncio.sleep(0.01)
    await heard.until(499)
    assert heard.sequences == list(range(500))


async def test_a_gap_is_fetched_from_the_replay_endpoint(
    publisher: KVEventPublisher, subscriber: KVEventSubscriber, heard: Heard
) -> None:
    subscriber.subscribe("w", 1, [source(publisher)])
    publisher.publish(batch(0))
    await heard.until(0)
    for sequence in range(1, 5):  # lost on the way: only the buffer has them
        publisher._buffer.append(_frames(sequence))
    publisher.publish(batch(5))
    await heard.until(5)
    assert heard.sequences == [0, 1, 2, 3, 4, 5]
    assert heard.uncertain == []
    assert subscriber.num_gaps >= 1


async def test_a_defect_is_logged_and_the_rank_is_followed_anew(
    publisher: KVEventPublisher,
    subscriber: KVEventSubscriber,
    heard: Heard,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(events, "AGAIN_S", 0.01)
    monkeypatch.setattr(events, "FIRST_CHECK_S", 0.05)

    def broken(holder: Holder, batch: KVEventBatch) -> None:
        subscriber.apply = heard.apply
        raise OSError("no file is left")

    subscriber.apply = broken
    publisher.publish(batch(0))
    subscriber.subscribe("w", 1, [source(publisher)])
    await heard.until(0)
    publisher.publish(batch(1))
    await heard.until(1)
    assert heard.uncertain == [HOLDER]
    assert "followed anew" in caplog.text


def _frames(sequence: int) -> list[bytes]:
    return encode(batch(sequence))


async def test_a_gap_that_cannot_be_filled_makes_the_rank_uncertain(
    publisher: KVEventPublisher, subscriber: KVEventSubscriber, heard: Heard
) -> None:
    subscriber.subscribe("w", 1, [source(publisher, replay=False)])
    for sequence in range(1000):
        publisher.publish(batch(sequence))
        await asyncio.sleep(0.01)
        if heard.batches:
            break
    heard.uncertain.clear()
    last = heard.sequences[-1]
    publisher.publish(batch(last + 7))
    await heard.until(last + 7)
    assert heard.uncertain == [HOLDER]


async def test_a_rank_that_forgot_its_oldest_batches_is_uncertain_and_then_followed(
    subscriber: KVEventSubscriber, heard: Heard
) -> None:
    short = KVEventPublisher("127.0.0.1", buffer_batches=3)
    try:
        for sequence in range(10):
            short.publish(batch(sequence))
        subscriber.subscribe("w", 1, [source(short)])
        await heard.until(9)
        assert heard.sequences == [7, 8, 9]
        assert heard.uncertain == [HOLDER]
    finally:
        await short.close()


async def test_garbage_is_reported_and_does_not_end_the_subscription(
    publisher: KVEventPublisher, subscriber: KVEventSubscriber, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    subscriber.subscribe("w", 1, [source(publisher)])
    publisher.publish(batch(0))
    await heard.until(0)
    await publisher._pub.send_multipart([b"", b"short", b"\xc1"])
    publisher.publish(batch(1))
    await heard.until(1)
    assert "cannot read" in caplog.text


async def test_unsubscribing_ends_its_task(publisher: KVEventPublisher, subscriber: KVEventSubscriber) -> None:
    before = len(asyncio.all_tasks())
    subscriber.subscribe("w", 1, [source(publisher)])
    await asyncio.sleep(0.05)
    subscriber.unsubscribe("w", 1)
    await asyncio.sleep(0.05)
    assert len(asyncio.all_tasks()) == before


async def send(publisher: KVEventPublisher, subscriber: KVEventSubscriber, heard: Heard, *frames: list[bytes]) -> None:
    """Straight to who subscribes, kept for nobody; the subscription is in effect."""
    subscriber.subscribe("w", 1, [source(publisher)])
    publisher.publish(batch(0))
    await heard.until(0)
    for each in frames:
        await publisher._pub.send_multipart(each)


async def test_a_publisher_that_begins_anew_is_followed_from_its_beginning(
    publisher: KVEventPublisher, subscriber: KVEventSubscriber, heard: Heard
) -> None:
    await send(publisher, subscriber, heard, _frames(1), _frames(2))
    await heard.until(2)
    publisher._buffer.clear()
    other = [encode(KVEventBatch(number, 0, [BlockRemoved([7])])) for number in (0, 1)]
    publisher._buffer.extend(other)
    await publisher._pub.send_multipart(other[1])
    async with asyncio.timeout(10):
        while heard.sequences[-2:] != [0, 1] or len(heard.batches) < 6:
            heard.grew.clear()
            await heard.grew.wait()
    assert heard.sequences == [0, 1, 2, 0, 0, 1]
    assert heard.batches[3].events == [AllBlocksCleared()]
    assert heard.uncertain == []


def another(sequence: int) -> KVEventBatch:
    """What a publisher says that began anew."""
    return KVEventBatch(sequence, 0, [BlockRemoved([1_000 + sequence])])


async def test_a_publisher_that_begins_anew_is_found_out_though_nothing_of_it_came_but_by_replay(
    publisher: KVEventPublisher, subscriber: KVEventSubscriber, heard: Heard
) -> None:
    for sequence in range(1_000):
        publisher.publish(batch(sequence))
    subscriber.subscribe("w", 1, [source(publisher)])
    await heard.until(999)
    publisher._buffer.clear()
    said = 0
    async with asyncio.timeout(10):
        while len(heard.batches) == 1_000:  # a subscription takes effect unannounced
            publisher.publish(another(said))
            said += 1
            await asyncio.sleep(0.02)
    publisher.publish(another(said))
    await heard.until(said)
    assert said < 1_000
    assert heard.sequences[1_000:] == [0, *range(said + 1)]
    assert heard.batches[1_000].events == [AllBlocksCleared()]
    assert heard.batches[-1].events == another(said).events
    assert heard.uncertain == []


async def test_a_publisher_that_began_anew_and_is_further_than_before_is_found_out(
    publisher: KVEventPublisher, subscriber: KVEventSubscriber, heard: Heard
) -> None:
    subscriber.subscribe("w", 1, [source(publisher)])
    for sequence in range(3):
        publisher.publish(batch(sequence))
    await heard.until(2)
    publisher._buffer.clear()
    publisher._buffer.extend(encode(another(sequence)) for sequence in range(5))
    publisher.publish(another(5))
    await heard.until(5)
    assert heard.sequences == [0, 1, 2, 0, 0, 1, 2, 3, 4, 5]
    assert heard.batches[3].events == [AllBlocksCleared()]
    assert heard.uncertain == []


async def test_a_batch_that_comes_twice_is_taken_once(
    publisher: KVEventPublisher, subscriber: KVEventSubscriber, heard: Heard
) -> None:
    await send(publisher, subscriber, heard, _frames(1), _frames(1), _frames(2))
    await heard.until(2)
    assert heard.sequences == [0, 1, 2]
    assert subscriber.anomalies.total(Anomaly.SEQUENCE) == 1


async def test_a_replay_endpoint_that_does_not_answer_costs_a_moment_and_the_rank_its_certainty(
    publisher: KVEventPublisher, subscriber: KVEventSubscriber, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    await send(publisher, subscriber, heard)
    monkeypatch.setattr(events, "REPLAY_TIMEOUT_S", 0.1)
    publisher._task.cancel()
    await publisher._pub.send_multipart(_frames(5))
    await heard.until(5)
    assert heard.uncertain == [HOLDER]
    assert subscriber.anomalies.total(Anomaly.NO_REPLAY) >= 1


async def test_what_is_lost_is_asked_of_another_follower_which_is_believed_if_it_knows_enough(
    publisher: KVEventPublisher, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "FIRST_CHECK_S", 0.05)
    answers = [None, Snapshot(4, []), Snapshot(8, [])]
    restored: list[Snapshot] = []
    meanwhile: list[int] = []

    async def resync(holder: Holder) -> Snapshot | None:
        return answers.pop(0)

    def restoring(holder: Holder, snapshot: Snapshot) -> Iterator[None]:
        for number in (7, 8):  # 7 is in the snapshot.
            publisher.publish(batch(number))
        for _ in range(100):
            yield
        meanwhile.extend(heard.sequences)
        restored.append(snapshot)
        heard.grew.set()

    subscriber = KVEventSubscriber(heard.apply, heard.uncertain.append, restoring, resync)
    try:
        subscriber.subscribe("w", 1, [source(publisher)])
        publisher.publish(batch(0))
        await heard.until(0)
        publisher._buffer.clear()
        publisher.publish(batch(6))
        async with asyncio.timeout(10):
            while not restored:
                heard.grew.clear()
                await heard.grew.wait()
        assert (restored, meanwhile) == ([Snapshot(8, [])], [0, 6])
        await heard.until(8)
        assert heard.sequences == [0, 6, 8]
    finally:
        await subscriber.close()


async def test_a_replay_of_which_some_was_dropped_is_asked_again_from_there(
    publisher: KVEventPublisher, subscriber: KVEventSubscriber, heard: Heard
) -> None:
    """A ROUTER drops what a peer does not take at once."""
    publisher._buffer.extend(_frames(number) for number in (0, 1, 3))
    subscriber.subscribe("w", 1, [source(publisher)])
    await heard.until(1)
    publisher._buffer.insert(2, _frames(2))
    await heard.until(3)
    assert heard.sequences == [0, 1, 2, 3]


async def test_a_frame_beyond_all_measure_ends_its_connection_and_nothing_else(
    publisher: KVEventPublisher, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MAX_PAYLOAD_BYTES", 10_000)
    monkeypatch.setattr(events, "FIRST_CHECK_S", 0.05)
    subscriber = KVEventSubscriber(heard.apply, heard.uncertain.append)
    try:
        await send(publisher, subscriber, heard, [b"", (1).to_bytes(8, "big"), bytes(20_000)])
        for number in (1, 2):
            publisher.publish(batch(number))
        await heard.until(2)
        assert heard.sequences == [0, 1, 2]
    finally:
        await subscriber.close()


async def test_a_reader_that_fell_behind_sees_that_it_did(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_QUEUED", 5)
    subscriber = KVEventSubscriber(heard.apply, heard.uncertain.append)
    with zmq.Context() as context, context.socket(zmq.PUB) as pub:
        pub.setsockopt(zmq.SNDHWM, 5)
        pub.setsockopt(zmq.LINGER, 0)
        port = pub.bind_to_random_port("tcp://127.0.0.1")
        subscriber.subscribe("w", 1, [KVEventSource(0, f"tcp://127.0.0.1:{port}", None, "simulated-1")])
        number = -1
        async with asyncio.timeout(10):
            while not heard.batches:
                number += 1
                pub.send_multipart(_frames(number))
                await asyncio.sleep(0.01)
            heard.uncertain.clear()
            payload = encode(KVEventBatch(0, 0, [BlockRemoved([1 << 60] * 20_000)]))[2]
            for _ in range(200):  # Without a turn of the loop for the reader.
                number += 1
                pub.send_multipart([b"", number.to_bytes(8, "big"), payload])
            while not heard.uncertain:
                number += 1
                pub.send_multipart(_frames(number))
                await asyncio.sleep(0.01)
        await subscriber.close()
    assert heard.uncertain[0] == HOLDER
