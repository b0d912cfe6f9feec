"""Who holds which prompt block: exact, from the engines' own events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from backends.kv_events import AllBlocksCleared, BlockStored, KVEventBatch
from dynamo_ray.routing.block_hash import block_hashes, chain_seed

DEVICE_MEDIA = (None, "GPU")
"""Where a block must be to count; vLLM says GPU on CPUs too. What moves to slower media is another event."""


class Holder(NamedTuple):
    """One attention DP rank of one incarnation of a worker."""

    worker: str
    epoch: int
    dp_rank: int


class _Holding:
    """What one holder has said: its bit, and its own hashes in terms of ours."""

    __slots__ = ("bit", "copies", "ours")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.ours: dict[int | bytes, int] = {}
        self.copies: dict[int | bytes, int] = {}
        """Of its blocks stored more than once: copies beyond the first. Prompts computed side by side make them."""

    def remove(self, theirs: int | bytes) -> int | None:
        """One copy is gone; our hash if it was the last."""
        copies = self.copies.pop(theirs, 0)
        if copies == 0:
            return self.ours.pop(theirs, None)
        if copies > 1:
            self.copies[theirs] = copies - 1
        return None

    def clear(self) -> list[int]:
        """Everything is gone; what it was."""
        gone = list(self.ours.values())
        self.ours.clear()
        self.copies.clear()
        return gone


class KVIndex:
    """Block hash -> the set of its holders, as the bits of one int.

    A stored block counts only if its parent is known; blocks below an unknown parent are counted in
    `orphan_blocks` and are not attributed to anybody, so that an overlap is never promised that is not there.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._blocks: dict[int, int] = {}
        self._holdings: dict[Holder, _Holding] = {}
        self._free_bits: list[int] = []
        self._by_bit: dict[int, Holder] = {}
        self.orphan_blocks = 0

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def add_holder(self, holder: Holder) -> None:
        """Know a rank, holding nothing yet; adding it again changes nothing."""
        if holder in self._holdings:
            return
        index = self._free_bits.pop() if self._free_bits else len(self._by_bit)
        self._holdings[holder] = _Holding(1 << index)
        self._by_bit[index] = holder

    def remove_holder(self, holder: Holder) -> None:
        """Forget a rank and all it holds."""
        holding = self._holdings.pop(holder, None)
        if holding is None:
            return
        self._drop(holding, holding.clear())
        index = holding.bit.bit_length() - 1
        del self._by_bit[index]
        self._free_bits.append(index)

    def clear_holder(self, holder: Holder) -> None:
        """Forget what a rank holds, not the rank: what it said can no longer be trusted."""
        holding = self._holdings.get(holder)
        if holding is not None:
            self._drop(holding, holding.clear())

    def apply(self, holder: Holder, batch: KVEventBatch) -> None:
        """Take one batch of a rank's events, in order; those of an unknown holder are ignored."""
        holding = self._holdings.get(holder)
        if holding is None:
            return
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self.clear_holder(holder)
            elif event.medium not in DEVICE_MEDIA:
                continue
            elif isinstance(event, BlockStored):
                self._store(holding, event)
            else:
                removed = [holding.remove(block) for block in event.block_hashes]
                self._drop(holding, [block for block in removed if block is not None])

    def overlap(self, hashes: Sequence[int]) -> dict[Holder, int]:
        """How many leading blocks of a chain each holder has; holders without the first are left out."""
        found: dict[Holder, int] = {}
        alive = -1
        depth = 0
        for block in hashes:
            mask = self._blocks.get(block, 0) & alive
            if mask != alive:
                if alive != -1:
                    self._collect(found, alive & ~mask, depth)
                alive = mask
                if not alive:
                    return found
            depth += 1
        if alive > 0:
            self._collect(found, alive, depth)
        return found

    def _store(self, holding: _Holding, event: BlockStored) -> None:
        if event.parent_block_hash is None:
            parent = chain_seed(self._model, event.lora_name, event.cache_salt)
        elif event.parent_block_hash in holding.ours:
            parent = holding.ours[event.parent_block_hash]
        else:
            self.orphan_blocks += len(event.block_hashes)
            return
        bit, blocks = holding.bit, self._blocks
        ours = block_hashes(event.token_ids, event.block_size, parent)
        for theirs, block in zip(event.block_hashes, ours, strict=False):
            if theirs in holding.ours:
                holding.copies[theirs] = holding.copies.get(theirs, 0) + 1
            holding.ours[theirs] = block
            blocks[block] = blocks.get(block, 0) | bit

    def _drop(self, holding: _Holding, gone: list[int]) -> None:
        for block in gone:
            mask = self._blocks.get(block, 0) & ~holding.bit
            if mask:
                self._blocks[block] = mask
            else:
                self._blocks.pop(block, None)

    def _collect(self, found: dict[Holder, int], mask: int, depth: int) -> None:
        while mask:
            low = mask & -mask
            found[self._by_bit[low.bit_length() - 1]] = depth
            mask ^= low


class RoutedPrefixes:
    """What we sent where, for ranks that publish no events: a guess that expires."""

    def __init__(self, ttl_s: float = 120.0) -> None:
        self.ttl_s = ttl_s
        self._seen: dict[Holder, dict[int, float]] = {}

    def routed(self, holder: Holder, hashes: Sequence[int], now_s: float) -> None:
        seen = self._seen.setdefault(holder, {})
        for block in hashes:
            seen.pop(block, None)
            seen[block] = now_s + self.ttl_s
        while seen and next(iter(seen.values())) <= now_s:
            del seen[next(iter(seen))]

    def overlap(self, hashes: Sequence[int], now_s: float) -> dict[Holder, int]:
        """As `KVIndex.overlap`, by what has not expired."""
        found: dict[Holder, int] = {}
        for holder, seen in self._seen.items():
            depth = 0
            for block in hashes:
                if seen.get(block, 0.0) <= now_s:
                    break
                depth += 1
            if depth:
                found[holder] = depth
        return found

    def remove_holder(self, holder: Holder) -> None:
        self._seen.pop(holder, None)
