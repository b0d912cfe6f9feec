"""A configuration file, read and checked as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dynamo_ray import config_file, secrets
from dynamo_ray.config_file import Application, Document, dotted
from dynamo_ray.errors import ConfigError, Problem


@dataclass(frozen=True, slots=True)
class CheckedFile:
    path: Path
    value: dict[str, Any]
    """The document as Serve takes it."""
    applications: tuple[Application, ...]
    """Ours; at least one."""

    @property
    def host(self) -> str:
        return str((self.value.get("http_options") or {}).get("host", "0.0.0.0"))

    @property
    def port(self) -> int:
        return int((self.value.get("http_options") or {}).get("port", 8000))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(application.name for application in self.applications)

    @property
    def drain_timeout_s(self) -> float:
        """The longest."""
        return max(application.config.limits.drain_timeout_s for application in self.applications)

    def urls(self, root: str) -> tuple[str, ...]:
        """Where each of ours is, on a Serve that listens at `root`."""
        return tuple(root + (application.route_prefix or "").rstrip("/") for application in self.applications)


def check_reachable(checked: CheckedFile) -> None:
    """Raises ConfigError where clients could not reach an application of ours."""
    problems = []
    if checked.value.get("proxy_location") == "Disabled":
        problems.append(Problem("proxy_location", "Disabled leaves no way in; write HeadOnly or EveryNode"))
    for application in checked.applications:
        if application.route_prefix is None:
            field = f"applications[{application.index}].route_prefix"
            problems.append(Problem(field, "null leaves no way in; write a path such as /"))
    if problems:
        raise ConfigError(tuple(problems))


def check_secrets(checked: CheckedFile) -> None:
    """Raises ConfigError where a secret is not where an application of ours says that it is."""
    problems: list[Problem] = []
    for application in checked.applications:
        for place, value in application.config.given_secrets.items():
            try:
                secrets.read(f"applications[{application.index}].args.{dotted(place)}", value)
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(tuple(problems))


def check_url(option: str, url: str) -> str:
    """The URL. Raises ConfigError, at that option, where it is none that a deployment could be at."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        port = 0
    if port == 0 or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError((Problem(option, f"{url!r} is no URL of a deployment; write http://host:port"),))
    return url


def check_file(path: Path) -> CheckedFile:
    """Read and check every level of a `serve run` file.

    Raises:
        ConfigError: Anything is wrong; carries every mistake, in the order of the file.
    """
    document = config_file.read(path)
    found, wrong = check_document(document)
    if wrong:
        raise ConfigError(tuple(wrong))
    return CheckedFile(path, document.value, found)


def check_document(document: Document) -> tuple[tuple[Application, ...], list[Problem]]:
    """Our applications in a `serve run` document, and every mistake at any level of it, in its order."""
    # Imported late: it imports Ray, which takes seconds, and a file that is no YAML needs none of it.
    from dynamo_ray.cli import serve_schema

    found, problems = config_file.applications(document)
    wrong = [*serve_schema.check(document), *problems]
    if not wrong and not found:
        wrong = [Problem("applications", f"none has `import_path: {config_file.IMPORT_PATH}`", None)]
    return found, sorted(dict.fromkeys(wrong), key=lambda problem: problem.line or 0)
