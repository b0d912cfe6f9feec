"""Which ranks are busy: what they have, by all that is known of it, against what they can take."""

from __future__ import annotations

import numpy as np

from dynamo_ray.routing.chooser import WorkerFacts
from dynamo_ray.routing.load import LoadTable
from dynamo_ray.routing.ranks import Ranks


class Occupancy:
    """Arrays by column of `ranks`, beside those of `table`.

    A rank is busy when it has `max_requests`, running and waiting, or its worker has `max_worker_requests`; or when its
    KV blocks do not hold one more. Bookings count a prefix that requests share once for each of them, so that they
    alone do not make a rank busy: it must have said that requests wait in it, or that its blocks are held. A rank
    without requests is never busy.
    """

    def __init__(self, ranks: Ranks, table: LoadTable, max_requests: int, max_worker_requests: int) -> None:
        self._ranks, self._table = ranks, table
        self._max_requests, self._max_worker_requests = max_requests, max_worker_requests
        self._kv_tokens = np.zeros(0)
        self._worker = np.zeros(0, dtype=np.intp)
        """The first column of each column's worker."""

    def up(self, facts: WorkerFacts) -> None:
        """After the load table knows its ranks."""
        width = self._table.values.shape[1]
        known = len(self._kv_tokens)
        self._kv_tokens = np.append(self._kv_tokens, np.full(width - known, np.inf))
        self._worker = np.append(self._worker, np.arange(known, width))
        columns = [column for column in map(self._ranks.column, facts.holders) if column is not None]
        self._kv_tokens[columns] = facts.kv_total_blocks * facts.block_size
        self._worker[columns] = columns[0]

    def busy(self, prompt_tokens: int) -> int:
        """The mask of the ranks that are, for a request of that size."""
        _, requests, kv = self._table.values
        over = (kv + prompt_tokens > self._kv_tokens) & (requests > 0)
        mask = self._confirmed(over, prompt_tokens) if over.any() else 0
        if requests.sum() >= min(self._max_requests, self._max_worker_requests):
            by_worker = np.bincount(self._worker, requests, len(requests))[self._worker]
            full = (requests >= self._max_requests) | (by_worker >= self._max_worker_requests)
            mask |= int.from_bytes(np.packbits(full, bitorder="little").tobytes(), "little")
        return mask

    def _confirmed(self, over: np.ndarray[tuple[int], np.dtype[np.bool_]], prompt_tokens: int) -> int:
        mask = 0
        for column in np.flatnonzero(over).tolist():
            holder = self._ranks.holder(column)
            said = None if holder is None else self._table.load(holder).reported
            if said is None or said.num_waiting:
                mask |= 1 << column
            elif said.kv_used_blocks and said.kv_total_blocks:
                block_tokens = self._kv_tokens[column] / said.kv_total_blocks
                if said.kv_used_blocks * block_tokens + prompt_tokens > self._kv_tokens[column]:
                    mask |= 1 << column
        return mask
