"""A `serve run` file as a checked value: every mistake at once, each with its field, its line and what to write."""

from __future__ import annotations

import re
import types
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

import backends
from backends.engine import EngineStartError, Role
from dynamo_ray.cluster.launches import Launch, disagreements, first_launches
from dynamo_ray.config import SECRETS, DeploymentConfig, RoleConfig
from dynamo_ray.errors import ConfigError, Problem
from dynamo_ray.routing.policies import resolve

IMPORT_PATH = "dynamo_ray.app:build"

Place = tuple[str | int, ...]
"""Keys and list indexes from the top of the document."""


@dataclass(frozen=True, slots=True)
class Document:
    """What a YAML file says, and on which line it says it."""

    value: Any
    lines: dict[Place, int]
    duplicates: tuple[Place, ...] = ()
    blocks: dict[Place, int] = field(default_factory=dict)
    """Where a literal block (`key: |`) stands, the line of its first line of text."""

    def problem(self, path: Place, message: str) -> Problem:
        """At the line of `path`, or of the nearest thing around it that the file has."""
        line = next((self.lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.lines), None)
        return Problem(dotted(path), message, line)


@dataclass(frozen=True, slots=True)
class Application:
    """One of our applications in a file."""

    index: int
    name: str
    route_prefix: str | None
    """None: no HTTP."""
    config: DeploymentConfig = field(repr=False)


def load_config(file: Path | str, application: str | None = None) -> DeploymentConfig:
    """What a `serve run` file says of one deployment, checked; for `plan`, `simulate` and `up`.

    Args:
        application: its name; None: the only one of ours in the file.

    Raises:
        ConfigError: The file cannot be read, what it says of ours is wrong (every mistake, with its line), or there is
            no such application. What is Serve's own in it is not looked at: `dynamo-ray validate` does that.
    """
    found, problems = applications(read(Path(file)))
    if problems:
        raise ConfigError(problems)
    if not found:
        message = f"none in {file} has `import_path: {IMPORT_PATH}`; give a `serve run` file with one of ours"
        raise ConfigError((Problem("applications", message),))
    chosen = [one.config for one in found if application in (None, one.name)]
    if len(chosen) != 1:
        names = ", ".join(one.name for one in found)
        raise ConfigError((Problem("applications", f"name one of those in {file}: {names}"),))
    return chosen[0]


def dotted(path: Place) -> str:
    """applications[0].args.prefill; the whole document is `(file)`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "(file)"


def read(file: Path) -> Document:
    """Parse a file of one document; anchors and merge keys are resolved.

    Raises:
        ConfigError: The file cannot be read, or is no YAML.
    """
    documents = read_all(file)
    if len(documents) > 1:
        raise ConfigError((Problem(str(file), "is not valid YAML: has several documents", documents[1].lines[()]),))
    return documents[0]


def read_all(file: Path) -> tuple[Document, ...]:
    """Parse every document of a file; an empty file is one that says nothing. Raises as `read` does."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError((Problem(str(file), f"cannot be read: {error}"),)) from error
    return parse(text, str(file))


def parse(text: str, name: str, first_line: int = 1) -> tuple[Document, ...]:
    """Parse every document of a text that begins on that line of a file; `name` stands in errors. Raises as `read`."""
    try:
        return _Reader(text, first_line).documents() or (Document(None, {}),)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + first_line if error.problem_mark else None
        what = "; ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError((Problem(name, f"is not valid YAML: {what}", line),)) from error
    except yaml.YAMLError as error:
        raise ConfigError((Problem(name, f"is not valid YAML: {error}"),)) from error
    except RecursionError as error:
        raise ConfigError((Problem(name, "contains itself, or is nested too deeply"),)) from error


