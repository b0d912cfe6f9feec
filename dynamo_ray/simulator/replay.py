"""A trace against a deployment that does not exist: the router's own code, modelled ranks, virtual time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import count
from math import inf
from pathlib import Path

import backends
from backends.engine import EngineStartError, Role
from backends.kv_events import KVEventBatch
from backends.simulated_args import parse_args
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.errors import ConfigError, Problem
from dynamo_ray.request.wish import Wish
from dynamo_ray.routing.block_hash import chain_seed
from dynamo_ray.routing.chooser import Booked, Choice, WorkerFacts
from dynamo_ray.routing.policy import Ask
from dynamo_ray.routing.ranks import Holder
from dynamo_ray.simulator.group import Group
from dynamo_ray.simulator.ideal import ideal_hit_tokens
from dynamo_ray.simulator.rank import Leg, Rank, RankModel, What
from dynamo_ray.simulator.report import Percentiles, Report, Slo
from dynamo_ray.simulator.router import Arrival, Placed, Router
from dynamo_ray.simulator.traces import TraceRequest, faster, read_trace

EVENT_DELAY_S = 0.005
"""From a block's being stored to the router's knowing."""
LOAD_INTERVAL_S = 1.0
"""Between two words of a rank about its load: the data plane's heartbeat."""
_FIRST_ANSWER_TOKEN = 1 << 30
"""Answers are told apart by the request's number; blocks of prompts have smaller ids."""


def simulate(
    config: DeploymentConfig,
    trace: Path | str | Sequence[TraceRequest],
    *,
    policy: str | None = None,
    rate: float = 1.0,
    models: Mapping[Role, RankModel] | None = None,
    slo: Slo | None = None,
) -> Report:
    """Replay a trace through the deployment's router; same inputs, same report but for `decision_cpu_s`.

    Nothing is started. Every worker's DP ranks step in lockstep; what can never fit a rank is refused and counted.
    Ranks cache prefixes where their `engine_args` have them do so, and tell of it unless `events: none`. Requests wait
    in the ingress as `router.queue` has it, and are refused where it is full; nobody has a deadline.

    Args:
        trace: a file of Mooncake's format, or requests in order of arrival.
        policy: in place of the configuration's.
        rate: how much faster than recorded requests come.
        models: how fast each role's ranks are; needed where the backend is not `simulated`.

    Raises:
        ConfigError: The trace or an argument is wrong; names it.
    """
    requests = read_trace(Path(trace)) if isinstance(trace, str | Path) else tuple(trace)
    problems = [*_problems(config, requests, policy, rate, models, slo)]
    if problems:
        raise ConfigError(tuple(problems))
    if policy is not None:
        router = config.router.model_copy(update={"policy": policy})
        config = config.model_copy(update={"router": router})
    known = {role: rank_model(config, role) for role in config.roles} if models is None else models
    try:
        replay = _Replay(config, known, slo or Slo())
    except ValueError as error:
        field = "router.policy" if policy is None else "policy"
        raise ConfigError((Problem(field, str(error)),)) from error
    return replay.run(tuple(faster(requests, rate)), rate)


def _problems(
    config: DeploymentConfig,
    trace: Sequence[TraceRequest],
    policy: str | None,
    rate: float,
    models: Mapping[Role, RankModel] | None,
    slo: Slo | None,
) -> Iterator[Problem]:
    if not isinstance(config, DeploymentConfig):
        yield Problem("config", f"is a {type(config).__name__}; give what `load_config` returns")
        return
    if policy is not None and not isinstance(policy, str):
        yield Problem("policy", "is no name; give a policy one by register_policy(name, policy), and that name here")
    if not isinstance(rate, int | float) or not 0 < rate < inf:
        yield Problem("rate", f"{rate!r} is not above 0")
    if models is not None and (not isinstance(models, Mapping) or config.roles.keys() - models.keys()):
        yield Problem("models", f"give a RankModel for each of {', '.join(config.roles)}")
    if slo is not None and not isinstance(slo, Slo):
        yield Problem("slo", f"is a {type(slo).__name__}; give Slo(ttft_s, itl_s)")
    if not trace:
        yield Problem("trace", "holds no requests")
    for number, request in enumerate(trace):
        if not isinstance(request, TraceRequest):
            yield Problem(f"trace[{number}]", f"is a {type(request).__name__}; give a TraceRequest")
            return
        if number and request.arrival_s < trace[number - 1].arrival_s:
            yield Problem(f"trace[{number}]", "comes before the one before it; give them in order of arrival")
            return


