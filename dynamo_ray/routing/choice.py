"""Where a request should go, and why: the values that `Chooser.choose` answers with."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from dynamo_ray.routing.latency import Prediction, predict
from dynamo_ray.routing.policy import Floats, Leg, Terms
from dynamo_ray.routing.ranks import Holder


@dataclass(slots=True, eq=False)
class Pick:
    """The rank chosen for one leg, and what it was chosen from."""

    leg: Leg
    costs: Floats
    terms: Terms
    """What the costs are the sum of."""
    place: int
    """Of the chosen candidate."""

    @property
    def holder(self) -> Holder:
        return self.leg.pool.holders[self.place]

    @property
    def group(self) -> str:
        """The lockstep group that the rank belongs to."""
        return self.leg.pool.groups[self.place]

    @property
    def cost(self) -> float:
        return float(self.costs[self.place])

    @property
    def overlap_blocks(self) -> int:
        """Leading prompt blocks that the rank holds, or will when it comes to this request."""
        return int(self.leg.coming_blocks[self.place])

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens that the rank computes; 0 on a decode leg."""
        if not self.leg.computes_prompt:
            return 0
        return max(1, self.leg.prompt_tokens - self.overlap_blocks * self.leg.block_size)


@dataclass(slots=True, eq=False)
class Choice:
    """Where a request should go; nothing is counted until it is booked. Holds arrays over all candidates: drop it once
    it has been booked and explained.
    """

    prefill: Pick | None
    """None: the decode rank computes the prompt itself."""
    decode: Pick

    def predict(self) -> Prediction:
        first = None if self.prefill is None else (self.prefill.leg, self.prefill.place)
        return predict(first, (self.decode.leg, self.decode.place))


class CandidateCost(msgspec.Struct, frozen=True):
    """One rank that could have taken the leg."""

    worker: str
    dp_rank: int
    cost: float | None
    """None: the policy ruled it out."""
    terms: dict[str, float]
    """What the cost is the sum of."""
    overlap_blocks: int
    coming_blocks: int
    """The same, with what it is computing already."""
    host_blocks: int
    disk_blocks: int
    queued_tokens: float
    num_requests: float
    kv_tokens: float


class LegReasons(msgspec.Struct, frozen=True):
    role: str
    worker: str
    dp_rank: int
    why: str
    candidates: list[CandidateCost]
    """The cheapest first."""


class Reasons(msgspec.Struct, frozen=True):
    """A choice as a person or a program can read it."""

    policy: str
    prompt_tokens: int
    prompt_blocks: int
    prefill: LegReasons | None
    decode: LegReasons
    predicted_ttft_s: float
    predicted_itl_s: float


def explain(policy: str, choice: Choice) -> Reasons:
    """Every candidate of both legs with what it held, carried and cost at that moment; speeds are those of now."""
    leg, predicted = choice.decode.leg, choice.predict()
    return Reasons(
        policy,
        leg.prompt_tokens,
        leg.prompt_blocks,
        None if choice.prefill is None else _reasons(choice.prefill),
        _reasons(choice.decode),
        predicted.ttft_s,
        predicted.itl_s,
    )


def _reasons(pick: Pick) -> LegReasons:
    order = pick.costs.argsort(kind="stable").tolist()
    holder = pick.holder
    candidates = [_candidate(pick, place) for place in order]
    return LegReasons(pick.leg.role.value, holder.worker, holder.dp_rank, _why(pick, order), candidates)


def _candidate(pick: Pick, place: int) -> CandidateCost:
    leg, cost = pick.leg, float(pick.costs[place])
    holder = leg.holders[place]
    return CandidateCost(
        holder.worker,
        holder.dp_rank,
        None if cost == float("inf") else cost,
        {name: float(term[place]) for name, term in pick.terms.items()},
        int(leg.device_blocks[place]),
        int(leg.coming_blocks[place]),
        int(leg.host_blocks[place]),
        int(leg.disk_blocks[place]),
        float(leg.queued_tokens[place]),
        float(leg.num_requests[place]),
        float(leg.kv_tokens[place]),
    )


def _why(pick: Pick, order: list[int]) -> str:
    """Against the cheapest of the others, and by which term."""
    others = [place for place in order if place != pick.place and pick.costs[place] != float("inf")]
    if not others:
        return "the only candidate"
    rival = others[0]
    holder, less = pick.leg.holders[rival], pick.costs[rival] - pick.cost
    name = f"{holder.worker} rank {holder.dp_rank}"
    if less == 0:
        return f"costs as much as {name}; the fewest requests decide, then the turn"
    if less < 0:
        return f"costs {-less:.4g} more than {name} by itself; the pair of legs decides, or chance"
    by = max(pick.terms, key=lambda term: float(pick.terms[term][rival] - pick.terms[term][pick.place]))
    saved = float(pick.terms[by][rival] - pick.terms[by][pick.place])
    return f"costs {less:.4g} less than {name}; {by} is {saved:.4g} less"
