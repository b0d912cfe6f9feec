"""Which live workers a try at a request may use."""

from __future__ import annotations

from backends.admission import lacking, wishes
from backends.engine import Role
from dynamo_ray.errors import InvalidRequest, NotReady, Overloaded
from dynamo_ray.request.attempt import Attempt
from dynamo_ray.request.connection import WorkerConnection
from dynamo_ray.request.waiting import RETRY_AFTER_S
from dynamo_ray.request.wire import worker_of
from dynamo_ray.request.workers import Workers


def eligible(workers: Workers, role: Role, attempt: Attempt, priority: int) -> list[WorkerConnection]:
    """Live workers that can, without those that failed this request while there are others; never a full one.

    Nodes of one worker fail together, but each has room of its own.

    Args:
        priority: what an engine must be able to order by; 0: nothing.

    Raises:
        NotReady: The role has no live worker.
        InvalidRequest: None of them has what is asked for.
        Overloaded: Every one of them refused this request for lack of room.
    """
    live = _able(workers.of_role(role), attempt, priority)
    if not live:
        raise not_ready(workers, role)
    failed = attempt.excluded
    if not failed:
        return live
    lost = {worker_of(endpoint) for endpoint, failure in failed.items() if not failure.overloaded}
    fresh = [c for c in live if c.info.worker not in failed and worker_of(c.info.worker) not in lost]
    if fresh:
        return fresh
    with_room = [c for c in live if c.info.worker not in failed or not failed[c.info.worker].overloaded]
    if not with_room:
        raise Overloaded(f"every {role} worker is full", retry_after_s=RETRY_AFTER_S)
    return with_room


def not_ready(workers: Workers, role: Role, but: str = "") -> NotReady:
    """The error of a request that needs a role without a live worker; `but`: what can be served all the same."""
    paused = "".join(f"; {worker} {why}" for worker, why in workers.paused(role).items())
    return NotReady(f"no {role} worker is ready{paused}{but}", retry_after_s=RETRY_AFTER_S)


def _able(connections: list[WorkerConnection], attempt: Attempt, priority: int) -> list[WorkerConnection]:
    """Those whose engine has what the request asks for.

    Raises:
        InvalidRequest: There are some, and none of them has; says why, and names the field.
    """
    request = attempt.request
    asked = wishes(request.sampling, request.cache_salt, priority, request.lora)
    if asked is None:
        return connections
    refusals = [lacking(connection.info.engine, asked) for connection in connections]
    able = [connection for connection, refusal in zip(connections, refusals, strict=True) if refusal is None]
    if refusals and not able:
        assert refusals[0] is not None
        raise InvalidRequest(refusals[0].message, refusals[0].field)
    return able
