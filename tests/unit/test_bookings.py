"""What ingress replicas tell each other of their bookings: exact after any loss, gone with their replica."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_ray.events.bookings import FULL_EVERY_S, LEASE_S, OwnBookings, PeerBookings, RankBooked, Statement
from dynamo_ray.routing.load import Booked, Booking, LoadTable
from dynamo_ray.routing.ranks import Holder, Ranks

RANKS = [Holder("w", 1, 0), Holder("w", 1, 1), Holder("v", 3, 0)]


def table() -> LoadTable:
    made = LoadTable(Ranks())
    for rank in RANKS:
        made.add_holder(rank)
    return made


class Listener:
    """A replica's table, and what it has heard of others."""

    def __init__(self, name: str = "here") -> None:
        self.table = table()
        self.heard = PeerBookings(name, self.table.peer, self.table.forget)

    def seen(self) -> dict[Holder, Booked]:
        loads = {rank: self.table.load(rank) for rank in RANKS}
        booked = {r: Booked(int(x.queued_tokens), int(x.num_requests), int(x.kv_tokens)) for r, x in loads.items()}
        return {rank: values for rank, values in booked.items() if any(values)}


def statement(replica: str, sequence: int, ranks: Mapping[Holder, Booked], full: bool = True) -> bytes:
    listed = [RankBooked(*holder, *values) for holder, values in ranks.items()]
    return msgspec.msgpack.encode(Statement(replica, sequence, full, False, listed))


class Speaker:
    """A replica that books, and says so."""

    def __init__(self, name: str) -> None:
        self.table, self.own, self.bookings = table(), OwnBookings(name), list[Booking]()

    def do(self, step: int) -> None:
        """Book on some rank, or have a prompt computed, or free."""
        if step < 100 or not self.bookings:
            self.bookings.append(self.table.book(RANKS[step % 3], step, 2 * step))
        elif step < 150:
            self.table.prefilled(self.bookings[step % len(self.bookings)])
        else:
            self.table.free(self.bookings.pop(step % len(self.bookings)))

    def says(self, full: bool) -> bytes:
        changed = self.table.take_changes()
        return self.own.full(self.table.ours()) if full else self.own.changes(changed)


Turns = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 199), st.booleans(), st.sampled_from(["arrives", "lost", "late"])),
    max_size=40,
)


@given(Turns)
def test_whatever_was_lost_late_or_doubled_one_full_statement_of_each_makes_it_right(
    turns: list[tuple[int, int, bool, str]],
) -> None:
    speakers, listener, late = [Speaker("a"), Speaker("b")], Listener(), list[bytes]()
    for who, step, full, fate in turns:
        speakers[who].do(step)
        said = speakers[who].says(full)
        if fate != "lost":
            (late.append if fate == "late" else lambda it: listener.heard.take(it, 0.0))(said)
    for speaker in speakers:
        listener.heard.take(speaker.says(full=True), 0.0)
    for said in late:
        listener.heard.take(said, 0.0)
    totals: dict[Holder, Booked] = {}
    for ours in (speaker.table.ours() for speaker in speakers):
        for rank, values in ours.items():
            totals[rank] = Booked(*(a + b for a, b in zip(totals.get(rank, Booked()), values, strict=True)))
    assert listener.seen() == totals
    assert listener.heard.num_stale == len(late)


def test_changes_alone_are_enough_while_nothing_is_lost() -> None:
    speaker, listener = Speaker("a"), Listener()
    for step in [1, 2, 3, 120, 4, 160, 170, 151, 5]:
        speaker.do(step)
        listener.heard.take(speaker.says(full=False), 0.0)
        assert listener.seen() == speaker.table.ours()


def test_the_bookings_of_a_replica_that_falls_silent_are_gone_when_its_lease_ends_and_no_sooner() -> None:
    listener = Listener()
    listener.heard.take(statement("a", 1, {RANKS[0]: Booked(10, 1, 20)}), 100.0)
    listener.heard.take(statement("b", 1, {RANKS[0]: Booked(5, 1, 7)}), 100.0 + FULL_EVERY_S)
    assert listener.heard.expires_s == 100.0 + LEASE_S
    assert listener.heard.expire(100.0 + LEASE_S - 0.001) == []
    assert listener.seen() == {RANKS[0]: Booked(15, 2, 27)}
    assert listener.heard.expire(100.0 + LEASE_S) == ["a"]
    assert listener.seen() == {RANKS[0]: Booked(5, 1, 7)}
    assert listener.heard.expires_s == 100.0 + FULL_EVERY_S + LEASE_S


def test_a_replica_that_leaves_is_forgotten_at_once() -> None:
    speaker, listener = Speaker("a"), Listener()
    speaker.do(1)
    listener.heard.take(speaker.says(full=True), 0.0)
    listener.heard.take(speaker.own.full({}, leaving=True), 0.1)
    assert listener.seen() == {}
    assert len(listener.heard) == 0


def test_one_that_was_only_stopped_counts_again_with_its_next_word() -> None:
    speaker, listener = Speaker("a"), Listener()
    speaker.do(1)
    listener.heard.take(speaker.says(full=True), 0.0)
    listener.heard.expire(LEASE_S)
    assert listener.seen() == {}
    listener.heard.take(speaker.says(full=True), 60.0)
    assert listener.seen() == speaker.table.ours()


def test_bookings_on_a_rank_that_is_not_known_yet_count_once_it_is() -> None:
    listener, newer = Listener(), Holder("w", 2, 0)
    listener.heard.take(statement("a", 1, {newer: Booked(10, 1, 20)}), 0.0)
    listener.table.add_holder(newer)
    assert listener.table.load(newer).num_requests == 1


GOOD = statement("a", 5, {RANKS[0]: Booked(10, 1, 20)})


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"junk",
        b"\xc1",
        GOOD[:-1],
        GOOD + b"\x00",
        b"\x91" * 100_000,
        statement("", 6, {}),
        statement("x" * 257, 6, {}),
        statement("a", -1, {}),
        statement("a", 6, {RANKS[0]: Booked(-1, 1, 1)}),
        statement("a", 6, {RANKS[0]: Booked(1, 1, 2**63)}),
        statement("a", 6, {Holder("w", 1, -1): Booked(1, 1, 1)}),
        statement("a", 6, {Holder("w", 1, n): Booked(1, 1, 1) for n in range(65_537)}),
        statement("here", 6, {RANKS[0]: Booked(1, 1, 1)}),
    ],
)
def test_what_no_replica_of_ours_says_is_counted_and_changes_nothing(payload: bytes) -> None:
    listener = Listener()
    listener.heard.take(GOOD, 0.0)
    listener.heard.take(payload, 1.0)
    assert listener.seen() == {RANKS[0]: Booked(10, 1, 20)}
    assert (listener.heard.num_taken, listener.heard.num_stale, listener.heard.num_refused) == (1, 0, 1)


@given(st.binary(max_size=200), st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_no_bytes_raise(junk: bytes, at: int, byte: int) -> None:
    listener = Listener()
    listener.heard.take(junk, 0.0)
    listener.heard.take(GOOD[:at] + bytes([byte]) + GOOD[at + 1 :], 0.0)
    for values in listener.seen().values():
        assert min(values) >= 0


def test_the_log_is_not_flooded(caplog: pytest.LogCaptureFixture) -> None:
    listener = Listener()
    for _ in range(100):
        listener.heard.take(b"junk", 0.0)
    assert listener.heard.num_refused == 100
    assert len(caplog.records) == 1
