"""A checked file: where its applications will be, and whether anybody can reach them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_ray.cli.checked import CheckedFile, check_file, check_reachable
from dynamo_ray.errors import ConfigError

FILE = """\
PROXY
applications:
  - name: a
    route_prefix: PREFIX
    import_path: dynamo_ray.app:build
    args: {model: {name: m, path: /m}, backend: simulated, aggregated: {}, limits: {drain_timeout_s: 90}}
"""


def checked(tmp_path: Path, prefix: str = "/", proxy: str = "") -> CheckedFile:
    file = tmp_path / "config.yaml"
    file.write_text(FILE.replace("PREFIX", prefix).replace("PROXY", proxy))
    return check_file(file)


@pytest.mark.parametrize(("prefix", "url"), [("/", "http://h:1"), ("/llm", "http://h:1/llm")])
def test_an_application_is_under_its_prefix(tmp_path: Path, prefix: str, url: str) -> None:
    made = checked(tmp_path, prefix)
    check_reachable(made)
    assert made.urls("http://h:1") == (url,)
    assert made.drain_timeout_s == 90.0


@pytest.mark.parametrize(
    ("prefix", "proxy", "field"),
    [("null", "", "applications[0].route_prefix"), ("/", "proxy_location: Disabled", "proxy_location")],
)
def test_what_nobody_could_reach_is_refused(tmp_path: Path, prefix: str, proxy: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_reachable(checked(tmp_path, prefix, proxy))
    assert [problem.field for problem in caught.value.problems] == [field]
