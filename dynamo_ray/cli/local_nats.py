"""The private nats-server of a `dynamo-ray up` whose file wants events by NATS and names no server."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_ray.cli import processes
from dynamo_ray.cli.checked import CheckedFile
from dynamo_ray.config import DeploymentConfig, NatsConfig
from dynamo_ray.config_file import Application
from dynamo_ray.errors import PreflightError, Problem

if TYPE_CHECKING:
    from dynamo_ray.events.nats.server import PrivateServer

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "DYNAMO_RAY_NATS_TOKEN"
"""Read by the processes that Ray starts; the token itself is in no configuration."""
LOOK_EVERY_S = 0.1
FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 5.0
"""Before a server that died is started again: twice as long each time, until it has stayed."""
STAYED_S = 10.0


class Keeper:
    """Starts a server again whenever it dies, on its port and with what it had stored, from `keep` to `let_go`.

    Args:
        server: that has been started; None: there is none to keep.
    """

    def __init__(self, server: PrivateServer | None) -> None:
        self._server = server
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def keep(self) -> None:
        if self._server is not None:
            self._thread = threading.Thread(target=self._run, args=[self._server], name="nats-server", daemon=True)
            self._thread.start()

    def let_go(self) -> None:
        """Once it returns, a server that dies stays dead; safe to call twice."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, server: PrivateServer) -> None:
        pause_s, started_s, complaint = FIRST_PAUSE_S, time.monotonic(), ""
        while not self._ended.wait(LOOK_EVERY_S):
            if server.is_running:
                continue
            if time.monotonic() - started_s > STAYED_S:
                pause_s = FIRST_PAUSE_S
            if self._ended.wait(pause_s):
                return
            before, complaint = complaint, _started(server)
            if not complaint:
                log.warning("the private nats-server died and was started again at %s", server.url)
            elif complaint != before:
                log.warning("the private nats-server died and is tried again and again: %s", complaint)
            pause_s, started_s = min(2 * pause_s, LAST_PAUSE_S), time.monotonic()


def _started(server: PrivateServer) -> str:
    """Why it was not; empty if it was."""
    from dynamo_ray.events.nats.server import NoServer  # late: most need none

    try:
        server.start()
    except (NoServer, OSError) as error:
        return str(error)
    return ""


@dataclass(frozen=True, slots=True)
class Provided:
    checked: CheckedFile
    """The file that was given, with a server where it named none."""
    keeper: Keeper


@contextlib.contextmanager
def provided(checked: CheckedFile, folder: Path, private: bool) -> Iterator[Provided]:
    """The same file, with a server of its own on loopback where it names none; that one ends with the context.

    Args:
        folder: for the server's files.
        private: the Ray is on this machine alone.

    Raises:
        PreflightError: No such server can be started here, or workers elsewhere would not reach it.
    """
    lacking = [application for application in checked.applications if _lacks(application.config)]
    if not lacking:
        yield Provided(checked, Keeper(None))
        return
    field = f"applications[{lacking[0].index}].args.nats.urls"
    if not private:
        message = "missing: a server of ours would be on this machine alone; write nats://host:port, or drop --address"
        raise PreflightError((Problem(field, message),))
    from dynamo_ray.events.nats.server import NoServer, PrivateServer, only_with  # late: most need none

    token = secrets.token_hex(32)
    server = PrivateServer(folder / "nats", only_with(token), {processes.VARIABLE: str(folder)})
    keeper = Keeper(server)
    before = os.environ.get(TOKEN_VARIABLE)
    try:
        server.start()
        os.environ[TOKEN_VARIABLE] = token
        yield Provided(_naming(checked, lacking, server.url), keeper)
    except NoServer as error:
        raise PreflightError((Problem(field, f"missing, and {error}"),)) from error
    finally:
        keeper.let_go()
        server.stop()
        os.environ.pop(TOKEN_VARIABLE, None)
        if before is not None:
            os.environ[TOKEN_VARIABLE] = before


def _lacks(config: DeploymentConfig) -> bool:
    return config.nats_events is not None and not config.nats_events.urls


def _naming(checked: CheckedFile, lacking: list[Application], url: str) -> CheckedFile:
    value = copy.deepcopy(checked.value)
    applications = list(checked.applications)
    for application in lacking:
        given = application.config.nats_events or NatsConfig()
        nats = given.model_copy(update={"urls": (url,), "token": f"${{{TOKEN_VARIABLE}}}"})
        config = application.config.model_copy(update={"nats": nats})
        value["applications"][application.index]["args"]["nats"] = nats.model_dump(mode="json", exclude_defaults=True)
        applications[checked.applications.index(application)] = replace(application, config=config)
    return replace(checked, value=value, applications=tuple(applications))
