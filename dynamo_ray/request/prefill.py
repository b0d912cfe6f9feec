"""The prefill step: entering returns when decode may start, leaving settles the prefill side."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from backends.engine import KVHandoff, Role
from dynamo_ray.request.attempt import Attempt
from dynamo_ray.request.connection import LegFailed, TokenStream
from dynamo_ray.request.router import Placement, Target
from dynamo_ray.request.transfer import Transfer, rendezvous


@asynccontextmanager
async def prefill(placement: Placement, attempt: Attempt) -> AsyncIterator[Transfer | None]:
    """Compute the prompt on the placement's prefill rank; None when the decode worker does it itself.

    Raises:
        LegFailed: The prefill worker refused or lost the leg; nothing is held there.
    """
    target = placement.prefill
    if target is None:
        yield None
        return
    if target.connection.info.engine.handoff == "concurrent":
        transfer = _start_beside_decode(target, attempt)
    else:
        transfer = await _finish_before_decode(target, attempt)
        placement.prefill_done()
    try:
        yield transfer
    finally:
        transfer.settle()


async def _finish_before_decode(target: Target, attempt: Attempt) -> Transfer:
    leg = _submit(target, attempt, None)
    try:
        chunk = await leg.next()
        if chunk.handoff is None:
            raise LegFailed("prefill ended without a hand-off", target.worker, retryable=True)
    except BaseException:
        leg.close()
        # It may just have finished: then there is no leg any more to abort, but KV that nobody will fetch.
        target.connection.release(leg.request.request_id)
        raise
    return Transfer(chunk.handoff, target.connection, leg, chunk.cached_tokens or 0, chunk.engine_s or 0.0)


def _start_beside_decode(target: Target, attempt: Attempt) -> Transfer:
    handoff = rendezvous(target.connection.info, target.dp_rank)
    return Transfer(handoff, target.connection, _submit(target, attempt, handoff))


def _submit(target: Target, attempt: Attempt, handoff: KVHandoff | None) -> TokenStream:
    leg = target.connection.submit(attempt.leg(Role.PREFILL, target.dp_rank, handoff, target.features))
    leg.fail_at(attempt.deadline_s, attempt.deadline_error())
    return leg
