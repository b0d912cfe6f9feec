"""What a rank holds, said again and followed on NATS: exact whatever is lost, without a server."""

from __future__ import annotations

import asyncio
from typing import cast

import nats.errors
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from nats.aio.client import Client

from backends.engine import RankLoad
from backends.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent, KVEventBatch
from dynamo_ray.config import NatsConfig
from dynamo_ray.events.nats import wire
from dynamo_ray.events.nats.follower import Follower, Verdict
from dynamo_ray.events.nats.publisher import Rank
from dynamo_ray.events.nats.subscriber import NatsSubscriber
from dynamo_ray.events.plane import Listener
from dynamo_ray.routing.block_hash import block_hashes, chain_seed
from dynamo_ray.routing.kv_index import KVIndex, Snapshot
from dynamo_ray.routing.ranks import Holder, Ranks
from dynamo_ray.simulator import clock

HOLDER = Holder("w.1", 3, 0)
SIZE = 2
CHAINS = [[(chain, depth) for depth in range(5)] for chain in range(4)]
"""Blocks by name: chains 1 and 3 continue 0 and 2 after two blocks of theirs."""


def tokens(chain: int, depth: int) -> list[int]:
    return [100 * (chain - 1 if chain % 2 and depth < 2 else chain) + depth, depth]


def name(chain: int, depth: int) -> int:
    return 10 * (chain - 1 if chain % 2 and depth < 2 else chain) + depth


def restore(index: KVIndex, snapshot: Snapshot) -> None:
    for _ in index.restoring(HOLDER, snapshot):
        pass


def stored(chain: int, first: int, last: int, lora: str | None = None) -> BlockStored:
    depths = range(first, last + 1)
    return BlockStored(
        [name(chain, depth) for depth in depths],
        name(chain, first - 1) if first else None,
        [token for depth in depths for token in tokens(chain, depth)],
        SIZE,
        lora_name=lora,
    )


one_event = st.one_of(
    st.builds(
        lambda chain, ends: stored(chain, *sorted(ends)),
        st.integers(0, 3),
        st.tuples(st.integers(0, 4), st.integers(0, 4)),
    ),
    st.builds(lambda chain, depth: BlockRemoved([name(chain, depth)]), st.integers(0, 3), st.integers(0, 4)),
    st.just(AllBlocksCleared()),
)
histories = st.lists(one_event, max_size=40)


class Known:
    """An index of one rank, and what it knows of every chain."""

    def __init__(self) -> None:
        self.index = KVIndex("m", Ranks())
        self.index.add_holder(HOLDER)

    def apply(self, events: list[KVEvent]) -> None:
        self.index.apply(HOLDER, KVEventBatch(0, 0, events))

    def forget(self) -> None:
        self.index.clear_holder(HOLDER)

    @property
    def depths(self) -> list[int]:
        seed = chain_seed("m", None, None)
        chains = ([token for depth in range(5) for token in tokens(chain, depth)] for chain in range(4))
        return [self.index.overlap(block_hashes(chain, SIZE, seed)).get(HOLDER, 0) for chain in chains]


@given(histories, histories, st.integers(1, 3))
def test_the_parts_of_a_state_make_what_all_events_left(
    before: list[KVEvent], after: list[KVEvent], part_blocks: int
) -> None:
    saw_each, was_told = Known(), Known()
    saw_each.apply(before)
    snapshot = saw_each.index.snapshot(HOLDER, 9)
    assert snapshot is not None
    pieces = wire.parts(snapshot, part_blocks)
    states = [wire.State(*HOLDER, 9, part, len(pieces), piece, 0.0) for part, piece in enumerate(pieces)]
    again = [wire.decode(wire.encode(state)) for state in states]
    restore(was_told.index, wire.whole([state for state in again if isinstance(state, wire.State)]))
    assert was_told.depths == saw_each.depths
    for event in after:  # also what later events need: names, copies, parents
        saw_each.apply([event])
        was_told.apply([event])
        assert was_told.depths == saw_each.depths


class Sender:
    """A publisher's rank without its connection: what it sends is a list of messages."""

    def __init__(self) -> None:
        index = KVIndex("m", Ranks())
        index.add_holder(HOLDER)
        self.rank = Rank(HOLDER, index, max_queued_bytes=1500)
        self.sequence = 0

    def engine_says(self, events: list[KVEvent]) -> None:
        self.rank.apply(KVEventBatch(self.sequence, 0, events))
        self.sequence += 1

    def engine_begins_anew(self) -> None:
        """As events/zmq.py tells of it."""
        self.rank.apply(KVEventBatch(0, None, [AllBlocksCleared()]))
        self.sequence = 0

    def send(self) -> list[wire.Events | wire.State]:
        sent: list[wire.Events | wire.State] = []
        if self.rank.due:
            sent += self.rank.state()
        while self.rank.waiting:
            sent.append(self.rank.take())
        return sent


actions = st.lists(
    st.tuples(
        st.lists(one_event, max_size=2),
        st.sampled_from(["send", "send", "lose", "lose", "send twice", "wait", "forget", "anew", "ask"]),
    ),
    max_size=15,
)
"""What the engine says, and what happens then; `lose`: it is sent, and never arrives."""


