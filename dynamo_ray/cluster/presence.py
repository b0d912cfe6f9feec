"""Whether an application is still deployed, as Ray Serve's controller says."""

from __future__ import annotations

from enum import StrEnum

import ray

ORCHESTRATOR = "Orchestrator"
"""The deployment that owns an application's workers."""
ANSWER_TIMEOUT_S = 10.0


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
    """Ask the controller. Blocks; a few ms, and the first time about a second where Serve was not imported before."""
    # Here, because node actors need no Serve unless they are left alone: it doubles what one of them imports.
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
    from ray.serve.schema import ApplicationStatus, ServeInstanceDetails

    try:
        # By name, each time: `serve.status()` goes on asking the first one it found after that has died.
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    except ValueError:
        return Presence.ABSENT
    except ray.exceptions.RayError:
        return Presence.UNKNOWN
    try:
        details = ray.get(controller.get_serve_instance_details.remote(), timeout=ANSWER_TIMEOUT_S)
    except ray.exceptions.RayError:
        return Presence.UNKNOWN
    found = ServeInstanceDetails(**details).applications.get(app)
    if found is None or found.status is ApplicationStatus.NOT_STARTED:
        return Presence.ABSENT
    if found.status is ApplicationStatus.DELETING:
        return Presence.DELETING
    # Another application may have taken the name, and it ends no workers.
    ours = found.status is ApplicationStatus.DEPLOYING or ORCHESTRATOR in found.deployments
    return Presence.DEPLOYED if ours else Presence.ABSENT
