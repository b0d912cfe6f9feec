"""The path of one request, whole: route, prefill, hand over, decode, and again elsewhere if a worker is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from backends.engine import TokenChunk
from dynamo_ray.request.attempt import Attempt
from dynamo_ray.request.connection import LegFailed
from dynamo_ray.request.decode import decode
from dynamo_ray.request.generation import Generation
from dynamo_ray.request.prefill import prefill
from dynamo_ray.request.router import Router


async def serve(request: Generation, router: Router, timeout_s: float, max_retries: int) -> AsyncGenerator[TokenChunk]:
    """Yield the request's tokens, each once, whatever happens to the workers on the way.

    Every exit (the last token, an error, a client that left and closes this generator) aborts both legs, frees
    both sides' KV and the router's booking.

    Raises:
        RequestError: See the table in `dynamo_ray.errors`.
    """
    now_s = asyncio.get_running_loop().time()
    latest_s = now_s + timeout_s
    deadline_s = latest_s if request.deadline_s is None else min(latest_s, request.deadline_s)
    attempt = Attempt(request, deadline_s, now_s)
    while True:
        try:
            async with (
                router.place(attempt) as placement,
                prefill(placement, attempt) as transfer,
                aclosing(decode(placement, attempt, transfer)) as chunks,
            ):
                async for chunk in chunks:
                    fresh = attempt.deliver(chunk if transfer is None else transfer.both(chunk))
                    if fresh is not None:
                        yield fresh
            return
        except LegFailed as failure:
            attempt = attempt.after(failure, max_retries)
            router.retried(failure)
