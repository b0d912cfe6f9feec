"""plan(topology, worker groups) -> Plan: which node every rank of every worker runs on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from placement.parallelism import Parallelism
from placement.topology import NO_ACCELERATOR, Node, Resources, Topology


class PlacementError(Exception):
    """A worker fits nowhere. Not retryable until the cluster or the configuration changes.

    Args:
        group: the worker group, as the configuration names it.
        worker: the first worker that did not fit.
        needs: what each of its nodes must have free.
        num_nodes: how many nodes it needs at once.
        num_fitting: how many there are.
        largest: the largest free slot, in words.
    """

    def __init__(self, group: str, worker: str, needs: str, num_nodes: int, num_fitting: int, largest: str) -> None:
        super().__init__(group, worker, needs, num_nodes, num_fitting, largest)
        self.group, self.worker, self.needs = group, worker, needs
        self.num_nodes, self.num_fitting, self.largest = num_nodes, num_fitting, largest

    def __str__(self) -> str:
        nodes = "a node" if self.num_nodes == 1 else f"{self.num_nodes} nodes, each"
        found = "" if self.num_nodes == 1 else f"only {self.num_fitting} fit; "
        return (
            f"{self.worker} needs {nodes} with {self.needs} free; {found}{self.largest}. "
            f"Add nodes, free some, or lower `{self.group}`"
        )


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """Workers of one shape.

    Raises:
        ValueError: The ranks do not divide among the nodes.
    """

    name: str
    replicas: int
    nodes: int
    """Nodes that one worker spans."""
    parallelism: Parallelism
    cpus: float = 1.0
    """Per node of a worker."""
    memory_bytes: int = 0
    """Per node of a worker."""
    accelerator: str = NO_ACCELERATOR

    def __post_init__(self) -> None:
        if self.parallelism.num_ranks % self.nodes:
            raise ValueError(f"{self.name}: {self.parallelism.num_ranks} ranks do not divide among {self.nodes} nodes")

    @property
    def workers(self) -> tuple[str, ...]:
        return tuple(f"{self.name}-{index}" for index in range(self.replicas))

    @property
    def ranks_per_node(self) -> int:
        return self.parallelism.num_ranks // self.nodes

    @property
    def needs(self) -> Resources:
        """What one whole-node bundle takes."""
        gpus = 0 if self.accelerator == NO_ACCELERATOR else self.ranks_per_node
        return Resources(self.cpus, gpus, self.memory_bytes)

    @property
    def cores_per_rank(self) -> int:
        return max(1, int(self.cpus / self.ranks_per_node))


@dataclass(frozen=True, slots=True)
class Bundle:
    """One node's share of one worker."""

    node_rank: int
    node_id: str
    address: str
    resources: Resources
    ranks: tuple[int, ...]
    cores: tuple[int, ...] = ()
    """CPU engines: core numbers, the same count for every rank, in rank order."""


@dataclass(frozen=True, slots=True)
class WorkerPlacement:
    worker: str
    group: str
    bundles: tuple[Bundle, ...]
    """In node_rank order."""


@dataclass(frozen=True, slots=True)
class Plan:
    workers: tuple[WorkerPlacement, ...]
    """In the order of the groups and of their workers."""

    def of(self, worker: str) -> WorkerPlacement:
        """Raises KeyError for a worker that is not in the plan."""
        for placement in self.workers:
            if placement.worker == worker:
                return placement
        raise KeyError(worker)


def plan(topology: Topology, groups: Sequence[WorkerGroup]) -> Plan:
    """Assign every rank of every worker a node; same inputs, same plan.

    Workers with the widest nodes are placed first. GPU workers take the fullest nodes that still fit, which keeps
    whole nodes free; CPU workers take the emptiest, which keeps engines off each other's cores. Two engines share a
    core only where a node has fewer cores than ranks.

    Raises:
        PlacementError: Something does not fit; names the group, what it needs and the largest free slot.
    """
    nodes = {node.node_id: node for node in topology.nodes}
    wanted = [(group, worker) for group in groups for worker in group.workers]
    placed: dict[str, WorkerPlacement] = {}
    for group, worker in sorted(wanted, key=lambda item: (-item[0].needs.gpus, -item[0].nodes)):
        placed[worker] = place(Topology(tuple(nodes.values())), group, worker)
        for bundle in placed[worker].bundles:
            node = nodes[bundle.node_id]
            nodes[bundle.node_id] = replace(
                node, free=node.free - bundle.resources, busy_cores=node.busy_cores + bundle.cores
            )
    return Plan(tuple(placed[worker] for _, worker in wanted))


def place(topology: Topology, group: WorkerGroup, worker: str) -> WorkerPlacement:
    """Assign the ranks of one worker to what is free now: one step of `plan`.

    Raises:
        PlacementError: It does not fit.
    """
    chosen = _choose(topology.nodes, group, worker)
    return WorkerPlacement(worker, group.name, tuple(_bundle(group, rank, node) for rank, node in enumerate(chosen)))


def _choose(nodes: tuple[Node, ...], group: WorkerGroup, worker: str) -> list[Node]:
    """The nodes of one worker, in node_rank order."""
    right_kind = [node for node in nodes if group.accelerator in (NO_ACCELERATOR, node.accelerator)]
    fitting = [node for node in right_kind if group.needs.fits_in(node.free)]
    if len(fitting) < group.nodes:
        needs = str(group.needs) if group.accelerator == NO_ACCELERATOR else f"{group.needs} ({group.accelerator})"
        raise PlacementError(group.name, worker, needs, group.nodes, len(fitting), _largest(right_kind, group))
    # Stable sorts: equal nodes stay in the topology's order.
    if group.needs.gpus:
        best = sorted(fitting, key=lambda node: (node.free.gpus, node.free.cpus))
    else:
        best = sorted(fitting, key=lambda node: (-node.free.cpus, node.free.gpus))
    chosen = {node.node_id for node in best[: group.nodes]}
    return [node for node in fitting if node.node_id in chosen]


def _largest(right_kind: list[Node], group: WorkerGroup) -> str:
    if not right_kind:
        kind = "alive" if group.accelerator == NO_ACCELERATOR else f"with {group.accelerator}"
        return f"there is no node {kind}"
    node = max(right_kind, key=lambda node: (node.free.gpus, node.free.cpus, node.free.memory_bytes))
    nothing = ", no memory" if group.needs.memory_bytes and not node.free.memory_bytes else ""
    return f"the largest free slot is {node.free}{nothing} on {node.address}"


def _bundle(group: WorkerGroup, node_rank: int, node: Node) -> Bundle:
    first = node_rank * group.ranks_per_node
    cores: tuple[int, ...] = ()
    if group.accelerator == NO_ACCELERATOR:
        cores = _least_busy_cores(node, group.ranks_per_node * group.cores_per_rank)
    ranks = tuple(range(first, first + group.ranks_per_node))
    return Bundle(node_rank, node.node_id, node.address, group.needs, ranks, cores)


def _least_busy_cores(node: Node, count: int) -> tuple[int, ...]:
    load = Counter(dict.fromkeys(range(node.num_cores), 0))
    load.update(core for core in node.busy_cores if core < node.num_cores)
    taken = []
    for _ in range(count):
        core = min(load, key=lambda core: (load[core], core))
        load[core] += 1
        taken.append(core)
    return tuple(taken)
