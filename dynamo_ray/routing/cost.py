"""Which rank takes a leg: policies as plain functions from candidates to costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dynamo_ray.config import RouterConfig
from dynamo_ray.routing.kv_index import Holder
from dynamo_ray.routing.load import Load


@dataclass(frozen=True, slots=True)
class Candidate:
    """A rank that could take the leg."""

    holder: Holder
    overlap_blocks: int
    """Leading prompt blocks it already holds."""
    load: Load


@dataclass(frozen=True, slots=True)
class Leg:
    """What is to be placed."""

    prompt_blocks: int
    """Rounded up."""
    computes_prompt: bool
    """False for a decode leg that is handed its KV."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The chosen candidate, and every candidate's cost in the order given, for explanation."""

    chosen: Candidate
    costs: tuple[tuple[Candidate, float], ...]


Policy = Callable[[Leg, Sequence[Candidate], int, RouterConfig], Sequence[float]]
"""(leg, candidates, turn, config) -> a cost each, lower is better. `turn` counts decisions."""


def blocks(leg: Leg, candidates: Sequence[Candidate], turn: int, config: RouterConfig) -> list[float]:
    """Blocks to compute plus blocks being held, in blocks (Dynamo 1.6.1's published router cost, device tier only).

    cost = prefill_load_scale * max(0, queued + prompt - overlap_score_credit * overlap) + held
    """
    costs = []
    for candidate in candidates:
        held = candidate.load.decode_blocks + leg.prompt_blocks
        if leg.computes_prompt:
            to_compute = candidate.load.prefill_blocks + leg.prompt_blocks
            to_compute_uncached = max(0.0, to_compute - config.overlap_score_credit * candidate.overlap_blocks)
            costs.append(config.prefill_load_scale * to_compute_uncached + held)
        else:
            costs.append(float(held))
    return costs


def round_robin(leg: Leg, candidates: Sequence[Candidate], turn: int, config: RouterConfig) -> list[float]:
    """Each candidate in turn, whatever it holds."""
    return [float((index - turn) % len(candidates)) for index in range(len(candidates))]


POLICIES: dict[str, Policy] = {"blocks": blocks, "round_robin": round_robin}
READS_OVERLAP = frozenset({"blocks"})
"""Policies whose costs depend on what is cached where."""


def decide(leg: Leg, candidates: Sequence[Candidate], turn: int, config: RouterConfig) -> Decision:
    """The cheapest candidate; ties go to the fewest requests, then in rotation, so that equals share the work.

    Args:
        candidates: not empty, in a stable order.
    """
    costs = POLICIES[config.policy](leg, candidates, turn, config)
    count = len(candidates)
    best = min(range(count), key=lambda i: (costs[i], candidates[i].load.num_requests, (i - turn) % count))
    return Decision(candidates[best], tuple(zip(candidates, costs, strict=True)))
