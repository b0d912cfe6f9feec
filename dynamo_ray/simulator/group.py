"""The DP ranks of one worker, stepping in lockstep: a step takes as long as its slowest rank."""

from __future__ import annotations

from math import ceil

from dynamo_ray.simulator.rank import Outcome, Rank, RankModel

MAX_EQUAL_STEPS = 64
"""Steps that only decode are alike until somebody comes or ends, and are taken together, up to so many."""


class Group:
    """`begin` a step, then `end` it at the time that `begin`, or the last `hurry`, gave."""

    def __init__(self, worker: str, model: RankModel, num_ranks: int, caches_prefixes: bool = True) -> None:
        self.worker = worker
        self.ranks = [Rank(model, dp_rank, caches_prefixes) for dp_rank in range(num_ranks)]
        self.busy = False
        self._began_s = 0.0
        self._step_s = 0.0
        self._steps = 0

    def begin(self, now_s: float) -> tuple[list[Outcome], float | None]:
        """Plan every rank's next step; who was admitted to wait for KV, and when the step ends: None, nothing to do."""
        assert not self.busy, "a step is ended before the next begins"
        admitted = [outcome for rank in self.ranks for outcome in rank.plan()]
        equal = [steps for rank in self.ranks if (steps := rank.equal_steps()) is not None]
        if not equal:
            return admitted, None
        self.busy = True
        self._began_s, self._steps = now_s, min(*equal, MAX_EQUAL_STEPS)
        self._step_s = max(rank.step_time_s(self._steps) for rank in self.ranks)
        return admitted, now_s + self._steps * self._step_s

    def hurry(self, now_s: float) -> float | None:
        """Somebody has come: end after the step that runs now. When that is, if it is earlier than said before."""
        running = max(1, ceil((now_s - self._began_s) / self._step_s))
        if running >= self._steps:
            return None
        self._steps = running
        return self._began_s + running * self._step_s

    def end(self) -> list[Outcome]:
        """The step is over: what it brought, rank by rank."""
        self.busy = False
        return [outcome for rank in self.ranks for outcome in rank.advance(self._steps)]
