"""A worker whose nodes each take requests: to the router as many workers, which live and die together."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from backends.engine import EngineInfo, Role, Sampling
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.errors import Overloaded
from dynamo_ray.request.attempt import Attempt
from dynamo_ray.request.connection import LegFailed, WorkerConnection
from dynamo_ray.request.generation import Generation
from dynamo_ray.request.router import Router
from dynamo_ray.request.wire import WorkerInfo, endpoint_name, worker_of
from dynamo_ray.request.workers import Workers
from dynamo_ray.simulator import clock

CONFIG = DeploymentConfig.model_validate(
    {
        "model": {"name": "m", "path": "/"},
        "backend": "simulated",
        "aggregated": {"replicas": 2, "nodes": 2, "parallelism": {"attn_dp": 4, "moe_ep": 4}},
        "router": {"policy": "round_robin"},
    }
)
ENGINE = EngineInfo("vllm", "1", "m", Role.AGGREGATED, 2, 16, 1024, 64, "none")


class Connected(Workers):
    """Every endpoint of both workers, as if it had just connected."""

    def __init__(self) -> None:
        super().__init__(5.0, lambda _: None, lambda _: None, lambda _info, _loads: None, lambda: None, lambda _: None)
        self.infos = [
            WorkerInfo(endpoint_name(worker, rank), 1, "127.0.0.1:1", ENGINE)
            for worker in ("aggregated-0", "aggregated-1")
            for rank in range(2)
        ]

    def of_role(self, role: Role) -> Sequence[WorkerConnection]:
        made = [
            WorkerConnection(info, b"", 5.0, lambda _info, _loads: None, lambda: None, lambda _: None, lambda _: None)
            for info in self.infos
        ]
        return made if role is Role.AGGREGATED else []

    def connection(self, worker: str) -> WorkerConnection:
        return next(made for made in self.of_role(Role.AGGREGATED) if made.info.worker == worker)


def targets(*failures: LegFailed) -> set[tuple[str, int]]:
    """Where eight requests in turn go after those failures."""

    async def main() -> set[tuple[str, int]]:
        workers = Connected()
        router = Router(CONFIG, workers)
        for info in workers.infos:
            router.up(info)
        chosen = set()
        for _ in range(8):
            attempt = Attempt(Generation("r", [1, 2, 3], Sampling(4)), 60.0)
            for failure in failures:
                attempt = attempt.after(failure, max_retries=9)
            async with router.place(attempt) as placed:
                chosen.add((placed.decode.worker, placed.decode.dp_rank))
        return chosen

    return clock.run(main())


def test_an_endpoint_is_named_after_its_worker() -> None:
    assert endpoint_name("decode-3", 0) == "decode-3"
    assert [worker_of(endpoint_name("decode-3", rank)) for rank in (0, 1, 12)] == ["decode-3"] * 3


def test_every_rank_of_every_endpoint_is_given_requests() -> None:
    names = ("aggregated-0", "aggregated-0.1", "aggregated-1", "aggregated-1.1")
    assert targets() == {(name, rank) for name in names for rank in range(2)}


def test_a_request_that_a_worker_lost_is_not_given_to_its_other_nodes() -> None:
    lost = LegFailed("the connection was lost", "aggregated-0.1", retryable=True)
    assert {worker for worker, _ in targets(lost)} == {"aggregated-1", "aggregated-1.1"}


def test_a_full_node_is_left_for_its_neighbour() -> None:
    full = LegFailed("the worker already has 256 requests", "aggregated-0", retryable=True, overloaded=True)
    assert {worker for worker, _ in targets(full)} == {"aggregated-0.1", "aggregated-1", "aggregated-1.1"}


def test_where_all_others_are_full_a_lost_worker_is_asked_again() -> None:
    lost = LegFailed("the connection was lost", "aggregated-0", retryable=True)
    full = [LegFailed("full", f"aggregated-1{node}", retryable=True, overloaded=True) for node in ("", ".1")]
    assert {worker for worker, _ in targets(lost, *full)} == {"aggregated-0", "aggregated-0.1"}
    everywhere = [LegFailed("full", f"aggregated-0{node}", retryable=True, overloaded=True) for node in ("", ".1")]
    with pytest.raises(Overloaded):
        targets(*full, *everywhere)
