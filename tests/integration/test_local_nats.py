"""The private server of `dynamo-ray up`: there, named, and gone again."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import yaml

from dynamo_ray.cli import local_nats, processes
from dynamo_ray.cli.checked import check_file
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.events.nats.link import options

CONFIG = Path(__file__).parents[2] / "configs/local-sim.yaml"


def test_a_private_server_is_named_in_the_file_its_token_is_not_and_it_ends_with_its_up(tmp_path: Path) -> None:
    document = yaml.safe_load(CONFIG.read_text())
    document["applications"][0]["args"]["events"] = "nats"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(document))
    with local_nats.provided(check_file(file), tmp_path, private=True) as provided:
        args = provided.value["applications"][0]["args"]
        nats = DeploymentConfig.model_validate(args).nats_events
        assert nats == provided.applications[0].config.nats_events
        assert nats is not None
        assert nats.urls[0].startswith("nats://127.0.0.1:")
        assert nats.token == "${DYNAMO_RAY_NATS_TOKEN}"
        token = options(nats)["token"]
        assert token == os.environ[local_nats.TOKEN_VARIABLE]
        (process,) = processes.started_by(str(tmp_path))  # so that `down` ends it, should `up` be killed
        assert token not in " ".join(process.cmdline())
    assert not psutil.pid_exists(process.pid)
    assert local_nats.TOKEN_VARIABLE not in os.environ
