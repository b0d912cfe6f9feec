"""Why a request goes where it goes: a choice's candidates, what each would cost, and the reason in words."""

from __future__ import annotations

import math

import msgspec

from dynamo_ray.routing.choice import Choice, Pick


class Candidate(msgspec.Struct, frozen=True):
    """A rank that could have taken the leg."""

    worker: str
    epoch: int
    dp_rank: int
    chosen: bool
    cost: float | None
    """In the policy's own unit, lower is better; None: it must not be taken."""
    terms: dict[str, float | None]
    """What the cost is the sum of, where the policy says."""
    overlap_blocks: int
    """Leading prompt blocks that it holds ready to use, or is about to."""
    host_overlap_blocks: int
    """The same, counting those in host memory in."""
    disk_overlap_blocks: int
    """The same, counting every tier in."""
    queued_tokens: int
    """Prompt tokens to compute before this one's."""
    num_requests: int
    kv_tokens: int
    """Tokens whose KV its requests hold."""


class LegExplanation(msgspec.Struct, frozen=True):
    prompt_tokens: int
    block_size: int
    why: str
    candidates: list[Candidate]
    """Cheapest first."""


class Explanation(msgspec.Struct, frozen=True):
    """All there is to say of a choice. The same state, request and policy give the same one."""

    policy: str
    prefill: LegExplanation | None
    """None: whoever decodes computes the prompt."""
    decode: LegExplanation
    predicted_ttft_s: float
    predicted_itl_s: float


class ChosenRank(msgspec.Struct, frozen=True):
    worker: str
    dp_rank: int
    overlap_blocks: int
    cost: float | None
    why: str


class Route(msgspec.Struct, frozen=True):
    """A choice in brief, small enough for a header."""

    policy: str
    prefill: ChosenRank | None
    decode: ChosenRank
    waited_s: float = 0.0
    """For a rank that is not busy."""


def explain(name: str, choice: Choice) -> Explanation:
    """`name` is what the configuration calls the policy that chose. Speeds, for the predictions, are those of now."""
    prefill = None if choice.prefill is None else _leg(choice.prefill)
    predicted = choice.predict()
    return Explanation(name, prefill, _leg(choice.decode), predicted.ttft_s, predicted.itl_s)


def brief(name: str, choice: Choice) -> Route:
    return Route(name, None if choice.prefill is None else _chosen(choice.prefill), _chosen(choice.decode))


def attributes(route: Route) -> dict[str, str | int | float]:
    """As OpenTelemetry takes them, for the span of the request: dynamo_ray.route.<role>.<what>."""
    found: dict[str, str | int | float] = {
        "dynamo_ray.route.policy": route.policy,
        "dynamo_ray.route.waited_s": route.waited_s,
    }
    for role, rank in (("prefill", route.prefill), ("decode", route.decode)):
        given = {} if rank is None else msgspec.structs.asdict(rank)
        found |= {f"dynamo_ray.route.{role}.{name}": value for name, value in given.items() if value is not None}
    return found


def _chosen(pick: Pick) -> ChosenRank:
    return ChosenRank(pick.holder.worker, pick.holder.dp_rank, pick.overlap_blocks, _number(pick.cost), _why(pick))


def _leg(pick: Pick) -> LegExplanation:
    leg, terms = pick.leg, pick.terms
    costs = pick.costs.tolist()
    candidates = [
        Candidate(
            holder.worker,
            holder.epoch,
            holder.dp_rank,
            place == pick.place,
            _number(costs[place]),
            {name: _number(float(values[place])) for name, values in terms.items()},
            int(leg.coming_blocks[place]),
            int(leg.host_blocks[place]),
            int(leg.disk_blocks[place]),
            int(leg.queued_tokens[place]),
            int(leg.num_requests[place]),
            int(leg.kv_tokens[place]),
        )
        for place, holder in enumerate(leg.holders)
    ]
    candidates.sort(key=lambda c: (c.cost is None, c.cost or 0.0, not c.chosen))
    return LegExplanation(leg.prompt_tokens, leg.block_size, _why(pick), candidates)


def _why(pick: Pick) -> str:
    costs, own = pick.costs, pick.cost
    if len(costs) == 1:
        return "the only candidate"
    least = float(costs.min())
    if own > least:
        return f"picked by the policy, though the lowest cost is {least:.4g}"
    num_equal = int((costs == least).sum()) - 1
    if num_equal:
        return f"lowest cost, like {num_equal} more of {len(costs)}: fewest requests first, then in turn"
    place = int(costs.argsort()[1])
    other = pick.leg.holders[place]
    next_best = float(costs[place])
    if math.isinf(next_best):
        return f"the only one of {len(costs)} that may be taken"
    return f"lowest cost of {len(costs)}; next is {other.worker} rank {other.dp_rank} at {next_best:.4g}"


def _number(value: float) -> float | None:
    """JSON has no infinity; six digits say enough."""
    return None if math.isinf(value) else float(f"{value:.6g}")
