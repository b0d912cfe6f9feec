"""What the orchestrator promises the supervisor, without a cluster."""

from __future__ import annotations

import pytest

from dynamo_ray.cluster import orchestrator
from dynamo_ray.cluster.lifecycle import Event, NotReserved, Released
from dynamo_ray.cluster.orchestrator import outcome


async def fails() -> Event:
    raise RuntimeError("the GCS is away")


async def test_work_that_raises_is_answered_all_the_same() -> None:
    assert await outcome(fails, lambda why: NotReserved("d", why)) == NotReserved("d", "the GCS is away")


async def test_work_that_must_succeed_is_done_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "RETRY_S", 0.0)
    attempts = []

    async def succeeds_at_last() -> Event:
        attempts.append(1)
        return Released("d") if len(attempts) == 3 else await fails()

    assert await outcome(succeeds_at_last) == Released("d")
