"""Deploying a checked file on a connected Ray, and following its workers."""

from __future__ import annotations

import contextlib
import copy
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import ray
from ray import serve
from ray.serve._private import api as serve_api
from ray.serve._private.client import ServeControllerClient
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import APIType, ApplicationStatus, ServeDeploySchema, ServeInstanceDetails, ServeStatus

from dynamo_ray import secrets
from dynamo_ray.cli import local_ray
from dynamo_ray.cli.checked import CheckedFile
from dynamo_ray.cli.patience import Patience
from dynamo_ray.cluster.gang import reason_of
from dynamo_ray.cluster.presence import ORCHESTRATOR
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.errors import PreflightError, Problem, StartError
from dynamo_ray.request.membership import Phase, WorkerStatus

POLL_S = 0.25
CONNECT_TIMEOUT_S = 5.0

Report = Callable[[tuple[WorkerStatus, ...]], None]


def start(checked: CheckedFile, port: int) -> ServeControllerClient:
    """Serve, started as the file says; one that runs already stays as it is.

    Raises:
        StartError: Serve's own processes do not start.
    """
    schema = _schema(checked, port)
    try:
        return serve_api.serve_start(
            http_options=schema.http_options.model_dump(),
            proxy_location=schema.proxy_location,
            grpc_options=gRPCOptions(**schema.grpc_options.model_dump()),
            controller_options=schema.controller_options,
        )
    except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
        raise StartError(f"Ray Serve did not start: {reason_of(error)}") from error


def root_url(options: HTTPOptions, wildcard: str) -> str:
    """Where a Serve with these listens; `wildcard` is the host to use where it does on every interface."""
    host = wildcard if options.host in ("0.0.0.0", "::") else options.host
    return f"http://{f'[{host}]' if ':' in host else host}:{options.port}"


def check_alone(client: ServeControllerClient, names: tuple[str, ...]) -> None:
    """Raises PreflightError where deploying these applications would replace or end another one.

    A file states everything that is to be deployed from files: Serve ends what it does not name
    (ray/serve/_private/application_state.py, apply_app_configs).
    """
    found = _details(client).applications.items()
    lost = [name for name, there in found if name in names or there.source is APIType.DECLARATIVE]
    if lost:
        message = f"Serve there would end {', '.join(lost)} for this file; end it first, or choose another Ray"
        raise PreflightError((Problem("--address", message),))


def deploy(client: ServeControllerClient, checked: CheckedFile, port: int) -> None:
    """Hand the file to Serve; returns before anything is up. As `serve run` does it (ray/serve/scripts.py).

    Raises:
        StartError: Serve does not take it.
    """
    try:
        client.deploy_apps(_schema(checked, port), _blocking=False)
    except (ray.exceptions.RayError, RayServeException) as error:
        raise StartError(f"Ray Serve did not take the file: {reason_of(error)}") from error


def await_ready(checked: CheckedFile, urls: tuple[str, ...], report: Report, give_up: bool) -> None:
    """Return when every application answers; `report` is told each change of its workers.

    Args:
        urls: of the applications.
        give_up: a worker that cannot start is an error; otherwise it is waited for.

    Raises:
        StartError: An application failed to deploy, a worker fails again and again, or Serve has ended.
    """
    seen: tuple[WorkerStatus, ...] = ()
    patience = Patience()
    while True:
        _check_deployed(checked.names)
        found = tuple(status for name in checked.names for status in statuses(name))
        if found != seen:
            seen = found
            report(found)
        if give_up:
            patience.check(found, time.monotonic())
        serving = bool(found) and all(status.phase is Phase.READY for status in found)
        if serving and all(_answers(f"{url}/ready") for url in urls):
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


def undeploy(names: tuple[str, ...], timeout_s: float) -> bool:
    """Drain and end the applications; whether Serve has none of them left, or has ended itself."""
    deadline_s = time.monotonic() + timeout_s
    try:
        for name in names:
            serve.delete(name, _blocking=False)
        while any(name in serve.status().applications for name in names):
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(0.1)
    except (ray.exceptions.RayError, RayServeException):
        pass
    return True


def first_token(url: str, config: DeploymentConfig) -> None:
    """Ask for one token, and wait for it.

    Raises:
        StartError: None came.
    """
    body = {"model": config.model.name, "prompt": "Hello", "max_tokens": 1, "stream": True}
    key = secrets.read_first("api_keys", config.api_keys)
    headers = {"Content-Type": "application/json", **secrets.bearer(key)}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120.0) as response:
            if any(line.startswith(b"data:") for line in response):
                return
    except OSError as error:
        raise StartError(f"the first request failed: {error}") from error
    raise StartError("the deployment answered the first request without a token")


def _schema(checked: CheckedFile, port: int) -> ServeDeploySchema:
    value = copy.deepcopy(checked.value)
    value["http_options"] = {**(value.get("http_options") or {}), "port": port}
    return ServeDeploySchema.model_validate(value)


def _check_deployed(names: tuple[str, ...]) -> None:
    try:
        found: ServeStatus = serve.status()
    except (ray.exceptions.RayError, RayServeException) as error:
        raise StartError(f"Ray Serve has ended: {reason_of(error)}") from error
    for name in names:
        application = found.applications.get(name)
        if application is not None and application.status is ApplicationStatus.DEPLOY_FAILED:
            reason = application.message.strip().splitlines()[-1]
            raise StartError(f"application {name} could not be deployed: {reason}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def driver(address: str) -> Iterator[str]:
    """Joined to a running Ray, whose head node's address it is.

    Raises:
        PreflightError: Nobody answers there, or not to us; or this process is joined to a Ray already.
    """
    local_ray.refuse_second()
    try:
        _check_listens(address)
        local_ray.connect(address=address)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise PreflightError((Problem("--address", f"no Ray answers at {address}: {reason_of(error)}"),)) from error
    try:
        yield str(ray.get_runtime_context().gcs_address).rpartition(":")[0]
    finally:
        ray.shutdown()


def _check_listens(address: str) -> None:
    """Raises OSError at once where nothing does; Ray itself goes on trying for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host:  # not `auto`, nor a URL
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


def ours(head: str) -> dict[str, str]:
    """The applications on this Ray that have an orchestrator of ours, and where each is."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return {}
    found = _details(client).applications.items()
    return {
        name: root_url(client.http_config, head) + (there.route_prefix or "").rstrip("/")
        for name, there in found
        if ORCHESTRATOR in there.deployments
    }


def _details(client: ServeControllerClient) -> ServeInstanceDetails:
    return ServeInstanceDetails(**client.get_serve_details())
