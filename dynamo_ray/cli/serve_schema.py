"""Checks the part of a file that is Ray Serve's, every level of it: Serve itself ignores keys it does not know."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from dynamo_ray.config_file import IMPORT_PATH, Document, Place, known_keys, problems_of, unknown_key, unknown_keys
from dynamo_ray.errors import Problem

KEYS = known_keys(ServeDeploySchema)
DEPLOYMENTS = ("Ingress", "Orchestrator")
_OURS = frozenset({"args"})
"""Checked by config_file, against DeploymentConfig."""


def check(document: Document) -> list[Problem]:
    """Every mistake outside our applications' `args`."""
    if not isinstance(document.value, dict):
        return [document.problem((), "is not a mapping; a file starts with `applications:`")]
    if document.value and not any(get_close_matches(str(key), KEYS, n=1) for key in document.value):
        return [document.problem((), "has no key of a `serve run` file; such a file starts with `applications:`")]
    problems = list(unknown_keys(document, (), ServeDeploySchema, document.value, _OURS))
    try:
        ServeDeploySchema.model_validate(document.value)
    except ValidationError as error:
        problems += problems_of(document, (), ServeDeploySchema, error)
    http = document.value.get("http_options")
    if isinstance(port := http.get("port") if isinstance(http, dict) else None, int) and not 0 < port < 65536:
        problems.append(document.problem(("http_options", "port"), f"no port is {port}; write one of 1 to 65535"))
    listed = document.value.get("applications")
    for index, app in enumerate(listed if isinstance(listed, list) else []):
        if isinstance(app, dict):
            problems += _check_application(document, ("applications", index), app)
    return problems


def _check_application(document: Document, path: Place, app: dict[str, Any]) -> list[Problem]:
    if app.get("import_path") != IMPORT_PATH:
        if isinstance(app.get("import_path"), str) and app["import_path"].startswith("dynamo_ray"):
            return [document.problem((*path, "import_path"), f"there is only {IMPORT_PATH}")]
        return []
    problems = []
    if isinstance(name := app.get("name"), str) and "/" in name:
        problems.append(document.problem((*path, "name"), "must not contain `/`; it is part of actors' names"))
    listed = app.get("deployments")
    for index, deployment in enumerate(listed if isinstance(listed, list) else []):
        if not isinstance(deployment, dict):
            continue
        here: Place = (*path, "deployments", index)
        name = deployment.get("name")
        if name not in DEPLOYMENTS:
            message = unknown_key(str(name), DEPLOYMENTS).replace("unknown key", f"no deployment {name!r}")
            problems.append(document.problem((*here, "name"), message))
        if deployment.get("user_config") is not None:
            problems.append(document.problem((*here, "user_config"), "nothing of ours reads it; write it under `args`"))
        if name == "Orchestrator" and deployment.get("num_replicas", 1) != 1:
            problems.append(document.problem((*here, "num_replicas"), "there is exactly 1 orchestrator; write 1"))
        if name == "Ingress" and _autoscales(deployment):
            key = "num_replicas" if deployment.get("num_replicas") == "auto" else "autoscaling_config"
            problems.append(document.problem((*here, key), "the ingress does not autoscale; give a number of replicas"))
    return problems


def _autoscales(deployment: dict[str, Any]) -> bool:
    return deployment.get("num_replicas") == "auto" or deployment.get("autoscaling_config") is not None
