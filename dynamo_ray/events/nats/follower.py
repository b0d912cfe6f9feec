"""How one rank's messages become its holdings: what is taken, what is old, what is a gap. Pure."""

from __future__ import annotations

from enum import Enum

from dynamo_ray.events.nats import wire
from dynamo_ray.events.nats.wire import Events, State
from dynamo_ray.routing.kv_index import Snapshot

MAX_PARTS = 4096


class Verdict(Enum):
    APPLY = "apply"
    """Its events come next."""
    RESTORE = "restore"
    """`Follower.snapshot` is all that the rank holds."""
    SKIP = "skip"
    """Known already, or of no use before a State is whole."""
    GAP = "gap"
    """Something is missing: what the rank was known to hold is in doubt, and a State is to be asked for."""


class Follower:
    """One rank of one incarnation; says of each message what to do with it.

    It is exact while `next_sequence` is known: then every earlier batch has been applied, and nothing else.
    """

    def __init__(self) -> None:
        self.next_sequence: int | None = None
        self._parts: list[State] = []

    @property
    def exact(self) -> bool:
        return self.next_sequence is not None

    @property
    def building(self) -> bool:
        """Parts of a State have come, and more will."""
        return bool(self._parts)

    def judge(self, message: Events | State) -> tuple[Verdict, Snapshot | None]:
        """A snapshot beside RESTORE."""
        return (self._events(message), None) if isinstance(message, Events) else self._state(message)

    def _events(self, message: Events) -> Verdict:
        if self._parts:
            return self._gap()  # the rest of a State is missing
        if self.next_sequence is None:
            if message.sequence != 0:
                return Verdict.SKIP
            self.next_sequence = 0  # heard from its very beginning
        if message.sequence + message.num_batches <= self.next_sequence:
            return Verdict.SKIP
        if message.sequence != self.next_sequence:
            return self._gap()
        self.next_sequence += message.num_batches
        return Verdict.APPLY

    def _state(self, message: State) -> tuple[Verdict, Snapshot | None]:
        if message.part == 0:
            self._parts = []
            if self.next_sequence is not None and message.next_sequence <= self.next_sequence:
                return Verdict.SKIP, None
        elif not self._continues(message):
            return (self._gap() if self._parts else Verdict.SKIP), None
        self._parts.append(message)
        if message.part + 1 < message.num_parts:
            return Verdict.SKIP, None
        taken, self._parts = self._parts, []
        self.next_sequence = message.next_sequence
        return Verdict.RESTORE, wire.whole(taken)

    def _continues(self, message: State) -> bool:
        if not self._parts or len(self._parts) >= MAX_PARTS:
            return False
        last = self._parts[-1]
        return (message.next_sequence, message.part) == (last.next_sequence, last.part + 1)

    def _gap(self) -> Verdict:
        self.next_sequence, self._parts = None, []
        return Verdict.GAP
