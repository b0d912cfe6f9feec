"""A deployment on a cluster that is not there: the layout, whether it fits, what it costs; or everything in its way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynamo_ray.cluster.layout import Assumptions, as_json, plan
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.errors import ConfigError
from placement.model_shape import KvDtype

WIDEEP = Path(__file__).parents[2] / "configs/deepseek-r1-wideep.yaml"
FP8 = Assumptions(kv_dtype=KvDtype.FP8)


def wideep(**changes: Any) -> DeploymentConfig:
    args = yaml.safe_load(WIDEEP.read_text())["applications"][0]["args"]
    return DeploymentConfig.model_validate({**args, **changes})


def problems(config: DeploymentConfig, topology: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan(config, topology, FP8)
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
        ({"model": {"name": "nobody/nothing", "path": "/nowhere"}}, "13x8xH100", "give --model-config FILE"),
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
