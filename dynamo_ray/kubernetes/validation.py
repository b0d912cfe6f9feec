"""One Kubernetes object against its schema, without a cluster: every mistake with its place, what is unknown refused.

Custom resources are checked against `crds/`, core ones against the schemas in the `kubernetes-validate` wheel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from referencing import Registry, Resource

from dynamo_ray.config_file import Document, Place, unknown_key
from dynamo_ray.errors import PreflightError, Problem

KUBERNETES_VERSION = "1.37.0"
"""Whose core schemas are used."""

_METADATA = (
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "labels",
    "managedFields",
    "name",
    "namespace",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
)


class _Validator(Protocol):
    def iter_errors(self, instance: Any) -> Iterator[ValidationError]: ...


def is_manifest(document: Document) -> bool:
    """Whether it is a Kubernetes object, or tries to be."""
    return isinstance(document.value, dict) and "apiVersion" in document.value and "kind" in document.value


def is_checked(value: Mapping[str, Any]) -> bool:
    """Whether there is a schema for objects of that API: custom resources of other projects have none here."""
    return _custom(value) is not None or _is_core(str(value["apiVersion"]))


def check(document: Document) -> list[Problem]:
    """What the API server would refuse or drop of an object.

    Raises:
        PreflightError: It is a core object, and the wheel with their schemas is not installed.
    """
    value = document.value
    custom = _custom(value)
    if custom is not None:
        found = _problems(document, custom, _without_nulls(value))
        metadata = value.get("metadata")
        keys = metadata if isinstance(metadata, dict) else {}
        unknown = [key for key in keys if key not in _METADATA]
        return found + [document.problem(("metadata", key), unknown_key(str(key), _METADATA)) for key in unknown]
    api_version, kind = str(value["apiVersion"]), str(value["kind"])
    if not _is_core(api_version):
        near = get_close_matches(kind, [name for name, api in _custom_kinds().items() if api == api_version], n=1)
        return [document.problem(("kind",), f"{api_version} has no {kind}; did you mean {near[0]}?")] if near else []
    core = _core(api_version, kind)
    if core is None:
        return [document.problem(("kind",), _no_such_kind(api_version, kind))]
    found = _problems(document, core, value)
    if not isinstance(value.get("metadata"), dict):
        found.append(document.problem(("metadata",), "missing: an object needs a name"))
    return found


def _problems(document: Document, validator: _Validator, value: Any) -> list[Problem]:
    return [problem for error in validator.iter_errors(value) for problem in _told(document, error)]


def _told(document: Document, error: ValidationError) -> Iterator[Problem]:
    """A finding of jsonschema in our words."""
    path: Place = tuple(error.absolute_path)
    given = error.instance
    if error.validator == "additionalProperties" and isinstance(given, dict):
        known = tuple(error.schema.get("properties", ()))
        for key in given:
            if key not in known:
                yield document.problem((*path, key), unknown_key(str(key), known))
    elif error.validator == "required":
        for key in error.validator_value:
            if f"{key!r} is a required" in error.message:
                yield document.problem((*path, key), "missing")
    elif error.validator in ("enum", "const"):
        allowed = [error.validator_value] if error.validator == "const" else list(error.validator_value)
        near = get_close_matches(str(given), [str(one) for one in allowed], n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        yield document.problem(path, f"{given!r} is none of {', '.join(str(one) for one in allowed)}{meant}")
    elif error.validator == "type":
        wanted = error.validator_value
        names = " or ".join(wanted) if isinstance(wanted, list) else wanted
        yield document.problem(path, f"must be of type {names}; it is {_short(given)}")
    else:
        yield document.problem(path, error.message if len(error.message) < 200 else f"{error.message[:200]}...")


def _short(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _without_nulls(value: Any) -> Any:
    """As an API server reads a custom resource: a null is a field left out."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _custom(value: Mapping[str, Any]) -> _Validator | None:
    group, _, version = str(value["apiVersion"]).partition("/")
    validator = _derived(str(value["kind"]).lower(), version)
    if validator is None:
        return None
    schema = validator.schema
    return validator if schema["properties"]["apiVersion"]["const"] == f"{group}/{version}" else None


