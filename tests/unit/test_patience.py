"""When `up` gives up on a worker."""

from __future__ import annotations

import itertools

import pytest

from backends.engine import Role
from dynamo_ray.cli.patience import MAX_UNPLACED_S, Patience
from dynamo_ray.errors import StartError
from dynamo_ray.request.membership import Phase, WorkerStatus


def status(phase: Phase, now_s: float = 0.0, epoch: int = 0, restarts: int = 0) -> tuple[WorkerStatus, ...]:
    return (WorkerStatus("decode-0", Role.DECODE, phase, epoch, "needs 8 GPUs", now_s, restarts),)


def test_a_worker_that_is_tried_again_and_again_without_a_place_is_given_up_with_the_reason() -> None:
    patience = Patience()
    phases = itertools.cycle([Phase.RESERVING, Phase.BACKOFF])
    for now_s in range(0, int(MAX_UNPLACED_S) + 1, 5):
        patience.check(status(next(phases), now_s), now_s)
    with pytest.raises(StartError, match="decode-0 has no place: needs 8 GPUs"):
        patience.check(status(Phase.RESERVING, MAX_UNPLACED_S + 1), MAX_UNPLACED_S + 1)


def test_a_worker_that_has_a_place_may_start_for_long() -> None:
    patience = Patience()
    patience.check(status(Phase.RESERVING), 0.0)
    patience.check(status(Phase.STARTING, epoch=1), 1000.0)
    patience.check(status(Phase.STARTING, epoch=1), 2000.0)


def test_a_worker_that_failed_twice_is_given_up() -> None:
    Patience().check(status(Phase.BACKOFF, epoch=1, restarts=1), 0.0)
    with pytest.raises(StartError, match="decode-0 does not start"):
        Patience().check(status(Phase.BACKOFF, epoch=2, restarts=2), 0.0)
