"""`dynamo-ray flags`: what every node of every worker starts, as its engine's own command line."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import backends
from dynamo_ray.cli.checked import check_file
from dynamo_ray.cluster.launches import Launch, first_launches, launches
from dynamo_ray.cluster.workload import worker_groups
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.errors import ConfigError, Problem
from placement.cluster_file import read_topology
from placement.plan import PlacementError, plan
from placement.topology import TopologyError


@dataclass(frozen=True, slots=True)
class Flags:
    application: str
    config: DeploymentConfig
    version: str | None
    """Of the engine, whose options these are."""
    launches: tuple[Launch, ...]
    """Without a topology, of each role's first worker alone."""
    placed: bool


def flags(file: Path, topology: str | None) -> Iterator[Flags]:
    """Of every application in the file.

    Raises:
        ConfigError: The file or the topology is wrong, or the workers do not fit there.
    """
    for application in check_file(file).applications:
        config = application.config
        found = (
            tuple(launch for role in config.roles for launch in first_launches(config, role))
            if topology is None
            else _on(topology, config, f"applications[{application.index}].args")
        )
        version = backends.resolve_version(config.backend, config.engine_version)
        yield Flags(application.name, config, version, found, topology is not None)


def text(found: Flags) -> str:
    """For a shell, once its placeholders are filled in: a comment, the environment and the command of each node."""
    return "\n".join(_shown(found, launch) for launch in found.launches)


def as_json(found: Flags) -> dict[str, Any]:
    """For programs."""
    return {
        "application": found.application,
        "backend": found.config.backend,
        "version": found.version,
        "nodes": [
            {
                "worker": launch.worker,
                "role": launch.role.value,
                "node_rank": launch.node_rank,
                "environment": dict(launch.plan.environment),
                "arguments": dict(launch.plan.arguments),
                "command": list(launch.plan.command),
                "settings": launch.plan.settings,
            }
            for launch in found.launches
        ],
    }


def _on(topology: str, config: DeploymentConfig, path: str) -> tuple[Launch, ...]:
    try:
        made = plan(read_topology(topology), worker_groups(config), spares=config.placement.spares)
    except TopologyError as error:
        raise ConfigError(tuple(Problem("--topology", problem) for problem in error.problems)) from error
    except PlacementError as error:
        raise ConfigError((Problem(f"{path}.{error.group}", str(error)),)) from error
    return launches(config, made)


def _shown(found: Flags, launch: Launch) -> str:
    replicas = found.config.roles[launch.role].replicas
    alike = "" if found.placed or replicas == 1 else f"; {replicas} workers are alike"
    actors = "; starts its ranks on all of them as Ray actors" if found.config.launcher(launch.role) == "ray" else ""
    lines = [f"# {launch.worker}, node {launch.node_rank} of {launch.num_nodes}{actors}{alike}"]
    if not launch.plan.command:
        return "\n".join([*lines, f"# simulated, in its worker's process: {dict(launch.plan.arguments)}"])
    lines += [f"{name}={shlex.quote(value)} \\" for name, value in launch.plan.environment.items()]
    lines.append(shlex.join(launch.plan.command))
    if launch.plan.settings is not None:
        lines += ["# with this file:", *(f"#   {line}" for line in launch.plan.settings.splitlines())]
    return "\n".join(lines)
