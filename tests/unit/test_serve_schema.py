"""Mistakes in the part of a file that is Ray Serve's."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_ray import config_file
from dynamo_ray.cli import serve_schema

FILE = """\
applications:
  - name: a
    import_path: dynamo_ray.app:build
    deployments:
      - {name: Ingress, OPTION}
"""


@pytest.mark.parametrize(
    ("option", "field", "message"),
    [
        ("user_config: {policy: x}", "user_config", "under `args`"),
        ("num_replicas: auto", "num_replicas", "does not autoscale"),
        ("num-replicas: 2", "num-replicas", "did you mean `num_replicas`?"),
    ],
)
def test_what_a_deployment_does_not_take_is_named(tmp_path: Path, option: str, field: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(FILE.replace("OPTION", option))
    (problem,) = serve_schema.check(config_file.read(file))
    assert (problem.field, problem.line) == (f"applications[0].deployments[0].{field}", 5)
    assert message in problem.message


def test_a_port_that_is_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("http_options: {port: 80000}\n" + FILE.replace("OPTION", "num_replicas: 1"))
    (problem,) = serve_schema.check(config_file.read(file))
    assert (problem.field, problem.line) == ("http_options.port", 1)
    assert "1 to 65535" in problem.message
