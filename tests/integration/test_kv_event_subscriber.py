"""KV events over real ZeroMQ sockets: nothing missed, nothing twice, and loss never hidden."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from backends.engine import KVEventSource
from backends.kv_events import BlockRemoved, KVEventBatch
from backends.kv_publisher import KVEventPublisher
from dynamo_ray.events.zmq import KVEventSubscriber
from dynamo_ray.routing.kv_index import Holder

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


def _frames(sequence: int) -> list[bytes]:
    from backends.kv_events import encode

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