class _Reader:
    """Composes documents and remembers where each key stands."""

    def __init__(self, text: str, first_line: int) -> None:
        self._loader = yaml.SafeLoader(text)
        self._first_line = first_line

    def documents(self) -> tuple[Document, ...]:
        found = []
        try:
            while self._loader.check_node() and (node := self._loader.get_node()) is not None:
                self._lines: dict[Place, int] = {}
                self._blocks: dict[Place, int] = {}
                self._duplicates: list[Place] = []
                value = self._build(node, ())
                found.append(Document(value, self._lines, tuple(self._duplicates), self._blocks))
        finally:
            self._loader.dispose()
        return tuple(found)

    def _build(self, node: yaml.Node, path: Place) -> Any:
        self._lines.setdefault(path, node.start_mark.line + self._first_line)
        if isinstance(node, yaml.ScalarNode) and node.style == "|":
            self._blocks[path] = node.start_mark.line + self._first_line + 1
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._constructed(node)

    def _constructed(self, node: yaml.Node) -> Any:
        try:
            return self._loader.construct_object(node, deep=True)
        except (ValueError, KeyError, AttributeError) as error:
            # As PyYAML 6 leaves it: 2024-02-30, `!!int x`, `!!bool x`, `!!timestamp x`.
            message = f"{node.value!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from error

    def _mapping(self, node: yaml.MappingNode, path: Place) -> dict[Any, Any]:
        own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        self._duplicates += [(*path, key) for key in dict.fromkeys(own) if own.count(key) > 1 and key != "<<"]
        self._loader.flatten_mapping(node)
        built: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self._constructed(key_node)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "found an unhashable key", key_node.start_mark)
            here = (*path, key if isinstance(key, int) else str(key))
            self._lines[here] = key_node.start_mark.line + self._first_line
            built[key] = self._build(value_node, here)
        return built


def applications(document: Document) -> tuple[tuple[Application, ...], tuple[Problem, ...]]:
    """Our applications in the document, and every mistake in their `args`."""
    found: list[Application] = []
    problems: list[Problem] = [document.problem(path, "given twice; keep one") for path in document.duplicates]
    listed = document.value.get("applications") if isinstance(document.value, dict) else None
    for index, raw in enumerate(listed if isinstance(listed, list) else []):
        if not isinstance(raw, dict) or raw.get("import_path") != IMPORT_PATH:
            continue
        path: Place = ("applications", index, "args")
        args = raw.get("args")
        if not isinstance(args, dict):
            problems.append(document.problem(path, "missing: the deployment is described here"))
            continue
        config, wrong = check_args(document, path, args)
        problems += wrong
        if config is not None:
            found.append(Application(index, str(raw.get("name", "default")), raw.get("route_prefix", "/"), config))
    return tuple(found), tuple(problems)


def check_args(document: Document, path: Place, args: dict[str, Any]) -> tuple[DeploymentConfig | None, list[Problem]]:
    """The configuration under `path`, or what is wrong with it."""
    try:
        config = DeploymentConfig.model_validate(args)
    except ValidationError as error:
        return None, problems_of(document, path, DeploymentConfig, error)
    return config, [*_policy_problems(document, path, config), *_engine_problems(document, path, config)]


def check_engines(config: DeploymentConfig) -> None:
    """Refuse what its engines would not take, or a policy there is not, for a configuration from no file of ours.

    Raises:
        ConfigError: Every mistake, with its field under `args`.
    """
    document = Document(None, {})
    problems = [*_policy_problems(document, (), config), *_engine_problems(document, (), config)]
    if problems:
        raise ConfigError(tuple(problems))


def _policy_problems(document: Document, path: Place, config: DeploymentConfig) -> list[Problem]:
    """Of the router's policy: here, as every ingress replica would find it."""
    try:
        resolve(config.router)
    except ValueError as error:
        text = str(error)
        key = "policy_args" if text.startswith("policy_args: ") else "policy"
        return [document.problem((*path, "router", key), text.removeprefix("policy_args: "))]
    return []


