"""Plan -> Ray placement groups: create, await, verify, release. The only file of this package that knows Ray.

One worker, one group: detached and named, so that it outlives whoever made it and can be found again. Its bundles
are pinned to the planned nodes, so a group whose node is lost is dropped and planned anew, never moved by Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from placement.plan import WorkerPlacement
from placement.topology import NODE_ID_LABEL, Resources, Topology

POLL_S = 0.05
RELEASE_TIMEOUT_S = 30.0


class ReservationError(Exception):
    """The group could not be made; it is released. Worth another plan: the cluster has changed since this one.

    Args:
        name: the group's.
        reason: for a person.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True)
class Reservation:
    """A group that holds its nodes."""

    name: str
    group: PlacementGroup
    node_ids: tuple[str, ...]
    """By bundle index, as Ray reports it."""


def observe(busy_cores: Mapping[str, tuple[int, ...]] | None = None, leaf_label: str | None = None) -> Topology:
    """The cluster now. Blocks for some milliseconds; raises TopologyError where nodes lack the label for leaves.

    What is free is the smaller of what Ray reports, which lags behind, and of what placement groups leave.
    """
    nodes = ray.nodes()
    available: Mapping[str, Mapping[str, float]] = ray._private.state.available_resources_per_node()
    free = {}
    reserved = _reserved_by_groups()
    for node in nodes:
        node_id = node["NodeID"]
        left = Resources.from_ray(node["Resources"]) - reserved.get(node_id, Resources())
        free[node_id] = left.at_most(Resources.from_ray(available.get(node_id, node["Resources"])))
    return Topology.from_ray(nodes, free, busy_cores, leaf_label)


async def reserve(name: str, placement: WorkerPlacement, timeout_s: float = 10.0) -> Reservation:
    """Create the worker's group and wait until it holds every node; a group of that name is released first.

    Raises:
        ReservationError: Ray finds it infeasible, or another tenant was faster. Nothing stays reserved,
            nor does it when the caller is cancelled.
    """
    await release(name)
    group = await asyncio.to_thread(_create, name, placement)
    try:
        return await _await_created(name, group, placement, timeout_s)
    except BaseException:
        await asyncio.shield(release(name))
        raise


async def find(prefix: str) -> dict[str, Reservation | None]:
    """Every group whose name starts with `prefix`, by name; None for one that does not hold all its nodes."""
    found: dict[str, Reservation | None] = {}
    for group_id, entry in (await asyncio.to_thread(placement_group_table)).items():
        if entry["name"].startswith(prefix) and entry["state"] != "REMOVED":
            whole = entry["state"] == "CREATED"
            found[entry["name"]] = Reservation(entry["name"], _handle(group_id), _node_ids(entry)) if whole else None
    return found


async def release(name: str) -> None:
    """Remove every group that now has that name, in whatever state; none is fine.

    Waits until Ray has, and until its nodes say so: `observe` sees at once what is free now.
    Processes that still run inside are killed by Ray.
    """
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    removed = await _ids(name)
    left = removed
    while left or await _still_reported(removed):
        if time.monotonic() >= deadline:
            raise ReservationError(name, f"Ray did not remove placement group {name} within {RELEASE_TIMEOUT_S:g} s")
        for group_id in left:
            await asyncio.to_thread(remove_placement_group, _handle(group_id))
        await asyncio.sleep(POLL_S)
        left = removed & await _ids(name)  # a group that a successor makes meanwhile is its own


async def _ids(name: str) -> set[str]:
    table = await asyncio.to_thread(placement_group_table)
    return {key for key, entry in table.items() if entry["name"] == name and entry["state"] != "REMOVED"}


async def _still_reported(group_ids: set[str]) -> bool:
    """Whether the latest report of a node has resources of these groups, which Ray names GPU_group_0_<id> and so on."""
    if not group_ids:
        return False
    reports = await asyncio.to_thread(ray._private.state.available_resources_per_node)
    return any(resource.rpartition("_")[2] in group_ids for report in reports.values() for resource in report)


def _create(name: str, placement: WorkerPlacement) -> PlacementGroup:
    bundles = [bundle.resources.as_ray() for bundle in placement.bundles]
    selectors = [{NODE_ID_LABEL: bundle.node_id} for bundle in placement.bundles]
    spread: dict[str, Any] = (
        {"topology_strategy": {NODE_ID_LABEL: "STRICT_SPREAD"}} if len(bundles) > 1 else {"strategy": "STRICT_PACK"}
    )
    return placement_group(bundles, name=name, lifetime="detached", bundle_label_selector=selectors, **spread)


async def _await_created(name: str, group: PlacementGroup, placement: WorkerPlacement, timeout_s: float) -> Reservation:
    deadline = time.monotonic() + timeout_s
    while True:
        entry = await asyncio.to_thread(placement_group_table, group)
        if entry and entry["state"] == "CREATED":
            return _verified(Reservation(name, group, _node_ids(entry)), placement)
        scheduling = entry["stats"]["scheduling_state"] if entry else "UNKNOWN"
        where = ", ".join(f"{bundle.resources} on {bundle.address}" for bundle in placement.bundles)
        if scheduling == "INFEASIBLE":
            raise ReservationError(name, f"Ray cannot reserve {where}: infeasible, a planned node is gone or changed")
        if time.monotonic() >= deadline:
            raise ReservationError(
                name, f"Ray did not reserve {where} within {timeout_s:g} s ({scheduling}): something else holds it"
            )
        await asyncio.sleep(POLL_S)


def _verified(reservation: Reservation, placement: WorkerPlacement) -> Reservation:
    """Ranks are started by bundle index, so each bundle must be on the node that was planned for it."""
    planned = tuple(bundle.node_id for bundle in placement.bundles)
    if reservation.node_ids != planned:
        reason = f"Ray put {reservation.name} on nodes {reservation.node_ids}, planned were {planned}"
        raise ReservationError(reservation.name, reason)
    return reservation


def _reserved_by_groups() -> dict[str, Resources]:
    """What placement groups of anyone hold, by node id."""
    held: dict[str, Resources] = {}
    for entry in placement_group_table().values():
        if entry["state"] in ("REMOVED", "PENDING"):
            continue
        for index, node_id in entry["bundles_to_node_id"].items():
            bundle = Resources.from_ray(entry["bundles"][index])
            if node_id:
                held[node_id] = held.get(node_id, Resources()) + bundle
    return held


def _node_ids(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(node_id or "" for _, node_id in sorted(entry["bundles_to_node_id"].items()))


def _handle(group_id: str) -> PlacementGroup:
    return PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id)))
