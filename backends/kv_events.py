"""KV cache events as values, and a decoder per engine's wire format and version."""

from __future__ import annotations

import msgspec


class BlockStored(msgspec.Struct, frozen=True):
    """Consecutive full blocks now held by one rank. `token_ids` covers all of them, in order."""

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    cache_salt: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True):
    block_hashes: list[int | bytes]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True):
    pass


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, frozen=True):
    """What one rank published at once. `sequence` grows by one a batch and rank; a jump is a gap."""

    sequence: int
    dp_rank: int | None
    events: list[KVEvent]
