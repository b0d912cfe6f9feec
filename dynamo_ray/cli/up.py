"""up(config) -> Deployment: from a file to something that answers, and back to nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import psutil
import yaml

from dynamo_ray.cli import local_ray, preflight, processes, serving, state
from dynamo_ray.cli.checked import CheckedFile, check_file
from dynamo_ray.cli.processes import PeakMemory
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.config_file import IMPORT_PATH
from dynamo_ray.request.membership import WorkerStatus

TEARDOWN_MARGIN_S = 30.0


class Deployment:
    """A deployment that this process started and answers for. `close`, or leaving its `with`, ends all of it."""

    def __init__(self, checked: CheckedFile, port: int, mark: str | None, resources: contextlib.ExitStack) -> None:
        self.checked = checked
        self.url = f"http://{'127.0.0.1' if checked.host in ('0.0.0.0', '::') else checked.host}:{port}"
        self.memory = PeakMemory(mark) if mark is not None else None
        self._mark = mark
        self._resources = resources

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(application.name for application in self.checked.applications)

    def statuses(self) -> list[WorkerStatus]:
        """Every worker, as its orchestrator sees it now."""
        return [status for name in self.names for status in serving.statuses(name)]

    def close(self) -> None:
        """Drain and end every worker, then whatever was started for them; safe to call twice."""
        self._resources.close()

    def kill(self) -> None:
        """End everything of a private Ray at once, without draining. On someone else's Ray it does nothing."""
        if self._mark is not None:
            processes.end(self._mark, patience_s=0.0)

    def __enter__(self) -> Deployment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def up(
    config: str | Path | DeploymentConfig,
    *,
    address: str | None = None,
    port: int | None = None,
    report: Callable[[tuple[WorkerStatus, ...]], None] = lambda statuses: None,
    progress: Callable[[str], None] = lambda line: None,
    prepared: Callable[[Deployment], None] = lambda deployment: None,
) -> Deployment:
    """Serve that configuration; returns when it answers. Nothing is left running if it does not.

    Args:
        config: a file, or the `args` of one as a value.
        address: of a running Ray; without it a private one is started, which ends with the deployment.
        port: in place of the file's.
        report: told the workers' states at each change.
        progress: told each step, as a line for a person.
        prepared: given the deployment before it is ready, for who must be able to end it early.

    Raises:
        ConfigError: The file is wrong.
        PreflightError: The machine is not ready.
        StartError: Something died while starting.
    """
    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(local_ray.scratch())
        checked = check_file(_as_file(config, folder))
        chosen = checked.port if port is None else port
        if address is None:
            preflight.check(checked, chosen, progress)
        ray_address = _connect(address, folder, progress, opened)
        deployment = Deployment(checked, chosen, None if address else str(folder), opened)
        prepared(deployment)
        _serve(deployment, chosen, ray_address, report, progress, opened, give_up=address is None)
        deployment._resources = opened.pop_all()
        return deployment
    raise AssertionError("an exit stack swallowed an exception")


def _serve(
    deployment: Deployment,
    port: int,
    ray_address: str,
    report: Callable[[tuple[WorkerStatus, ...]], None],
    progress: Callable[[str], None],
    opened: contextlib.ExitStack,
    give_up: bool,
) -> None:
    checked = deployment.checked
    drain_s = max(application.config.limits.drain_timeout_s for application in checked.applications)
    opened.callback(serving.undeploy, deployment.names, drain_s + TEARDOWN_MARGIN_S)
    entry = _entry(deployment, port, ray_address)
    opened.callback(state.remove, entry.pid)
    state.write(entry)

    def changed(statuses: tuple[WorkerStatus, ...]) -> None:
        state.write(msgspec.structs.replace(entry, workers=statuses))
        report(statuses)

    progress("deploying")
    serving.deploy(checked, port)
    serving.await_ready(checked, deployment.url, changed, give_up)
    state.write(msgspec.structs.replace(entry, workers=tuple(deployment.statuses()), ready=True))


def follow(deployment: Deployment, ended: Callable[[float], bool], every_s: float = 1.0) -> None:
    """Keep what other terminals see of the workers current, until `ended(seconds to wait)` says so."""
    found = next(entry for entry in state.running() if entry.pid == os.getpid())
    while not ended(every_s):
        workers = tuple(deployment.statuses())
        if workers != found.workers:
            found = msgspec.structs.replace(found, workers=workers)
            state.write(found)


def _connect(address: str | None, folder: Path, progress: Callable[[str], None], opened: contextlib.ExitStack) -> str:
    if address is None:
        progress("starting Ray")
        opened.enter_context(local_ray.variables(local_ray.environment(folder)))
        return opened.enter_context(local_ray.running(folder))
    opened.enter_context(serving.driver(address))
    return address


def _entry(deployment: Deployment, port: int, ray_address: str) -> state.Running:
    return state.Running(
        pid=os.getpid(),
        started_unix_s=psutil.Process().create_time(),
        url=deployment.url,
        port=port,
        config=str(deployment.checked.path),
        ray_address=ray_address,
        applications=deployment.names,
    )


def _as_file(config: str | Path | DeploymentConfig, folder: Path) -> Path:
    """A value becomes a file of its own, so that both take the same way."""
    if not isinstance(config, DeploymentConfig):
        return Path(config)
    document: dict[str, Any] = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [
            {
                "name": "default",
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": config.model_dump(mode="json", exclude_unset=True),
            }
        ],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path
