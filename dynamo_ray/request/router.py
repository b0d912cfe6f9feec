"""Chooses the workers and ranks of a request, holds it while all are busy, and keeps count of what it gave to whom."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial

from msgspec.structs import replace
from opentelemetry.trace import get_current_span

from backends.engine import Feature, RankLoad, Role
from backends.kv_events import KVEventBatch
from dynamo_ray.config import DeploymentConfig, QueueConfig
from dynamo_ray.errors import NotReady
from dynamo_ray.request.absence import Absence
from dynamo_ray.request.attempt import Attempt
from dynamo_ray.request.connection import LegFailed, WorkerConnection
from dynamo_ray.request.eligible import Eligible, not_ready
from dynamo_ray.request.occupancy import Occupancy
from dynamo_ray.request.queue import Ticket
from dynamo_ray.request.selection import Selection
from dynamo_ray.request.tally import Tally
from dynamo_ray.request.waiting import Busy, WaitingRoom
from dynamo_ray.request.wire import WorkerInfo, worker_of
from dynamo_ray.request.wish import Wish
from dynamo_ray.request.workers import Workers
from dynamo_ray.routing.block_hash import chain_seed
from dynamo_ray.routing.chooser import Booked, Choice, Chooser, Pick, WorkerFacts
from dynamo_ray.routing.explanation import Explanation, Route, attributes, brief
from dynamo_ray.routing.kv_index import Snapshot
from dynamo_ray.routing.policy import Ask
from dynamo_ray.routing.ranks import Holder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """A rank of a live worker."""

    connection: WorkerConnection
    dp_rank: int

    @property
    def worker(self) -> str:
        return self.connection.info.worker

    @property
    def features(self) -> tuple[Feature, ...]:
        return self.connection.info.engine.features


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one attempt runs; booked until `Router.place` is left."""

    prefill: Target | None
    """None: the decode worker computes the prompt itself."""
    decode: Target
    booked: Booked
    route: Route | None
    """In words, for who asked."""
    booked_s: float
    tally: Tally
    rank_free: Callable[[], None]
    """Called when the prefill rank is: others may wait for it."""

    def prefill_done(self) -> None:
        """The prefill rank is free of this prompt, though its KV may still wait there."""
        self.booked.prefill_done(_now_s())
        self.rank_free()

    def first_token(self) -> None:
        """Nothing of the prompt is left to compute."""
        now_s = _now_s()
        self.tally.observed(self.booked.predicted.ttft_s, now_s - self.booked_s)
        self.booked.first_token(now_s)
        self.rank_free()

    def free(self, generated_tokens: int = 0) -> None:
        self.booked.free(_now_s(), generated_tokens)


