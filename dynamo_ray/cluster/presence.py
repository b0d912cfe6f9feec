"""Whether an application is still deployed, as Ray Serve's controller says."""

from __future__ import annotations

from ray import serve
from ray.serve.schema import ApplicationStatus

ORCHESTRATOR = "Orchestrator"
"""The deployment that owns an application's workers."""


def is_deployed(app: str) -> bool:
    """Whether the application exists, is not being deleted, and still has an orchestrator. Blocks; a few ms.

    During `serve delete`, `serve shutdown` and Ctrl-C of `serve run` the application is DELETING until its last
    replica is gone; while replicas crash, restart or are replaced it never is. Without a controller there is no
    application.
    """
    found = serve.status().applications.get(app)
    if found is None or found.status in (ApplicationStatus.DELETING, ApplicationStatus.NOT_STARTED):
        return False
    return found.status is ApplicationStatus.DEPLOYING or ORCHESTRATOR in found.deployments
