"""TensorRT-LLM's arguments and environment for a launch spec, by version."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from backends import arguments, launch_plan
from backends.engine import EngineStartError, Feature, LaunchSpec, NodePlace, Role
from backends.trtllm_args import (
    EVENT_BUFFER,
    OWNED,
    bundle_indices,
    caches_prefixes,
    engine_args,
    environment,
    features,
)

VERSIONS = arguments.SUPPORTED["trtllm"]


def spec(role: Role = Role.DECODE, **fields: Any) -> LaunchSpec:
    given: dict[str, Any] = {"attn_dp": 16, "moe_ep": 16, "nodes": (NodePlace(), NodePlace("10.0.0.2"))}
    return LaunchSpec("d-0", role, "r1", "/models/r1", launcher="ray", **given | fields)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_wide_decode_worker(version: str) -> None:
    args = engine_args(spec(engine_args={"max_batch_size": 128, "kv_cache_config": {"dtype": "fp8"}}), version)
    assert args == {
        "model": "/models/r1",
        "skip_tokenizer_init": True,
        "tensor_parallel_size": 16,
        "moe_expert_parallel_size": 16,
        "moe_tensor_parallel_size": 1,
        "enable_attention_dp": True,
        "pipeline_parallel_size": 1,
        "gpus_per_node": 8,
        "orchestrator_type": "ray",
        "enable_iter_perf_stats": True,
        "max_batch_size": 128,
        "kv_cache_config": {"dtype": "fp8", "enable_block_reuse": False},
        "cache_transceiver_config": {"backend": "NIXL"},
    }


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("role", Role)
def test_every_argument_is_in_the_table_of_its_version(version: str, role: Role) -> None:
    balanced = {"moe_config": {"load_balancer": {"num_slots": 288, "layer_updates_per_iter": 2}}}
    args = engine_args(spec(role, redundant_experts=32, engine_args=balanced, loras={"a": "/a"}), version)
    assert arguments.mistakes("trtllm", version, args, {}) == ()


@pytest.mark.parametrize("version", VERSIONS)
def test_what_we_set_is_not_the_users_to_set(version: str) -> None:
    ours = engine_args(spec(Role.AGGREGATED), version).keys() - {"kv_cache_config"}
    assert ours <= OWNED.keys()
    table = arguments.table("trtllm", version)
    known = table.fields.keys() | arguments.table("trtllm", "1.3").fields.keys()
    assert {name.partition(".")[0] for name in OWNED} <= known


def test_a_dense_model_has_no_experts_to_split() -> None:
    args = engine_args(spec(attn_tp=8, attn_dp=1, moe_ep=1, nodes=(NodePlace(),)), "1.3")
    assert not {"moe_expert_parallel_size", "moe_tensor_parallel_size"} & args.keys()
    assert (args["tensor_parallel_size"], args["enable_attention_dp"]) == (8, False)


def test_prefill_publishes_events_and_keeps_the_users_own_settings_beside_ours() -> None:
    args = engine_args(spec(Role.PREFILL), "1.3")
    assert args["kv_cache_config"] == {"enable_block_reuse": True, "event_buffer_max_size": EVENT_BUFFER}
    assert args["disable_overlap_scheduler"] is True
    user = {
        "disable_overlap_scheduler": False,
        "kv_cache_config": {"event_buffer_max_size": 9},
        "cache_transceiver_config": {"max_tokens_in_buffer": 8192},
    }
    args = engine_args(spec(Role.PREFILL, engine_args=user), "1.3")
    assert args["disable_overlap_scheduler"] is False
    assert args["kv_cache_config"]["event_buffer_max_size"] == 9
    assert args["cache_transceiver_config"] == {"max_tokens_in_buffer": 8192, "backend": "NIXL"}
    assert "event_buffer_max_size" not in engine_args(spec(Role.PREFILL, kv_events=False), "1.3")["kv_cache_config"]
    assert user["cache_transceiver_config"] == {"max_tokens_in_buffer": 8192}, "the user's stay as they are"


@pytest.mark.parametrize(
    ("role", "given", "cached"),
    [(Role.PREFILL, None, True), (Role.AGGREGATED, None, True), (Role.DECODE, None, False), (Role.DECODE, True, True)],
)
def test_decode_caches_no_prefixes_unless_it_is_told_to(role: Role, given: bool | None, cached: bool) -> None:
    args = {} if given is None else {"kv_cache_config": {"enable_block_reuse": given}}
    assert caches_prefixes(spec(role, engine_args=args)) is cached


def test_balanced_experts_beyond_one_node_have_a_backend_of_their_own_in_1_2_only() -> None:
    balanced = {"moe_config": {"load_balancer": {"num_slots": 288}}}
    wide = spec(redundant_experts=32, engine_args=balanced)
    assert engine_args(wide, "1.2")["moe_config"] == {"load_balancer": {"num_slots": 288}, "backend": "WIDEEP"}
    assert engine_args(wide, "1.3")["moe_config"] == {"load_balancer": {"num_slots": 288}}
    narrow = spec(attn_dp=8, moe_ep=8, nodes=(NodePlace(),), engine_args=balanced)
    assert "backend" not in engine_args(narrow, "1.2")["moe_config"]
    chosen = {"moe_config": {"load_balancer": {"num_slots": 288}, "backend": "CUTLASS"}}
    assert engine_args(spec(engine_args=chosen), "1.2")["moe_config"]["backend"] == "CUTLASS"
    with pytest.raises(EngineStartError, match=r"moe_config\.backend: WIDEEP is gone since 1\.3; use CUTLASS"):
        engine_args(spec(engine_args={"moe_config": {"backend": "WIDEEP"}}), "1.3")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"launcher": "processes"}, r"launcher: .* use ray"),
        ({"attn_tp": 2, "attn_dp": 8}, r"parallelism\.attn_tp: .* use attn_tp: 1"),
        ({"moe_ep": 8}, r"parallelism\.moe_ep: moe_ep\*moe_tp=8 must be attn_tp\*attn_dp=16"),
        ({"attn_dp": 15, "moe_ep": 15}, r"nodes: 15 ranks do not divide by 2 nodes"),
        ({"redundant_experts": 16}, r"parallelism\.redundant_experts: .*load_balancer\.num_slots"),
        (
            {"engine_args": {"moe_config": {"load_balancer": {"num_slots": 260}}}},
            r"num_slots: 260 is no multiple of moe_ep=16",
        ),
    ],
)
def test_what_it_cannot_start_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineStartError, match=message):
        engine_args(dataclasses.replace(spec(), **fields), "1.3")


def test_features_follow_from_arguments_and_version() -> None:
    common = {Feature.MIN_TOKENS, Feature.CACHE_SALT}
    assert set(features(spec(), "1.2")) == common
    assert set(features(spec(), "1.3")) == common | {Feature.MIN_P}
    seeded = spec(engine_args={"sampler_type": "TRTLLMSampler"})
    assert Feature.SEED in features(seeded, "1.2")
    by_priority = spec(engine_args={"scheduler_config": {"waiting_queue_policy": "priority"}})
    assert Feature.PRIORITY in features(by_priority, "1.3")
    assert Feature.PRIORITY not in features(by_priority, "1.2")
    guided = spec(engine_args={"guided_decoding_backend": "xgrammar"})
    assert {Feature.JSON_OBJECT, Feature.JSON_SCHEMA, Feature.REGEX, Feature.GRAMMAR} <= set(features(guided, "1.2"))
    assert engine_args(guided, "1.2")["skip_tokenizer_init"] is False


def test_a_rank_takes_a_gpu_of_its_nodes_bundle() -> None:
    assert bundle_indices(spec(attn_dp=4, moe_ep=4, bundles=(1, 0))) == [1, 1, 0, 0]


def test_mpi_is_off_and_workers_see_every_gpu_of_their_node() -> None:
    must, defaults = environment(spec())
    assert (must["TLLM_DISABLE_MPI"], must["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]) == ("1", "1")
    assert defaults == {"HF_HUB_OFFLINE": "1", "TRTLLM_NO_USAGE_STATS": "1"}


@pytest.mark.parametrize("version", VERSIONS)
def test_its_plan_is_a_command_and_a_settings_file(version: str) -> None:
    plan = launch_plan("trtllm", version, spec(), on_cpu=False, env={"NCCL_DEBUG": "INFO"})
    assert plan.command[:2] == ("trtllm-serve", "/models/r1")
    assert plan.settings is not None
    assert "enable_attention_dp: true" in plan.settings
    assert plan.environment["NCCL_DEBUG"] == "INFO"
