"""The Helm chart by Helm's own renderer, compose's file by compose's own parser, the dashboard against our metrics."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from dynamo_ray.cli import manifest, manifest_check
from dynamo_ray.cli.checked import check_file
from dynamo_ray.kubernetes import platform as around
from dynamo_ray.kubernetes import pods, render
from dynamo_ray.kubernetes.options import Options
from dynamo_ray.telemetry import Telemetry

if platform.machine() != "x86_64":
    pytest.skip("Helm's library and compose's binary are built for x86_64", allow_module_level=True)

import helm_python

ROOT = Path(__file__).parents[2]
CHART = ROOT / "configs" / "helm" / "dynamo-ray"
COMPOSE = ROOT / "configs" / "compose"
DASHBOARD = CHART / "dashboards" / "dynamo-ray.json"

OPERATOR = {
    "Chart.yaml": "apiVersion: v2\nname: kuberay-operator\nversion: 1.7.0\n",
    "templates/seen.yaml": (
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: operator}\n"
        'data: {scheduler: "{{ .Values.batchScheduler.name }}"}\n'
    ),
}
"""Stands for KubeRay's chart, which a repository serves: its name, its version, and what of our values reaches it."""


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ours with its dependency in place, as `helm dependency build` leaves it."""
    folder = tmp_path_factory.mktemp("chart") / "dynamo-ray"
    shutil.copytree(CHART, folder)
    for name, text in OPERATOR.items():
        file = folder / "charts" / "kuberay-operator" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def rendered(chart: Path, tmp_path: Path, **values: Any) -> list[dict[str, Any]]:
    """What a release `rel` in namespace `ns` installs; each object has been checked at every level."""
    with helm_python.Chart.load(chart) as loaded:
        templates = loaded.render(values, name="rel", namespace="ns")
    text = "\n---\n".join(text for name, text in templates.items() if name.endswith(".yaml"))
    file = tmp_path / "rendered.yaml"
    file.write_text(text)
    assert all(found.checked for found in manifest_check.check(file))
    return [one for one in yaml.safe_load_all(text) if one]


def test_the_chart_has_no_findings(chart: Path) -> None:
    report = helm_python.lint(chart, strict=True)
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


def test_by_itself_it_installs_the_operator_alone(chart: Path, tmp_path: Path) -> None:
    (operator,) = rendered(chart, tmp_path, **{"kuberay-operator": {"batchScheduler": {"name": "volcano"}}})
    assert operator["data"] == {"scheduler": "volcano"}
    assert rendered(chart, tmp_path, **{"kuberay-operator": {"enabled": False}}) == []


def test_it_installs_the_service_as_kubectl_would_in_the_releases_namespace(chart: Path, tmp_path: Path) -> None:
    options = Options(image="i:1", name="served", anonymous=True, namespace="other")
    parts = manifest.objects(ROOT / "configs" / "deepseek-r1-wideep.yaml", options, None, None)
    values = yaml.safe_load(render.helm_values(parts)["values.yaml"])
    made = {one["kind"]: one for one in rendered(chart, tmp_path, **values)}
    by_kubectl = {one["kind"]: one for part in parts.values() for one in part}
    assert made.keys() - {"ConfigMap"} == by_kubectl.keys() - {"Namespace"}
    for kind, one in by_kubectl.items():
        if kind != "Namespace":
            assert made[kind]["spec"] == one["spec"]
            assert made[kind]["metadata"] == {**one["metadata"], "namespace": "ns"}


def test_what_stands_around_it_is_what_the_manifests_have(chart: Path, tmp_path: Path) -> None:
    switched = {"nats": {"enabled": True}, "monitors": {"enabled": True}, "dashboard": {"enabled": True}}
    made = {(one["kind"], one["metadata"]["name"]): one for one in rendered(chart, tmp_path, **switched)}
    options = Options(image="i:1", name="rel", namespace="ns")
    for one in around.nats(options):
        ours = made[one["kind"], one["metadata"]["name"]]["spec"]
        assert ours["selector"] == one["spec"]["selector"]
        if one["kind"] == "StatefulSet":
            assert ours["template"]["spec"] == one["spec"]["template"]["spec"]
            assert ours["volumeClaimTemplates"] == one["spec"]["volumeClaimTemplates"]
    ingress = made["PodMonitor", "rel-ingress"]["spec"]
    assert ingress["selector"]["matchLabels"] == {pods.POOL_LABEL: pods.INGRESS_POOL}
    assert json.loads(made["ConfigMap", "rel-dashboard"]["data"]["dynamo-ray.json"]) == json.loads(
        DASHBOARD.read_text()
    )


@pytest.mark.parametrize(
    "values",
    [{"natz": {}}, {"nats": {"enable": True}}, {"objects": [{"kind": "Job"}]}, {"monitors": {"interval": "15"}}],
)
def test_values_that_the_chart_does_not_read_are_refused(chart: Path, values: dict[str, Any]) -> None:
    with helm_python.Chart.load(chart) as loaded, pytest.raises(helm_python.HelmValuesError):
        loaded.validate_schema(values)


def compose(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    binary = str(files("compose") / "docker-compose")
    return subprocess.run(
        [binary, "-f", str(COMPOSE / "compose.yaml"), *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", **environment},
    )


def test_compose_reads_its_file_and_asks_for_what_must_be_secret() -> None:
    done = compose("config", "--format", "json", RAY_AUTH_TOKEN="t", GRAFANA_PASSWORD="p")
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    for name in ("ray-head", "ray-worker"):
        assert (
            services[name]["environment"].items() >= {"RAY_AUTH_TOKEN": "t", "RAY_SERVE_ENABLE_HA_PROXY": "1"}.items()
        )
    assert services["nats"]["image"] == around.NATS_IMAGE
    mounted = [
        volume["source"] for one in services.values() for volume in one.get("volumes", ()) if volume["type"] == "bind"
    ]
    assert mounted
    assert all(Path(source).exists() for source in mounted)
    published = [port for one in services.values() for port in one.get("ports", ())]
    assert all(port["host_ip"] == "127.0.0.1" for port in published)
    assert "Ray asks for it on every port" in compose("config", GRAFANA_PASSWORD="p").stderr
    assert compose("config", RAY_AUTH_TOKEN="t").returncode != 0


def test_what_compose_deploys_is_the_local_simulation_on_every_interface() -> None:
    deployed, local = (check_file(path).value for path in (COMPOSE / "serve.yaml", ROOT / "configs" / "local-sim.yaml"))
    assert deployed == {**local, "http_options": {**local["http_options"], "host": "0.0.0.0"}}
    scraped = yaml.safe_load((COMPOSE / "prometheus.yaml").read_text())["scrape_configs"][0]["static_configs"]
    assert scraped == [{"targets": [f"ray-head:{deployed['http_options']['port']}"]}]


def test_the_dashboard_asks_only_for_metrics_that_we_have() -> None:
    asked = set(re.findall(r"dynamo_ray_\w+", " ".join(_expressions(json.loads(DASHBOARD.read_text())))))
    exposed = set(re.findall(r"# TYPE (dynamo_ray_\w+)", Telemetry().exposition().decode()))
    source = " ".join(file.read_text() for file in (ROOT / "dynamo_ray" / "request").glob("*.py"))
    readings = set(re.findall(r'"(dynamo_ray_\w+)"', source))
    assert len(asked) > 10
    assert {name.removesuffix("_bucket") for name in asked} <= exposed | readings


def _expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_image_installs_the_ray_that_manifests_name_from_folders_that_are_there() -> None:
    text = (ROOT / "configs" / "docker" / "Dockerfile").read_text()
    assert f'"ray[default]=={ray.__version__}"' in text
    sources = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert sources
    assert all((ROOT / source).exists() for source in sources)