def rank_model(config: DeploymentConfig, role: Role) -> RankModel:
    """The model of a simulated engine's rank, as its `engine_args` have it.

    Raises:
        ConfigError: The backend is a real engine, of which no speed is known here.
    """
    if config.backend != "simulated":
        message = (
            f"how fast a {config.backend} rank is has to be said: block_size, kv_total_blocks, prefill_tokens_per_s, "
            "step_s"
        )
        raise ConfigError((Problem("models", message),))
    try:
        args = parse_args(config.roles[role].engine_args)
    except EngineStartError as error:
        raise ConfigError((Problem(role.value, str(error)),)) from error
    return RankModel(
        block_size=args.block_size,
        kv_total_blocks=args.kv_blocks,
        max_running=args.max_running,
        max_batched_tokens=args.max_batched_tokens,
        prefill_tokens_per_s=args.prefill_tokens_per_s,
        step_s=args.step_s,
        transfer_tokens_per_s=args.transfer_tokens_per_s,
    )


def _caches_prefixes(config: DeploymentConfig, role: Role) -> bool:
    try:
        return backends.caches_prefixes(config.backend, role, config.roles[role].engine_args)
    except EngineStartError as error:
        raise ConfigError((Problem(role.value, str(error)),)) from error


@dataclass(slots=True)
class _Request:
    """A request under way."""

    asked: TraceRequest
    number: int
    choice: Choice
    booked: Booked
    prefill: Leg | None = None
    """Where it is split: the leg whose blocks wait to be copied."""
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.asked.arrival_s

    @property
    def itl_s(self) -> float | None:
        """None of an answer of one token."""
        gaps = self.asked.answer_tokens - 1
        return (self.last_token_s - self.first_token_s) / gaps if gaps else None

    def within(self, slo: Slo) -> bool:
        return self.ttft_s <= slo.ttft_s and (self.itl_s or 0.0) <= slo.itl_s