@lru_cache(maxsize=32)
def _derived(kind: str, version: str) -> Draft202012Validator | None:
    file = resources.files("dynamo_ray.kubernetes.crds") / f"{kind}-{version}.json"
    if not kind.isalnum() or not version.isalnum() or not file.is_file():
        return None
    return Draft202012Validator(json.loads(file.read_text(encoding="utf-8")))


def known_kinds() -> dict[str, str]:
    """Every custom resource that is checked, and where its schema comes from."""
    return {schema["properties"]["kind"]["const"]: schema["$comment"] for schema in _derived_schemas()}


@lru_cache(maxsize=1)
def _custom_kinds() -> dict[str, str]:
    """Their API versions."""
    found = (schema["properties"] for schema in _derived_schemas())
    return {properties["kind"]["const"]: properties["apiVersion"]["const"] for properties in found}


def _derived_schemas() -> Iterator[Mapping[str, Any]]:
    for file in sorted(resources.files("dynamo_ray.kubernetes.crds").iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".json"):
            yield json.loads(file.read_text(encoding="utf-8"))


def _is_core(api_version: str) -> bool:
    """`v1`, `apps/v1`, `batch/v1`, and what Kubernetes itself keeps under k8s.io."""
    group, slash, _ = api_version.partition("/")
    if not slash or "." not in group:
        return True
    return group.endswith(".k8s.io") and any(name.endswith(f"-{_short_api(api_version)}") for name in _core_names())


def _short_api(api_version: str) -> str:
    """As the wheel names its files: resource.k8s.io/v1 is resource-v1."""
    group, slash, version = api_version.partition("/")
    return f"{group.partition('.')[0]}-{version}" if slash else api_version


def _core(api_version: str, kind: str) -> _Validator | None:
    name = f"{kind.lower()}-{_short_api(api_version)}"
    return _core_validator(name) if name in _core_names() else None


def _no_such_kind(api_version: str, kind: str) -> str:
    there = f"-{_short_api(api_version)}"
    kinds = [name.removesuffix(there) for name in _core_names() if name.endswith(there)]
    near = get_close_matches(kind.lower(), kinds, n=1)
    meant = f"; did you mean {near[0]} (in camel case)?" if near else ""
    return f"Kubernetes {KUBERNETES_VERSION} has no {kind} in {api_version}{meant}"


def _folder() -> Path:
    try:
        found = resources.files("kubernetes_validate")
    except ModuleNotFoundError as error:
        message = "the schemas of core Kubernetes are not installed; pip install 'dynamo-ray[kubernetes]'"
        raise PreflightError((Problem("kubernetes-validate", message),)) from error
    return Path(str(found)) / "kubernetes-json-schema" / f"v{KUBERNETES_VERSION}-local-strict"


@lru_cache(maxsize=1)
def _core_names() -> frozenset[str]:
    names = frozenset(file.stem for file in _folder().glob("*.json"))
    if not names:
        message = f"has no schemas of Kubernetes {KUBERNETES_VERSION}; pip install 'dynamo-ray[kubernetes]'"
        raise PreflightError((Problem("kubernetes-validate", message),))
    return names


@lru_cache(maxsize=1)
def _registry() -> Registry[Any]:
    definitions = json.loads((_folder() / "_definitions.json").read_text(encoding="utf-8"))
    return Resource.from_contents(definitions) @ Registry()


@lru_cache(maxsize=64)
def _core_validator(name: str) -> _Validator:
    schema = json.loads((_folder() / f"{name}.json").read_text(encoding="utf-8"))
    validator: _Validator = Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _registry())
    return validator
