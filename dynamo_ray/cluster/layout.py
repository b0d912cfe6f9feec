"""plan(config, topology) -> Layout: where every rank would run, whether it fits, what it costs. Touches nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.engine import Role
from dynamo_ray.cluster.assumptions import Assumptions, RoleMemory, role_memory
from dynamo_ray.cluster.workload import widths, worker_groups
from dynamo_ray.config import DeploymentConfig, ParallelismConfig
from dynamo_ray.errors import ConfigError, Problem
from placement.cluster_file import read_topology
from placement.gpus import GpuType, gpu_type
from placement.memory import Fit, fit, kv_cost
from placement.model_shape import ModelShape, read_config
from placement.plan import PlacementError, Plan, WorkerGroup
from placement.plan import plan as assign
from placement.topology import NO_ACCELERATOR, Topology, TopologyError
from placement.traffic import Leaves, RequestShape, Traffic, leaves_of, request_shape, traffic

SHAPES = Path(__file__).parents[1] / "models" / "shapes"
"""config.json of models that can be planned for without having them, as published on Hugging Face."""
NUM_RANDOM_LAYOUTS = 20


@dataclass(frozen=True, slots=True)
class Layout:
    topology: Topology
    """As it was before the plan."""
    groups: tuple[WorkerGroup, ...]
    plan: Plan
    fits: Mapping[str, Fit]
    """By group; none for workers on CPUs."""
    memory: Mapping[str, RoleMemory]
    """By group: what was assumed of its engines; none for workers on CPUs."""
    request: RequestShape
    cost: Traffic
    """Of this layout."""
    bound: Traffic
    """No layout on this cluster costs less: every worker where it is best off, as if it were alone."""
    random: Traffic
    """The mean of layouts that ignore leaves."""


def plan(
    config: DeploymentConfig,
    topology: Topology | str,
    assumptions: Assumptions | None = None,
    shape: ModelShape | None = None,
) -> Layout:
    """Place every rank of the deployment; same inputs, same layout.

    Args:
        topology: a Topology, or what `placement.cluster_file.read_topology` reads: 13x8xH100, or a file.
        assumptions: memory share and KV type in place of the file's, and the tokens of a typical request.
        shape: of the model; None: read from its folder's config.json or, by its name, from those that we know.

    Raises:
        ConfigError: It cannot be; carries everything that is in the way.
    """
    given = assumptions or Assumptions()
    if not isinstance(config, DeploymentConfig):
        raise ConfigError((Problem("config", f"is a {type(config).__name__}; give what `load_config` returns"),))
    try:
        cluster = read_topology(topology) if isinstance(topology, str) else topology
    except TopologyError as error:
        raise ConfigError(tuple(Problem("topology", problem) for problem in error.problems)) from error
    problems: list[Problem] = []
    groups = worker_groups(config)
    on_gpus = config.accelerator != NO_ACCELERATOR
    if shape is None and on_gpus:
        shape, wrong = shape_of(config)
        problems += wrong
    memory, wrong = _memory(config, given) if on_gpus else ({}, [])
    problems += wrong
    fits, wrong = _fits(config, shape, given, memory) if shape is not None and on_gpus else ({}, [])
    problems += wrong
    request = _request(config, shape, given, memory)
    found: Plan | None = None
    try:
        found = assign(cluster, groups, spares=config.placement.spares, request=request)
    except PlacementError as error:
        problems.append(Problem(error.group, str(error)))
    if problems or found is None:
        raise ConfigError(tuple(problems))
    return Layout(
        cluster,
        groups,
        found,
        fits,
        memory,
        request,
        traffic(request, _leaves(cluster, groups, found)),
        _bound(cluster, groups, request),
        _random(cluster, groups, request),
    )


def as_json(layout: Layout) -> dict[str, Any]:
    """For programs."""
    return {
        "workers": [
            {
                "worker": worker.worker,
                "role": worker.group,
                "nodes": [{"node": b.node_id, "address": b.address, "ranks": list(b.ranks)} for b in worker.bundles],
            }
            for worker in layout.plan.workers
        ],
        "spares": list(layout.plan.spares),
        "memory": {
            name: {
                "fits": found.fits,
                "label": found.label,
                "weights_bytes": found.weights.total,
                "allowances_bytes": found.allowances.total,
                "usable_bytes": found.usable_bytes,
                "kv_tokens": found.kv_tokens,
            }
            for name, found in layout.fits.items()
        },
        "traffic_bytes_per_request": {
            name: {"alltoall": cost.alltoall_bytes, "handoff": cost.handoff_bytes}
            for name, cost in (("layout", layout.cost), ("bound", layout.bound), ("random", layout.random))
        },
    }


def shape_of(config: DeploymentConfig) -> tuple[ModelShape | None, list[Problem]]:
    """The model's shape, from its folder or from those that are known by name; else None, and why."""
    own, known = config.model.folder / "config.json", SHAPES / f"{config.model.name.rpartition('/')[2]}.json"
    path = own if own.is_file() else known
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in SHAPES.glob("*.json")))
        message = f"{own} is not there, and {config.model.name} is none of those known without ({names})"
        return None, [Problem("model.path", f"{message}; give --model-config, or `shape`")]
    try:
        return read_shape(path), []
    except ConfigError as error:
        return None, list(error.problems)


