"""Chooses the workers and ranks of a request, and keeps count of what it gave to whom."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from backends.admission import lacking, wishes
from backends.engine import RankLoad, Role
from backends.kv_events import KVEventBatch
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.errors import InvalidRequest, NotReady, Overloaded
from dynamo_ray.request.attempt import Attempt
from dynamo_ray.request.connection import LegFailed, WorkerConnection
from dynamo_ray.request.wire import WorkerInfo, worker_of
from dynamo_ray.request.workers import Workers
from dynamo_ray.routing.block_hash import block_hashes, chain_seed
from dynamo_ray.routing.cost import READS_OVERLAP, Candidate, Decision, Leg, decide
from dynamo_ray.routing.kv_index import Holder, KVIndex, RoutedPrefixes
from dynamo_ray.routing.load import Booking, LoadTable
from dynamo_ray.routing.ranks import Ranks

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """A rank of a live worker, with what was counted in for this leg."""

    connection: WorkerConnection
    dp_rank: int
    booking: Booking

    @property
    def worker(self) -> str:
        return self.connection.info.worker


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one attempt runs; booked until `Router.place` is left."""

    prefill: Target | None
    decode: Target
    _table: LoadTable

    def prefill_done(self) -> None:
        """The prefill rank is free of this prompt, though its KV may still wait there."""
        if self.prefill is not None:
            self._table.free(self.prefill.booking)

    def first_token(self) -> None:
        """Nothing of the prompt is left to compute."""
        self.prefill_done()
        self._table.prefilled(self.decode.booking)


class _PromptHashes:
    """The block hashes of one attempt's prompt, computed once for both roles."""

    def __init__(self, attempt: Attempt, model: str) -> None:
        self._token_ids = attempt.token_ids
        self._seed = chain_seed(model, attempt.request.lora, attempt.request.cache_salt)
        self._by_size: dict[int, list[int]] = {}

    def of(self, block_size: int) -> list[int]:
        if block_size not in self._by_size:
            self._by_size[block_size] = block_hashes(self._token_ids, block_size, self._seed)
        return self._by_size[block_size]


