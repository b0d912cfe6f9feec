"""What every node of every worker would start, while none has a place yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import backends
from backends import LaunchPlan, agreement, placeholders
from backends.agreement import Disagreement
from backends.engine import Role
from dynamo_ray.cluster.workload import Work, launch_specs, works
from dynamo_ray.config import DeploymentConfig
from placement.plan import Bundle, WorkerPlacement
from placement.topology import NO_ACCELERATOR


@dataclass(frozen=True, slots=True)
class Launch:
    """One node of one worker."""

    worker: str
    role: Role
    node_rank: int
    plan: LaunchPlan


def launches(config: DeploymentConfig, role: Role) -> tuple[Launch, ...]:
    """Of the role's first worker, in node_rank order; the others differ from it in their places alone.

    An engine that starts its ranks as Ray actors does so on its leader.

    Raises:
        EngineStartError: The engine cannot start so; the message begins with the field at fault.
    """
    version = backends.resolve_version(config.backend, config.engine_version)
    work = next(work for work in works(config).values() if work.role is role)
    places = [placeholders.place(rank) for rank in range(work.config.nodes)]
    specs = launch_specs(config, work, _placement(work), places)
    return tuple(
        Launch(
            spec.worker,
            role,
            spec.node_rank,
            backends.launch_plan(
                config.backend,
                version,
                spec,
                on_cpu=config.accelerator == NO_ACCELERATOR,
                env=work.config.env,
            ),
        )
        for spec in (specs[:1] if config.launcher(role) == "ray" else specs)
    )


def disagreements(config: DeploymentConfig, leaders: Mapping[Role, Launch]) -> tuple[Disagreement, ...]:
    """What keeps decode from reading prefill's KV, from the leaders' launches."""
    if Role.PREFILL not in leaders or Role.DECODE not in leaders:
        return ()
    return agreement.check(config.backend, leaders[Role.PREFILL].plan, leaders[Role.DECODE].plan)


def _placement(work: Work) -> WorkerPlacement:
    per_node = work.config.parallelism.num_ranks // work.config.nodes
    return WorkerPlacement(
        work.worker,
        work.group.name,
        tuple(
            Bundle(rank, "", "", work.group.needs, tuple(range(rank * per_node, (rank + 1) * per_node)))
            for rank in range(work.config.nodes)
        ),
    )