@given(actions)
@example([([stored(0, 0, 1)], "send"), ([], "forget"), ([], "send")])
def test_a_follower_that_says_exact_holds_what_the_rank_holds_whatever_was_lost(
    steps: list[tuple[list[KVEvent], str]],
) -> None:
    sender, truth, follower, known = Sender(), Known(), Follower(), Known()
    held = {0: truth.depths}
    """What the rank held before each of its batches."""

    def deliver(messages: list[wire.Events | wire.State]) -> None:
        for message in messages:
            verdict, snapshot = follower.judge(message)
            if verdict is Verdict.GAP:
                known.index.doubt(HOLDER)
            elif snapshot is not None:
                restore(known.index, snapshot)
            elif verdict is Verdict.APPLY and isinstance(message, wire.Events):
                known.index.apply(HOLDER, message.batch())
            if follower.next_sequence is not None:
                assert known.depths == held[follower.next_sequence]

    for events, action in [*steps, ([], "ask"), ([], "send")]:
        if events:
            sender.engine_says(events)
            truth.apply(events)
            held[sender.rank.next_sequence] = truth.depths
        if action in ("anew", "forget"):
            sender.engine_begins_anew() if action == "anew" else sender.rank.lose()
            truth.forget()
            held[sender.rank.next_sequence] = truth.depths
        elif action == "ask":
            sender.rank.restate()
        elif action != "wait":
            messages = sender.send()
            deliver([] if action == "lose" else messages * 2 if action == "send twice" else messages)
    assert follower.next_sequence == sender.rank.next_sequence


def test_what_is_queued_is_bounded_and_the_state_comes_in_its_place() -> None:
    rank = Sender().rank
    rank.due = False
    for sequence in range(1000):
        rank.apply(KVEventBatch(sequence, 0, [stored(0, 0, 4)]))
        assert rank._queued_bytes <= 1500
    assert rank.due
    assert rank.dropped > 0
    assert not rank.waiting


@pytest.mark.parametrize("token", [2**32, -1])
def test_a_token_that_does_not_fit_32_bits_is_left_out_as_an_index_does(token: int) -> None:
    rank = Sender().rank
    rank.due = False
    rank.apply(KVEventBatch(0, 0, [BlockStored([9], None, [token, 1], SIZE), stored(0, 0, 1)]))
    message = rank.take()
    assert message.num_batches == 1
    assert len(message.events) == 1


@given(st.binary(max_size=200))
def test_bytes_of_anybody_are_unreadable_or_a_message(data: bytes) -> None:
    try:
        wire.decode(data)
    except wire.UnreadableMessage:
        return


def test_another_version_is_unreadable_and_says_so() -> None:
    load = wire.Load("w", 1, (RankLoad(0, 1, 2, 3, 4),), {0: 9}, 5, 6, 7, 8.0)
    assert wire.decode(wire.encode(load)) == load
    newer = wire.Load("w", 1, (), {}, 0, 0, 0, 0.0, version=2)
    with pytest.raises(wire.UnreadableMessage, match="version 2"):
        wire.decode(wire.encode(newer))


def test_names_with_dots_and_wildcards_are_one_part_of_a_subject() -> None:
    subjects = wire.Subjects("dynamo_ray", "my app.>")
    assert subjects.kv("prefill-0.1", 7, 3) == "dynamo_ray.my%20app%2E%3E.kv.prefill-0%2E1.7.3"
    assert subjects.stream == "dynamo_ray-my%20app%2E%3E"


class Silent:
    """A connection, and its JetStream, that fails once with each error given and then never answers."""

    is_closed = False

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.asked = 0

    def jetstream(self, timeout: float) -> Silent:
        return self

    async def stream_info(self, name: str) -> None:
        self.asked += 1
        if self.errors:
            raise self.errors.pop()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise nats.errors.ConnectionClosedError from None  # as nats-py 2.16 does at times


def followed(silent: Silent) -> tuple[NatsSubscriber, asyncio.Task[None]]:
    config = NatsConfig(urls=("nats://nowhere:4222",))
    subscriber = NatsSubscriber(config, "app", cast(Listener, None))
    subscriber._started = True  # by no link: this is its connection
    subscriber.subscribe("w", 1, [])
    subscriber._client = cast(Client, silent)
    subscriber._follow(("w", 1))
    return subscriber, subscriber._tasks["w", 1]


def test_who_follows_a_worker_ends_with_it_though_its_cancellation_is_lost() -> None:
    async def main() -> None:
        silent = Silent()
        subscriber, task = followed(silent)
        await asyncio.sleep(0.01)
        subscriber.unsubscribe("w", 1)
        async with asyncio.timeout(5.0):
            await task
        assert silent.asked == 1

    clock.run(main())


def test_a_defect_in_following_a_worker_is_logged_and_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        silent = Silent(KeyError("defect"))
        subscriber, task = followed(silent)
        await asyncio.sleep(5.0)
        assert not task.done()
        assert silent.asked == 2
        assert "defect" in caplog.text
        subscriber.unsubscribe("w", 1)
        await task

    clock.run(main())
