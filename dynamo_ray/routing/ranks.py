"""Every rank of the application as a column: what masks and arrays of the routing plane are indexed by."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import NamedTuple


class Holder(NamedTuple):
    """One attention DP rank of one incarnation of a worker."""

    worker: str
    epoch: int
    dp_rank: int


class Ranks:
    """Known ranks, each with a column: a dense small int, and bit `1 << column` in masks.

    The lowest free column is reused. So whoever keeps anything by column forgets it before the rank is removed here.
    """

    def __init__(self) -> None:
        self._columns: dict[Holder, int] = {}
        self._holders: list[Holder | None] = []
        self._free: list[int] = []
        self.version = 0
        """Grows whenever a column changes hands."""

    def __len__(self) -> int:
        return len(self._columns)

    def __contains__(self, holder: Holder) -> bool:
        return holder in self._columns

    @property
    def num_columns(self) -> int:
        """Arrays by column have at least this length: the most ranks ever known at once."""
        return len(self._holders)

    def add(self, holder: Holder) -> int:
        """The rank's column; adding it again changes nothing."""
        column = self._columns.get(holder)
        if column is not None:
            return column
        if self._free:
            column = heappop(self._free)
            self._holders[column] = holder
        else:
            column = len(self._holders)
            self._holders.append(holder)
        self._columns[holder] = column
        self.version += 1
        return column

    def remove(self, holder: Holder) -> None:
        """Free the rank's column; a rank that is not known is not an error."""
        column = self._columns.pop(holder, None)
        if column is not None:
            self._holders[column] = None
            heappush(self._free, column)
            self.version += 1

    def column(self, holder: Holder) -> int | None:
        return self._columns.get(holder)

    def holder(self, column: int) -> Holder | None:
        return self._holders[column] if 0 <= column < len(self._holders) else None

    def in_mask(self, mask: int) -> list[Holder]:
        """The known ranks of a mask, by column."""
        found = []
        while mask:
            low = mask & -mask
            mask ^= low
            holder = self.holder(low.bit_length() - 1)
            if holder is not None:
                found.append(holder)
        return found

    def by_holder(self, runs: list[tuple[int, int]]) -> dict[Holder, int]:
        """The depth of each rank, of runs as `KVIndex.lookup` tells them."""
        return {holder: depth for mask, depth in runs for holder in self.in_mask(mask)}
