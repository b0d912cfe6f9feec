"""What a researcher does to a running deployment: control(), and `dynamo-ray control`."""

from __future__ import annotations

import logging
import os
from enum import StrEnum
from typing import Annotated

import typer

from backends.engine import Command, Pause, Resume, Sleep, UpdateWeights, Wake
from dynamo_ray.cli import state
from dynamo_ray.errors import ConfigError, ControlError, PreflightError, Problem

TIMEOUT_S = 1800.0
"""Terabytes of weights may have to be read."""
ANSWER_MARGIN_S = 30.0
"""Beyond that, to be told which nodes took too long."""


def control(app: str, command: Command, worker: str | None = None, *, timeout_s: float = TIMEOUT_S) -> tuple[str, ...]:
    """Have a deployment's workers do it, each on all of its nodes; returns their names when all have.

    A worker that is paused, asleep, without weights or about to load some is sent no requests. This process must be
    joined to the deployment's Ray: by `dynamo_ray.up`, or by `ray.init(address=..., namespace="serve")`.

    Args:
        app: the application's name.
        worker: as in `decode-0`, or a role, for all of its workers; None: every worker.
        timeout_s: how long a node may take.

    Raises:
        ConfigError: That is no command.
        ControlError: Some have not, there is no such application or worker, or no Ray; says which and why. A worker
            that has done it in part takes no requests until the command, given again, succeeds.
    """
    if not isinstance(command, Command):
        message = f"{command!r} is none; give Pause(), Resume(), Sleep(), Wake() or UpdateWeights(path)"
        raise ConfigError((Problem("command", message),))
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from dynamo_ray.cluster.gang import reason_of
    from dynamo_ray.cluster.presence import ORCHESTRATOR

    if not ray.is_initialized():  # Serve would start one
        raise ControlError({app: 'this process is joined to no Ray; call ray.init(address=..., namespace="serve")'})
    try:
        handle = serve.get_deployment_handle(ORCHESTRATOR, app)
        answering = handle.control.remote(command, worker, timeout_s)
        answers: dict[str, str | None] = answering.result(timeout_s=timeout_s + ANSWER_MARGIN_S)
    except TimeoutError:
        raise ControlError(
            {app: f"no answer within {timeout_s + ANSWER_MARGIN_S:g} s; an earlier command may still be at it"}
        ) from None
    except (KeyError, RayServeException, ray.exceptions.RayError) as error:
        raise ControlError({app: f"its orchestrator does not answer: {reason_of(error)}"}) from error
    if not answers:
        raise ControlError({str(worker): f"{app} has no worker and no role of that name; see `dynamo-ray status`"})
    failures = {name: reason for name, reason in answers.items() if reason is not None}
    if failures:
        raise ControlError(failures)
    return tuple(answers)


class Order(StrEnum):
    """A command's name on the command line."""

    PAUSE = "pause"
    RESUME = "resume"
    SLEEP = "sleep"
    WAKE = "wake"
    UPDATE_WEIGHTS = "update-weights"


def command_of(order: Order, path: str | None, abort: bool, discard_weights: bool) -> Command:
    """Raises ConfigError for an option that the command has not, or lacks."""
    for option, given, owner in (
        ("--path", path is not None, Order.UPDATE_WEIGHTS),
        ("--abort", abort, Order.PAUSE),
        ("--discard-weights", discard_weights, Order.SLEEP),
    ):
        if given and order is not owner:
            raise ConfigError((Problem(option, f"is for {owner}, not for {order}; leave it out"),))
    match order:
        case Order.PAUSE:
            return Pause(abort)
        case Order.RESUME:
            return Resume()
        case Order.SLEEP:
            return Sleep(discard_weights)
        case Order.WAKE:
            return Wake()
        case Order.UPDATE_WEIGHTS:
            if path is None:
                raise ConfigError((Problem("--path", "say where the weights are, as every node sees it"),))
            return UpdateWeights(path)


def main(
    application: Annotated[str, typer.Argument(help="Its name, as `dynamo-ray status` shows it.", show_default=False)],
    order: Annotated[Order, typer.Argument(metavar="COMMAND", help=", ".join(Order), show_default=False)],
    path: Annotated[str | None, typer.Option(help="update-weights: the folder, as every node sees it.")] = None,
    worker: Annotated[str | None, typer.Option(help="decode-0, or a role; without it, every worker.")] = None,
    abort: Annotated[bool, typer.Option("--abort", help="pause: end what is inside.")] = False,
    discard_weights: Annotated[bool, typer.Option("--discard-weights", help="sleep: drop the weights.")] = False,
    address: Annotated[str | None, typer.Option(help="Of a running Ray.", envvar="RAY_ADDRESS")] = None,
    port: Annotated[int | None, typer.Option(help="Which `up`, if several have that name.")] = None,
) -> None:
    """Pause, resume, sleep, wake or give new weights to the workers of what runs; exit code 5 if some did not."""
    command = command_of(order, path, abort, discard_weights)
    if address is None:
        address = _address_of(application, port)
    from dynamo_ray.cli import serving  # Ray reads what it needs to join another one when it is imported

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with serving.driver(address):
        for name in control(application, command, worker):
            typer.echo(f"{name}: {order} done")


def _address_of(application: str, port: int | None) -> str:
    """Of the Ray on which an `up` of this user serves it; this process may then join it."""
    running = state.running()
    found = [entry for entry in running if application in entry.applications and port in (None, entry.port)]
    if len(found) != 1:
        names = ", ".join(f"{name} on port {entry.port}" for entry in running for name in entry.applications)
        what = "several have that name; say --port" if found else "nothing of that name runs here"
        raise PreflightError((Problem("APPLICATION", f"{what}; running: {names or 'nothing'}"),))
    token = state.ray_token(found[0])
    if token is not None:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    return found[0].ray_address
