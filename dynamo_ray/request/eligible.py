"""Which live workers a try at a request may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from backends.admission import Wishes, lacking, wishes
from backends.engine import Role
from dynamo_ray.errors import InvalidRequest, NotReady, Overloaded
from dynamo_ray.request.attempt import Attempt
from dynamo_ray.request.connection import LegFailed, WorkerConnection
from dynamo_ray.request.waiting import RETRY_AFTER_S
from dynamo_ray.request.wire import worker_of
from dynamo_ray.request.workers import Workers

MAX_REMEMBERED = 64
"""Kinds of requests of which it is remembered who can: by role, and by what they ask of an engine."""

Connections = Sequence[WorkerConnection]


class Eligible:
    """Answers as masks of ranks; `mask_of(worker)` says those of one.

    What depends on nothing but who is there is found once for each membership: a thousand workers cost a request no
    more than ten. Whoever changes what `mask_of` says calls `changed`.
    """

    def __init__(self, workers: Workers, mask_of: Callable[[str], int]) -> None:
        self._workers, self._mask_of = workers, mask_of
        self._able: dict[tuple[Role, Wishes | None], tuple[Connections, Connections, int]] = {}
        """Among the first, the second can, and those are their ranks."""

    def changed(self) -> None:
        self._able.clear()

    def everyone(self, role: Role) -> int:
        """The ranks of all its live workers; 0 where there is none."""
        return self._find(role, None)[1]

    def mask(self, role: Role, attempt: Attempt, priority: int) -> int:
        """Of live workers that can, without those that failed this request while there are others; never a full one.

        Nodes of one worker fail together, but each has room of its own.

        Args:
            priority: what an engine must be able to order by; 0: nothing.

        Raises:
            NotReady: The role has no live worker.
            InvalidRequest: None of them has what is asked for.
            Overloaded: Every one of them refused this request for lack of room.
        """
        request = attempt.request
        able, mask = self._find(role, wishes(request.sampling, request.cache_salt, priority, request.lora))
        if not able:
            raise not_ready(self._workers, role)
        return self._mask(_left(able, attempt.excluded, role)) if attempt.excluded else mask

    def _find(self, role: Role, asked: Wishes | None) -> tuple[Connections, int]:
        live = self._workers.of_role(role)
        known = self._able.get((role, asked))
        if known is not None and known[0] is live:
            return known[1], known[2]
        able = _able(live, asked)
        mask = self._mask(able)
        if len(self._able) >= MAX_REMEMBERED:
            self._able.clear()
        self._able[role, asked] = live, able, mask
        return able, mask

    def _mask(self, connections: Connections) -> int:
        mask = 0
        for connection in connections:
            mask |= self._mask_of(connection.info.worker)
        return mask


def not_ready(workers: Workers, role: Role, but: str = "") -> NotReady:
    """The error of a request that needs a role without a live worker; `but`: what can be served all the same."""
    paused = "".join(f"; {worker} {why}" for worker, why in workers.paused(role).items())
    return NotReady(f"no {role} worker is ready{paused}{but}", retry_after_s=RETRY_AFTER_S)


def _left(able: Connections, failed: Mapping[str, LegFailed], role: Role) -> Connections:
    """Those that may be asked after these failures."""
    lost = {worker_of(endpoint) for endpoint, failure in failed.items() if not failure.overloaded}
    fresh = [c for c in able if c.info.worker not in failed and worker_of(c.info.worker) not in lost]
    if fresh:
        return fresh
    with_room = [c for c in able if c.info.worker not in failed or not failed[c.info.worker].overloaded]
    if not with_room:
        raise Overloaded(f"every {role} worker is full", retry_after_s=RETRY_AFTER_S)
    return with_room


def _able(connections: Connections, asked: Wishes | None) -> Connections:
    """Those whose engine has what is asked for.

    Raises:
        InvalidRequest: There are some, and none of them has; says why, and names the field.
    """
    if asked is None:
        return connections
    refusals = [lacking(connection.info.engine, asked) for connection in connections]
    able = [connection for connection, refusal in zip(connections, refusals, strict=True) if refusal is None]
    if refusals and not able:
        assert refusals[0] is not None
        raise InvalidRequest(refusals[0].message, refusals[0].field)
    return able
