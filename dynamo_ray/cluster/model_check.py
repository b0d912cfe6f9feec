"""Looks at the model's files on the nodes a worker is about to take, before anything is taken there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from backends import model_folder
from dynamo_ray.cluster.workload import Work
from dynamo_ray.config import DeploymentConfig
from placement.plan import WorkerPlacement

TIMEOUT_S = 60.0
"""Of a look at one node: its first Ray worker process has to start."""


def folders(config: DeploymentConfig, work: Work) -> dict[str, tuple[Path, bool]]:
    """By field: a folder that the engine loads, and whether it must hold weights."""
    if config.backend == "simulated":
        return {}
    weights = work.config.engine_args.get("load_format") != "dummy"
    return {"model.path": (config.model.folder, weights)}


async def problem(config: DeploymentConfig, work: Work, placement: WorkerPlacement) -> str | None:
    """What of the model is missing on one of the placement's nodes; None where nothing is seen."""
    wanted = folders(config, work)
    if not wanted:
        return None
    here = ray.get_runtime_context().get_node_id()
    found = await asyncio.gather(
        *(_on_node(bundle.node_id, bundle.address, here, wanted) for bundle in placement.bundles)
    )
    return next((answer for answer in found if answer is not None), None)


async def _on_node(node_id: str, address: str, here: str, wanted: dict[str, tuple[Path, bool]]) -> str | None:
    if node_id == here:
        answer = await asyncio.to_thread(_look, wanted)
    else:
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        look = ray.remote(_look).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0)
        answer = await asyncio.wait_for(look.remote(wanted), TIMEOUT_S)
    return None if answer is None else f"{answer} (on node {address})"


def _look(wanted: dict[str, tuple[Path, bool]]) -> str | None:
    for field, (folder, weights) in wanted.items():
        lacks = model_folder.problem(folder, weights)
        if lacks is not None:
            return f"{field}: {lacks}"
    return None
