"""Whether this machine is large enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_ray.cli import preflight
from dynamo_ray.cli.checked import check_file
from dynamo_ray.cli.preflight import check_size, free_here
from dynamo_ray.config import DeploymentConfig
from placement.topology import Resources

CONFIGS = Path(__file__).parents[2] / "configs"
REAL = ("local.yaml", "local-aggregated.yaml", "local-dep.yaml")
GIB = 2**30


def config(name: str) -> DeploymentConfig:
    (application,) = check_file(CONFIGS / name).applications
    return application.config


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(("free_bytes", "shown"), [(2 * GIB, "0.1 GiB memory"), (0, "no memory")])
def test_real_engines_that_would_not_fit_are_named_before_anything_starts(
    name: str, free_bytes: int, shown: str
) -> None:
    (problem,) = check_size("args", config(name), Resources(1.9, 0, free_bytes))
    assert "1.9 GiB memory free" in problem.message
    assert shown in problem.message


@pytest.mark.parametrize("name", [*REAL, "local-sim.yaml"])
def test_every_local_configuration_fits_two_cores_and_4_gib(name: str) -> None:
    assert check_size("args", config(name), Resources(1.9, 0, 4 * GIB)) == []


def test_a_container_s_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "estimate_available_memory", lambda: preflight.OWN_MEMORY_BYTES + 5)
    assert free_here().memory_bytes == 5
    monkeypatch.setattr(preflight, "estimate_available_memory", lambda: 5)
    assert free_here().memory_bytes == 0
