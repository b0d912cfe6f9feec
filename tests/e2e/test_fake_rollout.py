"""`up --fake-cluster`: wide deployments really roll out, on fake nodes with simulated engines, and take traffic."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from deployments import ROOT, Deployment, up, wait_until


@dataclass(frozen=True)
class Rollout:
    recipe: str
    model: str
    nodes: int
    ranks: int
    """Of all workers, where each has its own KV cache."""
    caches: bool = True
    """Its engines find prefixes again; not where the recipe turns that off."""


ROLLOUTS = (
    Rollout("deepseek-r1-wideep", "deepseek-ai/DeepSeek-R1", nodes=13, ranks=104),
    Rollout("qwen3-32b-fp8-trtllm-disagg", "Qwen/Qwen3-32B-FP8", nodes=1, ranks=6, caches=False),
    Rollout("kimi-k2-vllm-disagg-32xh200", "moonshotai/Kimi-K2-Instruct", nodes=4, ranks=32),
)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("rollout", ROLLOUTS, ids=lambda rollout: rollout.recipe)
def test_a_recipe_rolls_out_on_fake_nodes_and_serves(rollout: Rollout, tmp_path: Path) -> None:
    config, log = ROOT / f"configs/{rollout.recipe}.yaml", tmp_path / "up.log"
    with up(config, rollout.model, log, "--fake-cluster") as deployment:
        figures = traffic(deployment)
        assert figures["errors"] == {}
        assert figures["ok"] == 256
        assert figures["answer_tokens"] == 256 * 8
        assert (figures["cached_tokens"] > 0.2 * figures["prompt_tokens"]) is rollout.caches, "a shared beginning"
        # One that is connected to in this very moment has told nothing yet.
        wait_until(lambda: ranks(deployment) == rollout.ranks, 30, f"{rollout.ranks} ranks tell their load")
    assert f"fake node {rollout.nodes} of {rollout.nodes}" in log.read_text()


def traffic(deployment: Deployment) -> dict[str, object]:
    shape = ["--requests", "256", "--concurrency", "64", "--prompt-tokens", "512", "--answer-tokens", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "dynamo_ray", "bench", "--url", deployment.url, *shape, "--shared", "0.5", "--json"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def ranks(deployment: Deployment) -> int:
    """That report their load."""
    _, text = deployment.get("/metrics")
    return sum(line.startswith("dynamo_ray_worker_kv_total_blocks{") for line in text.splitlines())
