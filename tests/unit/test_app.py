"""What `serve run` gets to deploy."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_ray import app, models
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.errors import ConfigError


def test_a_model_that_a_command_makes_is_missed_with_that_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = {"name": "m", "path": "~/.cache/dynamo-ray/models/byte-tokenizer"}
    config = DeploymentConfig.model_validate({"model": model, "backend": "simulated", "aggregated": {}})
    with pytest.raises(models.ModelError, match="`dynamo-ray model byte-tokenizer`"):
        app.build(config)


def test_an_ingress_that_is_ended_has_as_long_as_its_workers_drain() -> None:
    given = {"model": {"name": "m", "path": "/m"}, "backend": "simulated", "aggregated": {}}
    config = DeploymentConfig.model_validate({**given, "limits": {"drain_timeout_s": 300.0}})
    built = app.build(config)
    assert built._bound_deployment._deployment_config.graceful_shutdown_timeout_s > 300.0


def test_what_an_engine_would_not_take_is_refused_before_anything_is_deployed() -> None:
    role = {"engine_args": {"blok_size": 32}}
    given = {"model": {"name": "m", "path": "/m"}, "backend": "vllm", "engine_version": "0.32.0", "aggregated": role}
    with pytest.raises(ConfigError, match=r"^aggregated\.engine_args\.blok_size: .*'block_size'"):
        app.build(DeploymentConfig.model_validate(given))
