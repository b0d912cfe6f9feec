"""One worker's node actors, seen from the orchestrator: create, start, watch, adopt, kill."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from backends.engine import Command, NodePlace
from backends.failures import Failure, engine_name
from dynamo_ray.cluster import processes, workload
from dynamo_ray.cluster.commands import Hold, Node
from dynamo_ray.cluster.lifecycle import Health
from dynamo_ray.cluster.node import Assignment, Description, EngineNode
from dynamo_ray.cluster.workload import Work
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.request.wire import WorkerInfo
from placement.plan import WorkerPlacement
from placement.reserve import Reservation

log = logging.getLogger("ray.serve")

NAMESPACE = "dynamo_ray"
STOP_TIMEOUT_S = 25.0
GONE_POLL_S = 0.05
ANSWER_TIMEOUT_S = 3.0
DESCRIBE_TIMEOUT_S = 10.0

SEES_ALL_GPUS = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""For engines whose ranks are Ray actors. SGLang's take Ray's id of their GPU for CUDA's (ray/scheduler_actor.py,
0.5.16); TensorRT-LLM's are given the environment of our process, from which Ray would otherwise hide every GPU."""

Actor = Any
"""A handle to an EngineNode; Ray's handles are untyped."""


def actor_name(app: str, worker: str, node_rank: int) -> str:
    return f"{app}/{worker}/{node_rank}"


def group_name(app: str, worker: str) -> str:
    return f"{app}/{worker}"


class GangError(Exception):
    """A gang could not start or has died; says which node and why."""


@dataclass(frozen=True, slots=True)
class Gang:
    """The live actors of one incarnation of one worker, in node_rank order."""

    worker: str
    epoch: int
    actors: tuple[Actor, ...]
    endpoints: tuple[WorkerInfo, ...]
    """Of the nodes that take requests, in node_rank order; never none."""
    placement: WorkerPlacement

    async def watch(self) -> str:
        """Return, with the reason, as soon as any of its ranks is dead."""
        calls = [asyncio.ensure_future(_sentinel(actor, rank)) for rank, actor in enumerate(self.actors)]
        try:
            done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for call in calls:
                call.cancel()

    async def renew(self, timeout_s: float) -> Health:
        """Renew every node's lease; whether all are healthy, and what of a command keeps requests away."""
        answers: list[str | BaseException | None] = await asyncio.gather(
            *(asyncio.wait_for(actor.renew.remote(), timeout_s) for actor in self.actors), return_exceptions=True
        )
        failure = None
        for rank, answer in enumerate(answers):
            if isinstance(answer, TimeoutError):
                failure = failure or f"node {rank} did not answer within {timeout_s:g} s"
            elif isinstance(answer, BaseException):
                failure = failure or reason_of(answer)
        paused = next((answer for answer in answers if isinstance(answer, str)), None)
        return Health(self.worker, self.epoch, failure, paused)

    @property
    def nodes(self) -> list[Node]:
        """As commands are given to them."""
        return [_Remote(actor) for actor in self.actors]

    async def drain(self, timeout_s: float) -> None:
        """Have it refuse new requests and finish those inside; returns then, or when its time is over."""
        await drain(self.actors, timeout_s)


async def start(
    config: DeploymentConfig,
    work: Work,
    assignments: tuple[Assignment, ...],
    reservation: Reservation,
    placement: WorkerPlacement,
    secret: bytes,
    progress: Callable[[str], None],
) -> Gang:
    """Create the worker's actors in its group and start its engine.

    Raises:
        GangError: A node could not, or not all were ready in time; the message says which and why. Others may still be
            running, so the caller kills the gang.
    """
    actors = tuple(_create(config, work, assignment, reservation) for assignment in assignments)
    limit_s = config.limits.start_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            endpoints = await _start(config, work, actors, reservation, placement, secret, progress)
    except TimeoutError:
        event = f"{engine_name(config.backend)} was not ready within {limit_s:g} s (limits.start_timeout_s)"
        raise GangError(await _why_unready(actors, event)) from None
    return Gang(work.worker, assignments[0].epoch, actors, endpoints, placement)


