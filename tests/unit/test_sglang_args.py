"""A LaunchSpec -> SGLang's arguments, its environment and its ports."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from backends.engine import EngineStartError, Feature, LaunchSpec, NodePlace, RankLoad, Role
from backends.sglang import rank_load
from backends.sglang_args import (
    BOOTSTRAP,
    EVENTS,
    controls,
    engine_args,
    environment,
    features,
    node_of_rank,
    num_ports,
    priority_order,
    publishes_events,
    rank_ports,
)


def places(count: int) -> tuple[NodePlace, ...]:
    return tuple(NodePlace(f"10.0.0.{i}", tuple(range(21000 + 200 * i, 21100 + 200 * i))) for i in range(count))


def spec(role: Role = Role.DECODE, **fields: Any) -> LaunchSpec:
    given: dict[str, Any] = {"attn_dp": 16, "moe_ep": 16, "nodes": places(2), **fields}
    return LaunchSpec("w", role, "deepseek", "/models/r1", **given)


def test_a_wide_worker_is_told_the_same_widths_in_either_version_s_words() -> None:
    old, new = engine_args(spec(), "0.5.16"), engine_args(spec(), "0.5.23")
    assert (old["tp_size"], old["ep_size"], old["dp_size"], old["enable_dp_attention"]) == (16, 16, 16, True)
    assert (new["tp_size"], new["ep_size"], new["attn_dp_size"]) == (16, 16, 16)
    assert "attn_dp_size" not in old
    assert "dp_size" not in new
    assert "enable_dp_attention" not in new


def test_without_attention_dp_neither_version_hears_of_it() -> None:
    for version in ("0.5.16", "0.5.23"):
        args = engine_args(spec(attn_dp=1, attn_tp=8, moe_ep=1, nodes=places(1)), version)
        assert args["tp_size"] == 8
        assert not {"dp_size", "attn_dp_size", "enable_dp_attention"} & args.keys()


def test_every_node_meets_at_the_leader_and_binds_to_its_own_address() -> None:
    first, second = engine_args(spec(node_rank=0), "0.5.16"), engine_args(spec(node_rank=1), "0.5.16")
    assert first["dist_init_addr"] == second["dist_init_addr"] == "10.0.0.0:21000"
    assert (first["host"], second["host"]) == ("10.0.0.0", "10.0.0.1")
    assert (second["nnodes"], second["node_rank"]) == (2, 1)


def test_roles_get_the_transfer_and_the_leader_s_bootstrap_port() -> None:
    prefill = engine_args(spec(Role.PREFILL), "0.5.16")
    assert prefill["disaggregation_mode"] == "prefill"
    assert prefill["disaggregation_transfer_backend"] == "nixl"
    assert prefill["disaggregation_bootstrap_port"] == 21000 + BOOTSTRAP
    assert "disaggregation_mode" not in engine_args(spec(Role.AGGREGATED), "0.5.16")


@pytest.mark.parametrize("version", ["0.5.16", "0.5.23"])
def test_rank_r_publishes_on_a_port_of_its_own_node(version: str) -> None:
    """SGLang adds the rank's number to the base it is told, on the node where the rank runs."""
    made = spec(Role.PREFILL)
    for node, ranks in ((0, range(8)), (1, range(8, 16))):
        local = spec(Role.PREFILL, node_rank=node)
        config = json.loads(engine_args(local, version)["kv_events_config"])
        base, replay = (int(config[key].rpartition(":")[2]) for key in ("endpoint", "replay_endpoint"))
        for rank in ranks:
            assert node_of_rank(made, rank) == node
            ports = rank_ports(made, node)
            assert ports.endpoint(0, rank) == f"tcp://10.0.0.{node}:{base + rank}"
            assert ports.endpoint(1, rank) == f"tcp://10.0.0.{node}:{replay + rank}"
        taken = {base + rank for rank in ranks} | {replay + rank for rank in ranks}
        assert taken == set(made.nodes[node].ports[EVENTS : EVENTS + 16])


def test_a_wildcard_is_bound_only_where_sglang_knows_nothing_else() -> None:
    old = json.loads(engine_args(spec(Role.PREFILL), "0.5.16")["kv_events_config"])
    new = json.loads(engine_args(spec(Role.PREFILL), "0.5.23")["kv_events_config"])
    assert old["endpoint"].startswith("tcp://*:")
    assert new["endpoint"].startswith("tcp://10.0.0.0:")
    assert new["bind"] is True


def test_an_engine_without_a_prefix_cache_publishes_nothing() -> None:
    assert publishes_events(spec(Role.PREFILL))
    assert not publishes_events(spec(Role.DECODE)), "SGLang's decode has none unless it is asked to"
    assert publishes_events(spec(engine_args={"disaggregation_decode_enable_radix_cache": True}))
    assert not publishes_events(spec(Role.PREFILL, engine_args={"disable_radix_cache": True}))
    assert not publishes_events(spec(Role.PREFILL, kv_events=False))


