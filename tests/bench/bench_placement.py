"""Planning: how long it takes, how that grows, and how much traffic its layouts cost beside Ray's PACK and the optimum.

    make bench-placement        or        python tests/bench/bench_placement.py [--clusters 1000] [--check]

The optimum is CP-SAT's, on the instances whose optimality it proves within its limit. OR-tools has an environment of
its own, because it takes an older protobuf than Ray. PACK is Ray's policy for bundles as its source has it (2.60,
ray/raylet/scheduling/policy/bundle_scheduling_policy.cc): each bundle to the node that has least left over, among
equals the first by node id, which says nothing of its leaf; workers in the order of the plan, a node at most once for
each. Traffic is `placement.traffic`'s, for all of them. With --check, exit 1 unless the targets below are met.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from placement.cluster_file import from_shorthand
from placement.parallelism import Parallelism
from placement.plan import PlacementError, WorkerGroup, plan
from placement.topology import Node, Resources, Topology
from placement.traffic import RequestShape, leaves_of, traffic

MAX_R1_MS = 50.0
MAX_FLEET_S = 2.0
MAX_FLEET_MIB = 500.0
MAX_ABOVE_OPTIMUM = 0.05
MAX_EXACT_NODES = 14
EXACT_LIMIT_S = 5.0
REQUEST = RequestShape()

Chosen = Mapping[str, Sequence[str]]
"""Node ids by worker."""


def group(name: str, replicas: int, nodes: int, gpus: int = 8, accelerator: str = "H100") -> WorkerGroup:
    ranks = nodes * gpus
    return WorkerGroup(name, replicas, nodes, Parallelism(attn_dp=ranks, moe_ep=ranks), accelerator=accelerator)


def cost(topology: Topology, groups: Sequence[WorkerGroup], chosen: Chosen) -> float:
    """Bytes of a request that cross leaves."""
    leaf = {node.node_id: node.leaf for node in topology.nodes}
    roles = {g.name: [leaves_of(leaf[n] for n in chosen[worker]) for worker in g.workers] for g in groups}
    return traffic(REQUEST, roles).total_bytes


def planned(topology: Topology, groups: Sequence[WorkerGroup]) -> dict[str, list[str]]:
    made = plan(topology, groups, request=REQUEST)
    return {worker.worker: [bundle.node_id for bundle in worker.bundles] for worker in made.workers}


def packed(topology: Topology, groups: Sequence[WorkerGroup]) -> dict[str, list[str]] | None:
    """Ray's PACK; None where it finds no place for all."""
    nodes = {node.node_id: node for node in topology.nodes}
    chosen: dict[str, list[str]] = {}
    for g in groups:
        for worker in g.workers:
            fitting = [n for n in nodes.values() if n.accelerator == g.accelerator and g.needs.fits_in(n.free)]
            fitting.sort(key=lambda node: (node.free.gpus, node.node_id))
            if len(fitting) < g.nodes:
                return None
            for node in fitting[: g.nodes]:
                nodes[node.node_id] = replace(node, free=node.free - g.needs)
            chosen[worker] = [node.node_id for node in fitting[: g.nodes]]
    return chosen


def instances(count: int) -> Iterator[tuple[Topology, list[WorkerGroup]]]:
    """Random clusters, partly taken and of two kinds, with fleets that may or may not fit; always the same ones."""
    for seed in range(count):
        chance = random.Random(seed)
        nodes = []
        for leaf in range(chance.randint(2, 6)):
            for _ in range(chance.randint(1, 6)):
                kind = chance.choices(("H100", "H200"), (4, 1))[0]
                free = Resources(64.0, chance.choices((8, 4, 0), (6, 2, 1))[0])
                name = f"{chance.getrandbits(64):016x}"
                nodes.append(Node(name, name, free, Resources(64.0, 8), kind, leaf=f"l{leaf}"))
        shapes = [(chance.randint(1, 2), chance.randint(1, 5), chance.choice((8, 8, 4))) for _ in range(2)]
        if chance.random() < 0.3:
            groups = [group("aggregated", *shapes[0])]
        else:
            groups = [group("prefill", *shapes[0]), group("decode", *shapes[1])]
        yield Topology(tuple(nodes)), groups


