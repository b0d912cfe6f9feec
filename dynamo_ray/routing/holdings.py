"""What one rank holds on one tier, in the engine's names and in ours, and whose bits a tier's blocks carry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

EngineHash = int | bytes
Blocks = dict[int, int]
"""Our block hash -> mask of the ranks that hold it, of one tier. Both are plain ints, so the collector skips it."""
STEP_BLOCKS = 4_096
"""Taken in or let go of at a time, where others wait for their turn: some 4 ms."""


class Holding:
    """One rank's blocks on one tier, and its bit in that tier's `Blocks`.

    A block is held until everything that was stored as it is removed: engines compute equal prompts side by side and
    tell of each copy, and may tell two blocks apart that are one to us.
    """

    __slots__ = ("_aliases", "_bit", "_blocks", "_copies", "_ours")

    def __init__(self, bit: int, blocks: Blocks) -> None:
        self._bit, self._blocks = bit, blocks
        self._ours: dict[EngineHash, int] = {}
        self._copies: dict[EngineHash, int] = {}
        """Of its blocks stored more than once under one name: copies beyond the first."""
        self._aliases: dict[int, int] = {}
        """Of its blocks stored under more than one name: names beyond the first."""

    def __len__(self) -> int:
        return len(self._ours)

    def block(self, theirs: EngineHash) -> int | None:
        """Our hash of a block it holds."""
        return self._ours.get(theirs)

    def store(self, theirs: Sequence[EngineHash], ours: Sequence[int]) -> int:
        """Hold blocks, named alike in both; how many were not taken, since their name is another block's."""
        bit, blocks = self._bit, self._blocks
        masks = list(map(blocks.get, ours))
        # Whole events go in at the speed of C where nothing of them is known, as nearly always.
        if masks.count(None) == len(masks):
            added = zip(ours, repeat(bit), strict=False)
        elif not any(mask is not None and mask & bit for mask in masks):
            added = zip(ours, [bit if mask is None else mask | bit for mask in masks], strict=True)
        else:
            return self._store_one_by_one(theirs, ours)
        if not self._take_names(theirs, ours):
            return self._store_one_by_one(theirs, ours)
        blocks.update(added)
        return 0

    def remove(self, theirs: Iterable[EngineHash]) -> None:
        """Let go of one copy each; names that are not known are not held."""
        if self._copies or self._aliases:
            self._remove_one_by_one(theirs)
            return
        pop, drop = self._ours.pop, self._drop_bit
        for name in theirs:
            block = pop(name, None)
            if block is not None:
                drop(block)

    def clear(self) -> None:
        """Let go of everything."""
        for block in set(self._ours.values()) if self._aliases else self._ours.values():
            self._drop_bit(block)
        self._ours = {}
        self._copies = {}
        self._aliases = {}

    def contents(self) -> tuple[list[EngineHash], list[int], list[tuple[EngineHash, int]]]:
        """Names, our hashes of them, and copies beyond the first: for `replacing`."""
        return list(self._ours), list(self._ours.values()), list(self._copies.items())

    def replacing(
        self, theirs: Sequence[EngineHash], ours: Sequence[int], copies: Sequence[tuple[EngineHash, int]]
    ) -> Iterator[None]:
        """Come to hold exactly this, in steps of at most `STEP_BLOCKS`; whoever stops in between must `clear`."""
        self._copies = {}
        while self._ours:
            self._forget(STEP_BLOCKS)
            yield
        for step in _steps(len(theirs)):
            # Whole steps go in as events do, but for blocks of two names, of which an event has none.
            store = self.store if len(set(ours[step])) == len(ours[step]) else self._store_one_by_one
            store(theirs[step], ours[step])
            yield
        for step in _steps(len(copies)):
            self._copies.update((name, count) for name, count in copies[step] if name in self._ours and count > 0)
            yield

    def _forget(self, most: int) -> None:
        """Let go of that many names, if there are, each with all its copies."""
        for _ in range(min(most, len(self._ours))):
            _, block = self._ours.popitem()
            if not _decrement(self._aliases, block):
                self._drop_bit(block)

    def _take_names(self, theirs: Sequence[EngineHash], ours: Sequence[int]) -> bool:
        """Bind names that should all be new; if one is not, none is bound."""
        names = self._ours
        before = len(names)
        bound = list(map(names.setdefault, theirs, ours))
        if len(names) == before + len(theirs):
            return True
        for name, block, now in zip(theirs, ours, bound, strict=True):
            # Nothing of these blocks was held, so a name bound to its block was bound just now.
            if block == now:
                names.pop(name, None)
        return False

    def _store_one_by_one(self, theirs: Sequence[EngineHash], ours: Sequence[int]) -> int:
        contradictions = 0
        for name, block in zip(theirs, ours, strict=True):
            known = self._ours.get(name)
            if known is None:
                self._ours[name] = block
                self._add_bit(block)
            elif known == block:
                self._copies[name] = self._copies.get(name, 0) + 1
            else:
                contradictions += 1
        return contradictions

    def _remove_one_by_one(self, theirs: Iterable[EngineHash]) -> None:
        for name in theirs:
            if _decrement(self._copies, name):
                continue
            block = self._ours.pop(name, None)
            if block is not None and not _decrement(self._aliases, block):
                self._drop_bit(block)

    def _add_bit(self, block: int) -> None:
        mask = self._blocks.get(block, 0)
        if mask & self._bit:
            self._aliases[block] = self._aliases.get(block, 0) + 1
        else:
            self._blocks[block] = mask | self._bit

    def _drop_bit(self, block: int) -> None:
        mask = self._blocks.get(block, self._bit)
        if mask != self._bit:
            self._blocks[block] = mask & ~self._bit
        else:
            self._blocks.pop(block, None)


def _steps(size: int) -> Iterator[slice]:
    return (slice(start, start + STEP_BLOCKS) for start in range(0, size, STEP_BLOCKS))


def _decrement(counts: dict[Any, int], key: EngineHash) -> bool:
    """Whether there was one to take away."""
    count = counts.get(key, 0)
    if count > 1:
        counts[key] = count - 1
    elif count:
        del counts[key]
    return count > 0
