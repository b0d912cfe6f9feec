from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from backends.engine import EngineStartError, LaunchSpec, NodePlace, Role
from backends.vllm_args import (
    CORES_VARIABLE,
    UNIPROC_EXECUTOR,
    cores_of_rank,
    engine_args,
    environment,
)

SPEC = LaunchSpec("decode-0", Role.DECODE, "name", "/models/name")


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
    assert "distributed_executor_backend" not in args_of(attn_tp=2)


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
        ("nodes", {"nodes": (NodePlace(), NodePlace())}),
        ("parallelism.moe_ep", {"attn_dp": 4, "moe_ep": 2}),
        ("resources.cpus", {"attn_dp": 2, "cores": (0, 1, 2)}),
        ("transfer.backend", {"transfer_backend": "mooncake"}),
    ],
)
def test_a_layout_that_vllm_cannot_start_is_refused(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(EngineStartError, match=f"^{field}:"):
        args_of(**fields)


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