class _Replay:
    """One run. What happens at a time is called at it; what is due at once, in the order of making."""

    def __init__(self, config: DeploymentConfig, models: Mapping[Role, RankModel], slo: Slo) -> None:
        self._slo = slo
        self._policy = config.router.policy
        self._models = models
        self._seed = chain_seed(config.model.name)
        self._tells_events = config.events != "none"
        self._router = Router(config)
        self._groups: dict[str, Group] = {}
        self._roles: dict[Role, list[Rank]] = {role: [] for role in config.roles}
        self._told: deque[tuple[float, Holder, KVEventBatch]] = deque()
        """KV events on their way to the router."""
        self._sent = dict[Holder, int]()
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._ends: dict[str, float] = {}
        """When each busy group's step is over; an event for another time was overtaken."""
        self._live: dict[int, _Request] = {}
        self._done: list[_Request] = []
        self._hit_tokens = 0
        self._woken = False
        """Those that wait will be looked at, in this moment."""
        for role, role_config in config.roles.items():
            caches = _caches_prefixes(config, role)
            facts = partial(
                WorkerFacts,
                epoch=1,
                role=role,
                attn_dp_size=role_config.parallelism.attn_dp,
                block_size=models[role].block_size,
                kv_total_blocks=models[role].kv_total_blocks,
                handoff="none" if role is Role.AGGREGATED else "sequential",
                caches_prefixes=caches,
                tells_events=caches and self._tells_events,
            )
            for replica in range(role_config.replicas):
                self._add(facts(f"{role.value}-{replica}"))

    def run(self, trace: Sequence[TraceRequest], rate: float) -> Report:
        fitting = [request for request in trace if self._fits(request)]
        for number, request in enumerate(fitting):
            self._at(request.arrival_s, partial(self._arrive, number, request))
        self._at(0.0, self._tell_load)
        while self._heap:
            now_s, _, happen = heappop(self._heap)
            happen(now_s)
        assert not self._live, "every request ends"
        assert not self._router.any_waits, "nobody waits for ranks that are free"
        return self._report(fitting, len(trace) - len(fitting), rate)

    def _add(self, facts: WorkerFacts) -> None:
        self._router.up(facts)
        group = Group(facts.name, self._models[facts.role], facts.attn_dp_size, facts.caches_prefixes)
        self._groups[facts.name] = group
        self._roles[facts.role] += group.ranks

    def _at(self, time_s: float, happen: Callable[[float], None]) -> None:
        heappush(self._heap, (time_s, next(self._order), happen))

    def _fits(self, request: TraceRequest) -> bool:
        longest = request.prompt_tokens + request.answer_tokens
        return all(ranks[0].fits(longest) for ranks in self._roles.values())

    def _arrive(self, number: int, asked: TraceRequest, now_s: float) -> None:
        self._hear(now_s)
        ask = Ask(asked.token_ids(), self._seed, asked.answer_tokens, asked.session)
        placed = self._router.enter(Arrival(number, asked, ask, Wish(self._router.chooser)), now_s)
        if placed is not None:
            self._send(placed, now_s)
        else:
            self._room(now_s)  # it may stand before all others

    def _room(self, now_s: float) -> None:
        """Something may be free: look, as soon as all else of this moment is done."""
        if self._router.any_waits and not self._woken:
            self._woken = True
            self._at(now_s, self._look)

    def _look(self, now_s: float) -> None:
        self._woken = False
        self._hear(now_s)
        for placed in self._router.leaving(now_s):
            self._send(placed, now_s)

    def _send(self, placed: Placed, now_s: float) -> None:
        arrival, choice = placed.arrival, placed.choice
        number, prompt = arrival.number, list(arrival.ask.token_ids)
        self._live[number] = _Request(arrival.asked, number, choice, placed.booked)
        if choice.prefill is None:
            answer = [_FIRST_ANSWER_TOKEN + number] * arrival.asked.answer_tokens
            self._submit(choice.decode.holder, Leg(number, prompt + answer, len(prompt), Role.AGGREGATED), now_s)
        else:
            self._submit(choice.prefill.holder, Leg(number, prompt, len(prompt), Role.PREFILL), now_s)

    def _submit(self, holder: Holder, leg: Leg, now_s: float) -> None:
        group = self._groups[holder.worker]
        group.ranks[holder.dp_rank].submit(leg)
        self._wake(group, now_s)

    def _wake(self, group: Group, now_s: float) -> None:
        """Somebody has come to the group."""
        end_s = group.hurry(now_s) if group.busy else None
        if end_s is not None:
            self._end_at(group, end_s)
        elif not group.busy:
            self._begin(group, now_s)

    def _begin(self, group: Group, now_s: float) -> None:
        admitted, end_s = group.begin(now_s)
        for leg, _ in admitted:
            copied = leg.missing / self._models[Role.DECODE].transfer_tokens_per_s
            self._at(now_s + copied, partial(self._landed, group, leg))
        self._tell(group, now_s)
        if end_s is not None:
            self._end_at(group, end_s)

    def _end_at(self, group: Group, end_s: float) -> None:
        self._ends[group.worker] = end_s
        self._at(end_s, partial(self._end, group))

    def _end(self, group: Group, now_s: float) -> None:
        if self._ends.get(group.worker) != now_s:
            return
        del self._ends[group.worker]
        for leg, what in group.end():
            request = self._live[leg.number]
            if what is What.FIRST_TOKEN:
                request.first_token_s = now_s
                request.booked.first_token(now_s)
                self._room(now_s)
            elif leg.role is Role.PREFILL:
                self._hand_over(request, leg, now_s)
            else:
                self._finish(request, now_s)
            if what is What.FIRST_TOKEN and leg.role is Role.AGGREGATED:
                self._hit_tokens += leg.cached
        self._tell(group, now_s)
        self._begin(group, now_s)

    def _hand_over(self, request: _Request, leg: Leg, now_s: float) -> None:
        """The prompt is computed: its decode leg asks for blocks, and the prefill rank keeps its own until then."""
        self._hit_tokens += leg.cached
        request.booked.prefill_done(now_s)
        self._room(now_s)
        request.prefill = leg
        answer = [_FIRST_ANSWER_TOKEN + request.number] * request.asked.answer_tokens
        decode = Leg(request.number, leg.tokens + answer, leg.prompt_tokens, Role.DECODE)
        self._submit(request.choice.decode.holder, decode, now_s)

    def _landed(self, group: Group, leg: Leg, now_s: float) -> None:
        request = self._live[leg.number]
        assert request.prefill is not None, "only what was handed over lands"
        assert request.choice.prefill is not None, "and only a split request is handed over"
        held_by = request.choice.prefill.holder
        self._groups[held_by.worker].ranks[held_by.dp_rank].release(request.prefill)
        self._wake(self._groups[held_by.worker], now_s)
        group.ranks[request.choice.decode.holder.dp_rank].landed(leg)
        self._wake(group, now_s)

    def _finish(self, request: _Request, now_s: float) -> None:
        request.last_token_s = now_s
        request.booked.free(now_s, request.asked.answer_tokens)
        self._done.append(self._live.pop(request.number))
        self._room(now_s)

    def _tell(self, group: Group, now_s: float) -> None:
        """Send what the group's ranks have stored and evicted on its way to the router."""
        for rank in group.ranks:
            events, rank.pool.events = rank.pool.events, []
            if events and self._tells_events:
                holder = Holder(group.worker, 1, rank.dp_rank)
                self._sent[holder] = sequence = self._sent.get(holder, -1) + 1
                self._told.append((now_s + EVENT_DELAY_S, holder, KVEventBatch(sequence, rank.dp_rank, events)))

    def _hear(self, now_s: float) -> None:
        while self._told and self._told[0][0] <= now_s:
            _, holder, batch = self._told.popleft()
            self._router.chooser.apply(holder, batch)

    def _tell_load(self, now_s: float) -> None:
        for group in self._groups.values():
            for rank in group.ranks:
                self._router.heard(Holder(group.worker, 1, rank.dp_rank), rank.load(), now_s)
        self._room(now_s)
        if self._heap:
            self._at(now_s + LOAD_INTERVAL_S, self._tell_load)

    def _report(self, trace: Sequence[TraceRequest], num_refused: int, rate: float) -> Report:
        caching = Role.PREFILL if Role.PREFILL in self._roles else Role.AGGREGATED
        model, ranks = self._models[caching], self._roles[caching]
        done = self._done
        last_s = max((request.last_token_s for request in done), default=0.0)
        return Report(
            policy=self._policy,
            rate=rate,
            num_ranks=sum(map(len, self._roles.values())),
            num_requests=len(trace),
            num_refused=num_refused,
            num_turned_away=self._router.num_refused,
            duration_s=last_s - trace[0].arrival_s if trace else 0.0,
            prompt_tokens=sum(request.prompt_tokens for request in trace),
            hit_tokens=self._hit_tokens,
            ideal_hit_tokens=ideal_hit_tokens(trace, model.block_size, model.kv_total_blocks * len(ranks)),
            ttft_s=Percentiles.of([request.ttft_s for request in done]),
            itl_s=Percentiles.of([itl_s for request in done if (itl_s := request.itl_s) is not None]),
            slo=self._slo,
            num_within_slo=sum(request.within(self._slo) for request in done),
            max_over_mean_load=max(_max_over_mean(ranks) for ranks in self._roles.values()),
            decision_cpu_s=self._router.decision_cpu_s / len(trace) if trace else 0.0,
            num_policy_errors=self._router.chooser.num_policy_errors,
            policy_error=self._router.chooser.policy_error,
        )


def _max_over_mean(ranks: Sequence[Rank]) -> float:
    work = [rank.work_tokens for rank in ranks]
    return max(work) * len(work) / sum(work) if any(work) else 1.0