async def _start(
    config: DeploymentConfig,
    work: Work,
    actors: tuple[Actor, ...],
    reservation: Reservation,
    placement: WorkerPlacement,
    secret: bytes,
    progress: Callable[[str], None],
) -> tuple[WorkerInfo, ...]:
    ports = workload.num_ports(work.config, config.launcher(work.role))
    prepared: list[NodePlace] = await _all([actor.prepare.remote(ports) for actor in actors])
    bundles = tuple(reservation.node_ids.index(bundle.node_id) for bundle in placement.bundles)
    specs = workload.launch_specs(config, work, placement, prepared, bundles)
    progress("loading the model")
    answers: list[WorkerInfo | None] = await _all(
        [
            actor.start.remote(config.backend, spec, secret, config.limits, config.nats_events)
            for actor, spec in zip(actors, specs, strict=True)
        ]
    )
    assert answers[0] is not None, "the leader serves"
    return tuple(info for info in answers if info is not None)


async def drain(actors: Sequence[Actor], timeout_s: float) -> None:
    """As `Gang.drain`, of any actors of one worker; a node that does not answer holds up nobody."""
    answers = await asyncio.gather(
        *(asyncio.wait_for(actor.drain.remote(timeout_s), timeout_s + ANSWER_TIMEOUT_S) for actor in actors),
        return_exceptions=True,
    )
    for rank, answer in enumerate(answers):
        if isinstance(answer, BaseException):
            log.info("node %d is not drained: %s", rank, reason_of(answer))


