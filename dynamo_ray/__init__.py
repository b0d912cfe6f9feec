"""NVIDIA Dynamo's job, on Ray. `from dynamo_ray import DeploymentConfig, plan, up`; importing this imports no Ray."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo_ray.cli.up import up as up
    from dynamo_ray.cluster.layout import plan as plan
    from dynamo_ray.config import DeploymentConfig as DeploymentConfig

__version__ = "0.1.0"
__all__ = ["DeploymentConfig", "__version__", "plan", "up"]

_HOMES = {"DeploymentConfig": "dynamo_ray.config", "plan": "dynamo_ray.cluster.layout", "up": "dynamo_ray.cli.up"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dynamo_ray' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
