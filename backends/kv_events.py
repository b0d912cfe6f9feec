"""KV cache events as values, and a decoder per engine's wire format and version."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated

import msgspec

MAX_PAYLOAD_BYTES = 32 << 20
"""Of one batch. A step of 128k tokens makes half a megabyte."""
MAX_HASH_BYTES = 64
"""vLLM's are SHA-256 at the longest."""

EngineHash = int | Annotated[bytes, msgspec.Meta(max_length=MAX_HASH_BYTES)]
"""What an engine calls a block: 64 bits, signed or not, or a digest."""


TOKEN_CODE = next(code for code in "IL" if array(code).itemsize == 4)
"""Of an array of token ids: unsigned, 32 bits each."""


class BlockStored(msgspec.Struct, frozen=True, gc=False):
    """Consecutive full blocks now held by one rank. `token_ids` covers all of them, in order.

    They are a list, or an `array` where they came packed. With neither tokens nor a block size: blocks told of before
    are now on `medium` too.
    """

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: Sequence[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    cache_salt: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, gc=False):
    block_hashes: list[int | bytes]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, gc=False):
    pass


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, frozen=True):
    """What one rank published at once. `sequence` grows by one a batch and rank; a jump is a gap."""

    sequence: int
    dp_rank: int | None
    events: list[KVEvent]
    published_unix_s: float | None = None
    """By its publisher's clock; None where it does not say."""


class KVEventDecodeError(ValueError):
    """A publisher sent what its wire format does not allow."""


def packed_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as unsigned 32-bit integers, little-endian.

    A list of integers costs each reader more than all the rest of an event (tests/bench/bench_index.py).

    Raises:
        OverflowError: A token is negative or does not fit.
        TypeError: A token is not an integer.
    """
    return _swapped(array(TOKEN_CODE, token_ids)).tobytes()


def unpacked_tokens(data: bytes) -> array[int]:
    """The inverse of `packed_tokens`.

    Raises:
        ValueError: They are not whole.
    """
    tokens = array(TOKEN_CODE)
    tokens.frombytes(data)
    return _swapped(tokens)


def tokens_to_publish(token_ids: Sequence[int]) -> bytes | list[int]:
    """Packed; as they are where one is no token id, so that whoever reads them counts it, and where there are none.

    SGLang's pairs are no token ids either, and a batch of them takes nothing packed.
    """
    try:
        return packed_tokens(token_ids) if token_ids else []
    except (OverflowError, TypeError):
        return list(token_ids)


def _swapped(tokens: array[int]) -> array[int]:
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


Frames = Sequence[bytes]
"""[topic, 8-byte big-endian sequence, msgpack payload]: the framing of vLLM's and SGLang's ZeroMQ publishers."""

Decoder = Callable[[Frames], KVEventBatch]
"""Of one rank's stream: what it has seen of it may decide what it takes from the next batch."""

Bigram = tuple[int, int]
"""What SGLang keeps a block by while it speculates with a draft of the EAGLE kind: a token and the one after it
(_record_store_event in mem_cache/events.py, 0.5.16 and 0.5.23)."""


class _TaggedStored(msgspec.Struct, tag_field="type", tag="BlockStored", gc=False):
    block_hashes: list[EngineHash]
    parent_block_hash: EngineHash | None
    token_ids: list[int] | bytes
    """As engines tell them, or packed (backends.kv_publisher.pack_tokens)."""
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    cache_salt: str | None = None
    extra_keys: list[tuple[msgspec.Raw, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None

    def value(self) -> BlockStored:
        return BlockStored(
            self.block_hashes,
            self.parent_block_hash,
            _tokens(self.token_ids),
            self.block_size,
            self.medium,
            self.lora_name,
            self.cache_salt or (_salt_in(self.extra_keys, self.lora_name) if self.extra_keys else None),
        )


class _PairedTaggedStored(_TaggedStored, tag_field="type", tag="BlockStored", gc=False):
    token_ids: list[Bigram]  # type: ignore[assignment]

    def value(self) -> BlockStored:
        return msgspec.structs.replace(super().value(), token_ids=[first for first, _ in self.token_ids])


class _TaggedRemoved(msgspec.Struct, tag_field="type", tag="BlockRemoved", gc=False):
    block_hashes: list[EngineHash]
    medium: str | None = None
    group_idx: int | None = None

    def value(self) -> BlockRemoved:
        return BlockRemoved(self.block_hashes, self.medium)


class _TaggedCleared(msgspec.Struct, tag_field="type", tag="AllBlocksCleared", gc=False):
    def value(self) -> AllBlocksCleared:
        return AllBlocksCleared()


class _ArrayStored(msgspec.Struct, array_like=True, tag="BlockStored", gc=False):
    block_hashes: list[EngineHash]
    parent_block_hash: EngineHash | None
    token_ids: list[int] | bytes
    block_size: int
    lora_id: int | None = None
    medium: str | None = None

    def value(self) -> BlockStored:
        lora = None if self.lora_id is None else str(self.lora_id)
        tokens = _tokens(self.token_ids)
        return BlockStored(self.block_hashes, self.parent_block_hash, tokens, self.block_size, self.medium, lora)


class _PairedArrayStored(_ArrayStored, array_like=True, tag="BlockStored", gc=False):
    token_ids: list[Bigram]  # type: ignore[assignment]

    def value(self) -> BlockStored:
        return msgspec.structs.replace(super().value(), token_ids=[first for first, _ in self.token_ids])


class _ArrayRemoved(msgspec.Struct, array_like=True, tag="BlockRemoved", gc=False):
    block_hashes: list[EngineHash]
    medium: str | None = None

    def value(self) -> BlockRemoved:
        return BlockRemoved(self.block_hashes, self.medium)


class _ArrayCleared(msgspec.Struct, array_like=True, tag="AllBlocksCleared", gc=False):
    def value(self) -> AllBlocksCleared:
        return AllBlocksCleared()


_Tagged = _TaggedStored | _TaggedRemoved | _TaggedCleared
_Array = _ArrayStored | _ArrayRemoved | _ArrayCleared


class _TaggedBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_Tagged]
    dp_rank: int | None = None


class _PairedTaggedBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_PairedTaggedStored | _TaggedRemoved | _TaggedCleared]
    dp_rank: int | None = None


