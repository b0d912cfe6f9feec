from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from backends import arguments, launch_plan
from backends.engine import EngineStartError, LaunchSpec, NodePlace, Role
from backends.vllm_args import (
    CORES_VARIABLE,
    OWNED,
    UNIPROC_EXECUTOR,
    Share,
    check_model,
    cores_of_rank,
    engine_args,
    environment,
    share,
)

SPEC = LaunchSpec("decode-0", Role.DECODE, "name", "/models/name")
NODES = (NodePlace("10.0.0.7", (20, 21, 22, 23)), NodePlace("10.0.0.8", (40, 41, 42, 43)))


def args_of(spec: LaunchSpec = SPEC, on_cpu: bool = True, **fields: Any) -> dict[str, Any]:
    return engine_args(replace(spec, **fields), on_cpu)


def environment_of(**fields: Any) -> dict[str, str]:
    must, defaults = environment(replace(SPEC, **fields), True, "/tmp/sockets", 5600, "lo")
    assert must.keys().isdisjoint(defaults)
    return must | defaults


def test_the_widths_become_vllms_names() -> None:
    args = args_of(attn_tp=2, attn_dp=4, moe_ep=8)
    assert args["tensor_parallel_size"] == 2
    assert args["data_parallel_size"] == 4
    assert args["enable_expert_parallel"] is True
    assert args_of()["enable_expert_parallel"] is False


def test_a_rank_of_one_device_runs_inside_its_engine_core() -> None:
    assert args_of(attn_dp=2)["distributed_executor_backend"] == UNIPROC_EXECUTOR
    assert args_of(attn_tp=2)["distributed_executor_backend"] == "mp"


def test_the_role_decides_who_gives_and_who_takes_kv() -> None:
    assert args_of(role=Role.PREFILL)["kv_transfer_config"]["kv_role"] == "kv_producer"
    assert args_of(role=Role.DECODE)["kv_transfer_config"]["kv_role"] == "kv_consumer"
    assert "kv_transfer_config" not in args_of(role=Role.AGGREGATED)


