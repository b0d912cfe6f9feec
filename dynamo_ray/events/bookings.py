"""What each ingress replica has booked on every rank, said to the others as absolute values under a lease. Pure.

A replica states the ranks that changed, and once a second everything it has booked, so that whatever was lost on the
way is right again within that second. One that has not been heard for `LEASE_S` has booked nothing any more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated

import msgspec

from dynamo_ray.routing.load import Booked
from dynamo_ray.routing.ranks import Holder
from dynamo_ray.telemetry import Reading

log = logging.getLogger(__name__)

FULL_EVERY_S = 1.0
LEASE_S = 3.0
MAX_RANKS = 65_536
"""Of one statement, and remembered of one replica."""
MAX_REPLICAS = 1_024
_MAX_NAME = 256
_MAX_VALUE = 2**48

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_NAME)]
Amount = Annotated[int, msgspec.Meta(ge=0, le=_MAX_VALUE)]


class Peer(msgspec.Struct, frozen=True):
    """An ingress replica as the others find it: by its name, which no later one has, and its two sockets."""

    replica: Name
    bookings: Name
    """ZeroMQ endpoint that publishes its statements."""
    snapshots: Name
    """ZeroMQ endpoint that tells what a rank holds."""


class RankBooked(msgspec.Struct, frozen=True, array_like=True):
    worker: Name
    epoch: Amount
    dp_rank: Amount
    queued_tokens: Amount
    num_requests: Amount
    kv_tokens: Amount


class Statement(msgspec.Struct, frozen=True, array_like=True, tag="booked"):
    """`sequence` grows by one with each; `full`: nothing is booked on any rank that is not named."""

    replica: Name
    sequence: Amount
    full: bool
    leaving: bool
    """The last one: forget this replica."""
    ranks: Annotated[list[RankBooked], msgspec.Meta(max_length=MAX_RANKS)]


UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""All that msgspec 0.22 raises for bytes that are not what they should be."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Statement)


class OwnBookings:
    """Puts what this replica has booked into statements."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._sequence = 0

    def full(self, booked: Mapping[Holder, Booked], leaving: bool = False) -> bytes:
        """Everything: ranks that `booked` does not name have nothing."""
        return self._statement(booked, full=True, leaving=leaving)

    def changes(self, booked: Mapping[Holder, Booked]) -> bytes:
        """Ranks that `booked` does not name are as they were."""
        return self._statement(booked, full=False)

    def _statement(self, booked: Mapping[Holder, Booked], full: bool, leaving: bool = False) -> bytes:
        self._sequence += 1
        ranks = [RankBooked(*holder, *values) for holder, values in booked.items()]
        return _encoder.encode(Statement(self._replica, self._sequence, full, leaving, ranks))


class _Heard:
    """One replica's last words."""

    __slots__ = ("at_s", "ranks", "sequence")

    def __init__(self) -> None:
        self.at_s = 0.0
        self.sequence = 0
        self.ranks: set[Holder] = set()
        """On which it has something booked."""


class PeerBookings:
    """Takes the statements of the other replicas, from anybody and in any order.

    `peer(replica, values)` is called with what a replica has booked now on the ranks named, `forget(replica)` once
    nothing it said holds any more: those of a `LoadTable`.
    """

    def __init__(
        self, replica: str, peer: Callable[[str, Mapping[Holder, Booked]], None], forget: Callable[[str], None]
    ) -> None:
        self._replica = replica
        self._peer, self._forget = peer, forget
        self._heard: dict[str, _Heard] = {}
        self._complained = False
        self.num_taken = 0
        self.num_stale = 0
        """Older than what the same replica said before."""
        self.num_refused = 0
        """No statement, or one that no replica of ours makes."""

    def __contains__(self, replica: str) -> bool:
        return replica in self._heard

    def __len__(self) -> int:
        return len(self._heard)

    @property
    def expires_s(self) -> float | None:
        """When the first lease ends, should nothing more be heard."""
        return min((heard.at_s + LEASE_S for heard in self._heard.values()), default=None)

    def take(self, payload: bytes, now_s: float) -> None:
        """Apply a statement; what is stale or cannot be read changes nothing."""
        try:
            statement = _decoder.decode(payload)
        except UNREADABLE as error:
            self._refuse(f"not a statement: {error}")
            return
        heard = self._heard.get(statement.replica)
        if statement.replica == self._replica:
            self._refuse("a statement in our own name")
        elif heard is None and len(self._heard) >= MAX_REPLICAS:
            self._refuse(f"more than {MAX_REPLICAS} replicas")
        elif heard is not None and statement.sequence <= heard.sequence:
            self.num_stale += 1
        elif heard is not None and not statement.full and len(heard.ranks) + len(statement.ranks) > MAX_RANKS:
            self._refuse(f"more than {MAX_RANKS} ranks of {statement.replica}")
        else:
            self._apply(statement, now_s)

    def expire(self, now_s: float) -> list[str]:
        """Forget replicas whose lease is over, and say which."""
        silent = [replica for replica, heard in self._heard.items() if now_s >= heard.at_s + LEASE_S]
        for replica in silent:
            log.warning("ingress replica %s has been silent for %g s: its bookings no longer count", replica, LEASE_S)
            self._drop(replica)
        return silent

    def readings(self, num_sent: int) -> Iterator[Reading]:
        """What this replica, which has sent so many statements, knows of the others, for /metrics."""
        yield "dynamo_ray_peer_replicas", "Other ingress replicas whose bookings count", {}, len(self)
        for outcome, count in (
            ("sent", num_sent),
            ("taken", self.num_taken),
            ("stale", self.num_stale),
            ("refused", self.num_refused),
        ):
            labels = {"outcome": outcome}
            yield "dynamo_ray_booking_statements_total", "What ingress replicas told of their bookings", labels, count

    def _apply(self, statement: Statement, now_s: float) -> None:
        self.num_taken += 1
        if statement.leaving:
            self._drop(statement.replica)
            return
        heard = self._heard.setdefault(statement.replica, _Heard())
        heard.at_s, heard.sequence = now_s, statement.sequence
        values = {
            Holder(rank.worker, rank.epoch, rank.dp_rank): Booked(rank.queued_tokens, rank.num_requests, rank.kv_tokens)
            for rank in statement.ranks
        }
        if statement.full:
            values.update(dict.fromkeys(heard.ranks - values.keys(), Booked()))
        self._peer(statement.replica, values)
        for holder, booked in values.items():
            (heard.ranks.add if any(booked) else heard.ranks.discard)(holder)

    def _drop(self, replica: str) -> None:
        if self._heard.pop(replica, None) is not None:
            self._forget(replica)

    def _refuse(self, why: str) -> None:
        self.num_refused += 1
        if not self._complained:
            self._complained = True
            log.error("ignoring what is sent as another ingress replica's bookings: %s", why)