def test_structured_output_costs_the_engine_its_tokenizer_and_only_then() -> None:
    plain = engine_args(spec(), "0.5.16")
    assert (plain["skip_tokenizer_init"], plain["grammar_backend"]) == (True, "none")
    asked = spec(engine_args={"grammar_backend": "xgrammar"})
    assert engine_args(asked, "0.5.16")["skip_tokenizer_init"] is False
    assert Feature.JSON_SCHEMA in features(asked)
    assert Feature.JSON_SCHEMA not in features(spec())


def test_features_and_controls_are_those_of_the_engine_as_it_is_started() -> None:
    either = {Feature.SEED, Feature.MIN_P}
    assert either & set(features(spec())) == {Feature.MIN_P}
    seeded = features(spec(engine_args={"enable_deterministic_inference": True}))
    assert either & set(seeded) == {Feature.SEED}, "min_p with it ends SGLang's schedulers"
    assert Feature.PRIORITY in features(spec(engine_args={"enable_priority_scheduling": True}))
    assert controls(spec()) == ("pause", "resume", "update_weights")
    assert "sleep" in controls(spec(engine_args={"enable_memory_saver": True}))


def test_adapters_and_spare_experts_are_passed_on() -> None:
    args = engine_args(spec(loras={"sql": "/loras/sql"}, redundant_experts=32), "0.5.23")
    assert (args["enable_lora"], args["lora_paths"], args["ep_num_redundant_experts"]) == (
        True,
        {"sql": "/loras/sql"},
        32,
    )


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("parallelism.moe_ep", {"attn_dp": 4, "moe_ep": 3}),
        ("prefill.launcher", {"role": Role.PREFILL, "launcher": "ray"}),
        ("ports", {"nodes": (NodePlace("10.0.0.1", (1, 2, 3)),)}),
        ("parallelism.pp", {"pp": 2}),
    ],
)
def test_a_layout_that_sglang_cannot_start_is_refused(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(EngineStartError, match=f"^{field}:"):
        engine_args(spec(**fields), "0.5.16")


def test_the_node_s_address_is_what_sglang_tells_others() -> None:
    must, defaults = environment(spec(node_rank=1), "eth0")
    assert must["SGLANG_HOST_IP"] == "10.0.0.1"
    assert must["SGLANG_BLOCK_NONZERO_RANK_CHILDREN"] == "0"
    assert defaults["NCCL_SOCKET_IFNAME"] == "eth0"
    assert int(defaults["SGLANG_SCHEDULER_MAX_RECV_PER_POLL"]) > 0
    assert "SGLANG_SCHEDULER_MAX_RECV_PER_POLL" not in environment(spec(launcher="ray"))[1]
    assert "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES" in environment(spec(launcher="ray"))[0]


def test_priorities_are_in_sglang_s_order_where_it_has_one() -> None:
    args = {"enable_priority_scheduling": True, "schedule_low_priority_values_first": True}
    assert [priority_order(spec(engine_args=dict(list(args.items())[:n]))) for n in range(3)] == [0, 1, -1]


def test_what_waits_is_counted_once() -> None:
    """SGLang counts all queues in num_waiting_reqs but that of prefill's requests whose KV is being fetched."""
    queues = SimpleNamespace(prefill_bootstrap_queue_reqs=2, prefill_inflight_queue_reqs=3)
    snapshot = SimpleNamespace(num_running_reqs=1, num_waiting_reqs=7, num_used_tokens=65, disaggregation=queues)
    assert rank_load(0, snapshot, block_size=64, total_blocks=10) == RankLoad(0, 1, 10, 2, 10)


@pytest.mark.parametrize(
    ("layout", "homes"),
    [
        ({"attn_tp": 2, "attn_dp": 3, "moe_ep": 6, "nodes": places(2)}, [0, 0, 1]),
        ({"attn_tp": 4, "attn_dp": 2, "moe_ep": 8, "nodes": places(4)}, [0, 2]),
    ],
)
def test_ranks_that_do_not_divide_by_nodes_publish_on_the_node_where_they_begin(
    layout: dict[str, Any], homes: list[int]
) -> None:
    made = spec(Role.PREFILL, **layout)
    assert [node_of_rank(made, rank) for rank in range(made.attn_dp)] == homes
    endpoints = [
        rank_ports(made, home).endpoint(stream, rank) for rank, home in enumerate(homes) for stream in range(3)
    ]
    assert len(set(endpoints)) == len(endpoints)
    for endpoint in endpoints:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        (node,) = (node for node in made.nodes if node.address == host)
        assert int(port) in node.ports[EVENTS : num_ports(made)]
