"""One ingress replica tells another what a rank holds, where the engine itself can no longer tell.

The asking side names the rank and the part it wants next; the answering side copies what the rank holds once, at the
first part, and gives it out part by part, so that neither ever has more than one part on the way.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Annotated

import msgspec
import zmq
import zmq.asyncio

from dynamo_ray.events.bookings import UNREADABLE, Amount, Name
from dynamo_ray.events.curve import SecureContext
from dynamo_ray.routing.kv_index import Snapshot, TierSnapshot
from dynamo_ray.routing.ranks import Holder

log = logging.getLogger(__name__)

BLOCKS_PER_PART = 8_192
MAX_BLOCKS = 4_000_000
"""Of one rank, over all tiers."""
MAX_TIERS = 8
MAX_SESSIONS = 64
SESSION_S = 10.0
"""After which one that did not ask for its next part is given up."""
ANSWER_S = 2.0
MAX_ASK_BYTES = 4_096
MAX_PART_BYTES = 4 * 1024 * 1024

SnapshotOf = Callable[[Holder], Snapshot | None]
"""What a rank holds, or None where that is not known for certain."""

_Unsigned = Annotated[int, msgspec.Meta(ge=0)]


class Ask(msgspec.Struct, frozen=True, array_like=True, tag="ask"):
    """Part 0 begins a session, and ends an earlier one of the same socket."""

    worker: Name
    epoch: Amount
    dp_rank: Amount
    part: Amount


class Part(msgspec.Struct, frozen=True, array_like=True, tag="part"):
    """A piece of one tier of a `Snapshot`, whose tiers come one after the other."""

    part: Amount
    last: bool
    sequence: Amount
    tier: Annotated[int, msgspec.Meta(ge=0, lt=MAX_TIERS)]
    theirs: Annotated[list[int | bytes], msgspec.Meta(max_length=BLOCKS_PER_PART)]
    ours: Annotated[list[_Unsigned], msgspec.Meta(max_length=BLOCKS_PER_PART)]
    copies: Annotated[list[tuple[int | bytes, _Unsigned]], msgspec.Meta(max_length=BLOCKS_PER_PART)]


class Unavailable(msgspec.Struct, frozen=True, array_like=True, tag="unavailable"):
    why: str


_encode = msgspec.msgpack.Encoder().encode
_asks = msgspec.msgpack.Decoder(Ask)
_answers = msgspec.msgpack.Decoder(Part | Unavailable)


async def in_turns(steps: Iterator[None]) -> None:
    """Go through the steps of a restoring; others have their turn between them. Cancelled, it goes through the rest."""
    try:
        for _ in steps:
            await asyncio.sleep(0)
    finally:
        for _ in steps:
            pass


def pieces(snapshot: Snapshot, most_blocks: int) -> Iterator[tuple[int, TierSnapshot]]:
    """Its tiers one after the other, by number, each in pieces of so many blocks; at least one."""
    for number, tier in enumerate(snapshot.tiers):
        for start in range(0, max(1, len(tier.theirs)), most_blocks):
            rows = slice(start, start + most_blocks)  # a block is in `copies` once at most
            yield number, TierSnapshot(tier.theirs[rows], tier.ours[rows], tier.copies[rows])


def join(tiers: list[TierSnapshot], number: int, piece: TierSnapshot) -> None:
    """Add the next of `pieces`."""
    while len(tiers) <= number:
        tiers.append(TierSnapshot([], [], []))
    tiers[number].theirs.extend(piece.theirs)
    tiers[number].ours.extend(piece.ours)
    tiers[number].copies.extend(piece.copies)


class _Session:
    """What is left to give to one asker."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.asked_s = 0.0
        self.next_part = 0
        self._sequence = snapshot.sequence
        self._pieces = deque(pieces(snapshot, BLOCKS_PER_PART))

    def next(self, now_s: float) -> Part:
        number, piece = self._pieces.popleft()
        last = not self._pieces
        part = Part(self.next_part, last, self._sequence, number, piece.theirs, piece.ours, piece.copies)
        self.next_part, self.asked_s = self.next_part + 1, now_s
        return part


