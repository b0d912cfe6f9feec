"""Chooses the ranks of a request and keeps count of what it gave to whom; no I/O and no clock of its own."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np

from backends.engine import RankLoad, Role
from backends.kv_events import AllBlocksCleared, KVEventBatch
from dynamo_ray.config import RouterConfig
from dynamo_ray.routing.approximate import RoutedPrefixes
from dynamo_ray.routing.booked import Booked, Waiting
from dynamo_ray.routing.choice import Choice, Pick
from dynamo_ray.routing.explanation import Explanation, explain
from dynamo_ray.routing.facts import WorkerFacts
from dynamo_ray.routing.kv_index import KVIndex, Overlap, Runs
from dynamo_ray.routing.load import Booking, LoadTable
from dynamo_ray.routing.pending import PendingPrefixes
from dynamo_ray.routing.policies import resolve
from dynamo_ray.routing.policy import Ask, Leg, Policy, Pool, pick, pick_pair, total
from dynamo_ray.routing.ranks import Holder, Ranks
from dynamo_ray.routing.speeds import Speeds

__all__ = ["Booked", "Choice", "Chooser", "Pick", "WorkerFacts"]

log = logging.getLogger(__name__)

MAX_POOLS = 256
"""Sets of candidates remembered; retries make new ones by leaving out what failed."""
FALLBACK = Policy(lambda leg: leg.num_requests, reads_overlap=False)
NOWHERE = Overlap([], [], [])


class Chooser:
    """Index, load, speeds and policy of one application. `choose` only looks; `book` counts, and `Booked.free` undoes
    that.
    """

    def __init__(self, model: str, config: RouterConfig | None = None) -> None:
        """Raises ValueError when the configuration names no policy; see `policies.resolve`."""
        self.config = config or RouterConfig()
        self.policy = resolve(self.config)
        self.ranks = Ranks()
        self.index = KVIndex(model, self.ranks)
        self.guesses = RoutedPrefixes(self.ranks, self.config.approximate.ttl_s, self.config.approximate.max_blocks)
        self.pending = PendingPrefixes()
        self.table = LoadTable(self.ranks)
        self.speeds = Speeds()
        self.num_policy_errors = 0
        """Legs that a policy could not place, which then went to the rank with the fewest requests."""
        self.policy_error: str | None = None
        """What the first of them failed of, in a line."""
        self.num_legs: Counter[Holder] = Counter()
        """Booked on each known rank."""
        self._workers: dict[str, tuple[WorkerFacts, int]] = {}
        self._of_column: dict[int, WorkerFacts] = {}
        self._silent = 0
        self._turns: Counter[Role] = Counter()
        self._everyone: Pool | None = None
        """All known ranks, once somebody has asked; others are parts of it."""
        self._pools: dict[int, Pool] = {}

    def up(self, facts: WorkerFacts) -> None:
        """Know a worker; an older incarnation of it goes down."""
        older = self._workers.get(facts.name)
        if older is not None:
            self.down(facts.name, older[0].epoch)
        columns = []
        for holder in facts.holders:
            columns.append(self.ranks.add(holder))
            self.index.add_holder(holder)
            self.table.add_holder(holder, facts.role, facts.block_size)
            self._of_column[columns[-1]] = facts
        mask = sum(1 << column for column in columns)
        self.speeds.up(facts.group, columns)
        self._workers[facts.name] = facts, mask
        self._forget_pools()
        if facts.caches_prefixes and not facts.tells_events:
            self._silent |= mask

    def down(self, worker: str, epoch: int) -> None:
        """Forget a worker: what it holds, its load, what was booked there. One that is not known is ignored."""
        known = self._workers.get(worker)
        if known is None or known[0].epoch != epoch:
            return
        facts, mask = self._workers.pop(worker)
        self._silent &= ~mask
        columns = [column for column in map(self.ranks.column, facts.holders) if column is not None]
        self.speeds.down(facts.group, columns)
        for column, holder in zip(columns, facts.holders, strict=True):
            self.index.remove_holder(holder)
            self.table.remove_holder(holder)
            self.guesses.remove_holder(holder)
            self.pending.remove_rank(column)
            self.num_legs.pop(holder, None)
            del self._of_column[column]
            self.ranks.remove(holder)
        self._forget_pools()

    def mask(self, worker: str) -> int:
        """The ranks of a worker's current incarnation, for the masks of `choose`; 0 of one that is not known."""
        known = self._workers.get(worker)
        return known[1] if known is not None else 0

    def is_guessed(self, holder: Holder) -> bool:
        """Whether what the rank caches is guessed: it caches, and tells nothing of it."""
        column = self.ranks.column(holder)
        return column is not None and bool(self._silent >> column & 1)

    def guessed(self) -> dict[str, bool]:
        """Of each worker whether what it caches is guessed."""
        return {name: bool(mask & self._silent) for name, (_, mask) in self._workers.items()}

    def heard(self, holder: Holder, load: RankLoad) -> None:
        self.table.report(holder, load)

    def apply(self, holder: Holder, batch: KVEventBatch) -> None:
        self.index.apply(holder, batch)
        column = self.ranks.column(holder)
        self.table.moved(column)
        if column is not None and self.pending:
            self.pending.told(column, self.index.holds)
            if any(isinstance(event, AllBlocksCleared) for event in batch.events):
                self.pending.cleared(column)

    def uncertain(self, holder: Holder) -> None:
        """What was known of the rank's cache can no longer be trusted."""
        self.index.doubt(holder)

    def flushed(self, worker: str, epoch: int) -> None:
        """Its caches have been emptied: nothing that was sent there before is found there again."""
        known = self._workers.get(worker)
        for holder in known[0].holders if known is not None and known[0].epoch == epoch else ():
            self.index.clear_holder(holder)
            self.guesses.remove_holder(holder)
            column = self.ranks.column(holder)
            if column is not None:
                self.pending.cleared(column)

    def choose(self, ask: Ask, prefill: int | None, decode: int, now_s: float) -> Choice:
        """The ranks to take. Changes nothing but what expires by itself, and the count of policy errors.

        Args:
            prefill: mask of the ranks that may compute the prompt; None: whichever decodes it does.
            decode: mask of the ranks that may generate.

        Raises:
            ValueError: A mask names no known rank.
        """
        self.pending.expire(now_s)
        found = self._overlap(ask, self._pool(decode), decode | (prefill or 0), now_s)
        if prefill is None:
            return Choice(None, self._pick(self._leg(Role.AGGREGATED, ask, decode, found)))
        if self._block_size(self._pool(prefill)) != self._block_size(self._pool(decode)):
            found_there = self._overlap(ask, self._pool(prefill), prefill, now_s)
        else:
            found_there = found
        first = self._pick(self._leg(Role.PREFILL, ask, prefill, found_there))
        return self._pair(first, self._pick(self._leg(Role.DECODE, ask, decode, found)))

    def book(self, choice: Choice, now_s: float) -> Booked:
        """Count a choice in. Whoever books calls `Booked.free`, on every path."""
        prefill = None if choice.prefill is None else self._book(choice.prefill, now_s)
        return Booked(self, choice, prefill, self._book(choice.decode, now_s), now_s)

    def wait(self, choice: Choice) -> Waiting:
        """Count in a request that waits for these ranks, for those who choose meanwhile. Whoever calls it calls
        `Waiting.free`, before it books and on every path.
        """
        table, legs = self.table, [pick for pick in (choice.prefill, choice.decode) if pick is not None]
        waiting = [table.wait(p.holder, p.uncached_tokens, p.leg.prompt_blocks * p.leg.block_size) for p in legs]
        return Waiting(self, waiting, self.begin(legs[0], waiting[0]))

    def uncached_tokens(self, ask: Ask, holder: Holder, now_s: float) -> int:
        """Prompt tokens that a rank would have to compute now; all, of one that is not known."""
        column = self.ranks.column(holder)
        if column is None:
            return len(ask.token_ids)
        found, _ = self._overlap(ask, self._pool(1 << column), 1 << column, now_s)
        depth = max((depth for runs in found for _, depth in runs), default=0)
        return max(1, len(ask.token_ids) - depth * self._of_column[column].block_size)

    def explain(self, choice: Choice) -> Explanation:
        """Every candidate with what it holds, carries and costs, by cause; which one, and why."""
        return explain(self.config.policy, choice)

    def _book(self, picked: Pick, now_s: float) -> Booking:
        leg, holder = picked.leg, picked.holder
        self._turns[leg.role] += 1
        self.num_legs[holder] += 1
        if leg.computes_prompt and self._silent and self.policy.reads_overlap and self.is_guessed(holder):
            self.guesses.routed(holder, leg.ask.hashes(leg.block_size), now_s)
        if leg.computes_prompt:
            self.speeds.booked(picked.uncached_tokens)
        return self.table.book(holder, picked.uncached_tokens, leg.prompt_blocks * leg.block_size)

    def begin(self, computing: Pick, booking: Booking) -> list[int] | None:
        """Let others count on what this one will compute; `Booked` gives the answer back to `end`."""
        leg, column = computing.leg, booking.column
        if column is None or not self.policy.reads_coming or not self.policy.reads_overlap:
            return None
        if not self._of_column[column].caches_prefixes:
            return None
        return self.pending.add(column, leg.ask.hashes(leg.block_size), computing.overlap_blocks)

    def end(self, column: int | None, blocks: list[int], now_s: float | None) -> None:
        """What `begin` gave is computed since `now_s`, or (None) will not be."""
        if column is None:
            return
        # Not, or told of already, or guessed.
        if now_s is None or self.index.holds(column, blocks[-1]) or self._silent >> column & 1:
            self.pending.remove(column, blocks)
        else:
            self.pending.computed(column, blocks, now_s)

    def _pool(self, mask: int) -> Pool:
        pool = self._pools.get(mask)
        if pool is None:
            if self._everyone is None:
                self._everyone = self._all_known()
            pool = self._everyone.part(mask)
            if len(self._pools) >= MAX_POOLS:
                self._pools.clear()
            self._pools[mask] = pool
        return pool

    def _forget_pools(self) -> None:
        self._everyone = None
        self._pools.clear()

    def _all_known(self) -> Pool:
        members = [(f.group, h.dp_rank, c, h) for c, f in self._of_column.items() if (h := self.ranks.holder(c))]
        if not members:
            raise ValueError("no rank is known")
        members.sort(key=lambda member: member[:3])
        kv = [self._of_column[c].kv_total_blocks * self._of_column[c].block_size for _, _, c, _ in members]
        return Pool([c for _, _, c, _ in members], [h for *_, h in members], [g for g, *_ in members], kv)

    def _block_size(self, pool: Pool) -> int:
        return self._of_column[pool.first_column].block_size

    def _leg(self, role: Role, ask: Ask, mask: int, found: tuple[Overlap, Runs]) -> Leg:
        pool = self._pool(mask)
        everything, there = self.table.values, self.table.sent
        load = everything.take(pool.columns, axis=1)
        sent = load if there is everything else there.take(pool.columns, axis=1)
        recent = self.table.recent_tokens.take(pool.columns)
        held, coming_runs = found
        device = pool.depths(held.device)
        host = np.maximum(device, pool.depths(held.host)) if held.host else device
        disk = np.maximum(host, pool.depths(held.disk)) if held.disk else host
        coming = np.maximum(device, pool.depths(coming_runs)) if coming_runs else device
        size, turn = self._block_size(pool), self._turns[role]
        return Leg(
            role, ask, size, turn, pool, len(ask.token_ids), load, sent, recent, device, host, disk, coming, self.speeds
        )

    def _overlap(self, ask: Ask, pool: Pool, mask: int, now_s: float) -> tuple[Overlap, Runs]:
        """What the ranks of the mask hold of the prompt, and what they are computing of it."""
        if not self.policy.reads_overlap:
            return NOWHERE, []
        hashes = ask.hashes(self._block_size(pool))
        found = self.index.lookup(hashes, mask & ~self._silent)
        if self._silent:
            guessed = self.guesses.lookup(hashes, now_s, self._silent & mask)
            found = Overlap([*found.device, *guessed], found.host, found.disk)
        coming = self.pending.lookup(hashes, mask) if self.policy.reads_coming and len(self.pending) else []
        return found, coming

    def _pick(self, leg: Leg) -> Pick:
        try:
            costs = total(self.policy, leg)
            return Pick(leg, costs, self.policy, pick(self.policy, leg, costs))
        except Exception as error:  # noqa: BLE001 - a user's code can raise anything, and the request must go on
            self._count(error)
            return Pick(leg, leg.num_requests, FALLBACK, pick(FALLBACK, leg, leg.num_requests))

    def _pair(self, first: Pick, second: Pick) -> Choice:
        try:
            places = pick_pair(self.policy, first.leg, first.costs, second.leg, second.costs)
        except Exception as error:  # noqa: BLE001 - as above
            self._count(error)
            places = None
        if places is not None:
            first.place, second.place = places
        return Choice(first, second)

    def _count(self, error: Exception) -> None:
        if not self.num_policy_errors:
            log.error(
                "policy %s failed; such legs go where the fewest requests are (counted, and logged once)",
                self.config.policy,
                exc_info=error,
            )
            self.policy_error = f"{type(error).__name__}: {error}".splitlines()[0]
        self.num_policy_errors += 1
