"""Chooses the workers and ranks of a request, and keeps count of what it gave to whom."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
from dynamo_ray.routing.block_hash import chain_seed
from dynamo_ray.routing.chooser import Booked, Chooser, WorkerFacts
from dynamo_ray.routing.policy import Ask
from dynamo_ray.routing.ranks import Holder

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """A rank of a live worker, for one leg."""

    connection: WorkerConnection
    dp_rank: int

    @property
    def worker(self) -> str:
        return self.connection.info.worker


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one attempt runs; booked until `Router.place` is left."""

    prefill: Target | None
    decode: Target
    _booked: Booked

    def prefill_done(self) -> None:
        """The prefill rank is free of this prompt, though its KV may still wait there."""
        self._booked.prefill_done(_now_s())

    def first_token(self) -> None:
        """Nothing of the prompt is left to compute."""
        self._booked.first_token(_now_s())


class Router:
    """Decides in process, on the index and load of this ingress; see `dynamo_ray.routing` for how."""

    def __init__(self, config: DeploymentConfig, workers: Workers) -> None:
        self._config = config
        self._workers = workers
        self.chooser = Chooser(config.model.name, config.router)
        self.index, self.table = self.chooser.index, self.chooser.table
        self.num_retries = 0

    @property
    def num_legs(self) -> Counter[Holder]:
        """Sent to each rank since this process began."""
        return self.chooser.num_legs

    def up(self, info: WorkerInfo) -> None:
        told = self._config.events != "none" and bool(info.engine.kv_event_sources)
        self.chooser.up(_facts(info, told))
        if info.engine.caches_prefixes and not told and self.chooser.policy.reads_overlap:
            log.warning(
                "%s publishes no KV events: what it caches is guessed from what was sent there in the last %g s",
                info.worker,
                self.chooser.guesses.ttl_s,
            )

    def down(self, info: WorkerInfo) -> None:
        self.chooser.down(info.worker, info.epoch)

    def heard(self, info: WorkerInfo, loads: tuple[RankLoad, ...]) -> None:
        for load in loads:
            self.chooser.heard(Holder(info.worker, info.epoch, load.dp_rank), load)

    def flushed(self, info: WorkerInfo) -> None:
        """A command has emptied its caches: nothing that was sent there before is found there again."""
        self.chooser.flushed(info.worker, info.epoch)

    def apply(self, holder: Holder, batch: KVEventBatch) -> None:
        self.chooser.apply(holder, batch)

    def uncertain(self, holder: Holder) -> None:
        self.chooser.uncertain(holder)

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
        aggregated = self._config.aggregated is not None
        prefill = {} if aggregated else self._eligible(Role.PREFILL, attempt)
        decode = self._eligible(Role.AGGREGATED if aggregated else Role.DECODE, attempt)
        request = attempt.request
        seed = chain_seed(self._config.model.name, request.lora, request.cache_salt)
        ask = Ask(attempt.token_ids, seed, request.sampling.max_tokens, priority=request.priority)
        now_s = _now_s()
        choice = self.chooser.choose(ask, None if aggregated else self._mask(prefill), self._mask(decode), now_s)
        booked = self.chooser.book(choice, now_s)
        try:
            first = choice.prefill
            yield Placement(
                None if first is None else Target(prefill[first.holder.worker], first.holder.dp_rank),
                Target(decode[choice.decode.holder.worker], choice.decode.holder.dp_rank),
                booked,
            )
        finally:
            booked.free(_now_s())

    def _mask(self, connections: Iterable[str]) -> int:
        mask = 0
        for worker in connections:
            mask |= self.chooser.mask(worker)
        return mask

    def _eligible(self, role: Role, attempt: Attempt) -> dict[str, WorkerConnection]:
        return {connection.info.worker: connection for connection in self._live(role, attempt)}

    def _live(self, role: Role, attempt: Attempt) -> list[WorkerConnection]:
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


def _facts(info: WorkerInfo, tells_events: bool) -> WorkerFacts:
    engine = info.engine
    return WorkerFacts(
        info.worker,
        info.epoch,
        engine.role,
        engine.attn_dp_size,
        engine.block_size,
        engine.kv_total_blocks,
        worker_of(info.worker),
        engine.handoff,
        engine.caches_prefixes,
        tells_events,
    )


def _now_s() -> float:
    return asyncio.get_running_loop().time()
