"""Prefixes that are being computed: nobody holds them yet, but whoever goes there will find them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from dynamo_ray.routing.kv_index import Runs


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
    """Checkpoint block -> the ranks where it is being computed, as a mask."""

    def __init__(self) -> None:
        self._computing: dict[int, int] = {}

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

    def remove_rank(self, column: int) -> None:
        bit = 1 << column
        self.remove(column, [block for block, mask in self._computing.items() if mask & bit])

    def lookup(self, hashes: Sequence[int], mask: int) -> Runs:
        """How many leading blocks each rank of `mask` will hold; those with no checkpoint are left out."""
        computing, runs = self._computing, []
        for place in reversed(_checkpoints(len(hashes))):
            held = computing.get(hashes[place], 0) & mask
            if held:
                runs.append((held, place + 1))
                mask &= ~held
        return runs
