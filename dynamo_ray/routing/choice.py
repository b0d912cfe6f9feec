"""Where a request should go: what `Chooser.choose` answers with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dynamo_ray.routing.latency import Prediction, predict
from dynamo_ray.routing.policy import Floats, Leg, Policy
from dynamo_ray.routing.ranks import Holder


@dataclass(slots=True, eq=False)
class Pick:
    """The rank chosen for one leg, and what it was chosen from."""

    leg: Leg
    costs: Floats
    policy: Policy
    """The one that scored: the fallback, where the user's own failed."""
    place: int
    """Of the chosen candidate."""

    @property
    def terms(self) -> Mapping[str, Floats]:
        """What the costs are the sum of, where the policy says; by the speeds of now."""
        scored = (self.policy.terms or self.policy.score)(self.leg)
        if not isinstance(scored, Mapping):
            return {}
        return {name: np.broadcast_to(values, len(self.leg.pool)) for name, values in scored.items()}

    @property
    def holder(self) -> Holder:
        return self.leg.pool.holders[self.place]

    @property
    def bit(self) -> int:
        """The rank as a mask."""
        return 1 << int(self.leg.pool.columns[self.place])

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

    @property
    def mask(self) -> int:
        """Of its ranks."""
        return self.decode.bit | (0 if self.prefill is None else self.prefill.bit)

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens to compute."""
        return (self.prefill or self.decode).uncached_tokens

    def predict(self) -> Prediction:
        first = None if self.prefill is None else (self.prefill.leg, self.prefill.place)
        return predict(first, (self.decode.leg, self.decode.place))
