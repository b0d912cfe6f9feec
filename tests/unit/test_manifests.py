"""Kubernetes manifests: the rendered ones are current and valid, and what cannot be is refused with a way out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from typer.testing import CliRunner

from dynamo_ray import app
from dynamo_ray.cli import downloading, manifest, manifest_check
from dynamo_ray.cli.commands import app as command
from dynamo_ray.cluster.workload import worker_groups
from dynamo_ray.config_file import Application, applications, read
from dynamo_ray.errors import ConfigError
from dynamo_ray.kubernetes import ray_objects, render
from dynamo_ray.kubernetes.options import Options
from placement.topology import DOMAIN_LABEL

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.name != "catalog.yaml")
WIDEEP = ROOT / "configs" / "deepseek-r1-wideep.yaml"
NVLINK = ROOT / "configs" / "deepseek-r1-sglang-gb200.yaml"
LOCAL_SIM = ROOT / "configs" / "local-sim.yaml"
RENDERED = ROOT / "configs" / "kubernetes"
GOLDEN = dict(
    line.split(maxsplit=1)
    for line in (RENDERED / "manifests.txt").read_text().splitlines()
    if line and not line.startswith("#")
)

Object = dict[str, Any]


def options(**given: Any) -> Options:
    return Options(**{"image": "registry.example.com/dynamo-ray:0.1.0", "name": "served", **given})


def rendered(path: Path, given: Options | None = None, topology: str | None = None) -> list[Object]:
    chosen = given or options(hf_secret=None if path.name.startswith("local") else "hf-token")
    return [one for part in manifest.objects(path, chosen, topology, None).values() for one in part]


def said(path: Path, given: Options, topology: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        rendered(path, given, topology)
    return str(caught.value)


def check(tmp_path: Path, objects: list[Object]) -> list[manifest_check.Found]:
    file = tmp_path / "all.yaml"
    file.write_text(render._dump_all(objects))
    return manifest_check.check(file)


def cluster_of(objects: list[Object]) -> Object:
    (found,) = (one for one in objects if one["kind"] in ("RayService", "RayCluster"))
    spec: Object = found["spec"]
    return spec.get("rayClusterConfig", spec)


def groups_of(objects: list[Object]) -> dict[str, Object]:
    return {group["groupName"]: group for group in cluster_of(objects)["workerGroupSpecs"]}


def containers(objects: list[Object]) -> Iterator[Object]:
    cluster = cluster_of(objects)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("folder", GOLDEN)
def test_the_rendered_manifests_are_what_their_command_prints_now(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(command, ["manifest", *shlex.split(GOLDEN[folder]), "--out", str(tmp_path)])
    assert done.exit_code == 0, f"{done.output}{done.exception}"
    made, stored = ({file.name: file.read_text() for file in at.iterdir()} for at in (tmp_path, RENDERED / folder))
    assert made == stored, "configs/kubernetes is not current: make manifests"


def test_every_rendered_manifest_is_valid_at_every_level() -> None:
    found = manifest_check.check(RENDERED)
    assert {one.file.parent.name for one in found} == set(GOLDEN)
    assert all(one.checked for one in found), "there is a schema for every kind that we render"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_has_manifests_that_are_valid_and_hold_its_workers(path: Path, tmp_path: Path) -> None:
    objects = rendered(path)
    assert all(one.checked for one in check(tmp_path, objects))
    (application,) = applications(read(path))[0]
    for group in worker_groups(application.config):
        pods = [
            made for name, made in groups_of(objects).items() if name == group.name or name.startswith(f"{group.name}-")
        ]
        assert sum(made["replicas"] for made in pods) == group.replicas
        for made in pods:
            assert made["numOfHosts"] == group.nodes
            assert made["minReplicas"] == made["maxReplicas"] == made["replicas"], "nothing scales a gang"
            limits = made["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert int(limits.get("nvidia.com/gpu", 0)) == group.needs.gpus


def test_serve_finds_haproxy_mode_on_every_pod_and_the_ray_that_we_pin() -> None:
    objects = rendered(WIDEEP)
    for container in containers(objects):
        env = {entry["name"]: entry["value"] for entry in container["env"]}
        assert app.HAPROXY_ENVIRONMENT.items() <= env.items()
    assert cluster_of(objects)["rayVersion"] == ray.__version__ == ray_objects.RAY_VERSION


def test_serve_runs_on_pods_of_its_own_one_ingress_replica_each_where_no_worker_goes() -> None:
    objects = rendered(WIDEEP)
    (service,) = (one for one in objects if one["kind"] == "RayService")
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert serve["http_options"]["host"] == "0.0.0.0"
    deployments = {one["name"]: one for one in serve["applications"][0]["deployments"]}
    taken = {name: one["ray_actor_options"] for name, one in deployments.items()}
    assert taken["Ingress"] == {"num_cpus": 0, "resources": {"ingress": 1}}
    assert taken["Orchestrator"] == {"num_cpus": 0, "resources": {"control": 0.01}}
    group = groups_of(objects)["ingress"]
    assert group["resources"] == {"CPU": "0", "ingress": "1", "control": "1"}
    assert group["replicas"] == deployments["Ingress"]["num_replicas"]
    assert all("resources" not in made for name, made in groups_of(objects).items() if name != "ingress")


def test_events_by_nats_find_the_server_that_stands_beside(tmp_path: Path) -> None:
    by_nats = changed(tmp_path, events="nats")
    assert "--nats: missing: KV events go by NATS" in said(by_nats, options(anonymous=True))
    objects = rendered(by_nats, options(anonymous=True, nats=True))
    check(tmp_path, objects)
    (service,) = (one for one in objects if one["kind"] == "RayService")
    urls = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]["nats"]["urls"]
    (server,) = (one for one in objects if one["kind"] == "StatefulSet")
    assert urls == [f"nats://{server['metadata']['name']}:4222"]


def test_a_token_is_only_ever_named() -> None:
    objects = rendered(WIDEEP, options(hf_secret="hf-token", redis="redis:6379", redis_secret="redis"))
    (job,) = (one for one in objects if one["kind"] == "Job")
    (entry,) = job["spec"]["template"]["spec"]["containers"][0]["env"]
    assert entry == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "token"}}}
    storage = cluster_of(objects)["gcsFaultToleranceOptions"]
    assert storage["redisPassword"] == {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}
    assert not any(one["kind"] == "Secret" for one in objects)


def test_the_download_job_runs_our_command_for_the_models_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = (one for one in rendered(WIDEEP) if one["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    run: list[downloading.Wanted] = []
    monkeypatch.setattr(downloading, "run", lambda one, *_: run.append(one))
    program, *words = container["command"]
    assert program == "dynamo-ray"
    assert CliRunner().invoke(command, words).exit_code == 0
    assert run == [downloading.Wanted("deepseek-ai/DeepSeek-R1", Path("/models/DeepSeek-R1"))]
    (mount,) = container["volumeMounts"]
    assert mount["mountPath"] == "/models"
    assert "readOnly" not in mount


def test_nodes_of_one_nvlink_domain_share_a_label_a_compute_domain_and_a_clique() -> None:
    objects = rendered(NVLINK)
    domains = {one["metadata"]["name"]: one["spec"] for one in objects if one["kind"] == "ComputeDomain"}
    wide = {name: group for name, group in groups_of(objects).items() if group["numOfHosts"] > 1}
    assert wide
    assert {f"served-{name}" for name in wide} == domains.keys()
    for name, group in wide.items():
        spec = group["template"]["spec"]
        assert group["labels"][DOMAIN_LABEL] == f"served-{name}"
        assert domains[f"served-{name}"]["numNodes"] == group["numOfHosts"]
        assert spec["resourceClaims"] == [{"name": "nvlink", "resourceClaimTemplateName": f"served-{name}-channel"}]
        (term,) = spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "nvidia.com/gpu.clique"
        assert term["labelSelector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("cloud", "path", "devices"),
    [
        ("bare", WIDEEP, {"rdma/ib": "8"}),
        ("eks-efa", WIDEEP, {"vpc.amazonaws.com/efa": "32", "hugepages-2Mi": "5120Mi"}),
        ("aks-infiniband", WIDEEP, {"rdma/ib": "8"}),
        ("gke-roce", ROOT / "configs" / "deepseek-r1-sglang-32xh200.yaml", {}),
    ],
)
def test_each_cloud_gives_a_pod_the_rdma_devices_of_its_gpus(
    cloud: str, path: Path, devices: dict[str, str], tmp_path: Path
) -> None:
    objects = rendered(path, options(anonymous=True, cloud=cloud))
    check(tmp_path, objects)
    limits = groups_of(objects)["decode"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert {name: limits[name] for name in limits if name not in ("memory", "nvidia.com/gpu")} == devices
    claims = [one for one in objects if one["kind"] == "ResourceClaimTemplate"]
    assert len(claims) == (1 if cloud == "gke-roce" else 0)
    for claim in claims:
        assert claim["spec"]["spec"]["devices"]["requests"][0]["exactly"]["count"] == 8


@pytest.mark.parametrize(
    ("scheduler", "label"),
    [
        ("kai", "kai.scheduler/queue"),
        ("volcano", "volcano.sh/queue-name"),
        ("kueue", "kueue.x-k8s.io/queue-name"),
        ("yunikorn", "yunikorn.apache.org/queue"),
    ],
)
@pytest.mark.parametrize("kind", ["rayservice", "raycluster"])
def test_a_gang_scheduler_finds_its_queue_on_what_kuberay_acts_on(
    scheduler: str, label: str, kind: str, tmp_path: Path
) -> None:
    given = options(
        model_pvc="weights", scheduler=scheduler, queue="inference", kind=kind, gateway="inference", aiperf=True
    )
    objects = rendered(WIDEEP, given)
    check(tmp_path, objects)
    (made,) = (one for one in objects if one["kind"] in ("RayService", "RayCluster"))
    assert made["metadata"]["labels"][label] == "inference"
    services = {one["metadata"]["name"] for one in objects if one["kind"] == "Service"}
    (route,) = (one for one in objects if one["kind"] == "HTTPRoute")
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    assert backend["name"] == "served-serve-svc"
    assert services == ({"served-serve-svc"} if kind == "raycluster" else set()), "KubeRay makes a RayService's"


def test_a_stored_service_is_reachable_at_the_longest_name_and_not_beyond() -> None:
    assert rendered(LOCAL_SIM, options(name="a" * 47))
    assert rendered(LOCAL_SIM, options(name="a" * 53, kind="raycluster"))
    limit = "has 48 characters, KubeRay takes 47 for a RayService (63 of a Service's name less 10 for -serve-svc and 6"
    assert limit in said(LOCAL_SIM, options(name="a" * 48))
    deploy = next(
        one
        for one in rendered(LOCAL_SIM, options(name=f"cut-{'a' * 49}", kind="raycluster"))
        if one["metadata"]["name"].endswith("-deploy")
    )
    (_, token) = deploy["spec"]["template"]["spec"]["containers"][0]["env"]
    assert token["valueFrom"]["secretKeyRef"]["name"] == f"r{'a' * 49}", "KubeRay names the token's Secret so"
    assert "takes 53 for a RayCluster" in said(LOCAL_SIM, options(name="a" * 54, kind="raycluster"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "--hf-secret: say where the weights come from"),
        ({"hf_secret": "hf", "anonymous": True}, "--anonymous: --hf-secret already says where the weights come from"),
        ({"hf_secret": "hf_AbC123"}, "put it in a Secret and name that"),
        ({"anonymous": True, "name": "DeepSeek"}, "--name: 'DeepSeek' is no DNS label"),
        ({"anonymous": True, "scheduler": "kai"}, "--queue: missing: kai schedules nothing that names no queue"),
        ({"anonymous": True, "queue": "q"}, "--queue: no --scheduler reads it"),
        ({"anonymous": True, "cloud": "gke-roce"}, "accelerator: H100 on gke-roce, which is for H200, B200, GB300"),
        ({"anonymous": True, "nats": True}, "events: zmq: nothing would use --nats"),
        ({"anonymous": True, "redis": "redis"}, "--redis: 'redis' is not host:port"),
        ({"anonymous": True, "redis_secret": "redis"}, "--redis-secret: there is no --redis"),
        ({"model_pvc": "weights", "cache_gib": 5}, "--cache-gib: is for a claim that is made"),
    ],
)
def test_what_a_cluster_could_not_run_is_refused_with_a_way_out(given: dict[str, Any], expected: str) -> None:
    assert expected in said(WIDEEP, options(**given))


def test_a_token_given_by_mistake_is_not_printed() -> None:
    assert "hf_AbC123" not in said(WIDEEP, options(hf_secret="hf_AbC123"))


@pytest.mark.parametrize(
    ("topology", "expected"), [("12x8xH100", "Add 1 node"), ("13x8xH200", "H100"), ("26x4xH100", "8 GPU")]
)
def test_a_configuration_that_its_cluster_cannot_hold_is_refused(topology: str, expected: str) -> None:
    assert expected in said(WIDEEP, options(anonymous=True), topology)


def changed(tmp_path: Path, **args: Any) -> Path:
    document = yaml.safe_load(WIDEEP.read_text())
    document["applications"][0]["args"].update(args)
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def environment(pod: Object) -> dict[str, Any]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in pod["spec"]["containers"][0]["env"]}


def test_secrets_of_the_file_come_from_a_secret_in_the_pods_that_read_them(tmp_path: Path) -> None:
    nats = {"urls": ["nats://n:4222"], "token": "${NATS_TOKEN}"}
    file = changed(tmp_path, api_keys=["${API_KEY}", "${OLD_KEY}", "${file:/etc/key}"], events="nats", nats=nats)
    assert "--env-secret: missing: applications[0].args.api_keys[0] is the variable API_KEY;" in said(
        file, options(anonymous=True)
    )
    objects = rendered(file, options(anonymous=True, env_secret="keys", aiperf=True))
    check(tmp_path, objects)
    cluster = cluster_of(objects)

    def given(pod: Object) -> list[str]:
        return [name for name in ("API_KEY", "OLD_KEY", "NATS_TOKEN") if name in environment(pod)]

    groups = {name: given(group["template"]) for name, group in groups_of(objects).items()}
    assert groups == {
        "ingress": ["API_KEY", "OLD_KEY", "NATS_TOKEN"],
        "prefill": ["NATS_TOKEN"],
        "decode": ["NATS_TOKEN"],
    }
    assert given(cluster["headGroupSpec"]["template"]) == []
    reference = {"secretKeyRef": {"name": "keys", "key": "API_KEY"}}
    assert environment(cluster["workerGroupSpecs"][0]["template"])["API_KEY"] == reference
    (benchmark,) = (one for one in objects if one["metadata"]["name"] == "served-aiperf")
    assert environment(benchmark["spec"]["template"])["API_KEY"] == reference


@pytest.mark.parametrize(
    ("args", "given", "expected"),
    [
        ({"api_keys": ["hunter2"]}, {}, "args.api_keys[0]: would stand readable in the manifest; write ${NAME}"),
        (
            {"events": "nats", "nats": {"urls": ["nats://n:4222"], "token": "hunter2"}},
            {},
            "args.nats.token: would stand readable",
        ),
        ({}, {"env_secret": "keys"}, "--env-secret: the file names no variable"),
        ({"api_keys": ["${API_KEY}"]}, {"env_secret": "sk_1"}, "--env-secret: is no name of an object"),
        ({"api_keys": ["${file:/etc/key}"]}, {"aiperf": True}, "--aiperf: AIPerf's pod is given an API key"),
    ],
)
def test_a_secret_that_would_stand_readable_or_nowhere_is_refused(
    tmp_path: Path, args: dict[str, Any], given: dict[str, Any], expected: str
) -> None:
    refused = said(changed(tmp_path, **args), options(anonymous=True, **given))
    assert expected in refused
    assert "hunter2" not in refused


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"accelerator": "H1000"}, "args.accelerator: unknown GPU 'H1000'"),
        (
            {"placement": {"leaf_label": "rack"}},
            "placement.leaf_label: KubeRay gives all pods of a group the same labels",
        ),
        ({"model": {"name": "deepseek-ai/DeepSeek-R1", "path": "~/r1"}}, "folder inside another, such as /models/NAME"),
        ({"model": {"name": "mine", "path": "/models/mine"}}, "--model-source: 'mine' is no Hugging Face id"),
    ],
)
def test_what_only_kubernetes_cannot_do_is_refused_at_its_field(
    args: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    assert expected in said(changed(tmp_path, **args), options(anonymous=True))


def test_spare_nodes_are_pods_that_any_worker_fits_in(tmp_path: Path) -> None:
    objects = rendered(changed(tmp_path, placement={"spares": 2}), options(anonymous=True))
    spare = groups_of(objects)["spares"]
    assert (spare["replicas"], spare["numOfHosts"]) == (2, 1)
    assert spare["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--cloud", "eks"],
            "--cloud: 'eks' is none of bare, eks-efa, aks-infiniband, gke-roce; did you mean eks-efa?",
        ),
        (["--scheduler", "volcanos"], "did you mean volcano?"),
        (["--kind", "rayservices"], "did you mean rayservice?"),
    ],
)
def test_an_unknown_choice_names_the_nearest(words: list[str], expected: str) -> None:
    done = CliRunner().invoke(command, ["manifest", str(LOCAL_SIM), "--image", "i", *words])
    assert isinstance(done.exception, ConfigError)
    assert expected in str(done.exception)


def test_a_folder_with_other_yaml_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("kind: Secret\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml is not from this command"):
        manifest.write({"00-namespace.yaml": "x"}, tmp_path, f"{manifest.HEADER}c.yaml")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


def test_several_applications_share_the_cluster_under_their_names() -> None:
    document = yaml.safe_load(LOCAL_SIM.read_text())
    (one,) = applications(read(LOCAL_SIM))[0]
    second = {**document["applications"][0], "name": "other", "route_prefix": "/other"}
    both = {**document, "applications": [*document["applications"], second]}
    found = (one, Application(1, "other", "/other", one.config))
    parts = render.objects(options(), found, both, {})
    groups = groups_of([made for part in parts.values() for made in part])
    assert [*groups] == ["ingress", "local-sim-prefill", "local-sim-decode", "other-prefill", "other-decode"]
    assert groups["ingress"]["resources"]["ingress"] == "2"


def test_the_pages_commands_print_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    commands = [line.partition(" > ")[0] for line in page.splitlines() if line.startswith("dynamo-ray ")]
    assert len(commands) >= 4
    for line in commands:
        done = CliRunner().invoke(command, shlex.split(line)[1:])
        assert done.exit_code == 0, f"{line}: {done.output}{done.exception}"
    made = tmp_path / "out" / "40-rayservice.yaml"
    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `") and "0-" in line}
    assert {file.stem for file in made.parent.iterdir()} <= listed
    made.write_text(
        made.read_text().replace("groupName: decode", "groupNam: decode").replace("moe_ep: 72", "moe_epp: 72")
    )
    done = CliRunner().invoke(command, ["validate", "out"])
    without_lines = re.compile(r"\(line \d+\)")  # they move with the recipe
    for told in without_lines.sub("", str(done.exception)).splitlines():
        assert told in without_lines.sub("", page)
