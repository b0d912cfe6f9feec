"""Clusters that are not there yet: from a shorthand and from a file, every mistake at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from placement.cluster_file import from_document, from_shorthand, read_topology
from placement.topology import DOMAIN_LABEL, Resources, Topology, TopologyError


def problems(document: Any) -> list[str]:
    with pytest.raises(TopologyError) as caught:
        from_document(document)
    return list(caught.value.problems)


def test_a_shorthand_names_its_nodes_by_their_place() -> None:
    topology = from_shorthand("13x8xH100")
    assert [node.node_id for node in topology.nodes] == [f"node-{i:02}" for i in range(13)]
    assert {(node.accelerator, node.free.gpus, node.domain, node.leaf) for node in topology.nodes} == {
        ("H100", 8, "", "")
    }


def test_an_nvl72_rack_is_one_domain_of_18_trays() -> None:
    topology = from_shorthand("36x4xGB200@nvl72")
    assert [node.domain for node in topology.nodes] == ["node-nvl-0"] * 18 + ["node-nvl-1"] * 18


def test_leaves_and_several_kinds() -> None:
    topology = from_shorthand("6x8xH100/4+2x8xH200")
    assert [(node.accelerator, node.leaf) for node in topology.nodes] == [
        *[("H100", "node0-leaf-0")] * 4,
        *[("H100", "node0-leaf-1")] * 2,
        *[("H200", "")] * 2,
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("13x8", "13x8xH100"),
        ("0x8xH100", "topology[0].nodes: must be at least 1"),
        ("2x8xH1000", "did you mean H100"),
        ("4x8xH100@nvl20", "20 GPUs are no whole number of nodes of 8"),
        ("nowhere.yaml", "there is no such file"),
    ],
)
def test_a_wrong_shorthand_is_explained(text: str, said: str) -> None:
    with pytest.raises(TopologyError) as caught:
        read_topology(text)
    assert said in str(caught.value)


def test_a_file_describes_nodes_one_by_one_or_many_alike(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "nodes:\n"
        "  - {count: 2, name: a, gpus: 8, type: H100, leaf: l0}\n"
        "  - {name: b, gpus: 8, type: H200, leaf: l1, domain: d,\n"
        "     used_gpus: 3, drained: true, cpus: 64, memory_gib: 2}\n"
    )
    nodes = {node.node_id: node for node in read_topology(str(file)).nodes}
    assert set(nodes) == {"a-0", "a-1", "b"}
    assert (nodes["b"].free, nodes["b"].domain, nodes["b"].drained) == (Resources(64.0, 5, 2 * 2**30), "d", True)
    assert str(nodes["a-0"].free) == "8 GPUs"


def test_every_mistake_of_a_file_comes_at_once_with_its_path() -> None:
    found = problems(
        {
            "nodes": [
                {"name": "a", "gpus": 8, "type": "H100", "leaf": "l0", "gpu": 1},
                {"name": "b", "gpus": -1, "type": "H100"},
                {"name": "c", "gpus": 8, "type": "H10", "used_gpus": 9},
                {"gpus": 8},
                "d",
            ],
            "node": [],
        }
    )
    for said in (
        "node: unknown key",
        "nodes[0].gpu: unknown key; did you mean `gpus`?",
        "nodes[1].gpus: must be a whole number of at least 0; it is -1",
        "nodes[2].used_gpus: 9 of 8 GPUs",
        "nodes[2].type: unknown GPU 'H10'",
        "nodes[3].type: missing",
        "nodes[4]: is not a mapping",
    ):
        assert any(problem.startswith(said) for problem in found), (said, found)


def test_nodes_given_twice_and_leaves_of_some_nodes_only_are_named() -> None:
    a = {"name": "a", "gpus": 8, "type": "H100", "leaf": "l0"}
    assert problems({"nodes": [a, a]}) == ["nodes: the name 'a' is given 2 times"]
    assert problems({"nodes": [a, {"name": "b", "gpus": 8, "type": "H100"}]}) == [
        "nodes[1].leaf: missing, and other nodes have one"
    ]


def raw(name: str, labels: dict[str, str], gpus: int = 8) -> dict[str, Any]:
    amounts = {"CPU": 8.0, "GPU": float(gpus)}
    return {"NodeID": name, "NodeManagerAddress": name, "Alive": True, "Resources": amounts, "Labels": labels}


def test_labels_of_a_live_cluster_become_domains_and_leaves() -> None:
    nodes = [raw("a", {DOMAIN_LABEL: "d0", "rack": "r0"}), raw("head", {}, gpus=0)]
    topology = Topology.from_ray(nodes, leaf_label="rack")
    assert [(node.domain, node.leaf) for node in topology.nodes] == [("d0", "r0"), ("", "")]
    with pytest.raises(TopologyError, match=r"nodes\[b\]\.labels: has no 'rack'"):
        Topology.from_ray([*nodes, raw("b", {})], leaf_label="rack")