def test_the_users_arguments_are_kept_and_beat_the_cpu_defaults() -> None:
    args = args_of(engine_args={"block_size": 64, "dtype": "float32"})
    assert (args["block_size"], args["dtype"], args["enforce_eager"]) == (64, "float32", True)
    assert "enforce_eager" not in args_of(on_cpu=False)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("nodes", {"nodes": NODES, "attn_dp": 3}),
        ("nodes", {"nodes": NODES, "attn_dp": 3, "attn_tp": 2}),
        ("nodes", {"nodes": NODES, "attn_tp": 3}),
        ("parallelism.pp", {"pp": 2}),
        ("ports", {"nodes": NODES, "attn_dp": 8}),
        ("parallelism.redundant_experts", {"attn_dp": 4, "redundant_experts": 4}),
        (
            "engine_args.enable_eplb",
            {"attn_dp": 4, "moe_ep": 4, "redundant_experts": 4, "engine_args": {"enable_eplb": False}},
        ),
        ("parallelism.moe_ep", {"attn_dp": 4, "moe_ep": 2}),
        ("resources.cpus", {"attn_dp": 2, "cores": (0, 1, 2)}),
        ("transfer.backend", {"transfer_backend": "mooncake"}),
    ],
)
def test_a_layout_that_vllm_cannot_start_is_refused(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(EngineStartError, match=f"^{field}:"):
        args_of(**fields)


def test_every_node_runs_its_share_of_the_ranks_and_all_meet_at_the_leader() -> None:
    first, second = (args_of(nodes=NODES, node_rank=rank, attn_dp=6, attn_tp=2, moe_ep=12) for rank in (0, 1))
    told = ("data_parallel_size", "data_parallel_size_local", "data_parallel_start_rank", "data_parallel_hybrid_lb")
    assert [first[name] for name in told] == [6, 3, 0, True]
    assert [second[name] for name in told] == [6, 3, 3, True]
    for args in (first, second):
        assert (args["data_parallel_address"], args["data_parallel_rpc_port"]) == ("10.0.0.7", 23)
        assert "nnodes" not in args


def test_one_ranks_devices_may_be_on_several_nodes() -> None:
    args = args_of(on_cpu=False, nodes=NODES, node_rank=1, attn_tp=8, pp=2)
    assert [args[name] for name in ("nnodes", "node_rank", "master_addr", "master_port")] == [2, 1, "10.0.0.7", 21]
    assert "data_parallel_start_rank" not in args
    shares = [share(replace(SPEC, nodes=NODES, node_rank=rank, attn_tp=8)) for rank in (0, 1)]
    assert shares == [Share(0, 1), Share(0, 0)]


def test_a_node_that_only_lends_its_devices_is_started_without_a_server() -> None:
    for rank in (0, 1):
        spec = replace(SPEC, nodes=NODES, node_rank=rank, attn_tp=8)
        assert ("--headless" in launch_plan("vllm", "0.33.0", spec, on_cpu=False).command) is (rank == 1)
        served = replace(SPEC, nodes=NODES, node_rank=rank, attn_dp=2, moe_ep=2)
        assert "--headless" not in launch_plan("vllm", "0.33.0", served, on_cpu=False).command


def test_the_handshakes_of_a_nodes_ranks_are_on_its_own_ports() -> None:
    """vLLM adds the number of the rank among all of the worker's."""
    for rank in (0, 1):
        spec = replace(SPEC, nodes=NODES, node_rank=rank, attn_dp=6, moe_ep=6)
        must, _ = environment(spec, True, "/tmp/sockets", spec.place.ports[0], "lo")
        assert int(must["VLLM_NIXL_SIDE_CHANNEL_PORT"]) + 3 * rank == spec.place.ports[0]


def test_cores_are_shared_out_among_a_nodes_own_ranks() -> None:
    values = environment_of(nodes=NODES, node_rank=1, attn_dp=4, moe_ep=4, cores=(4, 5))
    assert (values[CORES_VARIABLE], values["OMP_NUM_THREADS"]) == ("4;5", "1")


def test_redundant_experts_are_balanced_with_the_users_own_settings() -> None:
    args = args_of(attn_dp=4, moe_ep=4, redundant_experts=4, engine_args={"eplb_config": {"step_interval": 100}})
    assert args["enable_eplb"] is True
    assert args["eplb_config"] == {"step_interval": 100, "num_redundant_experts": 4}
    assert "eplb_config" not in args_of(attn_dp=4, moe_ep=4)


def test_experts_that_do_not_divide_among_the_ranks_are_refused() -> None:
    spec = replace(SPEC, attn_dp=6, moe_ep=6, redundant_experts=4)
    with pytest.raises(EngineStartError, match="256 experts and 4 more do not divide"):
        check_model(spec, 256)
    check_model(replace(spec, redundant_experts=2), 256)


def test_a_model_without_experts_is_not_spread_over_nodes() -> None:
    with pytest.raises(EngineStartError, match=r"^nodes: .*replicas"):
        check_model(replace(SPEC, nodes=NODES, attn_dp=2), 0)
    check_model(replace(SPEC, nodes=NODES, attn_tp=2), 0)


@pytest.mark.parametrize("version", arguments.SUPPORTED["vllm"])
def test_the_flags_of_wide_expert_parallelism_are_known_and_passed_on(version: str) -> None:
    flags = {"enable_dbo": True, "all2all_backend": "deepep_low_latency", "dbo_decode_token_threshold": 32}
    assert arguments.mistakes("vllm", version, flags, OWNED) == ()
    assert flags.items() <= args_of(attn_dp=4, moe_ep=4, engine_args=flags).items()


def test_every_adapter_may_be_in_a_batch_unless_the_user_says_otherwise() -> None:
    loras = {"poet": "/loras/poet", "critic": "/loras/critic"}
    args = args_of(loras=loras)
    assert (args["enable_lora"], args["max_loras"]) == (True, 2)
    assert args_of(loras=loras, engine_args={"max_loras": 1})["max_loras"] == 1
    assert "enable_lora" not in args_of()


def test_only_who_answers_has_a_tokenizer_for_the_structure_of_answers() -> None:
    assert engine_args(SPEC, True)["skip_tokenizer_init"] is False
    assert engine_args(SPEC, True, tokenizer=False)["skip_tokenizer_init"] is True
    assert args_of(role=Role.PREFILL)["skip_tokenizer_init"] is True


def test_events_are_published_only_where_they_are_asked_for() -> None:
    assert args_of()["kv_events_config"]["publisher"] == "zmq"
    assert "kv_events_config" not in args_of(kv_events=False)


def test_every_socket_is_bound_to_the_nodes_address() -> None:
    values = environment_of(nodes=(NodePlace("10.0.0.7"),))
    assert values["VLLM_HOST_IP"] == values["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.7"
    assert values["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "5600"
    assert "VLLM_NIXL_SIDE_CHANNEL_PORT" not in environment_of(role=Role.AGGREGATED)


def test_what_tells_one_engine_from_another_is_not_left_to_the_processs_environment() -> None:
    must, defaults = environment(replace(SPEC, cores=(3,)), True, "/tmp/sockets", 5600, "lo")
    assert {"VLLM_HOST_IP", "VLLM_RPC_BASE_PATH", "VLLM_NIXL_SIDE_CHANNEL_PORT", "OMP_NUM_THREADS"} <= must.keys()
    assert {"UCX_TLS", "UCX_NET_DEVICES", "HF_HUB_OFFLINE"} <= defaults.keys()


def test_cores_are_shared_out_in_rank_order() -> None:
    assert [cores_of_rank((4, 5, 6, 7), 2, rank) for rank in (0, 1)] == [(4, 5), (6, 7)]
    values = environment_of(attn_dp=2, cores=(4, 5, 6, 7))
    assert (values["OMP_NUM_THREADS"], values["VLLM_CPU_OMP_THREADS_BIND"]) == ("2", "4,5|6,7")
    assert values[CORES_VARIABLE] == "4,5;6,7"
    assert environment_of(attn_tp=2, cores=(4, 5))[CORES_VARIABLE] == "", "vLLM's own executor binds its processes"


def test_without_cores_nothing_is_pinned_and_a_rank_has_one_thread() -> None:
    values = environment_of()
    assert (values["OMP_NUM_THREADS"], values["VLLM_CPU_OMP_THREADS_BIND"]) == ("1", "nobind")
    assert values[CORES_VARIABLE] == ""
