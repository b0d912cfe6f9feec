"""Who holds which prompt block: exact, from the engines' own events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from backends.kv_events import AllBlocksCleared, BlockStored, KVEventBatch
from dynamo_ray.routing.block_hash import block_hashes, chain_seed
from dynamo_ray.routing.ranks import Holder as Holder
from dynamo_ray.routing.ranks import Ranks

DEVICE_MEDIA = (None, "GPU")
"""Where a block must be to count; vLLM says GPU on CPUs too. What moves to slower media is another event."""


Runs = list[tuple[int, int]]
"""(mask of ranks, depth): these ranks hold exactly `depth` leading blocks. Deepest last; no rank is in two."""


class Overlap(NamedTuple):
    """How much of a prompt is where; runs are empty for tiers that no event ever named."""

    device: Runs
    host: Runs
    """On the host or faster."""
    disk: Runs
    """On any tier."""


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

    def __init__(self, model: str, ranks: Ranks) -> None:
        self._model = model
        self._ranks = ranks
        self._blocks: dict[int, int] = {}
        self._holdings: dict[Holder, _Holding] = {}
        self.orphan_blocks = 0

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def add_holder(self, holder: Holder) -> None:
        """Know a rank, holding nothing yet; adding it again changes nothing."""
        if holder not in self._holdings:
            self._holdings[holder] = _Holding(1 << self._ranks.add(holder))

    def remove_holder(self, holder: Holder) -> None:
        """Forget a rank and all it holds; `Ranks.remove` may follow."""
        holding = self._holdings.pop(holder, None)
        if holding is not None:
            self._drop(holding, holding.clear())

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

    def lookup(self, hashes: Sequence[int], mask: int = -1) -> Overlap:
        """How many leading blocks of a chain each rank of `mask` has; ranks without the first are left out."""
        runs: Runs = []
        blocks = self._blocks
        alive = mask
        depth = 0
        for block in hashes:
            held = alive & blocks.get(block, 0)
            if held != alive:
                if depth:
                    runs.append((alive & ~held, depth))
                alive = held
                if not alive:
                    return Overlap(runs, [], [])
            depth += 1
        if depth and alive:
            runs.append((alive, depth))
        return Overlap(runs, [], [])

    def overlap(self, hashes: Sequence[int]) -> dict[Holder, int]:
        """`lookup` on the device by rank, for tests and explanations."""
        return {holder: depth for mask, depth in self.lookup(hashes).device for holder in self._ranks.in_mask(mask)}

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
