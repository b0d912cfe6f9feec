"""What must be so before anything starts: the port, the model, the machine's size, no other Ray in the way."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import psutil
from ray._private.utils import estimate_available_memory

from backends import model_folder
from dynamo_ray import models
from dynamo_ray.cli.checked import CheckedFile
from dynamo_ray.cluster.workload import worker_groups
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.errors import PreflightError, Problem
from placement.plan import PlacementError, plan
from placement.topology import NO_ACCELERATOR, Node, Resources, Topology

RAY_ADDRESS_FILE = Path("/tmp/ray/ray_current_cluster")
"""Where `ray start` leaves its address (ray/_private/utils.py, write_ray_address)."""
OWN_MEMORY_BYTES = 2**30
"""Ray's daemons, Serve and the ingress."""
INGRESS_CPUS = 0.1


def check(checked: CheckedFile, port: int, progress: Callable[[str], None]) -> None:
    """Check this machine for a private, local deployment; a model that we can make and that is missing is made.

    Raises:
        PreflightError: Something is in the way; carries every problem at once.
    """
    problems = [*_check_port(checked.host, port), *_check_ray()]
    free = free_here()
    for application in checked.applications:
        field = f"applications[{application.index}].args"
        problems += _check_model(field, application.config, progress)
        problems += check_size(field, application.config, free)
    if problems:
        raise PreflightError(tuple(problems))


def _check_port(host: str, port: int) -> list[Problem]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return [Problem("http_options.host", f"cannot listen on {host}:{port}: {error.strerror}")]
            owner = _listener(port)
            return [Problem("http_options.port", f"port {port} is busy{owner}; end that, or use --port")]
    return []


def _listener(port: int) -> str:
    """Who listens there, where this user may know."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,)
            if listens and connection.pid:
                return f": {psutil.Process(connection.pid).name()} (pid {connection.pid}) listens there"
    return ""


def _check_ray() -> list[Problem]:
    try:
        address = RAY_ADDRESS_FILE.read_text().strip()
    except OSError:
        return []
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2.0).close()
    except (OSError, ValueError):
        return []  # left by a Ray that is gone
    advice = f"use it with `--address {address}`, or end it with `ray stop`"
    return [Problem("--address", f"a Ray already runs on this machine at {address}; {advice}")]


def _check_model(field: str, config: DeploymentConfig, progress: Callable[[str], None]) -> list[Problem]:
    folder, key = config.model.folder, models.key_of(config.model.folder)
    if key is not None:
        try:
            models.prepare(key, progress)
        except (models.ModelError, OSError) as error:
            return [Problem(f"{field}.model.path", f"{folder} cannot be made: {error}")]
    if not folder.is_dir():
        known = ", ".join(models.KNOWN)
        advice = f"bring it with `dynamo-ray download`, or make one of {known} with `dynamo-ray model KEY`"
        return [Problem(f"{field}.model.path", f"there is no folder {folder}; {advice}")]
    if not (folder / "tokenizer.json").is_file():
        return [Problem(f"{field}.model.path", f"{folder} has no tokenizer.json")]
    if config.backend == "simulated":
        return []
    weights = any(role.engine_args.get("load_format") != "dummy" for role in config.roles.values())
    lacks = model_folder.problem(folder, weights)
    return [] if lacks is None else [Problem(f"{field}.model.path", lacks)]


def free_here() -> Resources:
    """What workers may take of this machine."""
    # Ray's answer knows the container's limit, psutil's what the machine's other tenants use.
    available_bytes = min(estimate_available_memory(), psutil.virtual_memory().available)
    return Resources((os.cpu_count() or 1) - INGRESS_CPUS, memory_bytes=max(0, available_bytes - OWN_MEMORY_BYTES))


def check_size(field: str, config: DeploymentConfig, free: Resources) -> list[Problem]:
    """Whether the workers fit on this machine. GPUs are counted by Ray, later."""
    if config.accelerator != NO_ACCELERATOR:
        return []
    try:
        plan(Topology((Node("this machine", "this machine", free, free),)), worker_groups(config))
    except PlacementError as error:
        return [Problem(f"{field}.{error.group}.resources", str(error))]
    return []