def _engine_problems(document: Document, path: Place, config: DeploymentConfig) -> list[Problem]:
    """What the engines would not take: the user's own arguments, then all that follows from the configuration."""
    try:
        version = backends.resolve_version(config.backend, config.engine_version)
    except EngineStartError as error:
        return [_start_problem(document, path, "", error)]
    problems = [
        document.problem((*path, role.value, "engine_args", *mistake.key), mistake.message)
        for role, role_config in config.roles.items()
        for mistake in backends.mistakes(config.backend, version, role_config.engine_args)
    ]
    if problems:
        return problems
    leaders: dict[Role, Launch] = {}
    for role in config.roles:
        try:
            leaders[role] = first_launches(config, role)[0]
        except EngineStartError as error:
            problems.append(_start_problem(document, path, role.value, error))
    for found in disagreements(config, leaders):
        where = ("env",) if found.in_environment else ("engine_args",)
        problems.append(document.problem((*path, "decode", *where, *found.name.split(".")), found.message))
    return problems


def _start_problem(document: Document, path: Place, role: str, error: EngineStartError) -> Problem:
    """At the field with which the message begins, a role's or the deployment's; else at the role."""
    field, _, message = str(error).partition(": ")
    parts = field.split(".")
    if role and parts[0] in RoleConfig.model_fields:
        return document.problem((*path, role, *parts), message)
    if parts[0] in DeploymentConfig.model_fields:
        return document.problem((*path, *parts), message)
    return document.problem((*path, role) if role else path, str(error))


def problems_of(document: Document, path: Place, model: type[BaseModel], error: ValidationError) -> list[Problem]:
    """pydantic's findings in our words."""
    found = []
    for item in error.errors():
        where = _place(document, path, item["loc"])
        if item["type"] == "extra_forbidden":
            inner = model_at(model, where[len(path) : -1])
            found.append(document.problem(where, unknown_key(str(where[-1]), known_keys(inner) if inner else ())))
        elif item["type"] == "missing":
            found.append(document.problem((*where, item["loc"][-1]), "missing"))
        else:
            message = item["msg"].removeprefix("Value error, ")
            found.append(document.problem(where, message[0].lower() + message[1:] + _shown(where, item["input"])))
    return found


def _shown(where: Place, given: Any) -> str:
    """What was given, but for secrets."""
    if not isinstance(given, str | int | float | bool | None) or any(part in SECRETS for part in where):
        return ""
    if isinstance(given, str):
        given = re.sub(r"//[^/]*@", "//...@", given)
    return f"; it is {given!r}"


def _place(document: Document, path: Place, location: Place) -> Place:
    """What the document has of a location; pydantic also puts the tried branch of a union into it."""
    for part in location:
        if (*path, part) in document.lines:
            path = (*path, part)
    return path


def unknown_key(key: str, known: tuple[str, ...]) -> str:
    near = get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"unknown key; did you mean `{near[0]}`?"
    return f"unknown key; known here: {', '.join(sorted(known))}" if known else "unknown key"


def known_keys(model: type[BaseModel]) -> tuple[str, ...]:
    return tuple(info.alias or name for name, info in model.model_fields.items())


def model_at(model: type[BaseModel], path: Place) -> type[BaseModel] | None:
    """The model that describes what stands at `path` under `model`; None where it is free-form."""
    for part in path:
        if isinstance(part, int):
            continue
        info = model.model_fields.get(str(part))
        models = list(_models(info.annotation)) if info is not None else []
        if len(models) != 1:
            return None
        model = models[0]
    return model


def unknown_keys(
    document: Document, path: Place, model: type[BaseModel], value: Any, skip: frozenset[str] = frozenset()
) -> Iterator[Problem]:
    """Every key at or below `path` that `model` does not have, for models that would ignore it."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown_keys(document, (*path, index), model, item, skip)
    if not isinstance(value, dict):
        return
    known = known_keys(model)
    for key, inner in value.items():
        here = (*path, key)
        if key not in known:
            yield document.problem(here, unknown_key(str(key), known))
        elif key not in skip:
            nested = model_at(model, (key,))
            if nested is not None:
                yield from unknown_keys(document, here, nested, inner, skip)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, list, tuple):
        for argument in get_args(annotation):
            yield from _models(argument)