class Router:
    """Decides in process, on the index and load of this ingress; see `dynamo_ray.routing` for how."""

    def __init__(self, config: DeploymentConfig, workers: Workers) -> None:
        self._config = config
        self._workers = workers
        self._turns: Counter[Role] = Counter()
        self.ranks = Ranks()
        self.index = KVIndex(config.model.name, self.ranks)
        self.table = LoadTable()
        self.num_retries = 0
        self.num_legs: Counter[Holder] = Counter()
        """Sent to each rank since this process began."""
        self._routed = RoutedPrefixes()
        self._silent: set[Holder] = set()
        """Ranks whose cache is guessed: it matters here, and they tell nothing of it."""

    def up(self, info: WorkerInfo) -> None:
        holders = _holders(info)
        for holder in holders:
            self.index.add_holder(holder)
            self.table.add_holder(holder)
        told = self._config.events != "none" and info.engine.kv_event_sources
        if info.engine.caches_prefixes and not told and self._config.router.policy in READS_OVERLAP:
            self._silent.update(holders)
            log.warning(
                "%s publishes no KV events: what it caches is guessed from what was sent there in the last %g s",
                info.worker,
                self._routed.ttl_s,
            )

    def down(self, info: WorkerInfo) -> None:
        for holder in _holders(info):
            self.index.remove_holder(holder)
            self.table.remove_holder(holder)
            self._routed.remove_holder(holder)
            self.num_legs.pop(holder, None)
            self._silent.discard(holder)
            self.ranks.remove(holder)

    def heard(self, info: WorkerInfo, loads: tuple[RankLoad, ...]) -> None:
        for load in loads:
            self.table.report(Holder(info.worker, info.epoch, load.dp_rank), load)

    def flushed(self, info: WorkerInfo) -> None:
        """A command has emptied its caches: nothing that was sent there before is found there again."""
        for holder in _holders(info):
            self.index.clear_holder(holder)
            self._routed.remove_holder(holder)

    def apply(self, holder: Holder, batch: KVEventBatch) -> None:
        self.index.apply(holder, batch)

    def uncertain(self, holder: Holder) -> None:
        self.index.clear_holder(holder)

    def retried(self, failure: LegFailed) -> None:
        self.num_retries += 1
        log.warning("a request moves to other workers: %s", failure)

    @contextmanager
    def place(self, attempt: Attempt) -> Iterator[Placement]:
        """Choose and book; leaving frees the bookings.

        Raises:
            NotReady: A role has no live worker.
            InvalidRequest: None of a role's has what is asked for.
            Overloaded: Every worker of a role refused this request for lack of room.
        """
        hashes = _PromptHashes(attempt, self._config.model.name)
        with ExitStack() as booked:
            prefill = None
            if self._config.aggregated is None:
                prefill = self._choose(Role.PREFILL, attempt, hashes)
                booked.callback(self.table.free, prefill.booking)
            decode = self._choose(Role.AGGREGATED if prefill is None else Role.DECODE, attempt, hashes)
            booked.callback(self.table.free, decode.booking)
            yield Placement(prefill, decode, self.table)

    def _choose(self, role: Role, attempt: Attempt, hashes: _PromptHashes) -> Target:
        connections = {c.info.worker: c for c in self._eligible(role, attempt)}
        block_size = next(iter(connections.values())).info.engine.block_size
        leg = Leg(-(-len(attempt.token_ids) // block_size), computes_prompt=role is not Role.DECODE)
        holders = [holder for connection in connections.values() for holder in _holders(connection.info)]
        overlap = self._overlap(leg, hashes, block_size)
        candidates = [Candidate(holder, overlap.get(holder, 0), self.table.load(holder)) for holder in holders]
        decision = decide(leg, candidates, self._turns[role], self._config.router)
        self._turns[role] += 1
        chosen = decision.chosen.holder
        self.num_legs[chosen] += 1
        if chosen in self._silent and leg.computes_prompt:
            self._routed.routed(chosen, hashes.of(block_size), asyncio.get_running_loop().time())
        return Target(connections[chosen.worker], chosen.dp_rank, self._book(decision, leg))

    def _overlap(self, leg: Leg, hashes: _PromptHashes, block_size: int) -> dict[Holder, int]:
        """Leading prompt blocks by holder; not looked up where no decision depends on it."""
        if not leg.computes_prompt or self._config.router.policy not in READS_OVERLAP:
            return {}
        prompt = hashes.of(block_size)
        return self.index.overlap(prompt) | self._routed.overlap(prompt, asyncio.get_running_loop().time())

    def _book(self, decision: Decision, leg: Leg) -> Booking:
        to_compute = leg.prompt_blocks - decision.chosen.overlap_blocks if leg.computes_prompt else 0
        return self.table.book(decision.chosen.holder, max(0, to_compute), leg.prompt_blocks)

    def _eligible(self, role: Role, attempt: Attempt) -> list[WorkerConnection]:
        """Live workers that can, without those that failed this request while there are others; never a full one.

        Nodes of one worker fail together, but each has room of its own.
        """
        live = _able(self._workers.of_role(role), attempt)
        if not live:
            paused = "".join(f"; {worker} {why}" for worker, why in self._workers.paused(role).items())
            raise NotReady(f"no {role} worker is ready{paused}", retry_after_s=RETRY_AFTER_S)
        failed = attempt.excluded
        lost = {worker_of(endpoint) for endpoint, failure in failed.items() if not failure.overloaded}
        fresh = [c for c in live if c.info.worker not in failed and worker_of(c.info.worker) not in lost]
        if fresh:
            return fresh
        with_room = [c for c in live if c.info.worker not in failed or not failed[c.info.worker].overloaded]
        if not with_room:
            raise Overloaded(f"every {role} worker is full", retry_after_s=RETRY_AFTER_S)
        return with_room


def _able(connections: list[WorkerConnection], attempt: Attempt) -> list[WorkerConnection]:
    """Those whose engine has what the request asks for.

    Raises:
        InvalidRequest: There are some, and none of them has; says why, and names the field.
    """
    request = attempt.request
    asked = wishes(request.sampling, request.cache_salt, request.priority, request.lora)
    if asked is None:
        return connections
    refusals = [lacking(connection.info.engine, asked) for connection in connections]
    able = [connection for connection, refusal in zip(connections, refusals, strict=True) if refusal is None]
    if refusals and not able:
        assert refusals[0] is not None
        raise InvalidRequest(refusals[0].message, refusals[0].field)
    return able


def _holders(info: WorkerInfo) -> list[Holder]:
    return [Holder(info.worker, info.epoch, rank) for rank in range(info.engine.attn_dp_size)]
