"""plan(topology, worker groups) -> Plan: which node every rank of every worker runs on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from placement.parallelism import Parallelism
from placement.search import Allocation, Job, NoPlace, allocate
from placement.topology import NO_ACCELERATOR, Node, Resources, Topology
from placement.traffic import RequestShape

R1 = RequestShape()


class PlacementError(Exception):
    """A worker fits nowhere. Not retryable until the cluster or the configuration changes.

    Args:
        group: the worker group, as the configuration names it.
        worker: the first worker that did not fit.
        needs: what each of its nodes must have free.
        num_nodes: how many nodes it needs at once.
        num_fitting: how many there are.
        largest: the largest free slot, in words.
        change: the smallest one that would make it fit, in words.
    """

    def __init__(
        self,
        group: str,
        worker: str,
        needs: str,
        num_nodes: int,
        num_fitting: int,
        largest: str,
        change: str = "add nodes",
    ) -> None:
        super().__init__(group, worker, needs, num_nodes, num_fitting, largest, change)
        self.group, self.worker, self.needs = group, worker, needs
        self.num_nodes, self.num_fitting = num_nodes, num_fitting
        self.largest, self.change = largest, change

    def __str__(self) -> str:
        nodes = "a node" if self.num_nodes == 1 else f"{self.num_nodes} nodes, each"
        found = "" if self.num_nodes == 1 else f"only {self.num_fitting} fit; "
        return (
            f"{self.worker} needs {nodes} with {self.needs} free; {found}{self.largest}. "
            f"{self.change[0].upper()}{self.change[1:]}, or lower `{self.group}`"
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
    one_domain: bool = False
    """Every worker's nodes share one NVLink domain."""

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
    spares: tuple[str, ...] = ()
    """Ids of whole nodes kept free, to replace one that is lost."""

    def of(self, worker: str) -> WorkerPlacement:
        """Raises KeyError for a worker that is not in the plan."""
        for placement in self.workers:
            if placement.worker == worker:
                return placement
        raise KeyError(worker)


def plan(
    topology: Topology, groups: Sequence[WorkerGroup], *, spares: int = 0, request: RequestShape | None = None
) -> Plan:
    """Assign every rank of every worker a node; same inputs, same plan.

    A worker is kept in the fewest leaves, and in one NVLink domain where its group asks for it; prefill workers near
    decode workers; replicas of one role apart where that costs no traffic. GPU workers take the fullest nodes of a leaf
    that still fit, which keeps whole nodes free; CPU workers take the emptiest, which keeps engines off each other's
    cores. Two engines share a core only where a node has fewer cores than ranks.

    Args:
        spares: how many whole nodes with GPUs to leave free and name.
        request: what a request moves; None: as DeepSeek-R1.

    Raises:
        PlacementError: Something does not fit; names the group, what it needs, the largest slot, and the fix.
    """
    by_worker = {worker: group for group in groups for worker in group.workers}
    try:
        chosen = allocate(topology.nodes, [_job(group, worker) for worker, group in by_worker.items()], request or R1)
    except NoPlace as error:
        raise _misfit(by_worker[error.job.worker], error, topology) from error
    nodes = {node.node_id: node for node in topology.nodes}
    placed = {}
    for worker, group in by_worker.items():
        placed[worker] = _placement(group, worker, [nodes[node_id] for node_id in chosen[worker]])
        for bundle in placed[worker].bundles:
            node = nodes[bundle.node_id]
            busy = node.busy_cores + bundle.cores
            nodes[bundle.node_id] = replace(node, free=node.free - bundle.resources, busy_cores=busy)
    return Plan(tuple(placed.values()), _spares(nodes.values(), groups, placed.values(), spares))


def place(
    topology: Topology, group: WorkerGroup, worker: str, beside: Mapping[str, WorkerPlacement] | None = None
) -> WorkerPlacement:
    """Assign the ranks of one worker to what is free now, as `plan` would.

    Args:
        beside: workers that are there already, whose nodes have less free for it. Their groups' names are roles.

    Raises:
        PlacementError: It does not fit.
    """
    there = beside or {}
    nodes = {node.node_id: node for node in topology.nodes}
    job = _job(group, worker)
    allocation = Allocation(topology.nodes, [job], R1)
    for other in there.values():
        allocation.neighbour(other.group, [b.node_id for b in other.bundles if b.node_id in nodes])
    chosen = allocation.near(job)
    if chosen is None:
        raise _misfit(group, NoPlace(job, topology.nodes), topology)
    return _placement(group, worker, [nodes[node_id] for node_id in chosen])


def _job(group: WorkerGroup, worker: str) -> Job:
    return Job(worker, group.name, group.nodes, group.needs, group.accelerator, group.one_domain)


def _placement(group: WorkerGroup, worker: str, nodes: Sequence[Node]) -> WorkerPlacement:
    return WorkerPlacement(worker, group.name, tuple(_bundle(group, rank, node) for rank, node in enumerate(nodes)))


def _spares(
    nodes: Iterable[Node], groups: Sequence[WorkerGroup], placed: Iterable[WorkerPlacement], count: int
) -> tuple[str, ...]:
    """Free whole nodes, first those in leaves where most workers are.

    Raises:
        PlacementError: There are not so many.
    """
    if not count:
        return ()
    kinds = {group.accelerator for group in groups if group.needs.gpus}
    by_id = {node.node_id: node for node in nodes}
    used = Counter(by_id[bundle.node_id].leaf for worker in placed for bundle in worker.bundles)
    whole = [n for n in by_id.values() if n.accelerator in kinds and n.total.gpus and n.free.gpus == n.total.gpus]
    whole = [node for node in whole if not node.drained]
    if len(whole) < count:
        raise PlacementError("spares", "spares", "every GPU", count, len(whole), f"{len(whole)} whole nodes are left")
    whole.sort(key=lambda node: (-used[node.leaf], node.address, node.node_id))
    return tuple(node.node_id for node in whole[:count])


def _misfit(group: WorkerGroup, error: NoPlace, before: Topology) -> PlacementError:
    job = error.job
    fitting = [node for node in error.nodes if job.takes(node)]
    right_kind = [node for node in error.nodes if node.is_kind(group.accelerator) and not node.drained]
    needs = str(group.needs) if group.accelerator == NO_ACCELERATOR else f"{group.needs} ({group.accelerator})"
    found = len(fitting)
    if group.one_domain:
        needs += " in one NVLink domain"
        found = max(Counter(node.domain or node.node_id for node in fitting).values(), default=0)
    change = _smallest_change(group, before, group.nodes - found)
    return PlacementError(group.name, job.worker, needs, group.nodes, found, _largest(right_kind, group), change)


def _smallest_change(group: WorkerGroup, before: Topology, lacking: int) -> str:
    """What would make room: as few GPUs of others as possible, or more nodes."""
    add = f"add {lacking} node{'s' if lacking > 1 else ''}"
    needs = group.needs
    held = [
        (needs.gpus - node.free.gpus, node.address)
        for node in before.nodes
        if node.accelerator == group.accelerator and node.free.gpus < needs.gpus <= node.total.gpus and not node.drained
    ]
    if group.one_domain or len(held) < lacking:
        return add
    fewest = ", ".join(f"{gpus} GPUs on {address}" for gpus, address in sorted(held)[:lacking])
    return f"free {fewest}, or {add}"


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
    if group.accelerator == NO_ACCELERATOR and node.num_cores:
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
