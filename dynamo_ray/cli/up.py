"""up(config) -> Deployment: from a file to something that answers, and back to nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import yaml

from dynamo_ray.cli import local_nats, local_ray, preflight, serving, state
from dynamo_ray.cli.checked import CheckedFile, check_file, check_reachable, check_secrets
from dynamo_ray.cli.fake_cluster import fake_cluster
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.config_file import IMPORT_PATH
from dynamo_ray.errors import ConfigError, Problem
from dynamo_ray.request.membership import WorkerStatus

TEARDOWN_MARGIN_S = 30.0
"""Beyond draining."""

Report = Callable[[tuple[WorkerStatus, ...]], None]


class Deployment:
    """A deployment that this process starts and answers for. `close`, or leaving its `with`, ends all of it.

    Args:
        resources: what is closed with it; others may add to it.
        entry: what other terminals are told of it.
        keeper: of its private nats-server.
    """

    def __init__(
        self,
        checked: CheckedFile,
        resources: contextlib.ExitStack,
        entry: state.Running,
        keeper: local_nats.Keeper,
    ) -> None:
        self.checked = checked
        self._resources = resources
        self._entry = entry
        self._keeper = keeper
        resources.callback(state.remove, entry.pid)
        self.note()

    @property
    def url(self) -> str:
        """Of the first application."""
        return self._entry.url

    @property
    def mark(self) -> str | None:
        """What every process of its private Ray carries; None on someone else's Ray."""
        return self._entry.mark

    def statuses(self) -> list[WorkerStatus]:
        """Every worker, as its orchestrator sees it now."""
        return [status for name in self.checked.names for status in serving.statuses(name)]

    def note(self, **changes: Any) -> None:
        """Tell other terminals what has changed."""
        entry = msgspec.structs.replace(self._entry, **changes)
        state.write(entry)
        self._entry = entry

    def follow(self, ended: Callable[[float], bool], every_s: float = 1.0) -> None:
        """Keep what other terminals see of the workers current, until `ended(seconds to wait)` says so."""
        while not ended(every_s):
            workers = tuple(self.statuses())
            if workers != self._entry.workers:
                self.note(workers=workers)

    def close(self) -> None:
        """Drain and end every worker, then whatever was started for them; safe to call twice."""
        self._resources.close()

    def kill(self) -> None:
        """End everything of a private Ray at once, without draining. On someone else's Ray nothing is ended."""
        self._keeper.let_go()
        state.discard(self._entry)

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
    fake_nodes: bool = False,
    topology: str | None = None,
    report: Report = lambda statuses: None,
    progress: Callable[[str], None] = lambda line: None,
    prepared: Callable[[Deployment], None] = lambda deployment: None,
) -> Deployment:
    """Serve that configuration; returns when it answers. Nothing is left running if it does not.

    Args:
        config: a file, or the `args` of one as a value.
        address: of a running Ray; without it a private one is started, which ends with the deployment.
        port: in place of the file's.
        fake_nodes: on a private Ray whose GPU nodes are faked, with simulated engines (`fake_cluster`).
        topology: of those nodes, 13x8xH100 or a file; None: as few as the workers fit on.
        report: told the workers' states at each change.
        progress: told each step, as a line for a person.
        prepared: given the deployment before anything is started, for who must be able to end it early.

    Raises:
        ConfigError: The file or an argument is wrong.
        PreflightError: The machine is not ready.
        StartError: Something died while starting.
    """
    if not isinstance(config, str | Path | DeploymentConfig):
        message = f"is a {type(config).__name__}; give a file's path, or what `load_config` returns"
        raise ConfigError((Problem("config", message),))
    if port is not None and not 0 < port < 1 << 16:
        raise ConfigError((Problem("port", f"{port} is no port; write 1 to 65535"),))
    if topology is not None and not fake_nodes:
        raise ConfigError((Problem("topology", "is of faked nodes only; have them faked, or leave it out"),))
    if fake_nodes and address is not None:
        raise ConfigError((Problem("address", "a fake cluster is a private one; leave one of the two out"),))
    resources = contextlib.ExitStack()
    try:
        folder = resources.enter_context(local_ray.scratch())
        checked = check_file(_as_file(config, folder))
        check_reachable(checked)
        nodes: list[dict[str, Any]] = []
        if fake_nodes:
            fake = fake_cluster(checked, topology)
            checked, nodes = fake.checked, fake.node_options()
        chosen = checked.port if port is None else port
        if address is None:
            check_secrets(checked)
            state.running()  # for what it ends: a proxy of a killed `up` may sit on the port
            preflight.check(checked, chosen, progress)
        provided = resources.enter_context(local_nats.provided(checked, folder, private=address is None))
        entry = _entry(provided.checked, chosen, address, folder)
        deployment = Deployment(provided.checked, resources, entry, provided.keeper)
        prepared(deployment)
        if address is None:
            progress("starting Ray")
            deployment.note(ray_address=resources.enter_context(local_ray.running(folder, nodes, progress)))
            provided.keeper.keep()
            resources.callback(provided.keeper.let_go)  # Ray's end ends the server too
            head = "127.0.0.1"
        else:
            head = resources.enter_context(serving.driver(address))
        _deploy(deployment, chosen, head, resources, report, progress)
    except BaseException:
        resources.close()
        raise
    return deployment


def _deploy(
    deployment: Deployment,
    port: int,
    head: str,
    resources: contextlib.ExitStack,
    report: Report,
    progress: Callable[[str], None],
) -> None:
    checked = deployment.checked
    progress("deploying")
    client = serving.start(checked, port)
    urls = checked.urls(serving.root_url(client.http_config, head))
    deployment.note(url=urls[0])
    serving.check_alone(client, checked.names)
    resources.callback(serving.undeploy, checked.names, checked.drain_timeout_s + TEARDOWN_MARGIN_S)
    serving.deploy(client, checked, port)

    def changed(statuses: tuple[WorkerStatus, ...]) -> None:
        deployment.note(workers=statuses)
        report(statuses)

    serving.await_ready(checked, urls, changed, give_up=deployment.mark is not None)
    deployment.note(workers=tuple(deployment.statuses()), ready=True)


def _entry(checked: CheckedFile, port: int, address: str | None, folder: Path) -> state.Running:
    return state.Running(
        pid=os.getpid(),
        started_ticks=state.started_ticks(os.getpid()) or 0,
        url=f"http://{checked.host}:{port}",
        port=port,
        config=str(checked.path),
        ray_address=address or "",
        applications=checked.names,
        mark=None if address else str(folder),
        end_timeout_s=checked.drain_timeout_s + 2 * TEARDOWN_MARGIN_S,
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
