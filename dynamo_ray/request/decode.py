"""The decode step: the tokens, from handed-over KV or, aggregated, from scratch."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from backends.engine import Role, TokenChunk
from dynamo_ray.request.attempt import Attempt
from dynamo_ray.request.router import Placement
from dynamo_ray.request.transfer import Transfer


async def decode(placement: Placement, attempt: Attempt, transfer: Transfer | None) -> AsyncGenerator[TokenChunk]:
    """Yield the leg's tokens, the last chunk with a finish reason; closing aborts the leg.

    Raises:
        LegFailed: The decode worker, or the prefill leg it waits for, refused or lost the request.
        RequestError: The deadline passed.
    """
    target = placement.decode
    role, handoff = (Role.AGGREGATED, None) if transfer is None else (Role.DECODE, transfer.handoff)
    leg = target.connection.submit(attempt.leg(role, target.dp_rank, handoff, target.features))
    leg.fail_at(attempt.deadline_s, attempt.deadline_error())
    if transfer is not None:
        transfer.leg.feeds(leg)
    try:
        chunk = await leg.next()
        placement.first_token()
        if transfer is not None:
            transfer.landed()
        yield chunk
        while not leg.finished or leg.pending:
            yield await leg.next()
    finally:
        leg.close()