async def find(app: str) -> dict[str, list[tuple[Actor, Description | None]]]:
    """Every node actor of the application, by worker, in node_rank order; None where one does not answer."""
    names = await asyncio.to_thread(actor_names, app)
    found: dict[str, list[tuple[Actor, Description | None]]] = {}
    for name in sorted(names, key=lambda name: (name.split("/")[1], int(name.split("/")[2]))):
        try:
            actor = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
        except ValueError:
            continue  # it died since it was listed
        try:
            description = await asyncio.wait_for(actor.describe.remote(), DESCRIBE_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            log.warning("%s does not answer: %s", name, reason_of(error))
            description = None
        found.setdefault(name.split("/")[1], []).append((actor, description))
    return found


def adopt(nodes: list[tuple[Actor, Description | None]], work: Work) -> Gang | None:
    """The gang these actors are, if it is whole, serves, and is what the configuration asks for."""
    described = [description for _, description in nodes if description is not None]
    if len(described) != len(nodes) or len(nodes) != work.config.nodes or not all(d.started for d in described):
        return None
    epoch = described[0].assignment.epoch
    endpoints = tuple(d.info for d in described if d.info is not None)
    if not endpoints or any(d.assignment.epoch != epoch for d in described):
        return None
    if any(d.assignment.config_hash != work.config_hash for d in described):
        return None
    placement = WorkerPlacement(work.worker, work.group.name, tuple(d.assignment.bundle for d in described))
    return Gang(work.worker, epoch, tuple(actor for actor, _ in nodes), endpoints, placement)


async def kill(app: str, worker: str) -> None:
    """Stop and kill every actor of that worker; returns only when Ray no longer knows any of them."""
    prefix = f"{app}/{worker}/"
    while names := [name for name in await asyncio.to_thread(actor_names, app) if name.startswith(prefix)]:
        await asyncio.gather(*(_kill_one(name) for name in names))


def actor_names(app: str) -> list[str]:
    listed = ray.util.list_named_actors(all_namespaces=True)
    return [a["name"] for a in listed if a["namespace"] == NAMESPACE and a["name"].startswith(f"{app}/")]


def reason_of(error: BaseException) -> str:
    """The cause in one line, without Ray's remote traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return str(cause) or repr(cause)
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "Ray ended its process: its node was nearly out of memory; see resources.memory_gib"
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process died"
    return (str(error) or repr(error)).strip().splitlines()[-1]


async def _why_unready(actors: Sequence[Actor], event: str) -> str:
    """What a start that took too long fails with: of the node whose last lines tell why, else of the first unready."""
    answers: list[Failure | BaseException | None] = await asyncio.gather(
        *(asyncio.wait_for(actor.unready.remote(), ANSWER_TIMEOUT_S) for actor in actors), return_exceptions=True
    )
    unready = {rank: answer for rank, answer in enumerate(answers) if answer is not None}
    if not unready:
        return event
    told = [rank for rank, answer in unready.items() if isinstance(answer, Failure) and answer.cause]
    rank = told[0] if told else next(iter(unready))
    answer, others = unready[rank], [other for other in unready if other != rank]
    beside = f", nor on nodes {', '.join(map(str, others))}" if others else ""
    if isinstance(answer, Failure):
        return f"node {rank}: {answer.message(f'{event}{beside}')}"
    return f"node {rank}: {event}{beside}, and the node does not answer"


@dataclass(frozen=True, slots=True)
class _Remote:
    """A node's actor as `commands.Node`."""

    actor: Actor

    async def hold(self, holds: frozenset[Hold]) -> frozenset[Hold]:
        new: frozenset[Hold] = await self.actor.hold.remote(holds)
        return new

    async def unhold(self, holds: frozenset[Hold]) -> None:
        await self.actor.unhold.remote(holds)

    async def control(self, command: Command) -> bool:
        serves: bool = await self.actor.control.remote(command)
        return serves


async def _sentinel(actor: Actor, rank: int) -> str:
    try:
        reason: str = await actor.sentinel.remote()
    except ray.exceptions.RayError as error:
        reason = reason_of(error)
    return f"node {rank}: {reason}"


async def _kill_one(name: str) -> None:
    try:
        actor = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
    except ValueError:
        return
    try:
        # An actor that was never placed, or hangs, is not waited for: what it started ends with its process.
        await asyncio.wait_for(actor.describe.remote(), ANSWER_TIMEOUT_S)
        await asyncio.wait_for(actor.stop.remote(), STOP_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        log.info("%s did not stop by itself: %s", name, reason_of(error))
    await asyncio.to_thread(ray.kill, actor)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
        except ValueError:
            return
        await asyncio.sleep(GONE_POLL_S)


def _create(config: DeploymentConfig, work: Work, assignment: Assignment, reservation: Reservation) -> Actor:
    session, bundle = ray.get_runtime_context().gcs_address, assignment.bundle
    by_ray = config.launcher(work.role) == "ray"
    name = actor_name(assignment.app, assignment.worker, bundle.node_rank)
    inherited = SEES_ALL_GPUS if by_ray else {}
    # Ray titles the process after the class: `ps` then says which worker it is.
    titled = type(f"EngineNode {assignment.worker}/{bundle.node_rank}", (EngineNode,), {})
    return (
        ray.remote(titled)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            # The bundle holds the CPUs for the engine; an actor that asked for them too would not fit.
            num_cpus=0,
            # Where the engine starts its ranks as actors of their own, in this bundle, those take its GPUs.
            num_gpus=0 if by_ray else bundle.resources.gpus,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                reservation.group, placement_group_bundle_index=reservation.node_ids.index(bundle.node_id)
            ),
            runtime_env={"env_vars": {**inherited, **work.config.env, processes.VARIABLE: f"{session}/{name}"}},
        )
        .remote(assignment)
    )


async def _all(calls: list[Any]) -> list[Any]:
    """Every answer, in order; GangError as soon as one fails."""
    tasks = [asyncio.ensure_future(_answer(call, rank)) for rank, call in enumerate(calls)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _answer(call: Any, rank: int) -> Any:
    try:
        return await call
    except ray.exceptions.RayError as error:
        raise GangError(f"node {rank}: {reason_of(error)}") from error
