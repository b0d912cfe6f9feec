"""What a replay came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count as goodput."""

    ttft_s: float = 2.0
    itl_s: float = 0.1
    """Mean time between its tokens."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Nearest-rank: each is a value that was seen. All 0 where none was."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        ordered = sorted(values) or [0.0]
        return cls(*(ordered[ceil(len(ordered) * share) - 1] for share in (0.5, 0.9, 0.99)))


@dataclass(frozen=True, slots=True)
class Report:
    """One policy on one trace."""

    policy: str
    rate: float
    """How much faster than recorded the requests came."""
    num_ranks: int
    num_requests: int
    num_refused: int
    """Too long for any rank: never dispatched, in nothing below."""
    num_turned_away: int
    """Came while the ingress's queue was full: requests and prompt tokens without a hit, a TTFT or goodput."""
    duration_s: float
    """From the first arrival to the last token."""
    prompt_tokens: int
    hit_tokens: int
    """Prompt tokens found in the prefix cache of the rank that prefilled."""
    ideal_hit_tokens: int
    """What one cache with the capacity of all those ranks would have found (simulator/ideal.py)."""
    ttft_s: Percentiles
    itl_s: Percentiles
    """Of requests, each by the mean time between its tokens."""
    slo: Slo
    num_within_slo: int
    max_over_mean_load: float
    """Of the busiest rank to all of its role, in tokens computed and decoded over the run; the worst role's."""
    decision_cpu_s: float
    """Choosing and booking, on this machine, mean of a request."""
    num_policy_errors: int
    """Legs that the policy could not place, which then went to the rank with the fewest requests: above 0, this report
    is of something else than the policy."""
    policy_error: str | None
    """What the first of them failed of."""

    @property
    def hit_share(self) -> float:
        """Of the prompt tokens, in [0, 1]."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def share_of_ideal(self) -> float:
        """Hits against those of one cache; 1 where that has none."""
        return self.hit_tokens / self.ideal_hit_tokens if self.ideal_hit_tokens else 1.0

    @property
    def goodput_per_s(self) -> float:
        """Requests within the SLO in a second."""
        return self.num_within_slo / self.duration_s if self.duration_s else 0.0
