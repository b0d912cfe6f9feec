"""The Serve deployment that clients talk to: an ASGI app around the data path of this process."""

from __future__ import annotations

import gc
import logging
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from dynamo_ray import secrets
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.priority import restore_priority
from dynamo_ray.request.dispatch import Dispatch
from dynamo_ray.request.http import Front, Settings
from dynamo_ray.request.membership import Membership
from dynamo_ray.request.tokens import Tokeniser
from dynamo_ray.telemetry import Telemetry

log = logging.getLogger(__name__)

STOP_MARGIN_S = 10.0
"""Beyond draining: to end what was still running."""
MAX_ONGOING_REQUESTS = 100_000
"""Serve's own limit is kept out of the way: what is too much is decided by what the workers can take."""


class Ingress:
    """One replica: routes in process, holds a connection to every worker. Restarting it touches no worker."""

    async def __init__(self, config: dict[str, Any], orchestrator: DeploymentHandle) -> None:  # type: ignore[misc]
        # Serve awaits an async constructor, which is how this one is on the loop that serves.
        restore_priority()
        self._config = DeploymentConfig.model_validate(config)

        async def watch(version: int) -> Membership:
            membership: Membership = await orchestrator.watch.remote(version, self._dispatch.peer)
            return membership

        self._dispatch = Dispatch(
            self._config, watch, ray.util.get_node_ip_address(), serve.get_replica_context().app_name
        )
        await self._dispatch.start()

    async def __serve_build_asgi_app__(self) -> Front:
        config = self._config
        limits = config.limits
        settings = Settings(
            config.model.name,
            limits.max_body_bytes,
            secrets.read_each("api_keys", config.api_keys),
            limits.request_timeout_s,
            tuple(config.model.loras),
        )
        telemetry = Telemetry(self._dispatch.readings)
        front = Front(self._dispatch, Tokeniser(config.model.folder), settings, telemetry)
        # Every module there is stays: a collection that looks through them all would stop every stream.
        gc.collect()
        gc.freeze()
        return front

    async def check_health(self) -> None:
        """Serve replaces a replica that no longer hears from the control path's side of this process."""
        self._dispatch.check_health()

    async def __del__(self) -> None:
        await self._dispatch.close()


def application(config: DeploymentConfig, orchestrator: serve.Application) -> serve.Application:
    """The ingress bound to its orchestrator; replicas are set in the file's `deployments:`."""
    deployment = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        # Its streams may take as long to end as their workers' drain.
        graceful_shutdown_timeout_s=config.limits.drain_timeout_s + STOP_MARGIN_S,
        ray_actor_options={"num_cpus": 0.1},
        # A line a request costs more CPU than a short request's routing; /metrics counts them.
        logging_config={"enable_access_log": False},
    )
    return deployment.bind(config.model_dump(mode="json"), orchestrator)
