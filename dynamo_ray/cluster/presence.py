"""Whether an application is still deployed, as Ray Serve's controller says."""

from __future__ import annotations

from enum import StrEnum

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

ORCHESTRATOR = "Orchestrator"
"""The deployment that owns an application's workers."""


class Presence(StrEnum):
    DEPLOYED = "deployed"
    """Also while its replicas crash, restart or are replaced."""
    DELETING = "deleting"
    """From the first moment of `serve delete`, `serve shutdown` or Ctrl-C of `serve run` to the last replica's end."""
    ABSENT = "absent"
    """No such application, or no controller. Also for a moment while a controller recovers."""
    UNKNOWN = "unknown"
    """The controller did not answer."""


def presence(app: str) -> Presence:
    """Ask the controller. Blocks; a few ms."""
    try:
        found = serve.status().applications.get(app)
    except (ray.exceptions.RayError, RayServeException):
        return Presence.UNKNOWN
    if found is None or found.status is ApplicationStatus.NOT_STARTED:
        return Presence.ABSENT
    if found.status is ApplicationStatus.DELETING:
        return Presence.DELETING
    # Another application may have taken the name, and it ends no workers.
    ours = found.status is ApplicationStatus.DEPLOYING or ORCHESTRATOR in found.deployments
    return Presence.DEPLOYED if ours else Presence.ABSENT
