"""DeploymentConfig -> workers."""

from __future__ import annotations

from typing import Any

import pytest

from backends import arguments, sglang_args
from backends.engine import NodePlace, Role
from dynamo_ray.cluster.workload import config_hash, launch_specs, num_ports, works
from dynamo_ray.config import DeploymentConfig, Launcher
from placement.plan import plan
from placement.topology import Node, Resources, Topology


def config(**changes: Any) -> DeploymentConfig:
    given: dict[str, Any] = {
        "model": {"name": "m", "path": "/m"},
        "backend": "simulated",
        "prefill": {"replicas": 2},
        "decode": {"nodes": 2, "parallelism": {"attn_dp": 4, "moe_ep": 4}, "resources": {"memory_gib": 1}},
    }
    return DeploymentConfig.model_validate({**given, **changes})


def test_wide_workers_come_first() -> None:
    assert list(works(config())) == ["decode-0", "prefill-0", "prefill-1"]


def test_a_hash_changes_with_what_shapes_the_worker_and_only_with_that() -> None:
    before = config_hash(config(), Role.DECODE)
    assert config_hash(config(prefill={"replicas": 5}), Role.DECODE) == before
    assert config_hash(config(router={"policy": "round_robin"}), Role.DECODE) == before
    assert config_hash(config(model={"name": "m", "path": "/other"}), Role.DECODE) != before
    assert config_hash(config(decode={"engine_args": {"block_size": 32}}), Role.DECODE) != before
    more = {"nodes": 2, "parallelism": {"attn_dp": 4, "moe_ep": 4}, "resources": {"memory_gib": 1}, "replicas": 3}
    assert config_hash(config(decode=more), Role.DECODE) == before


def test_every_node_is_told_its_rank_its_ports_and_the_leader_s() -> None:
    checked = config()
    work = works(checked)["decode-0"]
    free = Resources(8.0, 0, 2**34)
    topology = Topology(tuple(Node(str(i), f"10.0.0.{i}", free, free) for i in range(2)))
    placement = plan(topology, [work.group]).of("decode-0")
    prepared = [NodePlace(f"10.0.0.{i}", (100 * i + 1, 100 * i + 2)) for i in range(2)]
    first, second = launch_specs(checked, work, placement, prepared, bundles=(1, 0))
    assert (first.node_rank, second.node_rank, second.num_nodes) == (0, 1, 2)
    assert second.leader == NodePlace("10.0.0.0", (1, 2))
    assert second.place == NodePlace("10.0.0.1", (101, 102))
    assert (second.attn_dp, second.moe_ep, second.moe_tp) == (4, 4, 1)
    assert placement.bundles[0].resources == Resources(1.0, 0, 2**30)
    assert first.bundles == second.bundles == (1, 0)


def test_a_configuration_that_names_no_version_is_for_the_newest_against_which_it_was_checked() -> None:
    def version(**changes: Any) -> str | None:
        checked = config(backend="vllm", prefill=None, decode=None, aggregated={}, **changes)
        work = works(checked)["aggregated-0"]
        node = Node("n", "10.0.0.1", Resources(8.0, 0, 2**34), Resources(8.0, 0, 2**34))
        placement = plan(Topology((node,)), [work.group]).of("aggregated-0")
        (spec,) = launch_specs(checked, work, placement, [NodePlace()])
        return spec.version

    assert version() == arguments.SUPPORTED["vllm"][-1]
    assert version(engine_version="0.32.0") == "0.32.0"


@pytest.mark.parametrize("launcher", ["processes", "ray"])
@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (8, 1), (16, 2), (72, 9)])
def test_a_node_has_ports_for_the_most_an_engine_asks_for(launcher: Launcher, ranks: int, nodes: int) -> None:
    role = {"nodes": nodes, "parallelism": {"attn_dp": ranks, "moe_ep": ranks}, "launcher": launcher}
    checked = config(backend="sglang", prefill=None, decode=None, aggregated=role)
    work = works(checked)["aggregated-0"]
    one = Resources(8.0, 0, 2**34)
    placement = plan(Topology(tuple(Node(f"n{i}", f"10.0.0.{i}", one, one) for i in range(nodes))), [work.group])
    places = [NodePlace()] * nodes
    for spec in launch_specs(checked, work, placement.of("aggregated-0"), places):
        assert sglang_args.num_ports(spec) <= num_ports(work.config, launcher)