def optimum(topology: Topology, groups: Sequence[WorkerGroup]) -> float | None:
    """The least traffic any layout costs; None where it is not proven in time."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    leaves = sorted({node.leaf for node in topology.nodes})
    takes: dict[str, dict[str, object]] = {}
    counts: dict[str, dict[str, object]] = {}
    for g in groups:
        right_kind = [n for n in topology.nodes if n.accelerator == g.accelerator and g.needs.gpus <= n.free.gpus]
        for worker in g.workers:
            takes[worker] = {node.node_id: model.new_bool_var(f"{worker}@{node.node_id}") for node in right_kind}
            model.add(sum(takes[worker].values()) == g.nodes)
            counts[worker] = {}
            for leaf in leaves:
                counts[worker][leaf] = model.new_int_var(0, g.nodes, f"{worker}#{leaf}")
                inside = [takes[worker][n.node_id] for n in right_kind if n.leaf == leaf]
                model.add(counts[worker][leaf] == sum(inside))
    for node in topology.nodes:
        used = [g.needs.gpus * takes[w][node.node_id] for g in groups for w in g.workers if node.node_id in takes[w]]
        model.add(sum(used) <= node.free.gpus)
    saved = _saved(model, groups, leaves, counts)
    model.maximize(sum(saved))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = EXACT_LIMIT_S
    solver.parameters.num_workers = 2
    if solver.solve(model) != cp_model.OPTIMAL:
        return None
    chosen = {worker: [n for n, taken in found.items() if solver.value(taken)] for worker, found in takes.items()}
    return cost(topology, groups, chosen)


def _saved(model: object, groups: Sequence[WorkerGroup], leaves: Sequence[str], counts: dict) -> list[object]:
    """Terms, in KiB, of the traffic that stays inside leaves: it is what layouts differ in."""
    terms = []

    def product(one: object, other: object, most: int, weight_bytes: float) -> None:
        square = model.new_int_var(0, most, "")
        model.add_multiplication_equality(square, [one, other])
        terms.append(round(weight_bytes / 1024) * square)

    for g in groups:
        tokens = {"prefill": REQUEST.prompt_tokens, "decode": REQUEST.answer_tokens}
        flow = REQUEST.alltoall_bytes_per_token * tokens.get(g.name, REQUEST.prompt_tokens + REQUEST.answer_tokens)
        for worker in g.workers:
            for leaf in leaves:
                inside = counts[worker][leaf]
                product(inside, inside, g.nodes**2, flow / g.replicas / g.nodes**2)
    by_name = {g.name: g for g in groups}
    if {"prefill", "decode"} <= by_name.keys():
        p, d = by_name["prefill"], by_name["decode"]
        flow = REQUEST.kv_bytes_per_token * REQUEST.prompt_tokens / (p.replicas * d.replicas * p.nodes * d.nodes)
        for one in p.workers:
            for other in d.workers:
                for leaf in leaves:
                    product(counts[one][leaf], counts[other][leaf], p.nodes * d.nodes, flow)
    return terms


def speed() -> dict[str, float]:
    """CPU seconds, and MiB at the peak of the largest."""
    r1 = [group("prefill", 1, 4), group("decode", 1, 9)]
    figures: dict[str, float] = {}
    for label, shorthand in (("one leaf", "13x8xH100"), ("leaves of 4", "13x8xH100/4")):
        topology = from_shorthand(shorthand)
        figures[f"DeepSeek-R1, 4+9 on {label}, ms"] = 1000 * timed(lambda topology=topology: plan(topology, r1))
    for nodes, replicas in ((100, 4), (1000, 32), (10_000, 32)):
        fleet = [group("prefill", replicas, 4), group("decode", replicas, 9)]
        fleet = fleet if nodes > 100 else [group("prefill", replicas, 4), group("decode", replicas, 9)]
        topology = from_shorthand(f"{nodes}x8xH100/8")
        figures[f"{2 * replicas} workers on {nodes} nodes, s"] = timed(lambda t=topology, f=fleet: plan(t, f))
    for nodes in (100, 1000, 10_000):
        few = [group("prefill", 2, 4), group("decode", 2, 9)]
        topology = from_shorthand(f"{nodes}x8xH100/8")
        figures[f"4 workers on {nodes} nodes, s"] = timed(lambda t=topology, f=few: plan(t, f))
    tracemalloc.start()
    plan(from_shorthand("10000x8xH100/8"), [group("prefill", 32, 4), group("decode", 32, 9)])
    figures["64 workers on 10000 nodes, MiB"] = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return figures


def timed(work) -> float:
    work()
    started_s = time.process_time()
    work()
    return time.process_time() - started_s


def quality(count: int) -> dict[str, float]:
    feasible = above_pack = exact = 0
    excess: list[float] = []
    ratios: list[float] = []
    for number, (topology, groups) in enumerate(instances(count)):
        if sys.stderr.isatty():
            print(f"\r{number + 1}/{count}", end="", file=sys.stderr)
        theirs = packed(topology, groups)
        try:
            ours = cost(topology, groups, planned(topology, groups))
        except PlacementError:
            if theirs is not None:
                raise
            continue
        feasible += 1
        if theirs is not None:
            packed_cost = cost(topology, groups, theirs)
            above_pack += ours > packed_cost * (1 + 1e-9) + 1.0
            if packed_cost:
                ratios.append(ours / packed_cost)
        if len(topology.nodes) <= MAX_EXACT_NODES:
            best = optimum(topology, groups)
            if best is not None:
                exact += 1
                excess.append((ours - best) / best if best > 1.0 else float(ours > 1.0))
    return {
        "instances": count,
        "with a layout": feasible,
        "above PACK's traffic": above_pack,
        "mean traffic / PACK's": statistics.mean(ratios),
        "solved exactly": exact,
        "worst above the optimum": max(excess),
        "within 5% of the optimum": sum(e <= MAX_ABOVE_OPTIMUM for e in excess),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    figures = {**speed(), **quality(args.clusters)}
    for name, value in figures.items():
        print(f"{name:<42} {value:>10.4g}")
    growth = figures["4 workers on 10000 nodes, s"] / figures["4 workers on 1000 nodes, s"]
    n_log_n = 10 * math.log(10_000) / math.log(1000)
    print(f"{'10,000 nodes against 1,000':<42} {growth:>9.3g}x  (n log n: {n_log_n:.3g}x)")
    met = (
        figures["DeepSeek-R1, 4+9 on leaves of 4, ms"] < MAX_R1_MS
        and figures["64 workers on 10000 nodes, s"] < MAX_FLEET_S
        and figures["64 workers on 10000 nodes, MiB"] < MAX_FLEET_MIB
        and not figures["above PACK's traffic"]
        and figures["worst above the optimum"] <= MAX_ABOVE_OPTIMUM
    )
    if args.check and not met:
        raise SystemExit("missed a target")


if __name__ == "__main__":
    main()
