"""How busy every rank is: what it said last, and what this ingress has given it."""

from __future__ import annotations

from dataclasses import dataclass

from backends.engine import RankLoad
from dynamo_ray.routing.kv_index import Holder


@dataclass(slots=True)
class _Booked:
    prefill_blocks: int = 0
    """Prompt blocks still to compute."""
    decode_blocks: int = 0
    """Blocks that requests hold while they generate."""
    requests: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """One rank's load as the policies see it."""

    prefill_blocks: int
    decode_blocks: int
    num_requests: int
    reported: RankLoad | None
    """What the rank said last, None before its first word."""


@dataclass(slots=True, eq=False)
class Booking:
    """What one leg adds to one rank until `LoadTable.free`."""

    holder: Holder
    prefill_blocks: int
    decode_blocks: int


class LoadTable:
    """Bookings and reports per rank. Whoever books frees, on every path; removing a rank removes its bookings."""

    def __init__(self) -> None:
        self._booked: dict[Holder, _Booked] = {}
        self._reported: dict[Holder, RankLoad] = {}
        self._bookings: set[Booking] = set()

    @property
    def num_bookings(self) -> int:
        return len(self._bookings)

    def add_holder(self, holder: Holder) -> None:
        self._booked.setdefault(holder, _Booked())

    def remove_holder(self, holder: Holder) -> None:
        self._booked.pop(holder, None)
        self._reported.pop(holder, None)
        self._bookings = {booking for booking in self._bookings if booking.holder != holder}

    def report(self, holder: Holder, load: RankLoad) -> None:
        if holder in self._booked:
            self._reported[holder] = load

    def reported(self) -> dict[Holder, RankLoad]:
        return dict(self._reported)

    def book(self, holder: Holder, prefill_blocks: int, decode_blocks: int) -> Booking:
        """Count a leg in. A rank that is not known (it died meanwhile) counts nothing."""
        booking = Booking(holder, prefill_blocks, decode_blocks)
        booked = self._booked.get(holder)
        if booked is not None:
            self._bookings.add(booking)
            booked.prefill_blocks += prefill_blocks
            booked.decode_blocks += decode_blocks
            booked.requests += 1
        return booking

    def prefilled(self, booking: Booking) -> None:
        """The leg's prompt is computed."""
        if booking in self._bookings:
            self._booked[booking.holder].prefill_blocks -= booking.prefill_blocks
            booking.prefill_blocks = 0

    def free(self, booking: Booking) -> None:
        """Count the leg out; safe to call twice."""
        if booking in self._bookings:
            self._bookings.discard(booking)
            booked = self._booked[booking.holder]
            booked.prefill_blocks -= booking.prefill_blocks
            booked.decode_blocks -= booking.decode_blocks
            booked.requests -= 1

    def load(self, holder: Holder) -> Load:
        booked = self._booked.get(holder) or _Booked()
        return Load(booked.prefill_blocks, booked.decode_blocks, booked.requests, self._reported.get(holder))
