"""`up --fake-cluster`: which nodes are faked, and what stands for the engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dynamo_ray.cli.checked import check_file
from dynamo_ray.cli.fake_cluster import FakeCluster, fake_cluster
from dynamo_ray.errors import StartupError
from placement.topology import ACCELERATOR_LABEL, DOMAIN_LABEL

CONFIGS = Path(__file__).parents[2] / "configs"


def faked(name: str, shape: str | None = None) -> FakeCluster:
    return fake_cluster(check_file(CONFIGS / f"{name}.yaml"), shape)


def written(tmp_path: Path, **changes: Any) -> Path:
    """A file of two aggregated SGLang workers with 4 GPUs each."""
    args = {
        "model": {"name": "m", "path": "/models/m"},
        "backend": "sglang",
        "engine_version": "0.5.16",
        "accelerator": "GB200",
        "aggregated": {"replicas": 2, "parallelism": {"attn_tp": 4, "moe_ep": 4}},
        **changes,
    }
    path = tmp_path / "config.yaml"
    application = {"name": "a", "route_prefix": "/", "import_path": "dynamo_ray.app:build", "args": args}
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return path


def test_the_cluster_of_a_recipe_is_as_large_as_its_workers_need() -> None:
    options = faked("deepseek-r1-wideep").node_options()
    assert [(node["num_gpus"], node["labels"][ACCELERATOR_LABEL]) for node in options] == [(8, "H100")] * 13


def test_nodes_of_one_nvlink_domain_say_so(tmp_path: Path) -> None:
    two_nodes = {"nodes": 2, "one_nvlink_domain": True, "parallelism": {"attn_dp": 8, "moe_ep": 8}}
    options = fake_cluster(check_file(written(tmp_path, aggregated=two_nodes)), None).node_options()
    assert [node["num_gpus"] for node in options] == [4, 4]
    assert len({node["labels"][DOMAIN_LABEL] for node in options}) == 1


def test_the_leaf_label_that_the_placement_reads_is_set(tmp_path: Path) -> None:
    checked = check_file(written(tmp_path, accelerator="H100", placement={"leaf_label": "rack"}))
    assert {node["labels"]["rack"] for node in fake_cluster(checked, "4x8xH100/2").node_options()} == {
        node.leaf for node in fake_cluster(checked, "4x8xH100/2").topology.nodes
    }
    assert [node["labels"]["rack"] for node in fake_cluster(checked, None).node_options()] == ["leaf"]


def test_engines_keep_their_blocks_lengths_widths_and_style_of_hand_off() -> None:
    real = check_file(CONFIGS / "deepseek-r1-wideep.yaml").applications[0].config
    config = faked("deepseek-r1-wideep").checked.applications[0].config
    assert config.backend == "simulated"
    assert config.model.name == real.model.name
    assert config.prefill is not None
    assert config.decode is not None
    assert config.decode.parallelism == real.roles[next(role for role in real.roles if role == "decode")].parallelism
    assert config.prefill.engine_args["block_size"] == 64
    assert config.prefill.engine_args["max_model_len"] == 8192
    assert config.decode.engine_args["max_model_len"] == 4500
    assert config.decode.engine_args["handoff"] == "concurrent"


def test_engines_that_cache_no_prefixes_do_not_when_faked_either() -> None:
    def caches(name: str) -> dict[str, bool]:
        config = faked(name).checked.applications[0].config
        return {role.value: args.engine_args["prefix_caching"] for role, args in config.roles.items()}

    assert caches("deepseek-r1-wideep") == {"prefill": True, "decode": False}, "SGLang's decode does not by itself"
    assert caches("qwen3-32b-vllm-disagg-kv") == {"prefill": True, "decode": False}
    assert caches("kimi-k2-vllm-disagg-32xh200") == {"prefill": True, "decode": True}
    assert caches("qwen3-235b-a22b-fp8-trtllm-disagg") == {"prefill": True, "decode": False}
    assert caches("qwen3-32b-fp8-trtllm-agg") == {"aggregated": False}


def test_what_serve_is_given_is_the_simulated_deployment() -> None:
    cluster = faked("deepseek-r1-wideep")
    assert cluster.checked.value["applications"][0]["args"]["backend"] == "simulated"
    assert cluster.checked.value["applications"][0]["deployments"] == [{"name": "Ingress", "num_replicas": 1}]


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("deepseek-r1-wideep", "12x8xH100", "prefill: prefill-0 needs 4 nodes"),
        ("deepseek-r1-wideep", "13x8xH200", "H100"),
        ("deepseek-r1-wideep", "13 nodes", "topology: '13 nodes'"),
        ("local-sim", None, "computes on CPUs, and needs no fake nodes; start it without"),
    ],
)
def test_what_cannot_be_faked_is_refused_with_the_reason(name: str, shape: str | None, said: str) -> None:
    with pytest.raises(StartupError) as caught:
        faked(name, shape)
    assert said in str(caught.value)


def test_a_gpu_of_an_unknown_kind_needs_a_topology(tmp_path: Path) -> None:
    checked = check_file(written(tmp_path, accelerator="L40S"))
    with pytest.raises(StartupError, match="topology: say what nodes there are"):
        fake_cluster(checked, None)
    with pytest.raises(StartupError):
        fake_cluster(checked, "1x8xL40S")
