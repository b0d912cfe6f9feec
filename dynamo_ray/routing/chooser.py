"""Chooses the ranks of a request and keeps count of what it gave to whom; no I/O and no clock of its own."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from backends.engine import HandoffStyle, RankLoad, Role
from backends.kv_events import KVEventBatch
from dynamo_ray.config import RouterConfig
from dynamo_ray.routing.approximate import RoutedPrefixes
from dynamo_ray.routing.kv_index import KVIndex
from dynamo_ray.routing.load import Booking, LoadTable
from dynamo_ray.routing.policies import resolve
from dynamo_ray.routing.policy import Ask, Floats, Leg, Policy, Pool, pick, total
from dynamo_ray.routing.ranks import Holder, Ranks

log = logging.getLogger(__name__)

FALLBACK = Policy(lambda leg: leg.num_requests, reads_overlap=False)
MAX_POOLS = 256
"""Sets of candidates remembered; retries make new ones by leaving out what failed."""


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What the router has to know of a worker; never changes until it stops."""

    name: str
    epoch: int
    role: Role
    attn_dp_size: int
    """Its ranks are 0 to this."""
    block_size: int
    kv_total_blocks: int
    """Per rank."""
    lockstep_group: str = ""
    """Ranks of one group step together: all those of one engine, whatever endpoints serve them. Empty: `name`."""
    handoff: HandoffStyle = "none"
    caches_prefixes: bool = True
    tells_events: bool = True
    """It publishes KV events and we listen; else what it caches is guessed from what was sent there."""

    @property
    def holders(self) -> list[Holder]:
        return [Holder(self.name, self.epoch, rank) for rank in range(self.attn_dp_size)]


