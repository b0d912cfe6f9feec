"""What we sent where, for ranks that tell nothing of their caches: a guess that expires, never taken for knowledge."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_ray.routing.holdings import Blocks
from dynamo_ray.routing.kv_index import Runs, leading_runs
from dynamo_ray.routing.ranks import Holder, Ranks

_SWEEPS = 32
"""In one time to live: expired blocks are looked for that often, and go by as much too early."""


class RoutedPrefixes:
    """Per rank the blocks of prompts sent to it lately, `max_blocks` at most: the least recently sent go first.

    A block counts for `ttl_s` after it was last sent, or up to 1/32 of that less.
    """

    def __init__(self, ranks: Ranks, ttl_s: float = 120.0, max_blocks: int = 1 << 16) -> None:
        self.ttl_s, self.max_blocks = ttl_s, max_blocks
        self._ranks = ranks
        self._blocks: Blocks = {}
        self._expiry: dict[Holder, dict[int, float]] = {}
        """By rank: when each block ends to count, the soonest first, since every prompt is given equally long."""
        self._sweep_at_s = 0.0

    def __len__(self) -> int:
        """Guesses there are, over all ranks; those that have just expired may be among them."""
        return sum(map(len, self._expiry.values()))

    def routed(self, holder: Holder, hashes: Sequence[int], now_s: float) -> None:
        """A prompt of these blocks was sent there. A rank that is not in `ranks` is ignored."""
        column = self._ranks.column(holder)
        if column is None:
            return
        self._sweep(now_s)
        bit, blocks = 1 << column, self._blocks
        expiry = self._expiry.setdefault(holder, {})
        ends_s = now_s + self.ttl_s
        for block in reversed(hashes[: self.max_blocks]):  # The leading ones are the last to go.
            if expiry.pop(block, None) is None:
                blocks[block] = blocks.get(block, 0) | bit
            expiry[block] = ends_s
        while len(expiry) > self.max_blocks:
            self._drop(bit, expiry, next(iter(expiry)))

    def lookup(self, hashes: Sequence[int], now_s: float, mask: int = -1) -> Runs:
        """As `KVIndex.lookup` on one tier, by what has not expired."""
        self._sweep(now_s)
        return leading_runs(self._blocks, hashes, mask)

    def overlap(self, hashes: Sequence[int], now_s: float) -> dict[Holder, int]:
        """`lookup` by rank, for tests and explanations."""
        return self._ranks.by_holder(self.lookup(hashes, now_s))

    def remove_holder(self, holder: Holder) -> None:
        """Forget what was sent there: it is gone, or its cache was emptied. Comes before `Ranks.remove`."""
        column = self._ranks.column(holder)
        expiry = self._expiry.pop(holder, {})
        if column is not None:
            for block in list(expiry):
                self._drop(1 << column, expiry, block)

    def _sweep(self, now_s: float) -> None:
        if now_s < self._sweep_at_s:
            return
        grain_s = self.ttl_s / _SWEEPS
        self._sweep_at_s = now_s + grain_s
        for holder, expiry in self._expiry.items():
            column = self._ranks.column(holder)
            assert column is not None, "a rank is forgotten here before it leaves"
            while expiry:
                oldest = next(iter(expiry))
                if expiry[oldest] > now_s + grain_s:
                    break
                self._drop(1 << column, expiry, oldest)

    def _drop(self, bit: int, expiry: dict[int, float], block: int) -> None:
        del expiry[block]
        mask = self._blocks.pop(block)
        if mask != bit:
            self._blocks[block] = mask ^ bit
