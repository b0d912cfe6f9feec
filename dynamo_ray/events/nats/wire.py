"""What is said on NATS and on which subjects: msgpack maps with a version and a kind. See docs/events.md.

A rank's batches are numbered from 0 (`sequence`) by its publisher, so that whoever listens knows what it missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from urllib.parse import quote

import msgspec

from backends.engine import RankLoad
from backends.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEvent,
    KVEventBatch,
    packed_tokens,
    unpacked_tokens,
)
from dynamo_ray.events.snapshots import join, pieces
from dynamo_ray.routing.kv_index import Snapshot, TierSnapshot

VERSION = 1

BlockHash = int | bytes
"""The engine's own; opaque, and only compared with others of the same rank and epoch."""


class Stored(msgspec.Struct, frozen=True, tag_field="kind", tag="stored", omit_defaults=True):
    """As BlockStored; `token_ids` are packed (`packed_tokens`), `block_size` a block."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: bytes
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    cache_salt: str | None = None


class Removed(msgspec.Struct, frozen=True, tag_field="kind", tag="removed", omit_defaults=True):
    block_hashes: list[BlockHash]
    medium: str | None = None


class Cleared(msgspec.Struct, frozen=True, tag_field="kind", tag="cleared"):
    """The rank holds nothing any more."""


Event = Stored | Removed | Cleared


class Events(msgspec.Struct, frozen=True, tag_field="kind", tag="events"):
    """`num_batches` batches of one rank's events, the first of them `sequence`."""

    worker: str
    epoch: int
    dp_rank: int
    sequence: int
    num_batches: int
    events: list[Event]
    at_unix_s: float
    version: int = VERSION

    def batch(self) -> KVEventBatch:
        """As one batch, which an index takes as it would take them one by one.

        Raises:
            UnreadableMessage: The tokens of one of its events are not whole.
        """
        return KVEventBatch(self.sequence, self.dp_rank, [unpacked(event) for event in self.events])


class State(msgspec.Struct, frozen=True, tag_field="kind", tag="state"):
    """Part of all that one rank held before its batch `next_sequence`, by tier: device, host, disk.

    Parts come in order, from 0 to `num_parts` - 1; together they are a `Snapshot`.
    """

    worker: str
    epoch: int
    dp_rank: int
    next_sequence: int
    part: int
    num_parts: int
    tiers: list[TierSnapshot]
    at_unix_s: float
    version: int = VERSION


def parts(snapshot: Snapshot, part_blocks: int) -> list[list[TierSnapshot]]:
    """A snapshot in pieces of so many blocks, at least one piece."""
    nothing = TierSnapshot([], [], [])
    return [[*repeat(nothing, number), piece] for number, piece in pieces(snapshot, part_blocks)] or [[]]


def whole(states: Sequence[State]) -> Snapshot:
    """The inverse of `parts`."""
    tiers: list[TierSnapshot] = []
    for state in states:
        for number, piece in enumerate(state.tiers):
            join(tiers, number, piece)
    return Snapshot(states[-1].next_sequence, tiers)


class Load(msgspec.Struct, frozen=True, tag_field="kind", tag="load"):
    """How busy a worker's ranks are, each second; and what its publisher did since it began."""

    worker: str
    epoch: int
    loads: tuple[RankLoad, ...]
    next_sequences: dict[int, int]
    """Of every rank that tells of its blocks: the batch that comes next. Who is still behind a second later has missed
    the last ones."""
    published: int
    """Messages that NATS has confirmed."""
    dropped: int
    """Batches that were not sent one by one for lack of room; a State came in their place."""
    restated: int
    at_unix_s: float
    version: int = VERSION


class Lifecycle(msgspec.Struct, frozen=True, tag_field="kind", tag="lifecycle"):
    """Where a worker is between nothing and serving; it takes requests while `phase` is `ready`."""

    worker: str
    role: str
    epoch: int
    phase: str
    detail: str
    restarts: int
    since_unix_s: float
    at_unix_s: float
    version: int = VERSION


class Ask(msgspec.Struct, frozen=True, tag_field="kind", tag="ask"):
    """Say again all that these ranks hold."""

    dp_ranks: tuple[int, ...]
    version: int = VERSION


Message = Events | State | Load | Lifecycle | Ask


class UnreadableMessage(ValueError):
    """Somebody published what no version of ours does, or a version we do not know."""


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(payload: bytes) -> Message:
    """Raises UnreadableMessage."""
    try:
        message = _decoder.decode(payload)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UnreadableMessage(str(error)) from error
    if message.version != VERSION:
        raise UnreadableMessage(f"version {message.version}; we read {VERSION}")
    return message


def packed(event: KVEvent) -> Event | None:
    """An engine's event as it is published; None where a token id is none, of which an index takes nothing."""
    if isinstance(event, BlockStored):
        try:
            tokens = packed_tokens(event.token_ids)
        except (OverflowError, TypeError):
            return None
        return Stored(
            event.block_hashes,
            event.parent_block_hash,
            tokens,
            event.block_size,
            event.medium,
            event.lora_name,
            event.cache_salt,
        )
    if isinstance(event, BlockRemoved):
        return Removed(event.block_hashes, event.medium)
    return Cleared()


def unpacked(event: Event) -> KVEvent:
    """The inverse of `packed`.

    Raises:
        UnreadableMessage: The tokens are not whole.
    """
    if isinstance(event, Stored):
        try:
            tokens = unpacked_tokens(event.token_ids)
        except ValueError as error:
            raise UnreadableMessage(f"{len(event.token_ids)} bytes of token ids of 4 bytes") from error
        return BlockStored(
            event.block_hashes,
            event.parent_block_hash,
            tokens,
            event.block_size,
            event.medium,
            event.lora_name,
            event.cache_salt,
        )
    if isinstance(event, Removed):
        return BlockRemoved(event.block_hashes, event.medium)
    return AllBlocksCleared()


def size_bytes(event: Event) -> int:
    """About what it takes on the wire."""
    if isinstance(event, Stored):
        return len(event.token_ids) + 9 * len(event.block_hashes) + 100
    return 9 * len(event.block_hashes) + 30 if isinstance(event, Removed) else 30


@dataclass(frozen=True, slots=True)
class Subjects:
    """Where one application's messages are. Names are percent-encoded where NATS gives a character a meaning."""

    prefix: str
    app: str

    @property
    def root(self) -> str:
        return f"{self.prefix}.{token(self.app)}"

    @property
    def stream(self) -> str:
        return f"{self.prefix}-{token(self.app)}"

    @property
    def kept(self) -> list[str]:
        """In the stream; all others are only heard by those who listen at that moment."""
        return [f"{self.root}.kv.>", f"{self.root}.lifecycle.>"]

    def kv(self, worker: str, epoch: int, dp_rank: int | None = None) -> str:
        """One rank's, or all of a worker's."""
        return f"{self.root}.kv.{token(worker)}.{epoch}.{'*' if dp_rank is None else dp_rank}"

    def ask(self, worker: str, epoch: int) -> str:
        return f"{self.root}.ask.{token(worker)}.{epoch}"

    def load(self, worker: str | None = None) -> str:
        return f"{self.root}.load.{'*' if worker is None else token(worker)}"

    def lifecycle(self, worker: str) -> str:
        return f"{self.root}.lifecycle.{token(worker)}"

    def bookings(self, replica: str | None = None) -> str:
        return f"{self.root}.bookings.{'*' if replica is None else token(replica)}"


def token(name: str) -> str:
    """One part of a subject."""
    return quote(name, safe="").replace(".", "%2E")
