"""Deploying a checked file on a connected Ray, and following its workers."""

from __future__ import annotations

import contextlib
import copy
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import ray
from ray import serve
from ray.serve._private import api as serve_api
from ray.serve.config import gRPCOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from dynamo_ray.cli.checked import CheckedFile
from dynamo_ray.cluster.gang import reason_of
from dynamo_ray.cluster.presence import ORCHESTRATOR
from dynamo_ray.errors import PreflightError, Problem, StartError
from dynamo_ray.request.membership import Phase, WorkerStatus

POLL_S = 0.25
MAX_FAILED_STARTS = 2
"""A worker that fails this often before anything was ready will not start by itself."""
MAX_UNPLACED_S = 60.0
"""How long a local deployment waits for room."""

Report = Callable[[tuple[WorkerStatus, ...]], None]


def deploy(checked: CheckedFile, port: int) -> None:
    """Hand the file to Serve; returns before anything is up. As `serve run` does it (ray/serve/scripts.py).

    Raises:
        StartError: Serve's own processes do not start.
    """
    value = copy.deepcopy(checked.value)
    value["http_options"] = {**(value.get("http_options") or {}), "port": port}
    schema = ServeDeploySchema.model_validate(value)
    try:
        client = serve_api.serve_start(
            http_options=schema.http_options.model_dump(),
            proxy_location=schema.proxy_location,
            grpc_options=gRPCOptions(**schema.grpc_options.model_dump()),
            controller_options=schema.controller_options,
        )
        client.deploy_apps(schema, _blocking=False)
    except ray.exceptions.RayError as error:
        raise StartError(f"Ray Serve did not start: {reason_of(error)}") from error


def await_ready(checked: CheckedFile, url: str, report: Report, give_up: bool) -> None:
    """Return when every application answers; `report` is told each change of its workers.

    Args:
        give_up: a worker that cannot start is an error; otherwise it is waited for.

    Raises:
        StartError: An application failed to deploy, or a worker fails again and again.
    """
    names = [application.name for application in checked.applications]
    seen: tuple[WorkerStatus, ...] = ()
    while True:
        for name in names:
            _check_application(name)
        found = tuple(status for name in names for status in statuses(name))
        if found != seen:
            seen = found
            report(found)
        if give_up:
            _check_workers(found)
        if found and all(status.phase is Phase.READY for status in found) and _answers(f"{url}/ready"):
            return
        time.sleep(POLL_S)


def statuses(app: str) -> list[WorkerStatus]:
    """The workers of that application; none while its orchestrator is not there."""
    try:
        handle = serve.get_deployment_handle(ORCHESTRATOR, app)
        found: list[WorkerStatus] = handle.status.remote().result(timeout_s=5.0)
    except (KeyError, RayServeException, ray.exceptions.RayError, TimeoutError):
        return []
    return found


def undeploy(names: tuple[str, ...], timeout_s: float) -> None:
    """Drain and end the applications; returns when Serve has none of them left."""
    for name in names:
        serve.delete(name, _blocking=False)
    deadline_s = time.monotonic() + timeout_s
    while any(name in serve.status().applications for name in names) and time.monotonic() < deadline_s:
        time.sleep(0.1)


def first_token(url: str, model: str) -> None:
    """Ask for one token, and wait for it."""
    body = b'{"model": "%s", "prompt": "Hello", "max_tokens": 1, "stream": true}' % model.encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120.0) as response:
        for line in response:
            if line.startswith(b"data:"):
                return
    raise StartError("the deployment answered the first request without a token")


def _check_application(name: str) -> None:
    application = serve.status().applications.get(name)
    if application is None or application.status is not ApplicationStatus.DEPLOY_FAILED:
        return
    raise StartError(f"application {name} could not be deployed: {application.message.strip().splitlines()[-1]}")


def _check_workers(found: tuple[WorkerStatus, ...]) -> None:
    for status in found:
        if status.restarts >= MAX_FAILED_STARTS and status.phase is not Phase.READY:
            raise StartError(f"{status.worker} does not start: {status.detail}")
        unplaced = status.phase in (Phase.BACKOFF, Phase.RESERVING) and status.restarts == 0 and status.epoch == 0
        if unplaced and time.time() - status.since_unix_s > MAX_UNPLACED_S:
            raise StartError(f"{status.worker} has no place: {status.detail}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def driver(address: str) -> Iterator[None]:
    """Joined to a running Ray.

    Raises:
        PreflightError: Nobody answers there.
    """
    try:
        ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PreflightError((Problem("--address", f"no Ray answers at {address}: {error}"),)) from error
    try:
        yield
    finally:
        ray.shutdown()


def ours() -> tuple[str, ...]:
    """The applications on this Ray that have an orchestrator of ours."""
    found = serve.status().applications
    return tuple(name for name, application in found.items() if ORCHESTRATOR in application.deployments)
