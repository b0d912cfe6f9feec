"""How busy every rank is: what this ingress gave it, what other ingresses gave it, and what it said itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from backends.engine import RankLoad, Role
from dynamo_ray.routing.ranks import Holder, Ranks

UNBOOKED_PROMPT_TOKENS = 1024
"""Taken for a waiting request that no ingress has told of: engines report how many wait, not how long they are."""

RECENT_REQUESTS = 32
"""Per rank: after so many bookings a rank, what was given before counts three quarters."""

Floats = NDArray[np.float64]


class Booked(NamedTuple):
    """What one ingress has in flight on one rank."""

    queued_tokens: int = 0
    """Prompt tokens still to be computed: neither cached there nor computed yet."""
    num_requests: int = 0
    kv_tokens: int = 0
    """Tokens whose KV those requests hold."""


NOTHING = Booked()


@dataclass(frozen=True, slots=True)
class Load:
    """One rank's load by all that is known, and the rank's own last word."""

    queued_tokens: float
    num_requests: float
    kv_tokens: float
    reported: RankLoad | None
    """None before its first report."""


class Booking:
    """What one leg adds to one rank until `LoadTable.free`."""

    __slots__ = ("column", "kv_tokens", "queued_tokens", "sent")

    def __init__(self, column: int | None, queued_tokens: int, kv_tokens: int, sent: bool = True) -> None:
        self.column = column
        """None: counts nothing (any more)."""
        self.queued_tokens = queued_tokens
        self.kv_tokens = kv_tokens
        self.sent = sent
        """False: it waits in this ingress for its rank."""


class _Rank:
    """One rank's sums; the three numbers are those of `Booked`."""

    __slots__ = ("block_size", "moves", "open", "ours", "peers", "reported", "role", "unbooked", "waiting")

    def __init__(self, role: Role, block_size: int) -> None:
        self.role = role
        self.block_size = block_size
        self.open: set[Booking] = set()
        self.ours = [0, 0, 0]
        self.peers = [0, 0, 0]
        self.waiting = [0, 0, 0]
        self.unbooked = [0, 0, 0]
        """What the last report had beyond what was booked at that moment."""
        self.reported: RankLoad | None = None
        self.moves = 0


