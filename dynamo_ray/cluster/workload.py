"""DeploymentConfig -> the workers it asks for, what each needs, and the hash that tells whether one still matches."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import backends
from backends.engine import LaunchSpec, NodePlace, Role
from dynamo_ray import __version__
from dynamo_ray.config import DeploymentConfig, Launcher, ParallelismConfig, RoleConfig
from placement.parallelism import Parallelism
from placement.plan import WorkerGroup, WorkerPlacement

NUM_ENGINE_PORTS = 24
NUM_RANK_PORTS = 4


@dataclass(frozen=True, slots=True)
class Work:
    """One worker, before it has a place."""

    worker: str
    role: Role
    config: RoleConfig
    group: WorkerGroup
    config_hash: str


def widths(config: ParallelismConfig) -> Parallelism:
    return Parallelism(config.attn_tp, config.attn_dp, config.moe_ep, config.moe_tp_size, config.pp)


def worker_group(role: Role, config: RoleConfig, accelerator: str) -> WorkerGroup:
    return WorkerGroup(
        name=role.value,
        replicas=config.replicas,
        nodes=config.nodes,
        parallelism=widths(config.parallelism),
        cpus=config.resources.cpus,
        memory_bytes=int(config.resources.memory_gib * 2**30),
        accelerator=accelerator,
        one_domain=config.one_nvlink_domain,
    )


def worker_groups(config: DeploymentConfig) -> tuple[WorkerGroup, ...]:
    return tuple(worker_group(role, role_config, config.accelerator) for role, role_config in config.roles.items())


def works(config: DeploymentConfig) -> dict[str, Work]:
    """Every worker by name, those that need the widest nodes first."""
    found = []
    for role, role_config in config.roles.items():
        group = worker_group(role, role_config, config.accelerator)
        digest = config_hash(config, role)
        found += [Work(worker, role, role_config, group, digest) for worker in group.workers]
    found.sort(key=lambda work: (-work.group.needs.gpus, -work.group.nodes))
    return {work.worker: work for work in found}


def config_hash(config: DeploymentConfig, role: Role) -> str:
    """Equal as long as a running worker of that role is what the configuration asks for.

    The number of replicas, the router and the ingress's limits are not in it.
    """
    role_config = config.roles[role]
    shaping = {
        "version": __version__,
        "model": config.model.model_dump(mode="json"),
        "backend": config.backend,
        "engine_version": config.engine_version,
        "accelerator": config.accelerator,
        "role": role_config.model_dump(mode="json", exclude={"replicas"}),
        "transfer": config.transfer.model_dump(mode="json"),
        "events": config.events if config.nats_events is None else config.nats_events.model_dump(mode="json"),
        "max_queued_requests": config.limits.max_queued_requests,
    }
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]


def num_ports(config: RoleConfig, launcher: Launcher) -> int:
    """Consecutive ports one node of a worker may listen on, for the most that an engine asks for (backends/*_args.py).

    SGLang: 16 for the engine as a whole, of which it uses 12, and 3 a rank for KV events, their replay and its load.
    Where it starts its ranks as Ray actors, they all count from one port, whichever node they are on.
    """
    ranks = config.parallelism.num_ranks
    return NUM_ENGINE_PORTS + NUM_RANK_PORTS * (ranks if launcher == "ray" else ranks // config.nodes)


def launch_specs(
    config: DeploymentConfig,
    work: Work,
    placement: WorkerPlacement,
    prepared: list[NodePlace],
    bundles: tuple[int, ...] = (),
) -> list[LaunchSpec]:
    """What each node starts, in node_rank order; `bundles` as in LaunchSpec."""
    shape = work.config.parallelism
    nodes = tuple(prepared)
    return [
        LaunchSpec(
            worker=work.worker,
            role=work.role,
            model=config.model.name,
            model_path=str(config.model.folder),
            attn_tp=shape.attn_tp,
            attn_dp=shape.attn_dp,
            moe_ep=shape.moe_ep,
            moe_tp=shape.moe_tp_size,
            pp=shape.pp,
            redundant_experts=shape.redundant_experts,
            node_rank=bundle.node_rank,
            nodes=nodes,
            cores=bundle.cores,
            transfer_backend=config.transfer.backend,
            kv_events=config.events != "none",
            version=backends.resolve_version(config.backend, config.engine_version),
            launcher=config.launcher(work.role),
            bundles=bundles,
            loras={name: str(Path(path).expanduser()) for name, path in config.model.loras.items()},
            engine_args=dict(work.config.engine_args),
        )
        for bundle in placement.bundles
    ]