class Answers:
    """The answering side. Pure: asks in, parts out."""

    def __init__(self, snapshot_of: SnapshotOf) -> None:
        self._snapshot_of = snapshot_of
        self._sessions: dict[bytes, _Session] = {}
        self.num_served = 0
        """Snapshots given out to the end."""
        self.num_refused = 0
        """Asks that were answered with none, or could not be read."""

    @property
    def expires_s(self) -> float | None:
        return min((session.asked_s + SESSION_S for session in self._sessions.values()), default=None)

    def expire(self, now_s: float) -> None:
        for asker in [a for a, session in self._sessions.items() if now_s >= session.asked_s + SESSION_S]:
            del self._sessions[asker]

    def answer(self, asker: bytes, payload: bytes, now_s: float) -> bytes:
        self.expire(now_s)
        try:
            ask = _asks.decode(payload)
        except UNREADABLE as error:
            return self._refuse(asker, f"not an ask: {error}")
        if ask.part == 0:
            refusal = self._begin(asker, Holder(ask.worker, ask.epoch, ask.dp_rank))
            if refusal is not None:
                return self._refuse(asker, refusal)
        session = self._sessions.get(asker)
        if session is None or session.next_part != ask.part:
            return self._refuse(asker, f"part {ask.part} is not what comes next")
        part = session.next(now_s)
        if part.last:
            del self._sessions[asker]
            self.num_served += 1
        return _encode(part)

    def _begin(self, asker: bytes, holder: Holder) -> str | None:
        """Copy what the rank holds; or why not."""
        self._sessions.pop(asker, None)
        if len(self._sessions) >= MAX_SESSIONS:
            return "busy"
        snapshot = self._snapshot_of(holder)
        if snapshot is None:
            return "not known for certain here"
        num_blocks = sum(len(tier.theirs) for tier in snapshot.tiers)
        if num_blocks > MAX_BLOCKS:
            return f"{num_blocks} blocks are more than {MAX_BLOCKS}"
        self._sessions[asker] = _Session(snapshot)
        return None

    def _refuse(self, asker: bytes, why: str) -> bytes:
        self._sessions.pop(asker, None)
        self.num_refused += 1
        return _encode(Unavailable(why))


class NoSnapshot(Exception):
    """A replica cannot tell what a rank holds; says why."""


class Assembly:
    """The asking side: parts in, a snapshot out. Pure."""

    def __init__(self, holder: Holder) -> None:
        self._holder = holder
        self._part = 0
        self._num_blocks = 0
        self._sequence: int | None = None
        self._tiers: list[TierSnapshot] = []

    def ask(self) -> bytes:
        return _encode(Ask(*self._holder, self._part))

    def take(self, payload: bytes) -> Snapshot | None:
        """The snapshot once its last part is here.

        Raises:
            NoSnapshot: There is none, or these parts are not of one.
        """
        try:
            part = _answers.decode(payload)
        except UNREADABLE as error:
            raise NoSnapshot(f"not a part: {error}") from error
        if isinstance(part, Unavailable):
            raise NoSnapshot(part.why)
        if len(part.theirs) != len(part.ours):
            raise NoSnapshot("lists of different lengths")
        if part.part != self._part or self._sequence not in (None, part.sequence):
            raise NoSnapshot(f"part {part.part} at {part.sequence} instead of {self._part} at {self._sequence}")
        self._num_blocks += len(part.theirs)
        if self._num_blocks > MAX_BLOCKS:
            raise NoSnapshot(f"more than {MAX_BLOCKS} blocks")
        self._part, self._sequence = part.part + 1, part.sequence
        self._add(part)
        return Snapshot(part.sequence, self._tiers) if part.last else None

    def _add(self, part: Part) -> None:
        if part.tier not in (len(self._tiers) - 1, len(self._tiers)):
            raise NoSnapshot(f"tier {part.tier} after {len(self._tiers)} tiers")
        join(self._tiers, part.tier, TierSnapshot(part.theirs, part.ours, part.copies))


async def serve(socket: zmq.asyncio.Socket, answers: Answers) -> None:
    """Answer what comes to a ROUTER, for ever."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            async with asyncio.timeout_at(answers.expires_s):
                frames = await socket.recv_multipart()
        except TimeoutError:
            answers.expire(loop.time())
            continue
        if len(frames) == 2:
            await socket.send_multipart([frames[0], answers.answer(frames[0], frames[1], loop.time())])


async def fetch(context: SecureContext, endpoint: str, holder: Holder) -> Snapshot:
    """All of a rank from one replica.

    Raises:
        NoSnapshot: It has none, or does not answer; says why.
    """
    try:
        return await _fetched(context, endpoint, Assembly(holder))
    except TimeoutError:
        raise NoSnapshot(f"no answer within {ANSWER_S:g} s") from None
    except zmq.ZMQError as error:  # no such endpoint, no file left for a socket, or we are about to end
        raise NoSnapshot(f"{endpoint}: {error}") from error


async def _fetched(context: SecureContext, endpoint: str, assembly: Assembly) -> Snapshot:
    socket = context.client(zmq.DEALER, MAX_PART_BYTES)
    try:
        socket.connect(endpoint)
        while True:
            await socket.send(assembly.ask())
            async with asyncio.timeout(ANSWER_S):
                snapshot = assembly.take(await socket.recv())
            if snapshot is not None:
                return snapshot
    finally:
        socket.close()
