"""Prefixes that are being computed, or just were: no event has told of them yet, but whoever goes there finds them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache

from dynamo_ray.routing.kv_index import Runs

EVENT_GRACE_S = 5.0
"""How long a prefix that is computed may count before the engine's own event has told of it: the longest that events of
a loaded node are late, and the longest that one which was never cached misleads."""


@lru_cache(maxsize=4096)
def _checkpoints(num_blocks: int) -> tuple[int, ...]:
    """The blocks by which a prompt of that many is known: all up to the 64th, then every 16th, and the last.

    A chained hash stands for all before it, so that few tell; two prompts that part between two of these are seen to
    part at the earlier one. Early ones are all there because blocks may be large: SGLang's and vLLM's can be of 512.
    """
    near = range(min(num_blocks, 64))
    far = range(79, num_blocks, 16)
    return tuple(dict.fromkeys((*near, *far, num_blocks - 1))) if num_blocks else ()


class PendingPrefixes:
    """Checkpoint block -> the ranks where it is being computed, as a mask.

    One that is computed counts on until events have told of it, or of one that the rank computed later: a rank tells in
    order. At most for `EVENT_GRACE_S`.
    """

    def __init__(self) -> None:
        self._computing: dict[int, int] = {}
        self._untold: dict[int, list[list[int]]] = {}
        """By column: the checkpoints of each prefix that is computed, in order; empty: of one that has been told of."""
        self._until: deque[tuple[float, int, list[int]]] = deque()
        """The same of all ranks, and until when they count at most, in order."""

    def __len__(self) -> int:
        return len(self._computing)

    def add(self, column: int, hashes: Sequence[int], held_blocks: int) -> list[int]:
        """A rank begins to compute a prompt of which it holds, or computes already, the first blocks.

        Returns:
            The checkpoints to give back to `remove`; those that an earlier prompt answers for are not among them.
        """
        computing, bit, added = self._computing, 1 << column, []
        for place in _checkpoints(len(hashes)):
            if place >= held_blocks:
                block = hashes[place]
                mask = computing.get(block, 0)
                if not mask & bit:
                    computing[block] = mask | bit
                    added.append(block)
        return added

    def remove(self, column: int, blocks: Sequence[int]) -> None:
        """They are computed, or will not be."""
        computing, keep = self._computing, ~(1 << column)
        for block in blocks:
            mask = computing.get(block, 0) & keep
            if mask:
                computing[block] = mask
            else:
                computing.pop(block, None)

    def computed(self, column: int, blocks: list[int], now_s: float) -> None:
        """What `add` gave is computed, and no event has told of it; it is no longer the caller's."""
        self._untold.setdefault(column, []).append(blocks)
        self._until.append((now_s + EVENT_GRACE_S, column, blocks))

    def told(self, column: int, holds: Callable[[int, int], bool]) -> None:
        """Events of the rank have come; `holds(column, block)` says what it holds by them."""
        waiting = self._untold.get(column)
        if waiting is None:
            return
        for place in range(len(waiting) - 1, -1, -1):
            if holds(column, waiting[place][-1]):
                self._end(column, place + 1)
                return

    def cleared(self, column: int) -> None:
        """The rank's cache is empty: what it had computed is gone; what it still computes is not."""
        self._end(column, len(self._untold.get(column, ())))

    def expire(self, now_s: float) -> None:
        """Forget what no event told of in time."""
        while self._until and self._until[0][0] <= now_s:
            _, column, blocks = self._until.popleft()
            if blocks:
                self._end(column, 1)

    def remove_rank(self, column: int) -> None:
        self.cleared(column)
        bit = 1 << column
        self.remove(column, [block for block, mask in self._computing.items() if mask & bit])

    def _end(self, column: int, number: int) -> None:
        """The first ones that the rank has computed count no longer."""
        waiting = self._untold.get(column, [])
        for blocks in waiting[:number]:
            self.remove(column, blocks)
            blocks.clear()
        del waiting[:number]
        if not waiting:
            self._untold.pop(column, None)

    def lookup(self, hashes: Sequence[int], mask: int) -> Runs:
        """How many leading blocks each rank of `mask` will hold; those with no checkpoint are left out."""
        computing, runs = self._computing, []
        for place in reversed(_checkpoints(len(hashes))):
            held = computing.get(hashes[place], 0) & mask
            if held:
                runs.append((held, place + 1))
                mask &= ~held
        return runs
