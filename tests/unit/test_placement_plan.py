"""Which node every rank runs on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.parallelism import SGLANG, TENSORRT_LLM, VLLM, Parallelism, RankLayout
from placement.plan import PlacementError, WorkerGroup, plan
from placement.topology import Node, Resources, Topology


def node(name: str, cpus: float = 64.0, gpus: int = 8, memory_gib: int = 512, accelerator: str = "H100") -> Node:
    amount = Resources(cpus, gpus, memory_gib * 2**30)
    return Node(name, f"10.0.0.{name}", amount, amount, accelerator)


def gpu_group(name: str, replicas: int, nodes: int, ranks: int, accelerator: str = "H100") -> WorkerGroup:
    return WorkerGroup(name, replicas, nodes, Parallelism(attn_dp=ranks, moe_ep=ranks), accelerator=accelerator)


def test_13_nodes_take_deepseek_r1_as_4_plus_9() -> None:
    topology = Topology(tuple(node(f"{i:02}") for i in range(13)))
    made = plan(topology, [gpu_group("prefill", 1, 4, 32), gpu_group("decode", 1, 9, 72)])
    used = [bundle.node_id for worker in made.workers for bundle in worker.bundles]
    assert len(used) == len(set(used)) == 13
    decode = made.of("decode-0")
    assert [bundle.node_rank for bundle in decode.bundles] == list(range(9))
    assert [rank for bundle in decode.bundles for rank in bundle.ranks] == list(range(72))
    assert decode.bundles[0].resources == Resources(1.0, 8, 0)
    assert decode.bundles[0].cores == ()


def test_ranks_stand_on_the_nodes_where_engines_start_them() -> None:
    topology = Topology(tuple(node(f"{i:02}") for i in range(9)))
    bundles = plan(topology, [gpu_group("decode", 1, 9, 72)]).of("decode-0").bundles
    for order in (SGLANG, VLLM, TENSORRT_LLM):
        engine = RankLayout(Parallelism(attn_dp=72, moe_ep=72), order, nodes=9)
        assert [bundle.ranks for bundle in bundles] == [tuple(engine.ranks_on(n)) for n in range(9)]


def test_a_misfit_names_the_group_what_it_needs_and_the_largest_slot() -> None:
    topology = Topology((node("1"), node("2", gpus=4)))
    with pytest.raises(PlacementError) as caught:
        plan(topology, [gpu_group("decode", 1, 2, 16)])
    message = str(caught.value)
    for part in ("decode-0", "2 nodes", "8 GPUs", "H100", "only 1 fit", "8 GPUs, 64 CPUs", "10.0.0.1"):
        assert part in message


def test_an_accelerator_that_no_node_has_is_said() -> None:
    with pytest.raises(PlacementError, match="there is no node with B200"):
        plan(Topology((node("1"),)), [gpu_group("decode", 1, 1, 8, accelerator="B200")])


def test_wide_workers_are_placed_before_narrow_ones_whatever_their_order() -> None:
    topology = Topology((node("1"), node("2", gpus=2)))
    made = plan(topology, [gpu_group("prefill", 1, 1, 2), gpu_group("decode", 1, 1, 8)])
    assert made.of("decode-0").bundles[0].node_id == "1"
    assert made.of("prefill-0").bundles[0].node_id == "2"
    assert [worker.worker for worker in made.workers] == ["prefill-0", "decode-0"]


def cpu_group(name: str, replicas: int, ranks: int = 1, cpus: float = 0.5) -> WorkerGroup:
    return WorkerGroup(name, replicas, 1, Parallelism(attn_dp=ranks, moe_ep=ranks), cpus=cpus)


def test_two_cpu_engines_on_two_cores_compute_on_different_ones() -> None:
    here = node("1", cpus=2.0, gpus=0, accelerator="cpu")
    made = plan(Topology((here,)), [cpu_group("prefill", 1), cpu_group("decode", 1)])
    assert [worker.bundles[0].cores for worker in made.workers] == [(0,), (1,)]


def test_ranks_of_one_engine_get_different_cores_even_when_another_has_them_too() -> None:
    here = node("1", cpus=2.0, gpus=0, accelerator="cpu")
    made = plan(Topology((here,)), [cpu_group("prefill", 1, ranks=2), cpu_group("decode", 1, ranks=2)])
    assert all(sorted(worker.bundles[0].cores) == [0, 1] for worker in made.workers)


def test_cores_in_use_are_taken_last() -> None:
    amount = Resources(2.0)
    here = Node("1", "10.0.0.1", amount, amount, busy_cores=(0,))
    assert plan(Topology((here,)), [cpu_group("decode", 1)]).workers[0].bundles[0].cores == (1,)


def test_whole_cpus_give_a_rank_several_cores() -> None:
    here = node("1", cpus=8.0, gpus=0, accelerator="cpu")
    made = plan(Topology((here,)), [cpu_group("decode", 1, ranks=2, cpus=4.0)])
    assert len(set(made.workers[0].bundles[0].cores)) == 4


def test_cpu_workers_spread_over_nodes() -> None:
    topology = Topology(tuple(node(str(i), cpus=2.0, gpus=0, accelerator="cpu") for i in range(2)))
    made = plan(topology, [cpu_group("aggregated", 2)])
    assert {worker.bundles[0].node_id for worker in made.workers} == {"0", "1"}


def test_ranks_that_do_not_divide_among_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 ranks do not divide among 2 nodes"):
        WorkerGroup("decode", 1, 2, Parallelism(attn_dp=3, moe_ep=3))


groups = st.lists(
    st.builds(
        lambda replicas, nodes, gpus: (replicas, nodes, gpus),
        st.integers(1, 3),
        st.integers(1, 3),
        st.sampled_from([1, 2, 4, 8]),
    ),
    max_size=4,
).map(lambda shapes: [gpu_group(f"g{i}", r, n, n * g) for i, (r, n, g) in enumerate(shapes)])


@given(st.lists(st.sampled_from([1, 2, 4, 8]), max_size=8), groups)
def test_no_plan_takes_more_than_a_node_has_and_equal_inputs_plan_equally(
    sizes: list[int], wanted: list[WorkerGroup]
) -> None:
    topology = Topology(tuple(node(f"{i}", gpus=size) for i, size in enumerate(sizes)))
    try:
        made = plan(topology, wanted)
    except PlacementError:
        return
    assert made == plan(Topology(topology.nodes[::-1]), wanted)
    for one in topology.nodes:
        taken = [b.resources.gpus for w in made.workers for b in w.bundles if b.node_id == one.node_id]
        assert sum(taken) <= one.free.gpus
    for worker in made.workers:
        assert len({bundle.node_id for bundle in worker.bundles}) == len(worker.bundles)


def test_ray_nodes_become_a_topology_without_the_dead() -> None:
    raw = {
        "NodeID": "a",
        "Alive": True,
        "NodeManagerAddress": "10.0.0.9",
        "Resources": {"CPU": 2.0, "GPU": 8.0, "memory": 1e9, "accelerator_type:H100": 1.0, "node:10.0.0.9": 1.0},
        "Labels": {"ray.io/node-id": "a", "ray.io/gpu-domain": "rack1"},
    }
    topology = Topology.from_ray([raw, {**raw, "NodeID": "b", "Alive": False}], free={"a": Resources(1.5, 4, 10)})
    assert [n.node_id for n in topology.nodes] == ["a"]
    assert topology.nodes[0].accelerator == "H100"
    assert topology.nodes[0].free == Resources(1.5, 4, 10)
    assert topology.nodes[0].labels["ray.io/gpu-domain"] == "rack1"
