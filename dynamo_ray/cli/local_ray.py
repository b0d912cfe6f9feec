"""A private Ray on this machine, with Serve in HAProxy mode; several can run side by side."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import auto_init_hook, parameter
from ray._private import utils as ray_utils
from ray._private.node import Node as RayNode
from ray._private.parameter import RayParams

from dynamo_ray.cli import processes, state
from dynamo_ray.cluster.gang import reason_of
from dynamo_ray.cluster.ports import PortBlock, reserve_ports
from dynamo_ray.config import HAPROXY_ENVIRONMENT
from dynamo_ray.errors import PreflightError, Problem, StartError
from dynamo_ray.priority import PRIORITY_ENVIRONMENT

OBJECT_STORE_BYTES = 100 * 2**20
"""Nearly Ray's smallest: tokens do not go through it."""
MAX_HAPROXY_THREADS = 4
_TOKEN = secrets.token_hex(32)
"""Of every private Ray of this process: Ray's client reads the first one and keeps it."""


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for Ray's and HAProxy's files, removed at the end.

    Short, because it holds Unix sockets: HAProxy takes paths of 97 characters, and Serve puts a node id of 56 in.
    """
    folder = Path(tempfile.mkdtemp(prefix="dynamo-ray-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def reserve_serve_ports() -> PortBlock:
    """Those that `environment` needs, ours until the block is left.

    None that the kernel gives to whoever asks for any: Ray has a hundred of those before HAProxy binds its own.

    Raises:
        StartError: There are none.
    """
    try:
        return reserve_ports("0.0.0.0", 4)
    except OSError as error:
        raise StartError(f"Ray did not start: {error}") from error


def environment(folder: Path, serve: PortBlock) -> dict[str, str]:
    """What Ray's and Serve's processes read when they start."""
    haproxy = folder / "h"
    metrics_port, stats_port, fallback_port, fallback_grpc_port = serve.ports
    values = {
        processes.VARIABLE: str(folder),
        **HAPROXY_ENVIRONMENT,
        **PRIORITY_ENVIRONMENT,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        # Serve's own proxy behind HAProxy. On a port of two, the kernel would give either's requests to the other.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc_port),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # Serve kills a proxy that has not begun after 5 s, and its start fails with it: too soon on a busy machine.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(MAX_HAPROXY_THREADS, os.cpu_count() or 1)),
        # No load balancer stands in front of this one, so that none must be waited for at the end.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray listens on every interface, and asks for a token; one of its own leaves none in the home folder.
        values["RAY_AUTH_TOKEN"] = _TOKEN
    return values


@contextlib.contextmanager
def variables(values: dict[str, str]) -> Iterator[None]:
    """Set in this process's environment, and as before at the end. RAY_ADDRESS is left out meanwhile.

    For the processes that Ray starts. This one has read its own when it imported Ray: under
    RAY_SERVE_THROUGHPUT_OPTIMIZED its handles would work inside an event loop only.
    """
    # ray.init sets RAY_AUTH_MODE where it is missing; the next one must find it missing again.
    before = {name: os.environ.get(name) for name in (*values, "RAY_ADDRESS", "RAY_AUTH_MODE")}
    os.environ.update(values)
    os.environ.pop("RAY_ADDRESS", None)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def bare_nodes() -> Iterator[None]:
    """Nodes that Ray starts meanwhile have no autoscaler and no log monitor, and of a dashboard the least that can be:
    Python processes of which nobody asks anything here, and whose imports take a second each.

    ray.init has no argument for these, and whether the packages of a dashboard are there it asks of its own function
    (Ray 2.60).
    """
    dashboard = ray_utils.get_dashboard_dependency_error
    parameter.RayParams = partial(RayParams, no_monitor=True, include_log_monitor=False)
    ray_utils.get_dashboard_dependency_error = lambda: ImportError("nobody looks at one")
    try:
        yield
    finally:
        parameter.RayParams, ray_utils.get_dashboard_dependency_error = RayParams, dashboard


@contextlib.contextmanager
def running(
    folder: Path, nodes: Sequence[Mapping[str, Any]] = (), progress: Callable[[str], None] = lambda line: None
) -> Iterator[str]:
    """Ray, as the address other drivers reach it at; at the end nothing that it started is left.

    Args:
        nodes: more nodes on this machine, with the resources and labels that each is to claim (RayParams of Ray).
        progress: told how many of those there are.

    Raises:
        PreflightError: This process is joined to a Ray already.
        StartError: Ray does not start.
    """
    refuse_second()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # Its warning says that a token is asked for, which is what we want.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    with reserve_serve_ports() as serve:
        try:
            values = environment(folder, serve)
            if "RAY_AUTH_TOKEN" in values:
                state.keep_ray_token(str(folder), values["RAY_AUTH_TOKEN"])
            with variables(values), bare_nodes():
                _start(folder)
                _add_nodes(nodes, progress)
            yield str(ray.get_runtime_context().gcs_address)
        finally:
            try:
                ray.shutdown()
            finally:
                # What is left of more nodes has lost its head and nothing to save; a raylet would wait ten seconds.
                processes.end(str(folder), patience_s=0.0 if nodes else processes.TERMINATE_TIMEOUT_S)


def _start(folder: Path) -> None:
    try:
        connect(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(folder / "ray"),
        )
    except Exception as error:  # the border: Ray raises whatever it meets
        raise StartError(f"Ray did not start: {reason_of(error)}") from error


def _add_nodes(nodes: Sequence[Mapping[str, Any]], progress: Callable[[str], None]) -> None:
    """As ray.cluster_utils.Cluster does, which would also tell the whole machine of this Ray (write_ray_address)."""
    address = str(ray.get_runtime_context().gcs_address)
    for number, options in enumerate(nodes, start=1):
        progress(f"fake node {number} of {len(nodes)}")
        parameters = RayParams(
            gcs_address=address,
            redis_address=address,
            node_ip_address=f"127.0.{number // 250}.{number % 250 + 2}",
            include_log_monitor=False,
            node_manager_port=0,
            min_worker_port=0,
            max_worker_port=0,
            dashboard_agent_listen_port=None,
            **options,
        )
        try:
            RayNode(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
        except Exception as error:  # the border: Ray raises whatever it meets
            raise StartError(f"fake node {number} did not start: {reason_of(error)}") from error


def refuse_second() -> None:
    """Raises PreflightError where this process is joined to a Ray: it can be to one only."""
    if ray.is_initialized():
        raise PreflightError((Problem("--address", "this process is joined to a Ray; call ray.shutdown() first"),))


def connect(**options: Any) -> None:
    """ray.init, which takes SIGTERM for itself (ray/_private/worker.py); whose it was gets it back.

    From then on nothing else in this process starts a Ray unasked: a thread of Serve's that outlives ray.shutdown
    would, by its next call, and nobody would end that one.
    """
    auto_init_hook.enable_auto_connect = False
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(namespace="serve", log_to_driver=False, logging_level="warning", **options)
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
