"""`dynamo-ray validate` for Kubernetes manifests: every level of every object, down into the Serve file inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynamo_ray import config_file, secrets
from dynamo_ray.cli.checked import check_document
from dynamo_ray.cli.serve_schema import check as serve_problems
from dynamo_ray.cluster.workload import worker_groups
from dynamo_ray.config_file import Application, Document, Place, dotted
from dynamo_ray.errors import ConfigError, Problem
from dynamo_ray.kubernetes import rules, validation
from placement.plan import PlacementError
from placement.plan import plan as assign
from placement.topology import DOMAIN_LABEL, NO_ACCELERATOR, UNLIMITED_BYTES, Node, Resources, Topology

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Found:
    """One valid object or Serve document."""

    file: Path
    title: str
    checked: bool = True
    """False: a custom resource of another project, for which there is no schema here."""


def holds_manifests(path: Path) -> bool:
    """Whether it is a folder, or a file with a Kubernetes object in it. Raises ConfigError if it cannot be read."""
    return path.is_dir() or any(validation.is_manifest(document) for document in config_file.read_all(path))


def check(path: Path) -> list[Found]:
    """What is in a manifest file, or in every YAML file of a folder.

    Raises:
        ConfigError: Anything is wrong; carries every mistake, by file and line.
        PreflightError: The schemas of core Kubernetes are not installed.
    """
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise ConfigError((Problem(str(path), "holds no YAML file"),))
    found: list[Found] = []
    problems: list[Problem] = []
    for file in files:
        try:
            documents = config_file.read_all(file)
        except ConfigError as error:
            problems += error.problems
            continue
        for document in documents:
            wrong = _check(document)
            in_order = sorted(dict.fromkeys(wrong), key=lambda problem: problem.line or 0)
            problems += [replace(problem, field=f"{file}: {problem.field}") for problem in in_order]
            if document.value is not None:
                found.append(_found(file, document))
    if problems:
        raise ConfigError(tuple(problems))
    return found


def _found(file: Path, document: Document) -> Found:
    value = document.value
    if not validation.is_manifest(document):
        return Found(file, "a Serve file")
    name = (value.get("metadata") or {}).get("name") if isinstance(value.get("metadata"), dict) else None
    return Found(file, f"{value['kind']} {name}", validation.is_checked(value))


def _check(document: Document) -> list[Problem]:
    if document.value is None:
        return []
    if not validation.is_manifest(document):
        return check_document(document)[1]
    problems = [document.problem(path, "given twice; keep one") for path in document.duplicates]
    problems += [*validation.check(document), *rules.check(document)]
    for place, is_whole in _serve_texts(document):
        problems += _inside(document, place, is_whole and not problems)
    return problems


def _serve_texts(document: Document) -> Iterator[tuple[Place, bool]]:
    """Where a Serve file stands inside the object, and whether its pods stand there too."""
    value = document.value
    if value["kind"] == "RayService" and isinstance(_at(value, "spec", "serveConfigV2"), str):
        yield ("spec", "serveConfigV2"), True
    data = value.get("data")
    if value["kind"] == "ConfigMap" and isinstance(data, dict):
        for key, text in data.items():
            if isinstance(text, str) and config_file.IMPORT_PATH in text:
                yield ("data", str(key)), False


def _inside(document: Document, place: Place, with_pods: bool) -> Iterator[Problem]:
    text = _at(document.value, *place)
    name = dotted(place)
    try:
        (inner, *more) = config_file.parse(text, name, document.blocks.get(place, 1))
    except ConfigError as error:
        yield from (_outside(document, place, problem) for problem in error.problems)
        return
    if more:
        yield document.problem(place, "holds several YAML documents; Serve reads one")
    applications, problems = check_document(inner) if config_file.IMPORT_PATH in text else ((), serve_problems(inner))
    secret = [problem for application in applications for problem in _readable(inner, application)]
    for problem in [*problems, *secret]:
        field = name if problem.field == "(file)" else f"{name}.{problem.field}"
        yield _outside(document, place, replace(problem, field=field))
    if with_pods and not problems:
        for application in applications:
            yield from _misfits(document, application)


def _readable(document: Document, application: Application) -> Iterator[Problem]:
    """Secrets that stand in the manifest themselves."""
    for place, value in application.config.given_secrets.items():
        if secrets.is_literal(value):
            message = "stands readable in the manifest; write ${NAME}, and give all pods that variable from a Secret"
            yield document.problem(("applications", application.index, "args", *place), message)


def _outside(document: Document, place: Place, problem: Problem) -> Problem:
    """With the outer file's line: exact in a literal block; elsewhere lines are folded, and the key's must do."""
    return problem if place in document.blocks else replace(problem, line=document.lines.get(place))


def _misfits(document: Document, application: Application) -> Iterator[Problem]:
    """Workers that find no room in the worker groups beside them, where no autoscaler would make some."""
    autoscales = _at(document.value, "spec", "rayClusterConfig", "enableInTreeAutoscaling")
    if application.config.accelerator == NO_ACCELERATOR or autoscales:
        return
    groups = _at(document.value, "spec", "rayClusterConfig", "workerGroupSpecs")
    nodes = [
        node
        for group in (groups if isinstance(groups, list) else [])
        if isinstance(group, dict)
        for node in _nodes(group, application.config.accelerator)
    ]
    try:
        assign(Topology(tuple(nodes)), worker_groups(application.config))
    except PlacementError as error:
        place = ("spec", "rayClusterConfig", "workerGroupSpecs")
        yield document.problem(place, f"no room for {application.name}'s {error.group}: {error}")


def _nodes(group: Mapping[str, Any], accelerator: str) -> Iterator[Node]:
    containers = _at(group, "template", "spec", "containers")
    first = containers[0] if isinstance(containers, list) and containers else {}
    gpus = _at(first, "resources", "limits", "nvidia.com/gpu")
    replicas, hosts = group.get("replicas") or 0, group.get("numOfHosts") or 1
    domain = str(_at(group, "labels", DOMAIN_LABEL) or "")
    total = Resources(cpus=float("inf"), gpus=int(gpus or 0), memory_bytes=UNLIMITED_BYTES)
    for index in range(replicas * hosts):
        name = f"{group.get('groupName')}-{index}"
        yield Node(name, name, total, total, accelerator, domain=domain)


def _at(value: Any, *keys: str | int) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
