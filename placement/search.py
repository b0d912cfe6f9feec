"""Which nodes each worker gets: few leaves for one worker, prefill near decode, replicas apart; and always an answer.

Wide nodes are given away first, then many. Each worker takes the leaves that add the least traffic, then the ones that
leave the least over, so that whole leaves stay free for those to come. Then workers are moved, and change places with
others, as long as that saves traffic; and all of it again in other orders, where there are few enough. Should a worker
find no place on that way, all are placed where most is free, whatever the leaf: for GPU counts that divide each other
that finds a place whenever there is one.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from placement.topology import NO_ACCELERATOR, Node, Resources
from placement.traffic import Leaves, RequestShape, alltoall_share, tokens_of

MAX_LEAF_VISITS = 200_000
"""What may be spent on moves that save traffic: about a microsecond each. A move visits every leaf a few times."""
MAX_CHOICES = 8
"""Places that a worker tries while another waits for what that leaves."""
MAX_ATTEMPTS = 16
MAX_NODE_VISITS = 200_000
"""What may be spent on placing all in other orders: so many nodes are looked at, once for each worker."""
MAX_LEAVES_TRIED = 64
"""Of a worker that fits in one of more leaves, those that it would fill best."""
PEERS = {"prefill": "decode", "decode": "prefill"}
FREE_BYTES = 1.0
"""Less than this of a request is none."""

Rule = Literal["whole", "spread", "any"]
"""Which nodes of a leaf are taken: those most taken already, which keeps whole nodes free; those least taken, which
leaves more different ones; or by lot."""
Fitting = dict[str, dict[str, None]]
"""Ids of the nodes that take a job, by leaf; the inner dictionary is an ordered set."""


@dataclass(frozen=True, slots=True)
class Job:
    """One worker that needs `nodes` different nodes, each with `needs` free."""

    worker: str
    role: str
    nodes: int
    needs: Resources
    accelerator: str = NO_ACCELERATOR
    one_domain: bool = False
    """All of them in one NVLink domain."""

    def takes(self, node: Node) -> bool:
        return node.takes(self.needs, self.accelerator)


class NoPlace(Exception):
    """A job fits nowhere beside those placed before it.

    Args:
        job: the one.
        nodes: as they are after those before it.
    """

    def __init__(self, job: Job, nodes: tuple[Node, ...]) -> None:
        super().__init__(job, nodes)
        self.job, self.nodes = job, nodes


class _Role:
    """What the placed workers of one role have in common."""

    def __init__(self) -> None:
        self.num_workers = 0
        self.num_nodes: Counter[str] = Counter()
        """By leaf."""
        self.share: dict[str, float] = defaultdict(float)
        """By leaf: the sum over workers of the share of their nodes that is there."""
        self.alltoall = 0.0
        """The sum over workers of the share of their all-to-all that crosses leaves."""

    def count(self, leaves: Leaves, sign: int) -> None:
        self.num_workers += sign
        self.alltoall += sign * alltoall_share(leaves)
        nodes = sum(leaves.values())
        for leaf, count in leaves.items():
            self.num_nodes[leaf] += sign * count
            self.share[leaf] += sign * count / nodes
            if not self.num_nodes[leaf]:
                del self.num_nodes[leaf], self.share[leaf]


class Allocation:
    """Nodes, what is free on them, and who has been placed where."""

    def __init__(self, nodes: Iterable[Node], jobs: Sequence[Job], request: RequestShape, rule: Rule = "whole") -> None:
        self._rule = rule
        self._chance = random.Random(0)
        self.nodes = {node.node_id: node for node in nodes}
        self.num_leaves = len({node.leaf for node in self.nodes.values()})
        self.taken: dict[str, tuple[str, ...]] = {}
        self._request = request
        self._jobs = {job.worker: job for job in jobs}
        self._num_of_role = Counter(job.role for job in jobs)
        self._roles: dict[str, _Role] = defaultdict(_Role)
        self._fitting = {shape: self._index(shape) for shape in {_shape(job) for job in jobs}}

    def take(self, job: Job, node_ids: tuple[str, ...]) -> None:
        self.taken[job.worker] = node_ids
        self._roles[job.role].count(self._leaves(node_ids), +1)
        for node_id in node_ids:
            self._change(replace(self.nodes[node_id], free=self.nodes[node_id].free - job.needs))

    def neighbour(self, role: str, node_ids: Sequence[str]) -> None:
        """A worker that is there already, and whose nodes have less free for it."""
        self._num_of_role[role] += 1
        self._roles[role].count(self._leaves(node_ids), +1)

    def give_back(self, worker: str) -> tuple[str, ...]:
        """Take it away again; where it was."""
        job, node_ids = self._jobs[worker], self.taken.pop(worker)
        self._roles[job.role].count(self._leaves(node_ids), -1)
        for node_id in node_ids:
            self._change(replace(self.nodes[node_id], free=self.nodes[node_id].free + job.needs))
        return node_ids

    def near(self, job: Job) -> tuple[str, ...] | None:
        """The nodes that cost least; None if there are none."""
        return next(self.choices(job), None)

    def choices(self, job: Job) -> Iterator[tuple[str, ...]]:
        """Nodes for it in every composition of leaves that is worth a try, those that cost least first."""
        wanted = self._roles[PEERS[job.role]].num_nodes if job.role in PEERS else ()
        found: list[tuple[tuple[float, ...], list[tuple[int, str]], int]] = []
        pools = self._pools(job)
        for index, fitting in enumerate(pools):
            free = {leaf: len(nodes) for leaf, nodes in fitting.items() if nodes}
            for counts in compositions(free, job.nodes, wanted):
                largest_first = sorted((-count, leaf) for leaf, count in counts.items())
                found.append((self._preference(job, counts, free), largest_first, index))
        for _, counts_of_leaves, index in sorted(found):
            yield self._pick(job, counts_of_leaves, pools[index])

    def emptiest(self, job: Job) -> tuple[str, ...] | None:
        """The nodes with most free, whatever their leaf."""
        found = ([self.nodes[n] for leaf in fitting.values() for n in leaf] for fitting in self._pools(job))
        nodes = max(found, key=len, default=[])
        nodes.sort(key=lambda node: (-node.free.gpus, -node.free.cpus, node.address, node.node_id))
        return tuple(node.node_id for node in nodes[: job.nodes]) if len(nodes) >= job.nodes else None

    def cost(self, worker: str) -> float:
        """Bytes of a request that cross leaves because of where this one is."""
        return self._cost(self._jobs[worker], self._leaves(self.taken[worker]))

    def total_cost(self) -> float:
        """Bytes of a request that cross leaves."""
        placed = {role: found for role, found in self._roles.items() if found.num_workers}
        alltoall = sum(
            self._alltoall_bytes(role) * found.alltoall / self._num_of_role[role] for role, found in placed.items()
        )
        prefill, decode = placed.get("prefill"), placed.get("decode")
        if prefill is None or decode is None:
            return alltoall
        together = sum(share * decode.share.get(leaf, 0.0) for leaf, share in prefill.share.items())
        return alltoall + self._handoff_bytes * (1.0 - together / (prefill.num_workers * decode.num_workers))

    @property
    def _handoff_bytes(self) -> int:
        return self._request.kv_bytes_per_token * self._request.prompt_tokens

    def _alltoall_bytes(self, role: str) -> int:
        return self._request.alltoall_bytes_per_token * tokens_of(self._request, role)

    def _leaves(self, node_ids: Iterable[str]) -> Leaves:
        return Counter(self.nodes[node_id].leaf for node_id in node_ids)

    def _pools(self, job: Job) -> list[Fitting]:
        """Where all of its nodes have to be: anywhere, or in any one NVLink domain."""
        everywhere = self._fitting[_shape(job)]
        if not job.one_domain:
            return [everywhere]
        domains: dict[str, Fitting] = defaultdict(lambda: defaultdict(dict))
        for leaf, nodes in everywhere.items():
            for node_id in nodes:
                domains[self.nodes[node_id].domain or node_id][leaf][node_id] = None
        return list(domains.values())

    def _preference(self, job: Job, counts: Leaves, free: Mapping[str, int]) -> tuple[float, ...]:
        """Lower is better: traffic; then replicas in the same leaves, which fail together; then what is left over."""
        beside = self._roles[job.role].num_nodes
        return (
            round(self._cost(job, counts)),
            sum(count * beside.get(leaf, 0) for leaf, count in counts.items() if leaf),
            sum(free[leaf] - count for leaf, count in counts.items()),
        )

    def _pick(self, job: Job, counts: Iterable[tuple[int, str]], fitting: Fitting) -> tuple[str, ...]:
        node_ids: list[str] = []
        for count, leaf in counts:
            nodes = sorted(
                (self.nodes[n] for n in fitting[leaf]), key=lambda n: (*self._rank(job, n), n.address, n.node_id)
            )
            chosen = sorted(nodes[:-count], key=lambda node: (node.address, node.node_id))
            node_ids += [node.node_id for node in chosen]
        return tuple(node_ids)

    def _rank(self, job: Job, node: Node) -> tuple[float, ...]:
        """The order in which a leaf's nodes are taken: GPU workers keep whole nodes free, CPU workers each other's."""
        if not job.needs.gpus:
            return (-node.free.cpus, node.free.gpus)
        if self._rule == "any":
            return (self._chance.random(),)
        return (node.free.gpus, node.free.cpus) if self._rule == "whole" else (-node.free.gpus, -node.free.cpus)

    def _cost(self, job: Job, leaves: Leaves) -> float:
        cost = self._alltoall_bytes(job.role) * alltoall_share(leaves)
        peers = self._roles[PEERS[job.role]] if job.role in PEERS else None
        if peers is not None and peers.num_workers:
            together = sum(count * peers.share.get(leaf, 0.0) for leaf, count in leaves.items())
            cost += self._handoff_bytes * (1.0 - together / (sum(leaves.values()) * peers.num_workers))
        return cost / self._num_of_role[job.role]

    def _index(self, shape: Job) -> Fitting:
        found: Fitting = defaultdict(dict)
        for node in self.nodes.values():
            if shape.takes(node):
                found[node.leaf][node.node_id] = None
        return found

    def _change(self, node: Node) -> None:
        self.nodes[node.node_id] = node
        for shape, fitting in self._fitting.items():
            if shape.takes(node):
                fitting[node.leaf][node.node_id] = None
            else:
                fitting[node.leaf].pop(node.node_id, None)


def compositions(free: Mapping[str, int], count: int, wanted: Iterable[str] = ()) -> Iterator[Leaves]:
    """Ways to take `count` nodes out of leaves that have so many: from one leaf where one has enough, else from the
    largest on, which keeps most of them together (no other way has a larger sum of squares), ended where it fits best.

    Args:
        wanted: leaves to try in any case.
    """
    enough = sorted((size, leaf) for leaf, size in free.items() if size >= count)
    if enough:
        tried = dict.fromkeys(leaf for _, leaf in enough[:MAX_LEAVES_TRIED])
        tried |= dict.fromkeys(leaf for leaf in wanted if free.get(leaf, 0) >= count)
        yield from ({leaf: count} for leaf in tried)
        return
    if sum(free.values()) < count:
        return
    taken: dict[str, int] = {}
    for size, leaf in sorted(((size, leaf) for leaf, size in free.items()), reverse=True):
        rest = count - sum(taken.values())
        tightest = min(((s, le) for le, s in free.items() if s >= rest and le not in taken), default=None)
        if tightest is not None:
            yield {**taken, tightest[1]: rest}
            return
        taken[leaf] = size


def allocate(nodes: Sequence[Node], jobs: Sequence[Job], request: RequestShape) -> dict[str, tuple[str, ...]]:
    """Node ids of every job, by worker; same inputs, same answer.

    Raises:
        NoPlace: One of them fits nowhere.
    """
    first = sorted(jobs, key=lambda job: (-job.needs.gpus, -job.nodes, not job.one_domain))
    best: Allocation | None = None
    for ordered, rule in _attempts(first, nodes):
        found = _place_all(nodes, ordered, request, near=True, rule=rule)
        if found is not None:
            _improve(found, ordered, MAX_LEAF_VISITS if best is None else MAX_LEAF_VISITS // 2 // MAX_ATTEMPTS)
            if best is None or found.total_cost() < best.total_cost() * (1 - 1e-9):
                best = found
            if best.total_cost() < FREE_BYTES:
                break
    if best is None:
        best = _place_all(nodes, first, request, near=False)
        assert best is not None, "it raises instead"
        _improve(best, first, MAX_LEAF_VISITS)
    return best.taken


def _attempts(first: Sequence[Job], nodes: Sequence[Node]) -> Iterator[tuple[Sequence[Job], Rule]]:
    """Orders to place them in, and which of a leaf's nodes to take, as many as the work allows.

    Wide nodes first, but for some attempts in which narrow workers that cause more traffic may come before. Rules
    matter only where workers share nodes.
    """
    yield first, "whole"
    widest = max((node.total.gpus for node in nodes), default=0)
    rules: tuple[Rule, ...] = ("whole", "spread", "any")
    if not any(0 < 2 * job.needs.gpus <= widest for job in first):
        rules = ("whole",)
    seen: set[tuple[tuple[Job, ...], Rule]] = {(tuple(map(_alike, first)), "whole")}
    shuffled, chance = list(first), random.Random(0)
    most = MAX_ATTEMPTS * len(rules)
    for number in range(min(most, MAX_NODE_VISITS // (len(first) * max(1, len(nodes))))):
        ordered = list(shuffled) if number % 4 > 1 else sorted(shuffled, key=lambda job: -job.needs.gpus)
        rule = rules[-1 - number % len(rules)]
        attempt = tuple(map(_alike, ordered)), rule
        if attempt not in seen or rule == "any":
            seen.add(attempt)
            yield ordered, rule
        chance.shuffle(shuffled)


def _place_all(
    nodes: Sequence[Node], jobs: Sequence[Job], request: RequestShape, near: bool, rule: Rule = "whole"
) -> Allocation | None:
    allocation = Allocation(nodes, jobs, request, rule)
    for job in jobs:
        found = allocation.near(job) if near else allocation.emptiest(job)
        if found is not None:
            allocation.take(job, found)
        elif near:
            return None
        else:
            raise NoPlace(job, tuple(allocation.nodes.values()))
    return allocation


def _improve(allocation: Allocation, jobs: Sequence[Job], max_leaf_visits: int) -> None:
    """Move workers, alone or with others, while it saves traffic and the work is worth it."""
    moves = max_leaf_visits // max(1, allocation.num_leaves)
    improved = True
    while improved:
        improved = False
        for job in jobs:
            peers = tuple(other for other in jobs if other.role == PEERS.get(job.role))
            for others in ((), *((other,) for other in jobs if other is not job), peers):
                if allocation.cost(job.worker) < FREE_BYTES:
                    break
                if moves <= 0:
                    return
                moves -= 1 + len(others)
                improved |= _move(allocation, job, others)


def _move(allocation: Allocation, job: Job, others: Sequence[Job]) -> bool:
    """Place one elsewhere, and then the others where that leaves room; undone unless it saves traffic."""
    before = allocation.total_cost()
    old = {moved: allocation.give_back(moved.worker) for moved in (job, *others)}
    for choice in islice(allocation.choices(job), MAX_CHOICES if others else 1):
        allocation.take(job, choice)
        placed = [job]
        for other in others:
            found = allocation.near(other)
            if found is None:
                break
            allocation.take(other, found)
            placed.append(other)
        if len(placed) == len(old) and allocation.total_cost() < before * (1 - 1e-9):
            return True
        for moved in placed:
            allocation.give_back(moved.worker)
    for moved, node_ids in old.items():
        allocation.take(moved, node_ids)
    return False


def _alike(job: Job) -> Job:
    """Replicas of one role can take each other's turn."""
    return replace(job, worker="")


def _shape(job: Job) -> Job:
    """What decides which nodes take it."""
    return replace(job, worker="", role="", nodes=0, one_domain=False)
