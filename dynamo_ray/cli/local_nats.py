"""The private nats-server of a `dynamo-ray up` whose file wants events by NATS and names no server."""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dynamo_ray.cli import processes
from dynamo_ray.cli.checked import CheckedFile
from dynamo_ray.config import DeploymentConfig, NatsConfig
from dynamo_ray.config_file import Application
from dynamo_ray.errors import PreflightError, Problem

TOKEN_VARIABLE = "DYNAMO_RAY_NATS_TOKEN"
"""Read by the processes that Ray starts; the token itself is in no configuration."""


@contextlib.contextmanager
def provided(checked: CheckedFile, folder: Path, private: bool) -> Iterator[CheckedFile]:
    """The same file, with a server of its own on loopback where it names none; that one ends with the context.

    Args:
        folder: for the server's files.
        private: the Ray is on this machine alone.

    Raises:
        PreflightError: No such server can be started here, or workers elsewhere would not reach it.
    """
    lacking = [application for application in checked.applications if _lacks(application.config)]
    if not lacking:
        yield checked
        return
    field = f"applications[{lacking[0].index}].args.nats.urls"
    if not private:
        message = "missing: a server of ours would be on this machine alone; write nats://host:port, or drop --address"
        raise PreflightError((Problem(field, message),))
    from dynamo_ray.events.nats.server import NoServer, PrivateServer  # late: most need none

    token = secrets.token_hex(32)
    server = PrivateServer(folder / "nats", token, {processes.VARIABLE: str(folder)})
    before = os.environ.get(TOKEN_VARIABLE)
    try:
        server.start()
        os.environ[TOKEN_VARIABLE] = token
        yield _naming(checked, lacking, server.url)
    except NoServer as error:
        raise PreflightError((Problem(field, f"missing, and {error}"),)) from error
    finally:
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
