"""What every node of every worker would start, while none has a place yet, or only a planned one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import backends
from backends import LaunchPlan, agreement, placeholders
from backends.agreement import Disagreement
from backends.engine import Role
from dynamo_ray.cluster.workload import Work, launch_specs, works
from dynamo_ray.config import DeploymentConfig
from placement.plan import Bundle, Plan, WorkerPlacement
from placement.topology import NO_ACCELERATOR


@dataclass(frozen=True, slots=True)
class Launch:
    """One node of one worker."""

    worker: str
    role: Role
    node_rank: int
    num_nodes: int
    plan: LaunchPlan


def launches(config: DeploymentConfig, plan: Plan) -> tuple[Launch, ...]:
    """Of every node of every planned worker, in the plan's order; ports stay placeholders.

    An engine that starts its ranks as Ray actors does so on its worker's leader, the only node of it that is here.

    Raises:
        EngineStartError: An engine cannot start so; the message begins with the field at fault.
    """
    known = works(config)
    return tuple(launch for worker in plan.workers for launch in _launches(config, known[worker.worker], worker))


def first_launches(config: DeploymentConfig, role: Role) -> tuple[Launch, ...]:
    """Of the role's first worker; the others differ from it in their places alone.

    Raises:
        EngineStartError: As `launches`.
    """
    work = next(work for work in works(config).values() if work.role is role)
    return _launches(config, work, _somewhere(work))


def disagreements(config: DeploymentConfig, leaders: Mapping[Role, Launch]) -> tuple[Disagreement, ...]:
    """What keeps decode from reading prefill's KV, from the leaders' launches."""
    if Role.PREFILL not in leaders or Role.DECODE not in leaders:
        return ()
    return agreement.check(config.backend, leaders[Role.PREFILL].plan, leaders[Role.DECODE].plan)


def _launches(config: DeploymentConfig, work: Work, placement: WorkerPlacement) -> tuple[Launch, ...]:
    version = backends.resolve_version(config.backend, config.engine_version)
    places = [placeholders.place(bundle.node_rank, bundle.address) for bundle in placement.bundles]
    specs = launch_specs(config, work, placement, places)
    return tuple(
        Launch(
            spec.worker,
            work.role,
            spec.node_rank,
            spec.num_nodes,
            backends.launch_plan(
                config.backend,
                version,
                spec,
                on_cpu=config.accelerator == NO_ACCELERATOR,
                env=work.config.env,
            ),
        )
        for spec in (specs[:1] if config.launcher(work.role) == "ray" else specs)
    )


def _somewhere(work: Work) -> WorkerPlacement:
    """On nodes without addresses."""
    per_node = work.config.parallelism.num_ranks // work.config.nodes
    return WorkerPlacement(
        work.worker,
        work.group.name,
        tuple(
            Bundle(rank, "", "", work.group.needs, tuple(range(rank * per_node, (rank + 1) * per_node)))
            for rank in range(work.config.nodes)
        ),
    )
