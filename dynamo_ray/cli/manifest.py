"""`dynamo-ray manifest`: a configuration and what is said of a Kubernetes cluster in, YAML for `kubectl apply` out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynamo_ray.cli.checked import CheckedFile, check_file
from dynamo_ray.cluster.layout import plan, read_shape, shape_of
from dynamo_ray.config_file import Application
from dynamo_ray.errors import ConfigError, Problem
from dynamo_ray.kubernetes import ray_objects, render
from dynamo_ray.kubernetes.options import Options
from dynamo_ray.kubernetes.pods import Object
from placement.cluster_file import from_document
from placement.gpus import GPU_TYPES
from placement.model_shape import ModelShape
from placement.topology import NO_ACCELERATOR, Topology

HEADER = "# dynamo-ray manifest "
"""Begins each file's first line: the command that makes it."""


def objects(file: Path, options: Options, topology: str | None, model_config: Path | None) -> dict[str, list[Object]]:
    """Kubernetes objects by file, of a `serve run` file.

    Args:
        file: the `serve run` file.
        options: of the cluster.
        topology: as of `plan`, what the cluster has; None: as many nodes as the workers ask for.
        model_config: the model's config.json, where it is not known.

    Raises:
        ConfigError: The file or the options are wrong, or the workers do not fit; everything at once.
    """
    checked = check_file(file)
    shapes = _shapes(checked, model_config)
    problems: list[Problem] = []
    made: dict[str, list[Object]] = {}
    try:
        made = render.objects(options, checked.applications, checked.value, shapes)
    except ConfigError as error:
        problems += error.problems
    for application in checked.applications:
        problems += _misfits(application, topology, shapes.get(application.config.model.name))
    if problems:
        raise ConfigError(tuple(dict.fromkeys(problems)))
    return made


def write(made: dict[str, str], folder: Path, header: str) -> None:
    """Write them; what an earlier run left there is replaced.

    Raises:
        ConfigError: It cannot be written, or the folder holds YAML that is not ours; then nothing is changed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = sorted(folder.glob("*.yaml"))
        for old in before:
            if not old.read_text(encoding="utf-8").startswith(HEADER):
                message = f"{old} is not from this command, and kubectl would apply it too; choose another folder"
                raise ConfigError((Problem("--out", message),))
        for old in before:
            old.unlink()
        for name, text in made.items():
            (folder / name).write_text(f"{header}\n{text}", encoding="utf-8")
    except OSError as error:
        raise ConfigError((Problem("--out", str(error)),)) from error


def _shapes(checked: CheckedFile, model_config: Path | None) -> dict[str, ModelShape]:
    found: dict[str, ModelShape] = {}
    for application in checked.applications:
        config = application.config
        shape = read_shape(model_config, "--model-config") if model_config is not None else shape_of(config)[0]
        if shape is not None:
            found[config.model.name] = shape
    return found


def _misfits(application: Application, topology: str | None, shape: ModelShape | None) -> Iterator[Problem]:
    path = f"applications[{application.index}].args"
    if topology is None and application.config.accelerator not in (NO_ACCELERATOR, *GPU_TYPES):
        return  # which is said already; there are no nodes of it to ask for
    try:
        plan(application.config, _asked_for(application) if topology is None else topology, shape=shape)
    except ConfigError as error:
        for problem in error.problems:
            field = "--topology" if problem.field == "topology" else f"{path}.{problem.field}"
            yield Problem(field, problem.message)


def _asked_for(application: Application) -> Topology:
    """The nodes that the manifests ask for: of each group as many pods as it has."""
    nodes: list[dict[str, Any]] = []
    for group in ray_objects.groups((application,)):
        config = group.config
        gpus = ray_objects.ranks_per_node(group.role_config) if config.accelerator != NO_ACCELERATOR else 0
        for index in range(group.replicas):
            name = f"{group.name}-{index}"
            node = {"name": name, "count": group.hosts, "gpus": gpus, "type": config.accelerator}
            nodes.append({**node, "domain": name} if group.role_config.one_nvlink_domain else node)
    return from_document({"nodes": nodes})