def read_shape(path: Path, field: str = "model.path") -> ModelShape:
    """A model's config.json, which that field or option names.

    Raises:
        ConfigError: It cannot be read, or its model is none we can size.
    """
    try:
        return read_config(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError((Problem(field, f"{path}: {error}"),)) from error


def _memory(config: DeploymentConfig, given: Assumptions) -> tuple[dict[str, RoleMemory], list[Problem]]:
    """By group; a group of which nothing can be assumed is a problem."""
    found: dict[str, RoleMemory] = {}
    problems: list[Problem] = []
    for role, role_config in config.roles.items():
        try:
            found[role.value] = role_memory(config, role_config, given)
        except ValueError as error:
            field, _, message = str(error).partition(": ")
            problems.append(Problem(f"{role.value}.{field}", message))
    return found, problems


def _fits(
    config: DeploymentConfig, shape: ModelShape, given: Assumptions, memory: Mapping[str, RoleMemory]
) -> tuple[dict[str, Fit], list[Problem]]:
    """By group; a width that the model does not divide by, or that does not fit, is a problem."""
    fits: dict[str, Fit] = {}
    problems: list[Problem] = []
    try:
        gpu = gpu_type(config.accelerator)
    except ValueError as error:
        return {}, [Problem("accelerator", str(error))]
    for name, assumed in memory.items():
        field = f"{name}.parallelism"
        width = config.roles[Role(name)].parallelism
        try:
            found = _fit(shape, width, gpu, assumed, given.prompt_tokens + given.answer_tokens)
        except ValueError as error:
            problems.append(Problem(field, str(error)))
            continue
        fits[name] = found
        if not found.fits:
            problems.append(Problem(field, found.explain()))
    return fits, problems


def _fit(shape: ModelShape, width: ParallelismConfig, gpu: GpuType, assumed: RoleMemory, kv_tokens: int) -> Fit:
    def with_fraction(mem_fraction: float) -> Fit:
        return fit(
            shape,
            widths(width),
            gpu,
            mem_fraction,
            redundant_experts=width.redundant_experts,
            kv_dtype=assumed.kv_dtype,
            min_kv_tokens=kv_tokens,
        )

    found = with_fraction(assumed.mem_fraction)
    share = assumed.share(found.weights.total + found.allowances.total, gpu.memory_bytes)
    return found if share == assumed.mem_fraction else with_fraction(share)


def _request(
    config: DeploymentConfig, shape: ModelShape | None, given: Assumptions, memory: Mapping[str, RoleMemory]
) -> RequestShape:
    role, role_config = next(iter(config.roles.items()))
    if shape is None or role.value not in memory:
        return RequestShape(given.prompt_tokens, given.answer_tokens)
    one = widths(role_config.parallelism)
    kv_bytes = kv_cost(shape, one, memory[role.value].kv_dtype).per_token_bytes * one.pp
    return request_shape(shape, given.prompt_tokens, given.answer_tokens, kv_bytes)


def _leaves(topology: Topology, groups: Sequence[WorkerGroup], made: Plan) -> dict[str, list[Leaves]]:
    leaf = {node.node_id: node.leaf for node in topology.nodes}
    return {
        group.name: [leaves_of(leaf[b.node_id] for b in made.of(worker).bundles) for worker in group.workers]
        for group in groups
    }


def _bound(topology: Topology, groups: Sequence[WorkerGroup], request: RequestShape) -> Traffic:
    """Every worker as if it were alone, and every hand-off inside a leaf."""
    alone: dict[str, list[Leaves]] = {}
    for group in groups:
        one = replace(group, replicas=1)
        alone |= _leaves(topology, [one], assign(topology, [one], request=request))
    return Traffic(traffic(request, alone).alltoall_bytes)


def _random(topology: Topology, groups: Sequence[WorkerGroup], request: RequestShape) -> Traffic:
    costs = [traffic(request, leaves) for leaves in _random_layouts(topology, groups)]
    count = max(1, len(costs))
    return Traffic(sum(c.alltoall_bytes for c in costs) / count, sum(c.handoff_bytes for c in costs) / count)


def _random_layouts(topology: Topology, groups: Sequence[WorkerGroup]) -> Iterator[dict[str, list[Leaves]]]:
    """Always the same ones; one that runs out of nodes is left out."""
    widest_first = sorted(groups, key=lambda group: -group.needs.gpus)
    wanted = [group for group in widest_first for _ in group.workers]
    for seed in range(NUM_RANDOM_LAYOUTS):
        chance, nodes = random.Random(seed), {node.node_id: node for node in topology.nodes}
        leaves: dict[str, list[Leaves]] = {group.name: [] for group in groups}
        for group in wanted:
            fitting = [node for node in nodes.values() if node.takes(group.needs, group.accelerator)]
            if len(fitting) < group.nodes:
                break
            chosen = chance.sample(fitting, group.nodes)
            leaves[group.name].append(leaves_of(node.leaf for node in chosen))
            nodes |= {node.node_id: replace(node, free=node.free - group.needs) for node in chosen}
        else:
            yield leaves
