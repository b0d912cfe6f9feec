"""A deployment on a cluster that is not there: the layout, whether it fits, what it costs; or everything in its way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from backends.engine import Role
from dynamo_ray.cluster.assumptions import Assumptions, RoleMemory, role_memory
from dynamo_ray.cluster.layout import as_json, plan
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.errors import ConfigError
from placement.model_shape import KvDtype

WIDEEP = Path(__file__).parents[2] / "configs/deepseek-r1-wideep.yaml"
FP8 = Assumptions(mem_fraction=0.85, kv_dtype=KvDtype.FP8)


def wideep(**changes: Any) -> DeploymentConfig:
    args = yaml.safe_load(WIDEEP.read_text())["applications"][0]["args"]
    return DeploymentConfig.model_validate({**args, **changes})


def problems(config: DeploymentConfig, topology: str, assumptions: Assumptions = FP8) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan(config, topology, assumptions)
    return [str(problem) for problem in caught.value.problems]


def test_deepseek_r1_fits_13_nodes_of_h100_as_4_and_9() -> None:
    layout = plan(wideep(), "13x8xH100", FP8)
    placed = as_json(layout)
    assert [(w["worker"], len(w["nodes"])) for w in placed["workers"]] == [("prefill-0", 4), ("decode-0", 9)]
    ranks = [rank for node in placed["workers"][1]["nodes"] for rank in node["ranks"]]
    assert ranks == list(range(72))
    decode = layout.fits["decode"]
    assert decode.weights.total / 2**30 == pytest.approx(27.5, rel=0.03)
    assert decode.kv_tokens == pytest.approx(1.1e6, rel=0.05)
    json.dumps(placed)


def test_a_layout_is_held_against_the_best_and_a_random_one() -> None:
    layout = plan(wideep(), "26x8xH100/4", FP8)
    assert layout.bound.total_bytes <= layout.cost.total_bytes < layout.random.total_bytes
    assert layout.request.kv_bytes_per_token == 35_136
    assert layout.request.alltoall_bytes_per_token == pytest.approx(10.08e6, rel=0.001)


def test_everything_that_is_in_the_way_comes_at_once() -> None:
    narrow = wideep(
        decode={"nodes": 1, "parallelism": {"attn_dp": 8, "moe_ep": 8, "redundant_experts": 32}},
        prefill={"nodes": 9, "parallelism": {"attn_dp": 72, "moe_ep": 72, "redundant_experts": 31}},
    )
    found = problems(narrow, "8x8xH100")
    assert len(found) == 3
    assert "prefill.parallelism" in found[0]
    assert "moe_ep" in found[0]
    assert "EP8+32 fp8 does not fit H100: 103.6 GiB of 80" in found[1]
    assert "EP16+32" in found[1]
    assert "prefill-0 needs 9 nodes, each with 8 GPUs" in found[2]


@pytest.mark.parametrize(
    ("changes", "topology", "said"),
    [
        ({"accelerator": "H10"}, "13x8xH100", "accelerator: unknown GPU 'H10'"),
        ({}, "13x8xH10", "topology: topology[0].type: unknown GPU"),
        (
            {"model": {"name": "nobody/nothing", "path": "/nowhere"}},
            "13x8xH100",
            "give --model-config, or `shape`",
        ),
        ({"placement": {"spares": 1}}, "13x8xH100", "spares"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], topology: str, said: str) -> None:
    assert any(said in problem for problem in problems(wideep(**changes), topology))


def test_a_model_s_own_config_counts_more_than_the_one_known_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    config = wideep(model={"name": "deepseek-ai/DeepSeek-R1", "path": str(tmp_path)})
    assert any("gpt2" in problem for problem in problems(config, "13x8xH100"))


def test_spares_are_named_and_free() -> None:
    layout = plan(wideep(placement={"spares": 2}), "15x8xH100", FP8)
    used = {bundle.node_id for worker in layout.plan.workers for bundle in worker.bundles}
    assert len(layout.plan.spares) == 2
    assert not used & set(layout.plan.spares)


def test_workers_on_cpus_are_planned_without_a_model() -> None:
    config = DeploymentConfig.model_validate(
        {"model": {"name": "m", "path": "/nowhere"}, "backend": "simulated", "aggregated": {"replicas": 2}}
    )
    layout = plan(config, "1x8xH100")
    assert layout.fits == {}
    assert len(layout.plan.workers) == 2


def test_memory_is_what_each_role_s_engine_arguments_say() -> None:
    layout = plan(wideep(), "13x8xH100")
    assert {name: fit.mem_fraction for name, fit in layout.fits.items()} == {"prefill": 0.85, "decode": 0.835}
    assert {assumed.kv_dtype for assumed in layout.memory.values()} == {KvDtype.BF16}
    args = {"kv_cache_dtype": "fp8_e4m3", "mem_fraction_static": 0.9}
    changed = {role: {**wideep().model_dump()[role], "engine_args": args} for role in ("prefill", "decode")}
    layout = plan(wideep(**changed), "13x8xH100")
    assert {fit.mem_fraction for fit in layout.fits.values()} == {0.9}
    assert layout.request.kv_bytes_per_token == 35_136


@pytest.mark.parametrize(
    ("backend", "version", "args", "mem_fraction", "kv_dtype"),
    [
        ("vllm", "0.33.0", {"gpu_memory_utilization": 0.7, "kv_cache_dtype": "fp8_ds_mla"}, 0.7, KvDtype.FP8_DS_MLA),
        ("sglang", "0.5.23", {}, 0.85, KvDtype.BF16),
        ("sglang", "0.5.23", {"mem_fraction_static": 0.6, "kv_cache_dtype": "bfloat16"}, 0.6, KvDtype.BF16),
        ("trtllm", "1.3", {"kv_cache_config": {"free_gpu_memory_fraction": 0.5, "dtype": "fp8"}}, 0.5, KvDtype.FP8),
    ],
)
def test_each_engine_has_its_own_words_for_it_and_the_caller_has_the_last(
    backend: str, version: str, args: dict[str, Any], mem_fraction: float, kv_dtype: KvDtype
) -> None:
    role = {"parallelism": {"attn_dp": 32, "moe_ep": 32}, "nodes": 4, "resources": {"cpus": 8}, "engine_args": args}
    config = wideep(backend=backend, engine_version=version, prefill=None, decode=None, aggregated=role)
    found = role_memory(config, config.roles[Role.AGGREGATED], Assumptions())
    assert (found.mem_fraction, found.kv_dtype) == (mem_fraction, kv_dtype)
    told = role_memory(config, config.roles[Role.AGGREGATED], Assumptions(0.3, KvDtype.FP8))
    assert told == RoleMemory(0.3, KvDtype.FP8)


def test_a_fraction_of_free_memory_is_of_what_weights_and_buffers_leave() -> None:
    args = {"kv_cache_config": {"free_gpu_memory_fraction": 0.5}}
    role = {"parallelism": {"attn_dp": 32, "moe_ep": 32}, "nodes": 4, "resources": {"cpus": 8}, "engine_args": args}
    config = wideep(backend="trtllm", engine_version="1.3", prefill=None, decode=None, aggregated=role)
    (fit,) = plan(config, "4x8xH100").fits.values()
    free = fit.gpu.memory_bytes - fit.weights.total - fit.allowances.total
    assert fit.kv_budget_bytes == pytest.approx(0.5 * free, rel=1e-6)


def test_kv_of_a_size_that_is_not_known_is_a_problem_until_the_caller_says_one() -> None:
    args = {"decode": {**wideep().model_dump()["decode"], "engine_args": {"kv_cache_dtype": "nvfp4"}}}
    (said,) = problems(wideep(**args), "13x8xH100", Assumptions())
    assert said.startswith("decode.engine_args.kv_cache_dtype: ")
    assert "--kv-dtype" in said
    assert plan(wideep(**args), "13x8xH100", FP8).fits["decode"].fits