class LoadTable:
    """Load per rank, in arrays by column of `ranks`: what is booked now, plus what no ingress has booked, plus what
    waits here for it.

    An engine's report includes bookings that have reached it, and not those on their way. So nothing of a report
    is added but its excess over all that was booked when it came: no request counts twice, and none is missed.
    Whoever books frees, on every path; removing a rank ends its bookings.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._rows: list[_Rank | None] = []
        self._peers: dict[str, dict[Holder, Booked]] = {}
        self._changed: set[int] = set()
        self._num_bookings = 0
        self.values: Floats = np.zeros((3, 0))
        """Row by row: queued_tokens, num_requests, kv_tokens. To read only."""
        self._waiting: Floats = np.zeros((3, 0))
        """Of these, what waits in this ingress."""
        self._num_waiting = 0
        self.recent_tokens: Floats = np.zeros(0)
        """What this ingress gave each rank to compute and had it generate lately, done or not. To read only."""
        self._until_faded = RECENT_REQUESTS

    @property
    def num_bookings(self) -> int:
        return self._num_bookings

    @property
    def sent(self) -> Floats:
        """`values` without what waits in this ingress: what the ranks have."""
        return self.values - self._waiting if self._num_waiting else self.values

    def add_holder(self, holder: Holder, role: Role = Role.AGGREGATED, block_size: int = 1) -> None:
        """Know a rank, idle until somebody says otherwise; adding it again changes nothing."""
        column = self._ranks.add(holder)
        while len(self._rows) <= column:
            self._rows.append(None)
        if self.values.shape[1] <= column:
            wider = np.zeros((3, max(64, 2 * column)))
            wider[:, : self.values.shape[1]] = self.values
            self.values = wider
            self._waiting = np.pad(self._waiting, ((0, 0), (0, wider.shape[1] - self._waiting.shape[1])))
            self.recent_tokens = np.append(self.recent_tokens, np.zeros(wider.shape[1] - len(self.recent_tokens)))
        if self._rows[column] is None:
            alike = [self.recent_tokens[c] for c, other in enumerate(self._rows) if other and other.role is role]
            # As if it had been there: it must not be given everything now.
            self.recent_tokens[column] = sum(alike) / max(1, len(alike))
            row = self._rows[column] = _Rank(role, block_size)
            for replica in self._peers.values():
                self._add(row.peers, replica.get(holder, NOTHING))
            self._sum(column, row)

    def remove_holder(self, holder: Holder) -> None:
        """Forget a rank, its bookings included. Before the rank's column is given up."""
        column = self._ranks.column(holder)
        row = self._row(column)
        if row is None or column is None:
            return
        for booking in row.open:
            booking.column = None
            self._num_waiting -= not booking.sent
        self._num_bookings -= len(row.open)
        for replica in self._peers.values():
            replica.pop(holder, None)
        self._rows[column] = None
        self.values[:, column] = self._waiting[:, column] = 0.0
        self.recent_tokens[column] = 0.0
        self._changed.discard(column)

    def report(self, holder: Holder, load: RankLoad) -> None:
        """Take what a rank says of itself; of a rank that is not known it is dropped."""
        column = self._ranks.column(holder)
        row = self._row(column)
        if row is None or column is None:
            return
        row.moves += load != row.reported
        row.reported = load
        booked = [ours + peers for ours, peers in zip(row.ours, row.peers, strict=True)]
        requests = max(0, load.num_running + load.num_waiting - booked[1])
        computing = {Role.PREFILL: requests, Role.DECODE: 0}.get(row.role, min(requests, load.num_waiting))
        row.unbooked[0] = computing * UNBOOKED_PROMPT_TOKENS
        row.unbooked[1] = requests
        row.unbooked[2] = max(0, load.kv_used_blocks * row.block_size - booked[2])
        self._sum(column, row)

    def reported(self) -> dict[Holder, RankLoad]:
        """Every rank's last word."""
        found = {}
        for column, row in enumerate(self._rows):
            holder = self._ranks.holder(column)
            if row is not None and row.reported is not None and holder is not None:
                found[holder] = row.reported
        return found

    def book(self, holder: Holder, queued_tokens: int, kv_tokens: int) -> Booking:
        """Count a leg in. A rank that is not known (it died meanwhile) counts nothing."""
        booking = self._open(holder, queued_tokens, kv_tokens, sent=True)
        if booking.column is None:
            return booking
        self.recent_tokens[booking.column] += queued_tokens
        self._until_faded -= 1
        if not self._until_faded:
            self.recent_tokens *= 0.75
            self._until_faded = RECENT_REQUESTS * len(self._rows)
        return booking

    def wait(self, holder: Holder, queued_tokens: int, kv_tokens: int) -> Booking:
        """Count in a leg that waits in this ingress for the rank: whoever chooses sees it, the rank does not have it
        yet, and peers are not told.
        """
        return self._open(holder, queued_tokens, kv_tokens, sent=False)

    def generated(self, booking: Booking, tokens: int) -> None:
        """The leg's rank has generated so many tokens."""
        if booking.column is not None:
            self.recent_tokens[booking.column] += tokens
            if tokens:
                self.moved(booking.column)

    def moved(self, column: int | None) -> None:
        """The rank does something: an event of its cache has come, or a prompt is computed, or an answer ended well."""
        row = self._row(column)
        if row is not None:
            row.moves += 1

    def moves(self, column: int) -> int:
        """Goes up with whatever shows that a known rank works, reports that say something new included."""
        row = self._row(column)
        return 0 if row is None else row.moves

    def prefilled(self, booking: Booking) -> None:
        """The leg's prompt is computed; its KV is still held."""
        self.moved(booking.column)
        row = self._row(booking.column)
        if row is not None and booking.column is not None and booking.sent and booking.queued_tokens:
            self._change(booking.column, row, -booking.queued_tokens, 0, 0)
            booking.queued_tokens = 0

    def free(self, booking: Booking) -> None:
        """Count the leg out; safe to call twice."""
        column, booking.column = booking.column, None
        row = self._row(column)
        if row is not None and column is not None:
            row.open.remove(booking)
            self._num_bookings -= 1
            self._change(column, row, -booking.queued_tokens, -1, -booking.kv_tokens, booking.sent)

    def take_changes(self) -> dict[Holder, Booked]:
        """What this ingress has booked on each rank whose bookings changed since the last call, for its peers."""
        changed, self._changed = self._changed, set()
        return self._ours(changed)

    def ours(self) -> dict[Holder, Booked]:
        """All that this ingress has booked, for a peer that begins to listen; ranks with nothing are left out."""
        return {holder: booked for holder, booked in self._ours(range(len(self._rows))).items() if any(booked)}

    def peer(self, replica: str, values: Mapping[Holder, Booked]) -> None:
        """Take what another ingress has booked: absolute values of the ranks named; those not named stay as told.

        Values of ranks that are not known yet count once these are.
        """
        told = self._peers.setdefault(replica, {})
        for holder, booked in values.items():
            before = told.pop(holder, NOTHING)
            if any(booked):
                told[holder] = booked
            column = self._ranks.column(holder)
            row = self._row(column)
            if row is not None and column is not None:
                self._add(row.peers, booked, before)
                self._sum(column, row)

    def forget(self, replica: str) -> None:
        """Another ingress has left, or was silent for longer than its bookings are lent: they are gone."""
        self.peer(replica, dict.fromkeys(self._peers.get(replica, ()), NOTHING))
        self._peers.pop(replica, None)

    def load(self, holder: Holder) -> Load:
        """One rank's load; zero of one that is not known."""
        column = self._ranks.column(holder)
        row = self._row(column)
        if row is None or column is None:
            return Load(0.0, 0.0, 0.0, None)
        queued, requests, kv = self.values[:, column].tolist()
        return Load(queued, requests, kv, row.reported)

    def _row(self, column: int | None) -> _Rank | None:
        return self._rows[column] if column is not None and column < len(self._rows) else None

    def _ours(self, columns: set[int] | range) -> dict[Holder, Booked]:
        found = {}
        for column in columns:
            holder, row = self._ranks.holder(column), self._row(column)
            if holder is not None and row is not None:
                found[holder] = Booked(*row.ours)
        return found

    def _open(self, holder: Holder, queued_tokens: int, kv_tokens: int, sent: bool) -> Booking:
        column = self._ranks.column(holder)
        row = self._row(column)
        if row is None or column is None:
            return Booking(None, 0, 0)
        booking = Booking(column, queued_tokens, kv_tokens, sent)
        row.open.add(booking)
        self._num_bookings += 1
        self._change(column, row, queued_tokens, 1, kv_tokens, sent)
        return booking

    def _change(
        self, column: int, row: _Rank, queued_tokens: int, requests: int, kv_tokens: int, sent: bool = True
    ) -> None:
        counted = row.ours if sent else row.waiting
        counted[0] += queued_tokens
        counted[1] += requests
        counted[2] += kv_tokens
        if sent:
            self._changed.add(column)
        else:
            self._num_waiting += requests
            self._waiting[:, column] = counted
        self._sum(column, row)

    def _sum(self, column: int, row: _Rank) -> None:
        """From whole numbers each time: nothing drifts."""
        ours, peers, unbooked, waiting, values = row.ours, row.peers, row.unbooked, row.waiting, self.values
        values[0, column] = ours[0] + peers[0] + unbooked[0] + waiting[0]
        values[1, column] = ours[1] + peers[1] + unbooked[1] + waiting[1]
        values[2, column] = ours[2] + peers[2] + unbooked[2] + waiting[2]

    @staticmethod
    def _add(to: list[int], booked: Booked, instead_of: Booked = NOTHING) -> None:
        for row in range(3):
            to[row] += booked[row] - instead_of[row]
