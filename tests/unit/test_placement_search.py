"""Where workers go: few leaves, prefill near decode, replicas apart; and a place whenever there is one."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.cluster_file import from_document, from_shorthand
from placement.parallelism import Parallelism
from placement.plan import PlacementError, WorkerGroup, WorkerPlacement, place, plan
from placement.search import compositions
from placement.topology import Node, Resources, Topology
from placement.traffic import RequestShape, alltoall_share, apart, leaves_of, traffic


def group(name: str, replicas: int, nodes: int, gpus: int = 8, one_domain: bool = False) -> WorkerGroup:
    ranks = nodes * gpus
    widths = Parallelism(attn_dp=ranks, moe_ep=ranks)
    return WorkerGroup(name, replicas, nodes, widths, accelerator="H100", one_domain=one_domain)


def leaves(topology: Topology, worker: WorkerPlacement) -> dict[str, int]:
    by_id = {node.node_id: node.leaf for node in topology.nodes}
    return dict(Counter(by_id[bundle.node_id] for bundle in worker.bundles))


def test_a_worker_stays_in_one_leaf_and_takes_the_one_it_fills_best() -> None:
    topology = from_shorthand("8x8xH100/8+5x8xH100/5+4x8xH100/4")
    assert leaves(topology, plan(topology, [group("decode", 1, 4)]).workers[0]) == {"node2-leaf-0": 4}


def test_a_worker_larger_than_any_leaf_takes_as_few_as_it_can() -> None:
    topology = from_shorthand("12x8xH100/4")
    assert sorted(leaves(topology, plan(topology, [group("decode", 1, 9)]).workers[0]).values()) == [1, 4, 4]


def test_prefill_is_put_beside_the_decode_worker_it_feeds() -> None:
    topology = from_shorthand("16x8xH100/8")
    made = plan(topology, [group("prefill", 1, 2), group("decode", 1, 6)])
    assert leaves(topology, made.of("prefill-0")).keys() == leaves(topology, made.of("decode-0")).keys()


def test_replicas_of_one_role_are_in_different_leaves() -> None:
    topology = from_shorthand("16x8xH100/8")
    made = plan(topology, [group("aggregated", 2, 2)])
    assert len({leaf for worker in made.workers for leaf in leaves(topology, worker)}) == 2


def test_a_pair_that_packs_badly_at_first_changes_places() -> None:
    """Best fit puts 6 into the leaf of 7 and then has to part a 3; 6 and 4 in the leaf of 10 leave room for all."""
    topology = from_shorthand("10x8xH100/10+7x8xH100/7")
    made = plan(topology, [group("aggregated", 1, 6), group("decode", 2, 4), group("prefill", 1, 3)])
    assert {len(leaves(topology, worker)) for worker in made.workers} == {1}


def test_one_nvlink_domain_where_it_is_asked_for() -> None:
    topology = from_document(
        {"nodes": [{"name": f"n{i}", "gpus": 4, "type": "GB200", "domain": f"d{i % 3}"} for i in range(12)]}
    )
    widths = Parallelism(attn_dp=16, moe_ep=16)
    wanted = WorkerGroup("decode", 2, 4, widths, accelerator="GB200", one_domain=True)
    domains = {node.node_id: node.domain for node in topology.nodes}
    for worker in plan(topology, [wanted]).workers:
        assert len({domains[bundle.node_id] for bundle in worker.bundles}) == 1
    too_wide = WorkerGroup("decode", 1, 5, Parallelism(attn_dp=20, moe_ep=20), accelerator="GB200", one_domain=True)
    with pytest.raises(PlacementError, match="in one NVLink domain free; only 4 fit"):
        plan(topology, [too_wide])


def test_drained_nodes_take_nothing_and_spares_stay_free_and_are_named() -> None:
    nodes = [{"name": f"n{i}", "gpus": 8, "type": "H100", "drained": i == 0} for i in range(4)]
    made = plan(from_document({"nodes": nodes}), [group("decode", 1, 2)], spares=1)
    used = {bundle.node_id for bundle in made.workers[0].bundles}
    assert "n0" not in used | set(made.spares)
    assert len(made.spares) == 1
    assert not used & set(made.spares)
    with pytest.raises(PlacementError, match="spares"):
        plan(from_document({"nodes": nodes}), [group("decode", 1, 2)], spares=2)


def test_a_misfit_says_the_smallest_change() -> None:
    nodes = [{"name": f"n{i}", "gpus": 8, "type": "H100", "used_gpus": i} for i in range(3)]
    with pytest.raises(PlacementError, match="Free 1 GPUs on n1, or add 1 node, or lower `decode`"):
        plan(from_document({"nodes": nodes}), [group("decode", 1, 2)])


def test_a_worker_that_comes_back_goes_beside_its_peers() -> None:
    topology = from_shorthand("8x8xH100/4")
    there = plan(topology, [group("decode", 1, 2)]).of("decode-0")
    taken = {bundle.node_id for bundle in there.bundles}
    left = Topology(
        tuple(node for node in topology.nodes if node.node_id not in taken)
        + tuple(
            Node(n.node_id, n.address, Resources(n.free.cpus, 0), n.total, "H100", leaf=n.leaf)
            for n in topology.nodes
            if n.node_id in taken
        )
    )
    back = place(left, group("prefill", 1, 2), "prefill-0", {"decode-0": there})
    assert leaves(topology, back).keys() == leaves(topology, there).keys()


def test_a_cpu_worker_fits_on_hosts_whose_cpus_nobody_counts() -> None:
    cpu = WorkerGroup("aggregated", 1, 1, Parallelism())
    assert plan(from_shorthand("1x8xH100"), [cpu]).workers[0].bundles[0].cores == ()


def test_shares_of_traffic() -> None:
    assert alltoall_share({"a": 4}) == 0.0
    assert alltoall_share({"a": 2, "b": 2}) == 0.5
    assert apart({"a": 1}, {"a": 1}) == 0.0
    assert apart({"a": 1, "b": 1}, {"a": 2}) == 0.5
    request = RequestShape(1000, 100, 10, 1)
    cost = traffic(request, {"prefill": [{"a": 1, "b": 1}], "decode": [{"a": 2}, {"b": 2}]})
    assert (cost.alltoall_bytes, cost.handoff_bytes) == (10 * 1000 * 0.5, 500.0)
    assert leaves_of(["a", "b", "a"]) == {"a": 2, "b": 1}


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9), min_size=1), st.integers(1, 30))
def test_every_way_takes_what_is_asked_and_no_more_than_there_is(free: dict[str, int], count: int) -> None:
    ways = list(compositions(free, count))
    assert bool(ways) == (sum(free.values()) >= count)
    for way in ways:
        assert sum(way.values()) == count
        assert all(0 < number <= free[leaf] for leaf, number in way.items())


SIZES = (1, 2, 4, 8)
clusters = st.lists(st.tuples(st.sampled_from(SIZES), st.sampled_from("abc")), min_size=1, max_size=10)
fleets = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from(SIZES)), min_size=1, max_size=4)


def cluster(described: list[tuple[int, str]]) -> Topology:
    """Nodes of 8 GPUs of which so many are free."""
    return Topology(
        tuple(
            Node(f"n{i}", f"n{i:03}", Resources(64.0, gpus), Resources(64.0, 8), "H100", leaf=leaf)
            for i, (gpus, leaf) in enumerate(described)
        )
    )


def wanted(fleet: list[tuple[int, int, int]]) -> list[WorkerGroup]:
    names = ("prefill", "decode", "aggregated", "other")
    return [group(names[i], replicas, nodes, gpus) for i, (replicas, nodes, gpus) in enumerate(fleet)]


@settings(deadline=None)
@given(clusters, fleets)
def test_no_gpu_is_used_twice_every_rank_is_placed_once_and_the_plan_is_the_same_again(
    described: list[tuple[int, str]], fleet: list[tuple[int, int, int]]
) -> None:
    topology, groups = cluster(described), wanted(fleet)
    try:
        made = plan(topology, groups)
    except PlacementError:
        return
    used: Counter[str] = Counter()
    for worker in made.workers:
        ranks = [rank for bundle in worker.bundles for rank in bundle.ranks]
        assert ranks == list(range(len(ranks)))
        assert len({bundle.node_id for bundle in worker.bundles}) == len(worker.bundles)
        used.update({bundle.node_id: bundle.resources.gpus for bundle in worker.bundles})
    assert [w.worker for w in made.workers] == [worker for g in groups for worker in g.workers]
    assert all(used[node.node_id] <= node.free.gpus for node in topology.nodes)
    assert plan(Topology(tuple(reversed(topology.nodes))), groups) == made


@settings(deadline=None)
@given(clusters, fleets, st.tuples(st.sampled_from(SIZES), st.sampled_from("abc")))
def test_one_more_node_never_takes_a_place_away(
    described: list[tuple[int, str]], fleet: list[tuple[int, int, int]], more: tuple[int, str]
) -> None:
    groups = wanted(fleet)
    try:
        plan(cluster(described), groups)
    except PlacementError:
        return
    plan(cluster([*described, more]), groups)