@dataclass(slots=True, eq=False)
class Pick:
    """The rank chosen for one leg, and what it was chosen from."""

    leg: Leg
    costs: Floats
    place: int
    """Of the chosen candidate."""

    @property
    def holder(self) -> Holder:
        return self.leg.pool.holders[self.place]

    @property
    def cost(self) -> float:
        return float(self.costs[self.place])

    @property
    def overlap_blocks(self) -> int:
        """Leading prompt blocks that the rank holds."""
        return int(self.leg.device_blocks[self.place])

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens that the rank computes; 0 on a decode leg."""
        if not self.leg.computes_prompt:
            return 0
        return max(1, self.leg.prompt_tokens - self.overlap_blocks * self.leg.block_size)


@dataclass(slots=True, eq=False)
class Choice:
    """Where a request should go; nothing is counted until it is booked."""

    prefill: Pick | None
    """None: the decode rank computes the prompt itself."""
    decode: Pick


class Booked:
    """A choice that counts, until `free`. Every method may be called again, and after `free`, to no effect."""

    __slots__ = ("_decode", "_prefill", "_table", "choice")

    def __init__(self, choice: Choice, table: LoadTable, prefill: Booking | None, decode: Booking) -> None:
        self.choice = choice
        self._table = table
        self._prefill = prefill
        self._decode = decode

    def prefill_done(self, now_s: float) -> None:
        """The prefill rank is free of this prompt, though its KV may still wait there."""
        if self._prefill is not None:
            self._table.free(self._prefill)

    def first_token(self, now_s: float) -> None:
        """Nothing of the prompt is left to compute."""
        self.prefill_done(now_s)
        self._table.prefilled(self._decode)

    def free(self, now_s: float, generated_tokens: int = 0) -> None:
        """Count it out. `generated_tokens`: how many came, of a request that ended well; 0 teaches nothing."""
        self.prefill_done(now_s)
        self._table.free(self._decode)


class Chooser:
    """Index, load and policy of one application. `choose` only looks; `book` counts, and `Booked.free` undoes that."""

    def __init__(self, model: str, config: RouterConfig | None = None) -> None:
        """Raises ValueError when the configuration names no policy; see `policies.resolve`."""
        self.config = config or RouterConfig()
        self.policy = resolve(self.config)
        self.ranks = Ranks()
        self.index = KVIndex(model, self.ranks)
        self.guesses = RoutedPrefixes(self.ranks, self.config.approximate.ttl_s, self.config.approximate.max_blocks)
        self.table = LoadTable(self.ranks)
        self.num_policy_errors = 0
        """Legs that a policy could not place, which then went to the rank with the fewest requests."""
        self.num_legs: Counter[Holder] = Counter()
        """Booked on each known rank."""
        self._workers: dict[str, tuple[WorkerFacts, int]] = {}
        self._of_column: dict[int, WorkerFacts] = {}
        self._silent = 0
        self._turns: Counter[Role] = Counter()
        self._pools: dict[int, Pool] = {}

    def up(self, facts: WorkerFacts) -> None:
        """Know a worker; an older incarnation of it goes down."""
        older = self._workers.get(facts.name)
        if older is not None:
            self.down(facts.name, older[0].epoch)
        mask = 0
        for holder in facts.holders:
            column = self.ranks.add(holder)
            self.index.add_holder(holder)
            self.table.add_holder(holder, facts.role, facts.block_size)
            self._of_column[column] = facts
            mask |= 1 << column
        self._workers[facts.name] = facts, mask
        self._pools.clear()
        if facts.caches_prefixes and not facts.tells_events:
            self._silent |= mask

    def down(self, worker: str, epoch: int) -> None:
        """Forget a worker: what it holds, its load, what was booked there. One that is not known is ignored."""
        known = self._workers.get(worker)
        if known is None or known[0].epoch != epoch:
            return
        del self._workers[worker]
        facts, mask = known
        self._silent &= ~mask
        for holder in facts.holders:
            self.index.remove_holder(holder)
            self.table.remove_holder(holder)
            self.guesses.remove_holder(holder)
            self.num_legs.pop(holder, None)
            column = self.ranks.column(holder)
            if column is not None:
                del self._of_column[column]
            self.ranks.remove(holder)
        self._pools.clear()

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

    def uncertain(self, holder: Holder) -> None:
        """What was known of the rank's cache can no longer be trusted."""
        self.index.doubt(holder)

    def flushed(self, worker: str, epoch: int) -> None:
        """Its caches have been emptied: nothing that was sent there before is found there again."""
        known = self._workers.get(worker)
        for holder in known[0].holders if known is not None and known[0].epoch == epoch else ():
            self.index.clear_holder(holder)
            self.guesses.remove_holder(holder)

    def choose(self, ask: Ask, prefill: int | None, decode: int, now_s: float) -> Choice:
        """The ranks to take. Changes nothing, but for the count of policy errors.

        Args:
            prefill: mask of the ranks that may compute the prompt; None: whichever decodes it does.
            decode: mask of the ranks that may generate.

        Raises:
            ValueError: A mask names no known rank.
        """
        first = None if prefill is None else self._pick(self._leg(Role.PREFILL, ask, prefill, now_s))
        role = Role.AGGREGATED if prefill is None else Role.DECODE
        return Choice(first, self._pick(self._leg(role, ask, decode, now_s)))

    def book(self, choice: Choice, now_s: float) -> Booked:
        """Count a choice in. Whoever books calls `Booked.free`, on every path."""
        prefill = None if choice.prefill is None else self._book(choice.prefill, now_s)
        return Booked(choice, self.table, prefill, self._book(choice.decode, now_s))

    def _book(self, picked: Pick, now_s: float) -> Booking:
        leg, holder = picked.leg, picked.holder
        self._turns[leg.role] += 1
        self.num_legs[holder] += 1
        if leg.computes_prompt and self.policy.reads_overlap and self.is_guessed(holder):
            self.guesses.routed(holder, leg.ask.hashes(leg.block_size), now_s)
        return self.table.book(holder, picked.uncached_tokens, leg.prompt_blocks * leg.block_size)

    def _pool(self, mask: int) -> Pool:
        pool = self._pools.get(mask)
        if pool is None:
            members = [(self._group(c), h.dp_rank, c, h) for c, h in self._members(mask)]
            if not members:
                raise ValueError("no known rank is in the mask")
            members.sort(key=lambda member: member[:3])
            kv = [self._of_column[c].kv_total_blocks * self._of_column[c].block_size for _, _, c, _ in members]
            pool = Pool([c for _, _, c, _ in members], [h for *_, h in members], [g for g, *_ in members], kv)
            if len(self._pools) >= MAX_POOLS:
                self._pools.clear()
            self._pools[mask] = pool
        return pool

    def _group(self, column: int) -> str:
        return self._of_column[column].lockstep_group or self._of_column[column].name

    def _members(self, mask: int) -> Iterable[tuple[int, Holder]]:
        for holder in self.ranks.in_mask(mask):
            column = self.ranks.column(holder)
            if column is not None:
                yield column, holder

    def _leg(self, role: Role, ask: Ask, mask: int, now_s: float) -> Leg:
        pool = self._pool(mask)
        block_size = self._of_column[int(pool.columns[0])].block_size
        queued, requests, kv = self.table.values.take(pool.columns, axis=1)
        depths = self._depths(pool, mask, ask, block_size, now_s)
        return Leg(role, ask, block_size, self._turns[role], pool, queued, requests, kv, *depths)

    def _depths(self, pool: Pool, mask: int, ask: Ask, block_size: int, now_s: float) -> tuple[Floats, Floats, Floats]:
        """Leading blocks on the device, on the host or faster, and on any tier, of each candidate."""
        if not self.policy.reads_overlap:
            none = pool.depths(())
            return none, none, none
        hashes = ask.hashes(block_size)
        found = self.index.lookup(hashes, mask & ~self._silent)
        device = pool.depths(found.device)
        if self._silent:
            pool.set_depths(device, self.guesses.lookup(hashes, now_s, self._silent & mask))
        host = np.maximum(device, pool.depths(found.host)) if found.host else device
        return device, host, np.maximum(host, pool.depths(found.disk)) if found.disk else host

    def _pick(self, leg: Leg) -> Pick:
        try:
            costs = total(self.policy, leg)
            return Pick(leg, costs, pick(self.policy, leg, costs))
        except Exception as error:  # a user's code can raise anything, and the request must go on
            if not self.num_policy_errors:
                log.error(
                    "policy %s failed; such legs go where the fewest requests are (counted, and logged once)",
                    self.config.policy,
                    exc_info=error,
                )
            self.num_policy_errors += 1
            return Pick(leg, leg.num_requests, pick(FALLBACK, leg, leg.num_requests))