class _ArrayBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_Array]
    dp_rank: int | None = None


class _PairedArrayBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_PairedArrayStored | _ArrayRemoved | _ArrayCleared]
    dp_rank: int | None = None


_Batch = _TaggedBatch | _PairedTaggedBatch | _ArrayBatch | _PairedArrayBatch


def _tokens(told: list[int] | bytes) -> Sequence[int]:
    if not isinstance(told, bytes):
        return told
    try:
        return unpacked_tokens(told)
    except ValueError:
        raise msgspec.ValidationError(f"{len(told)} bytes of token ids of 4 bytes") from None


def _salt_in(extra_keys: list[tuple[msgspec.Raw, ...] | None], lora_name: str | None) -> str | None:
    """vLLM has no cache_salt field: a salted prompt's first block carries the salt as a string among its extra keys.

    Where there is an adapter its name comes before, in every block (generate_block_hash_extra_keys in
    v1/core/kv_cache_utils.py, 0.32 and 0.33).
    """
    for keys in extra_keys:
        for key in (keys or ())[lora_name is not None :]:
            try:
                return msgspec.msgpack.decode(key, type=str)
            except msgspec.ValidationError:
                continue
    return None


_WHOLE_PREFIX = {None, "full_attention", "mla_attention", "sink_full_attention", "unknown"}


class _Groups:
    """Which of a hybrid model's KV cache groups is counted: the first that keeps whole prefixes.

    vLLM tells of every block once a group, by the same hash, and of a group's kind only where it stores
    (take_events in v1/core/kv_cache_manager.py, 0.32 and 0.33). Sliding windows and state space layers keep less
    than a prefix.
    """

    def __init__(self) -> None:
        self._counted: int | None = None

    def counts(self, event: _Tagged | _Array) -> bool:
        if not isinstance(event, _TaggedStored | _TaggedRemoved) or event.group_idx is None:
            return True
        if self._counted is None:
            if isinstance(event, _TaggedRemoved):
                return True
            if event.kv_cache_spec_kind in _WHOLE_PREFIX:
                self._counted = event.group_idx
        return event.group_idx == self._counted


_BATCHES: dict[str, tuple[type[_Batch], ...]] = {
    "vllm-0.32": (_TaggedBatch,),
    "vllm-0.33": (_TaggedBatch,),
    "sglang-0.5.16": (_ArrayBatch, _PairedArrayBatch),
    "sglang-0.5.23": (_TaggedBatch, _PairedTaggedBatch),
    "simulated-1": (_TaggedBatch,),
}
"""The shapes that a format's batches come in. One publisher keeps to one."""


def decoder(wire_format: str) -> Decoder:
    """The decoder of one rank's stream in an engine's wire format; it raises KVEventDecodeError for all but a batch.

    Raises:
        ValueError: The format is unknown; names those known.
    """
    if wire_format not in _BATCHES:
        raise ValueError(f"unknown KV event format {wire_format!r}; there are {', '.join(_BATCHES)}")
    shapes = [msgspec.msgpack.Decoder(shape) for shape in _BATCHES[wire_format]]
    counts = _Groups().counts

    def decode(frames: Frames) -> KVEventBatch:
        if len(frames) != 3 or len(frames[1]) != 8:
            raise KVEventDecodeError(f"not [topic, sequence, payload]: {len(frames)} frames")
        if len(frames[2]) > MAX_PAYLOAD_BYTES:
            raise KVEventDecodeError(f"{len(frames[2])} bytes in one batch, {MAX_PAYLOAD_BYTES} at most")
        try:
            batch = _first_fit(shapes, frames[2])
            events: list[KVEvent] = [event.value() for event in batch.events if counts(event)]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise KVEventDecodeError(f"not a {wire_format} batch: {error}") from error
        return KVEventBatch(int.from_bytes(frames[1], "big"), batch.dp_rank, events, batch.ts or None)

    return decode


def _first_fit(shapes: list[msgspec.msgpack.Decoder[_Batch]], payload: bytes) -> _Batch:
    """Decode, and try the shape that fits first from then on."""
    try:
        return shapes[0].decode(payload)
    except msgspec.ValidationError:
        for shape in shapes[1:]:
            with suppress(msgspec.ValidationError):
                batch = shape.decode(payload)
                shapes.reverse()
                return batch
        raise


def encode(batch: KVEventBatch) -> list[bytes]:
    """Frames of the `simulated-1` format, which is vLLM's."""
    events: list[_Tagged] = []
    for event in batch.events:
        if isinstance(event, BlockStored):
            tokens = tokens_to_publish(event.token_ids)
            events.append(_TaggedStored(**msgspec.structs.asdict(event) | {"token_ids": tokens}))
        elif isinstance(event, BlockRemoved):
            events.append(_TaggedRemoved(event.block_hashes, event.medium))
        else:
            events.append(_TaggedCleared())
    payload = msgspec.msgpack.encode(_TaggedBatch(batch.published_unix_s or 0.0, events, batch.dp_rank))
    return [b"", batch.sequence.to_bytes(8, "big"), payload]
