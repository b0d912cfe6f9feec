"""When waiting for workers that do not come up no longer helps."""

from __future__ import annotations

from dynamo_ray.errors import StartError
from dynamo_ray.request.membership import Phase, WorkerStatus

MAX_FAILED_STARTS = 2
"""A worker that fails this often before anything was ready will not start by itself."""
MAX_UNPLACED_S = 60.0
"""How long a local deployment waits for room."""


class Patience:
    """Told the workers' states again and again."""

    def __init__(self) -> None:
        self._unplaced_since_s: dict[str, float] = {}

    def check(self, found: tuple[WorkerStatus, ...], now_s: float) -> None:
        """Raises StartError for a worker that failed too often, or has waited too long for its first place."""
        for status in found:
            if status.restarts >= MAX_FAILED_STARTS and status.phase is not Phase.READY:
                raise StartError(f"{status.worker} does not start: {status.detail}")
            if status.epoch > 0:
                self._unplaced_since_s.pop(status.worker, None)
            elif now_s - self._unplaced_since_s.setdefault(status.worker, now_s) > MAX_UNPLACED_S:
                raise StartError(f"{status.worker} has no place: {status.detail}")
