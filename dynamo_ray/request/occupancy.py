"""Which ranks are busy: what they have, by all that is known of it, against what they can take."""

from __future__ import annotations

import numpy as np

from backends.engine import RankLoad, Role
from dynamo_ray.config import LimitsConfig, QueueConfig
from dynamo_ray.routing.chooser import WorkerFacts
from dynamo_ray.routing.load import LoadTable
from dynamo_ray.routing.ranks import Holder, Ranks

KV_AHEAD = 1.0
"""Of what a decode rank's KV holds: requests for which it has no room yet, but may when their prompts are computed. Of
those whose engine computes no prompt before decode has room for it (`concurrent`), none: they would wait there as here,
but in the order they came."""
STALLED_S = 20.0
"""An engine that computes or generates shows it every few steps: by the blocks it stores and those it says it holds."""


class Occupancy:
    """Arrays by column of `ranks`, beside those of `table`.

    A rank is busy when it has `max_requests`, running and waiting, or its worker what its limits allow; when it has
    `max_prompt_tokens` still to compute; or, where it only decodes, when its KV blocks do not hold one more, and as
    many tokens as `KV_AHEAD` says wait for room already. Bookings count a prefix that requests share once for each of
    them, so that they alone do not make a rank busy: it must have said that requests wait in it, or that its blocks are
    held. A rank without requests is never busy.

    Whoever computes prompts may have more of them than its KV holds: it keeps what they share until it comes to them.
    """

    def __init__(
        self, ranks: Ranks, table: LoadTable, limits: LimitsConfig, max_requests: float, max_prompt_tokens: float
    ) -> None:
        self._ranks, self._table, self._limits = ranks, table, limits
        self._max_requests, self._max_prompt_tokens = max_requests, max_prompt_tokens
        self._kv_tokens = np.zeros(0)
        """Infinite where no bound is kept."""
        self._most_kv_tokens = np.zeros(0)
        """With what may wait for room."""
        self._said_kv_tokens = np.zeros(0)
        """What each last said that it holds, -inf: nothing; inf: requests wait in it, or it has said nothing yet."""
        self._worker = np.zeros(0, dtype=np.intp)
        """The first column of each column's worker."""
        self._max_worker_requests = np.zeros(0)
        """Of each column's worker."""
        self._fewest_requests = max_requests
        """With fewer in all, no rank is busy by their number."""
        self._moves: dict[int, tuple[int, float]] = {}
        """By column: the table's moves when they went up last, and when that was."""
        self.stalled = 0
        """Ranks that go on telling their load while nothing happens to their requests: their engine hangs. A mask."""

    @classmethod
    def of(cls, queue: QueueConfig, limits: LimitsConfig, ranks: Ranks, table: LoadTable) -> Occupancy:
        """As the configuration has it."""
        return cls(ranks, table, limits, queue.busy_requests or np.inf, queue.busy_prompt_tokens or np.inf)

    def up(self, facts: WorkerFacts) -> None:
        """After the load table knows its ranks."""
        width = self._table.values.shape[1]
        known = len(self._kv_tokens)
        self._kv_tokens = np.append(self._kv_tokens, np.full(width - known, np.inf))
        self._most_kv_tokens = np.append(self._most_kv_tokens, np.full(width - known, np.inf))
        self._said_kv_tokens = np.append(self._said_kv_tokens, np.full(width - known, np.inf))
        self._worker = np.append(self._worker, np.arange(known, width))
        self._max_worker_requests = np.append(self._max_worker_requests, np.full(width - known, np.inf))
        columns = [column for column in map(self._ranks.column, facts.holders) if column is not None]
        self._kv_tokens[columns] = facts.kv_total_blocks * facts.block_size if facts.role is Role.DECODE else np.inf
        ahead = 0.0 if facts.handoff == "concurrent" else KV_AHEAD
        self._most_kv_tokens[columns] = (1.0 + ahead) * self._kv_tokens[columns]
        self._said_kv_tokens[columns] = np.inf
        self._worker[columns] = columns[0]
        worker_requests = self._limits.queued_requests(len(columns))
        self._max_worker_requests[columns] = worker_requests
        self._fewest_requests = min(self._fewest_requests, worker_requests)
        for column in columns:
            self._moves.pop(column, None)
            self.stalled &= ~(1 << column)

    def heard(self, holder: Holder, load: RankLoad, now_s: float) -> None:
        """Take what a rank says of itself, after the load table; of a rank that is not known it is dropped."""
        column = self._ranks.column(holder)
        if column is None:
            return
        self._look(column, now_s)
        if load.num_waiting:
            self._said_kv_tokens[column] = np.inf
        elif load.kv_used_blocks and load.kv_total_blocks:
            self._said_kv_tokens[column] = load.kv_used_blocks * (self._kv_tokens[column] / load.kv_total_blocks)
        else:
            self._said_kv_tokens[column] = -np.inf

    def _look(self, column: int, now_s: float) -> None:
        """See whether the rank has done anything, if it had anything to do."""
        moves, (before, since_s) = self._table.moves(column), self._moves.get(column, (-1, now_s))
        if moves != before or not self._table.sent.item(1, column):
            self._moves[column] = moves, now_s
            self.stalled &= ~(1 << column)
        elif now_s - since_s >= STALLED_S:
            self.stalled |= 1 << column

    def able(self, prefill: int | None, decode: int, busy: int) -> tuple[int | None, int]:
        """Of each role's ranks those for which it makes sense to wait: not a stalled one, where there are others."""
        hopeless = self.stalled & busy
        return prefill and (prefill & ~hopeless or prefill), decode & ~hopeless or decode

    def busy(self, prompt_tokens: int) -> int:
        """The mask of the ranks that are, for a request of that size."""
        queued, requests, kv = self._table.sent
        would_wait = self._said_kv_tokens > self._kv_tokens - prompt_tokens
        is_full = (kv > self._most_kv_tokens - prompt_tokens) & (requests > 0) & would_wait
        busy = (queued >= self._max_prompt_tokens) | is_full
        if requests.sum() >= self._fewest_requests:
            by_worker = np.bincount(self._worker, requests, len(requests))[self._worker]
            busy |= (requests >= self._max_requests) | (by_worker >= self._max_worker_requests)
        return int.from_bytes(np.packbits(busy, bitorder="little").tobytes(), "little")
