"""The paged, prefix-cached KV memory of one simulated rank: exact bookkeeping, no data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from backends.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent

_ROOT = 0


class Family(NamedTuple):
    """Prompts share blocks only within one: nothing is shared across tenants, nor across adapters."""

    salt: str | None = None
    lora: str | None = None


ANY = Family()


def engine_hash(parent: int, tokens: Sequence[int], family: Family, flushes: int = 0) -> int:
    """A 63-bit chained block hash, the same in every process; on purpose not the router's."""
    root = parent or _root(family, flushes)
    return hash((root, *tokens)) & 0x7FFF_FFFF_FFFF_FFFF or 1


def _root(family: Family, flushes: int) -> int:
    """What was stored before a flush is not found after it, though requests may still hold it."""
    if family == ANY and not flushes:
        return 1
    parts = (family.salt or "", family.lora or "", str(flushes))
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return int.from_bytes(text.encode(), "big") % ((1 << 61) - 1) + 2


@dataclass(slots=True)
class Lease:
    """The blocks one request holds. `shared` are full and findable by others; `private` the rest."""

    family: Family
    flushes: int
    """Of the pool, when it was made: blocks of before the last flush are no longer findable."""
    shared: list[int] = field(default_factory=list)
    private: int = 0

    @property
    def num_blocks(self) -> int:
        return len(self.shared) + self.private


class BlockPool:
    """Hands out blocks, shares full ones by prefix, evicts the least recently used that nobody holds.

    Every change of what is findable is appended to `events`, in order. Without `prefix_caching` nothing ever is.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.events: list[KVEvent] = []
        self._holders: dict[int, int] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()
        self._private = 0
        self._flushes = 0

    @property
    def used_blocks(self) -> int:
        """Blocks that a request holds."""
        return len(self._holders) - len(self._unheld) + self._private

    def cached_blocks(self, tokens: Sequence[int], family: Family = ANY) -> list[int]:
        """Hashes of the longest findable prefix, never the whole prompt: its last token is always computed."""
        found: list[int] = []
        parent = _ROOT
        for start in range(0, (len(tokens) - 1) // self.block_size * self.block_size, self.block_size):
            parent = engine_hash(parent, tokens[start : start + self.block_size], family, self._flushes)
            if parent not in self._holders:
                break
            found.append(parent)
        return found

    def acquire(self, tokens: Sequence[int], family: Family = ANY) -> Lease | None:
        """Hold blocks for all `tokens`, sharing the cached prefix; None when there are not enough."""
        lease = Lease(family, self._flushes)
        for block in self.cached_blocks(tokens, family):
            self._hold(block)
            lease.shared.append(block)
        needed = -(-len(tokens) // self.block_size) - len(lease.shared)
        if not self._make_room(needed):
            self.release(lease)
            return None
        lease.private = needed
        self._private += needed
        return lease

    def publish_full(self, lease: Lease, tokens: Sequence[int], num_tokens: int | None = None) -> None:
        """Make each full block of `tokens`, or of its first `num_tokens`, findable; not what a flush came after."""
        if not self.prefix_caching or lease.flushes != self._flushes:
            return
        size, num_tokens = self.block_size, len(tokens) if num_tokens is None else num_tokens
        first = len(lease.shared)
        fresh: list[int] = []
        for start in range(first * size, num_tokens // size * size, size):
            parent = lease.shared[-1] if lease.shared else _ROOT
            block = engine_hash(parent, tokens[start : start + size], lease.family, self._flushes)
            lease.private -= 1
            self._private -= 1
            lease.shared.append(block)
            if block in self._holders:
                self._hold(block)
            else:
                self._holders[block] = 1
                fresh.append(start // size)
        for run in _runs(fresh):
            self.events.append(
                BlockStored(
                    block_hashes=list(lease.shared[run.start : run.stop]),
                    parent_block_hash=lease.shared[run.start - 1] if run.start else None,
                    token_ids=list(tokens[run.start * size : run.stop * size]),
                    block_size=size,
                    medium="GPU",
                    lora_name=lease.family.lora,
                    cache_salt=lease.family.salt,
                )
            )

    def extend(self, lease: Lease, num_tokens: int) -> bool:
        """Hold enough blocks for `num_tokens` in all; False when there is no room."""
        needed = -(-num_tokens // self.block_size) - lease.num_blocks
        if needed > 0:
            if not self._make_room(needed):
                return False
            lease.private += needed
            self._private += needed
        return True

    def release(self, lease: Lease) -> None:
        """Let go of everything; full blocks stay findable until evicted, deepest first, or flushed."""
        self._private -= lease.private
        lease.private = 0
        for block in reversed(lease.shared):
            self._holders[block] -= 1
            if not self._holders[block]:
                if lease.flushes == self._flushes:
                    self._unheld[block] = None
                else:
                    del self._holders[block]
        lease.shared.clear()

    def flush(self) -> None:
        """Nothing that is there now is found again; requests keep what they hold."""
        for block in self._unheld:
            del self._holders[block]
        self._unheld.clear()
        self._flushes += 1
        self.events.append(AllBlocksCleared())

    def _hold(self, block: int) -> None:
        self._holders[block] += 1
        self._unheld.pop(block, None)

    def _make_room(self, needed: int) -> bool:
        free = self.num_blocks - len(self._holders) - self._private
        if free + len(self._unheld) < needed:
            return False
        evicted: list[int | bytes] = []
        while free + len(evicted) < needed:
            block, _ = self._unheld.popitem(last=False)
            del self._holders[block]
            evicted.append(block)
        if evicted:
            self.events.append(BlockRemoved(block_hashes=evicted, medium="GPU"))
        return True


def _runs(indexes: Sequence[int]) -> list[range]:
    """Maximal runs of consecutive numbers in an ascending sequence."""
    runs: list[range] = []
    for index in indexes:
        if runs and runs[-1].stop == index:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs
