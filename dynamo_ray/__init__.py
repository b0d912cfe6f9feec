"""NVIDIA Dynamo's job, on Ray. `from dynamo_ray import load_config, plan, up`; importing this imports no Ray."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backends.engine import Pause as Pause
    from backends.engine import Resume as Resume
    from backends.engine import Sleep as Sleep
    from backends.engine import UpdateWeights as UpdateWeights
    from backends.engine import Wake as Wake
    from dynamo_ray.cli.control import control as control
    from dynamo_ray.cli.up import up as up
    from dynamo_ray.cluster.layout import plan as plan
    from dynamo_ray.config import DeploymentConfig as DeploymentConfig
    from dynamo_ray.config_file import load_config as load_config
    from dynamo_ray.routing.policies import register_policy as register_policy
    from dynamo_ray.routing.policy import Leg as Leg
    from dynamo_ray.routing.policy import Policy as Policy
    from dynamo_ray.routing.policy import cheapest as cheapest
    from dynamo_ray.simulator.rank import RankModel as RankModel
    from dynamo_ray.simulator.replay import simulate as simulate
    from dynamo_ray.simulator.report import Slo as Slo
    from dynamo_ray.simulator.traces import TraceRequest as TraceRequest

__version__ = "0.1.0"
_HOMES = {
    "DeploymentConfig": "dynamo_ray.config",
    "Leg": "dynamo_ray.routing.policy",
    "Pause": "backends.engine",
    "Policy": "dynamo_ray.routing.policy",
    "RankModel": "dynamo_ray.simulator.rank",
    "Resume": "backends.engine",
    "Sleep": "backends.engine",
    "Slo": "dynamo_ray.simulator.report",
    "TraceRequest": "dynamo_ray.simulator.traces",
    "UpdateWeights": "backends.engine",
    "Wake": "backends.engine",
    "cheapest": "dynamo_ray.routing.policy",
    "control": "dynamo_ray.cli.control",
    "load_config": "dynamo_ray.config_file",
    "plan": "dynamo_ray.cluster.layout",
    "register_policy": "dynamo_ray.routing.policies",
    "simulate": "dynamo_ray.simulator.replay",
    "up": "dynamo_ray.cli.up",
}
__all__ = [
    "DeploymentConfig",
    "Leg",
    "Pause",
    "Policy",
    "RankModel",
    "Resume",
    "Sleep",
    "Slo",
    "TraceRequest",
    "UpdateWeights",
    "Wake",
    "__version__",
    "cheapest",
    "control",
    "load_config",
    "plan",
    "register_policy",
    "simulate",
    "up",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dynamo_ray' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