class Router:
    """Decides in process, on the index and load of this ingress; see `dynamo_ray.routing.chooser` for how."""

    def __init__(self, config: DeploymentConfig, workers: Workers) -> None:
        self._config = config
        self._workers = workers
        self._held = config.router.queue is not None
        queue = config.router.queue or QueueConfig()
        self.chooser = Chooser(config.model.name, config.router)
        self.index, self.table = self.chooser.index, self.chooser.table
        self._eligible = Eligible(workers, self.chooser.mask)
        self._selection = Selection(self.chooser, config.router.prefill_on_decode)
        self._occupancy = Occupancy.of(queue, config.limits, self.chooser.ranks, self.table)
        self.room: WaitingRoom[Placement] = WaitingRoom(queue, Placement.free, partial(self._occupancy.busy, 0))
        self.tally = Tally()
        wait_s = queue.worker_wait_s if self._held else 0.0
        self._absence = Absence(workers, config.roles, wait_s, partial(self.room.wake, come=True))

    @property
    def num_legs(self) -> Counter[Holder]:
        """Sent to each rank since this process began."""
        return self.chooser.num_legs

    def up(self, info: WorkerInfo) -> None:
        facts = self._facts(info)
        self.chooser.up(facts)
        self._eligible.changed()
        self._occupancy.up(facts)
        self._absence.came(info.role)
        if facts.caches_prefixes and not facts.tells_events and self.chooser.policy.reads_overlap:
            log.log(
                logging.INFO if self._config.events == "none" else logging.WARNING,
                "%s tells us no KV events: what it caches is guessed from what was sent there in the last %g s",
                info.worker,
                self.chooser.guesses.ttl_s,
            )
        self.room.wake(come=True)

    def down(self, info: WorkerInfo) -> None:
        self.chooser.down(info.worker, info.epoch)
        self._eligible.changed()
        self._absence.went(info.role)
        self.room.wake()

    def turned(self) -> None:
        """A worker has begun or ceased to take requests, though it lives."""
        self.room.wake(come=True)

    def heard(self, info: WorkerInfo, loads: tuple[RankLoad, ...]) -> None:
        for load in loads:
            self.load(Holder(info.worker, info.epoch, load.dp_rank), load)

    def flushed(self, info: WorkerInfo) -> None:
        """A command has emptied its caches: nothing that was sent there before is found there again."""
        self.chooser.flushed(info.worker, info.epoch)

    def apply(self, holder: Holder, batch: KVEventBatch) -> None:
        self.tally.heard(batch)
        self.chooser.apply(holder, batch)

    def uncertain(self, holder: Holder) -> None:
        self.chooser.uncertain(holder)

    def restoring(self, holder: Holder, snapshot: Snapshot) -> Iterator[None]:
        return self.index.restoring(holder, snapshot)

    def load(self, holder: Holder, load: RankLoad) -> None:
        self.chooser.heard(holder, load)
        before = self._occupancy.stalled
        self._occupancy.heard(holder, load, _now_s())
        if self._occupancy.stalled & ~before:
            log.warning(
                "%s rank %d does nothing for its requests, though it lives; nobody waits for it who may use another",
                holder.worker,
                holder.dp_rank,
            )
        self.room.wake()

    def retried(self, failure: LegFailed) -> None:
        self.tally.retries += 1
        log.warning("a request moves to other workers: %s", failure)

    @asynccontextmanager
    async def place(self, attempt: Attempt) -> AsyncIterator[Placement]:
        """Choose and book, as soon as there are ranks that are not busy; leaving frees the bookings.

        Raises:
            NotReady: A role that it needs has no live worker, and none came in time.
            InvalidRequest: None of a role's has what is asked for.
            Overloaded: Every worker of a role refused this request for lack of room, or too many wait already.
            DeadlineExceeded: It waited until then.
        """
        began_s, span, told = _now_s(), get_current_span(), attempt.request.told
        ask = self._ask(attempt)
        short = cache(partial(self._is_short, attempt, ask))  # once, however long it waits
        wish = Wish(self.chooser)
        go = partial(self._go, attempt, ask, wish, told is not None or span.is_recording(), short)
        ticket = partial(self._ticket, attempt, ask, wish)
        try:
            placement = await self.room.enter(
                go, ticket, attempt.deadline_s, again=attempt.number > 0, uncached=partial(self._uncached, ask, wish)
            )
        except TimeoutError:
            raise attempt.deadline_error() from None
        finally:
            wish.free()
        generated_tokens, before = 0, len(attempt.delivered) - attempt.skip
        try:
            if placement.route is not None:
                route = replace(placement.route, waited_s=round(placement.booked_s - began_s, 6))
                span.set_attributes(attributes(route))
                if told is not None:
                    told(route)
            yield placement
            generated_tokens = len(attempt.delivered) - before
        finally:
            placement.free(generated_tokens)
            self.room.wake()

    def explain(self, attempt: Attempt) -> Explanation:
        """Where it would go now, were no rank busy; nothing is booked. Raises as `place` does."""
        choice = self._choose(self._ask(attempt), *self._candidates(attempt))
        return self.chooser.explain(choice)

    def _go(
        self, attempt: Attempt, ask: Ask, wish: Wish, in_words: bool, short: Callable[[bool], bool], kept: int
    ) -> Placement | Busy:
        try:
            prefill, decode = self._candidates(attempt)
            if prefill == 0 and not short(False):
                raise self._no_prefill()
        except NotReady:
            if not self._absence.awaited(waiting=True):
                raise
            return Busy(0, everyone=self._nobody_else(0))
        busy = kept | self._occupancy.busy(len(ask.token_ids)) if self._held else kept
        prefill, decode = self._occupancy.able(prefill, decode, busy)
        if self.chooser.policy.waits:
            choice = wish.seek(partial(self._choose, ask), prefill, decode, busy)
            if choice is None:
                return Busy(wish.stuck, everyone=self._nobody_else(busy))
            return self._book(choice, in_words)
        found = self._selection.free(ask, prefill, decode, busy, short, _now_s())
        if isinstance(found, int):
            return Busy(found, everyone=self._nobody_else(found))
        return self._book(found, in_words)

    def _book(self, choice: Choice, in_words: bool) -> Placement:
        first = None if choice.prefill is None else self._target(choice.prefill)
        decode, now_s = self._target(choice.decode), _now_s()
        route = brief(self._config.router.policy, choice) if in_words else None
        booked = self.chooser.book(choice, now_s)  # last: whatever fails before has booked nothing
        self.tally.took(choice)
        return Placement(first, decode, booked, route, now_s, self.tally, self.room.wake)

    def _nobody_else(self, stuck: int) -> bool:
        """Whether a whole role is stuck which every request needs."""
        needed = {role for role in self._config.roles if not self._eligible.everyone(role) & ~stuck}
        return bool(needed - {Role.PREFILL} if self._config.router.prefill_on_decode else needed)

    def _choose(self, ask: Ask, prefill: int | None, decode: int) -> Choice:
        """Among those masks, which are as those of `_candidates`.

        Raises:
            NotReady: It needs a prefill worker, and there is none.
        """
        choice = self._selection.best(ask, prefill, decode, _now_s())
        if choice is None:
            raise self._no_prefill()
        return choice

    def _is_short(self, attempt: Attempt, ask: Ask, prefill_lives: bool) -> bool:
        """Whether it needs no prefill worker, were no rank busy."""
        decode = self._mask(Role.DECODE, attempt)
        return self._selection.alone(ask, decode, prefill_lives, _now_s()) is not None

    def _no_prefill(self) -> NotReady:
        allowed = self._config.router.prefill_on_decode
        assert allowed is not None  # else nobody gets as far without one
        but = f", and decode workers compute prompts of at most {allowed.limit(False)} uncached tokens"
        return not_ready(self._workers, Role.PREFILL, but)

    def _candidates(self, attempt: Attempt) -> tuple[int | None, int]:
        """Masks of the prefill ranks and of the others. None: those compute every prompt; 0: there are no prefill
        ranks at the moment, and short prompts can do without.
        """
        if self._config.aggregated is not None:
            return None, self._mask(Role.AGGREGATED, attempt)
        if self._config.router.prefill_on_decode is not None and not self._workers.of_role(Role.PREFILL):
            return 0, self._mask(Role.DECODE, attempt)
        return self._mask(Role.PREFILL, attempt), self._mask(Role.DECODE, attempt)

    def _mask(self, role: Role, attempt: Attempt) -> int:
        # Where requests wait here, it is here that they are put in order.
        priority = 0 if self._held else attempt.request.priority
        return self._eligible.mask(role, attempt, priority)

    def _ask(self, attempt: Attempt) -> Ask:
        request = attempt.request
        seed = chain_seed(self._config.model.name, request.lora, request.cache_salt)
        return Ask(attempt.token_ids, seed, request.sampling.max_tokens, request.session, request.priority)

    def _ticket(self, attempt: Attempt, ask: Ask, wish: Wish) -> Ticket:
        choose = partial(self._choose, ask)
        try:
            prefill, decode = self._candidates(attempt)
            if not self.chooser.policy.waits:
                wish.uncached_tokens = choose(prefill, decode).uncached_tokens
            else:
                busy = self._occupancy.busy(len(ask.token_ids))
                wish.hold(choose, *self._occupancy.able(prefill, decode, busy), busy)
        except NotReady:
            if not self._absence.awaited(waiting=False):
                raise
            wish.uncached_tokens = len(ask.token_ids)
        return Ticket(attempt.request.priority, attempt.arrived_s, wish.stuck)

    def _uncached(self, ask: Ask, wish: Wish) -> int:
        return wish.uncached(ask, _now_s())

    def _target(self, pick: Pick) -> Target:
        return Target(self._workers.connection(pick.holder.worker), pick.holder.dp_rank)

    def _facts(self, info: WorkerInfo) -> WorkerFacts:
        engine = info.engine
        return WorkerFacts(
            name=info.worker,
            epoch=info.epoch,
            role=info.role,
            attn_dp_size=engine.attn_dp_size,
            block_size=engine.block_size,
            kv_total_blocks=engine.kv_total_blocks,
            lockstep_group=worker_of(info.worker),
            handoff=engine.handoff,
            caches_prefixes=engine.caches_prefixes,
            tells_events=self._config.events != "none" and bool(engine.kv_event_sources),
        )


def _now_s() -> float:
    return asyncio.get_running_loop().time()
