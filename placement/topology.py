"""What a cluster has: nodes with what is free on them, as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isinf
from typing import Any

NODE_ID_LABEL = "ray.io/node-id"
ACCELERATOR_LABEL = "ray.io/accelerator-type"
DOMAIN_LABEL = "ray.io/gpu-domain"
"""Nodes of one value share an NVLink domain. Ray does not find it out by itself (`ray start --labels`)."""
ACCELERATOR_RESOURCE = "accelerator_type:"
NO_ACCELERATOR = "cpu"
"""The accelerator of workers that compute on CPU cores."""

UNLIMITED_BYTES = 2**60
"""Memory of a host that is only planned, and has what is asked of it; its CPUs are infinitely many."""

_EPSILON = 1e-6
"""Ray counts resources in 1e-4; sums of fractions differ in the last float bits."""


@dataclass(frozen=True, slots=True)
class Resources:
    """An amount of what Ray hands out. Fractions of a CPU are allowed."""

    cpus: float = 0.0
    gpus: int = 0
    memory_bytes: int = 0

    def __str__(self) -> str:
        parts = [f"{self.gpus} GPU{'s' if self.gpus != 1 else ''}"] if self.gpus else []
        if not isinf(self.cpus):
            parts.append(f"{self.cpus:g} CPU{'s' if self.cpus != 1 else ''}")
        if 0 < self.memory_bytes < UNLIMITED_BYTES:
            parts.append(f"{self.memory_bytes / 2**30:.1f} GiB memory")
        return ", ".join(parts) or "nothing"

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.cpus + other.cpus, self.gpus + other.gpus, self.memory_bytes + other.memory_bytes)

    def __sub__(self, other: Resources) -> Resources:
        return Resources(self.cpus - other.cpus, self.gpus - other.gpus, self.memory_bytes - other.memory_bytes)

    def fits_in(self, free: Resources) -> bool:
        return self.cpus <= free.cpus + _EPSILON and self.gpus <= free.gpus and self.memory_bytes <= free.memory_bytes

    def at_most(self, other: Resources) -> Resources:
        """The smaller of the two in every dimension."""
        return Resources(
            min(self.cpus, other.cpus), min(self.gpus, other.gpus), min(self.memory_bytes, other.memory_bytes)
        )

    def as_ray(self) -> dict[str, float]:
        """Ray's resource dictionary, without what is zero."""
        named = {"CPU": self.cpus, "GPU": float(self.gpus), "memory": float(self.memory_bytes)}
        return {name: amount for name, amount in named.items() if amount}

    @staticmethod
    def from_ray(amounts: Mapping[str, float]) -> Resources:
        return Resources(
            amounts.get("CPU", 0.0), int(amounts.get("GPU", 0.0) + _EPSILON), int(amounts.get("memory", 0.0))
        )


@dataclass(frozen=True, slots=True)
class Node:
    """One machine, and what is free on it now."""

    node_id: str
    address: str
    free: Resources
    total: Resources
    accelerator: str = NO_ACCELERATOR
    labels: Mapping[str, str] = field(default_factory=dict)
    busy_cores: tuple[int, ...] = ()
    """Core numbers that engines already compute on, once per engine rank."""
    domain: str = ""
    """The NVLink domain that it shares with other nodes; empty: its GPUs are a domain of their own."""
    leaf: str = ""
    """The part of the network whose nodes reach each other best: a leaf switch, or a rack. Empty: it is not known."""
    drained: bool = False
    """Takes no new workers."""

    def is_kind(self, accelerator: str) -> bool:
        """Whether workers of that accelerator may run here; those that compute on CPUs may anywhere."""
        return accelerator in (NO_ACCELERATOR, self.accelerator)

    def takes(self, needs: Resources, accelerator: str) -> bool:
        """Whether a new worker of that accelerator finds this free here."""
        return self.is_kind(accelerator) and not self.drained and needs.fits_in(self.free)

    @property
    def num_cores(self) -> int:
        """Cores are numbered 0..num_cores-1; their owner maps them to those its process may use. 0: it is not known."""
        return 0 if isinf(self.total.cpus) else max(1, int(self.total.cpus + _EPSILON))


class TopologyError(ValueError):
    """A cluster is described wrongly; carries every problem, each with its path."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


@dataclass(frozen=True, slots=True)
class Topology:
    """The nodes of a cluster, ordered by address and id so that equal clusters plan equally."""

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.nodes, key=lambda node: (node.address, node.node_id)))
        object.__setattr__(self, "nodes", ordered)

    @staticmethod
    def from_ray(
        nodes: Iterable[Mapping[str, Any]],
        free: Mapping[str, Resources] | None = None,
        busy_cores: Mapping[str, tuple[int, ...]] | None = None,
        leaf_label: str | None = None,
    ) -> Topology:
        """Read `ray.nodes()`; nodes that are dead are left out.

        Args:
            nodes: as `ray.nodes()` returns them.
            free: by node id; a node that is missing counts as wholly free.
            busy_cores: by node id.
            leaf_label: the label that says which leaf or rack a node is in, where the cluster has one.

        Raises:
            TopologyError: Nodes with GPUs lack that label; names all of them.
        """
        alive = [raw for raw in nodes if raw["Alive"]]
        lacking = [raw for raw in alive if _lacks(raw, leaf_label)]
        if lacking:
            raise TopologyError(
                tuple(
                    f"nodes[{raw['NodeManagerAddress']}].labels: has no {leaf_label!r}, which others have"
                    for raw in lacking
                )
            )
        return Topology(tuple(_node(raw, free or {}, busy_cores or {}, leaf_label) for raw in alive))


def _lacks(raw: Mapping[str, Any], leaf_label: str | None) -> bool:
    return (
        leaf_label is not None and bool(raw["Resources"].get("GPU")) and not (raw.get("Labels") or {}).get(leaf_label)
    )


def _node(
    raw: Mapping[str, Any], free: Mapping[str, Resources], busy: Mapping[str, tuple[int, ...]], leaf_label: str | None
) -> Node:
    node_id, resources, labels = raw["NodeID"], raw["Resources"], raw.get("Labels") or {}
    total = Resources.from_ray(resources)
    by_resource = (
        name.removeprefix(ACCELERATOR_RESOURCE) for name in resources if name.startswith(ACCELERATOR_RESOURCE)
    )
    accelerator = labels.get(ACCELERATOR_LABEL) or next(by_resource, NO_ACCELERATOR)
    return Node(
        node_id=node_id,
        address=raw["NodeManagerAddress"],
        free=free.get(node_id, total).at_most(total),
        total=total,
        accelerator=accelerator,
        labels=dict(labels),
        busy_cores=busy.get(node_id, ()),
        domain=labels.get(DOMAIN_LABEL, ""),
        leaf="" if leaf_label is None else labels.get(leaf_label, ""),
    )
