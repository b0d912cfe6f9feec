"""The orchestrator alone, on a real Ray of fake nodes: what ingresses see of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from dynamo_ray.cli import local_ray
from dynamo_ray.cluster import gang, orchestrator
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.events.bookings import Peer
from dynamo_ray.request.membership import Membership
from placement import reserve

TIMEOUT_S = 90.0
APP = "control"

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "500",
}
"""Nodes notice each other's death within some seconds, and are not thought dead on a busy machine."""


@contextlib.contextmanager
def fake_cluster(nodes: Sequence[Mapping[str, Any]]) -> Iterator[Cluster]:
    """A head that has nothing but Serve, and those nodes; this process has joined it.

    Args:
        nodes: what `Cluster.add_node` is given for each.
    """
    with contextlib.ExitStack() as undo:
        patch = undo.enter_context(pytest.MonkeyPatch.context())
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        undo.enter_context(local_ray.bare_nodes())
        made = Cluster()
        undo.callback(made.shutdown)
        # Port 0: any that is free, as the cluster of another test may have the usual one.
        made.add_node(num_cpus=0, include_dashboard=False, dashboard_agent_listen_port=0, resources={"head": 1})
        for node in nodes:
            made.add_node(wait=False, **node)
        made.wait_for_nodes(TIMEOUT_S)
        undo.callback(ray.shutdown)
        ray.init(address=made.address, namespace="serve", log_to_driver=False)
        undo.callback(serve.shutdown)
        serve.start(proxy_location="Disabled")
        yield made


def config(**changes: Any) -> DeploymentConfig:
    given: dict[str, Any] = {
        "model": {"name": "m", "path": "/nowhere"},
        "backend": "simulated",
        "aggregated": {"replicas": 1, "resources": {"cpus": 1.0}},
    }
    return DeploymentConfig.model_validate({**given, **changes})


class Deployed:
    def __init__(self, checked: DeploymentConfig) -> None:
        self.handle = serve.run(orchestrator.application(checked), name=APP, route_prefix=None)
        self.version = 0

    def until(self, condition: Callable[[Membership], bool], what: str) -> Membership:
        deadline_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_s:
            try:
                membership: Membership = self.handle.watch.remote(self.version).result(timeout_s=20.0)
            except (ray.exceptions.RayError, TimeoutError):
                continue  # the orchestrator is being replaced
            self.version = membership.version
            if condition(membership):
                return membership
        raise AssertionError(f"not within {TIMEOUT_S} s: {what}; last: {membership.statuses}")

    def replicas(self, me: Peer, version: int) -> tuple[Peer, ...]:
        """The ingress replicas that one is told of when it asks."""
        seen: Membership = self.handle.watch.remote(version, me).result(timeout_s=20.0)
        return seen.peers

    def ready(self, count: int) -> Membership:
        return self.until(lambda seen: len(seen.workers) == count, f"{count} workers serve")


@contextlib.contextmanager
def deployed(checked: DeploymentConfig) -> Iterator[Deployed]:
    try:
        yield Deployed(checked)
    finally:
        serve.delete(APP)
        assert gang.actor_names(APP) == []
        assert run(lambda: reserve.find(f"{APP}/")) == {}


def kill_orchestrator() -> None:
    """Serve makes another one in its place."""
    listed = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == "serve"]
    (name,) = [name for name in listed if name.startswith("SERVE_REPLICA") and "Orchestrator" in name]
    ray.kill(ray.get_actor(name, "serve"), no_restart=False)


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        return await work()

    return asyncio.run(main())
