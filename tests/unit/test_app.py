"""What `serve run` gets to deploy."""

from __future__ import annotations

from dynamo_ray import app
from dynamo_ray.config import DeploymentConfig


def test_an_ingress_that_is_ended_has_as_long_as_its_workers_drain() -> None:
    given = {"model": {"name": "m", "path": "/m"}, "backend": "simulated", "aggregated": {}}
    config = DeploymentConfig.model_validate({**given, "limits": {"drain_timeout_s": 300.0}})
    built = app.build(config)
    assert built._bound_deployment._deployment_config.graceful_shutdown_timeout_s > 300.0
