"""`dynamo-ray validate` on manifests: a mistake at any level is told with its line, down into serveConfigV2."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dynamo_ray import config_file
from dynamo_ray.cli import manifest_check
from dynamo_ray.cli.commands import app
from dynamo_ray.config_file import Document
from dynamo_ray.errors import ConfigError, PreflightError, Problem
from dynamo_ray.kubernetes import derive, rules, validation

RENDERED = Path(__file__).parents[2] / "configs" / "kubernetes"
SERVICE = (RENDERED / "deepseek-r1-wideep" / "40-rayservice.yaml").read_text()
JOB = (RENDERED / "deepseek-r1-wideep" / "10-model-cache.yaml").read_text()
MONITORS = (RENDERED / "deepseek-r1-wideep" / "70-monitoring.yaml").read_text()
CLUSTER = (RENDERED / "deepseek-r1-trtllm-wideep-gb200" / "50-serve.yaml").read_text()


def problems(tmp_path: Path, text: str) -> tuple[Problem, ...]:
    file = tmp_path / "changed.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        manifest_check.check(file)
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "right", "wrong", "field", "message"),
    [
        (SERVICE, "groupName: decode", "groupNam: decode", "workerGroupSpecs[2].groupNam", "did you mean `groupName`?"),
        (SERVICE, "numOfHosts: 9", "numOfHosts: nine", "workerGroupSpecs[2].numOfHosts", "must be of type integer"),
        (SERVICE, "numOfHosts: 9", "numOfHosts: 8", "workerGroupSpecs", "no room for deepseek-r1's"),
        (SERVICE, "readOnly: true", "readOny: true", "volumeMounts[1].readOny", "did you mean `readOnly`?"),
        (SERVICE, "  name: deepseek-r1\n", f"  name: {'a' * 48}\n", "metadata.name", "takes 47 for a RayService"),
        (SERVICE, "  namespace:", "  namespce:", "metadata.namespce", "did you mean `namespace`?"),
        (SERVICE, "kind: RayService", "kind: RayServce", "kind", "RayServce"),
        (
            SERVICE,
            "redisAddress: redis:6379",
            "storage: {}",
            "gcsFaultToleranceOptions.storage",
            "is for backend rocksdb",
        ),
        (
            SERVICE,
            "            moe_ep: 72",
            "            moe_epp: 72",
            "decode.parallelism.moe_epp",
            "did you mean `moe_ep`?",
        ),
        (
            SERVICE,
            "mem_fraction_static: 0.835",
            "mem_fraction: 0.835",
            "decode.engine_args.mem_fraction",
            "mem_fraction_static",
        ),
        (SERVICE, "num_replicas: 1", "num_replcas: 1", "applications[0].deployments[0].num_replcas", "did you mean"),
        (SERVICE, "          prefill:\n", "          prefill: [\n", "spec.serveConfigV2", "is not valid YAML"),
        (JOB, "backoffLimit: 10", "backofLimit: 10", "spec.backofLimit", "did you mean `backoffLimit`?"),
        (JOB, "storage: 800Gi", "storage: []", "spec.resources.requests.storage", ""),
        (JOB, "kind: Job", "kind: Jobb", "kind", "has no Jobb in batch/v1; did you mean job"),
        (MONITORS, "podMetricsEndpoints", "podMetricEndpoints", "spec.podMetricEndpoints", "did you mean"),
        (CLUSTER, "backend: trtllm", "backend: trtlm", "data.serve.yaml.applications[0].args.backend", "'trtllm'"),
    ],
)
def test_a_mistake_at_any_level_is_told_with_its_line(
    tmp_path: Path, text: str, right: str, wrong: str, field: str, message: str
) -> None:
    line = text[: text.index(right)].count("\n") + 1
    found = problems(tmp_path, text.replace(right, wrong, 1))
    told = [problem for problem in found if field in problem.field and message in problem.message]
    assert told, "\n".join(map(str, found))
    near = 0 if field not in ("workerGroupSpecs", "spec.serveConfigV2") else 200
    assert abs((told[0].line or 0) - line) <= near


NATS = {"events": "nats", "nats": {"urls": ["nats://n:4222"], "token": "s3cr3t"}}


@pytest.mark.parametrize(
    ("args", "place"),
    [({"api_keys": ["${API_KEY}", "hunter2"]}, "api_keys[1]"), (NATS | {"api_keys": ["${file:/key}"]}, "nats.token")],
)
def test_a_secret_that_stands_in_the_manifest_is_refused(tmp_path: Path, args: dict[str, Any], place: str) -> None:
    document = yaml.safe_load(SERVICE)
    serve = yaml.safe_load(document["spec"]["serveConfigV2"])
    serve["applications"][0]["args"] |= args
    document["spec"]["serveConfigV2"] = yaml.safe_dump(serve)
    text = yaml.safe_dump(document)
    (found,) = problems(tmp_path, text)
    assert found.line == next(n for n, line in enumerate(text.splitlines(), 1) if "serveConfigV2" in line)
    assert found.field.endswith(f": spec.serveConfigV2.applications[0].args.{place}")
    assert "stands readable in the manifest; write ${NAME}" in found.message


def test_a_serve_file_in_a_folded_string_is_checked_too_at_its_key(tmp_path: Path) -> None:
    document = yaml.safe_load(SERVICE)
    document["spec"]["serveConfigV2"] = document["spec"]["serveConfigV2"].replace("moe_ep: 72", "moe_epp: 72")
    text = yaml.safe_dump(document)
    line = next(number for number, one in enumerate(text.splitlines(), 1) if "serveConfigV2" in one)
    assert [problem.line for problem in problems(tmp_path, text) if "moe_epp" in problem.field] == [line]


def test_all_mistakes_of_a_folder_are_told_at_once_each_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(JOB.replace("backoffLimit", "backofLimit"))
    (tmp_path / "b.yml").write_text(SERVICE.replace("numOfHosts: 4", "numOfHosts: 0"))
    (tmp_path / "c.yaml").write_text("a: [\n")
    with pytest.raises(ConfigError) as caught:
        manifest_check.check(tmp_path)
    said = str(caught.value)
    assert all(name in said for name in ("a.yaml: spec.backofLimit", "b.yml: spec.rayClusterConfig", "c.yaml"))


def test_a_custom_resource_without_a_schema_is_named_as_such(tmp_path: Path) -> None:
    queue = tmp_path / "queue.yaml"
    queue.write_text("apiVersion: scheduling.run.ai/v2\nkind: Queue\nmetadata: {name: q}\nspec: {}\n")
    done = CliRunner().invoke(app, ["validate", str(queue)])
    assert "valid; Queue q, but for its own fields: there is no schema of it here" in done.output


def test_without_the_wheel_core_objects_are_not_called_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = resources.files

    def missing(name: str) -> Any:
        if name == "kubernetes_validate":
            raise ModuleNotFoundError(name)
        return installed(name)

    validation._core_names.cache_clear()
    monkeypatch.setattr(resources, "files", missing)
    document = Document({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}, {})
    with pytest.raises(PreflightError, match="dynamo-ray\\[kubernetes\\]"):
        validation.check(document)


def rule(path: str, value: Any, kind: str = "RayService") -> list[str]:
    """What is said of the rendered RayService with one place set otherwise; a value of ... removes it."""
    document = yaml.safe_load(SERVICE)
    inner: Any = document
    *outer, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in outer:
        inner = inner.setdefault(part, {}) if isinstance(inner, dict) else inner[part]
    if value is ...:
        inner.pop(last)
    elif isinstance(last, int):
        inner.insert(last, value)
    else:
        inner[last] = value
    return [f"{problem.field}: {problem.message}" for problem in rules.check(Document(document, {}))]


CONFIG = "spec/rayClusterConfig"
HEAD = f"{CONFIG}/headGroupSpec"
GROUP = f"{CONFIG}/workerGroupSpecs/1"
ENV = f"{HEAD}/template/spec/containers/0/env/0"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (f"{GROUP}/minReplicas", 2, "2 is more than maxReplicas 1"),
        (f"{GROUP}/replicas", 5, "5 is not within minReplicas 1 and maxReplicas 1"),
        (f"{GROUP}/numOfHosts", 0, "must be at least 1"),
        (f"{GROUP}/groupName", "ingress", "is an earlier group's"),
        (f"{GROUP}/rayStartParams/labels", "a=b", "write the group's own `labels`"),
        (f"{GROUP}/labels/a", "not a label!", "is no Kubernetes label"),
        (f"{GROUP}/idleTimeoutSeconds", 60, "only the autoscaler reads it"),
        (f"{GROUP}/template/spec/containers", [], "must hold a container"),
        (f"{CONFIG}/workerGroupSpecs/0/rayStartParams/num-cpus", "1", "the group's `resources` say it too"),
        (f"{CONFIG}/gcsFaultToleranceOptions/backend", "rocksdb", "feature gate GCSFaultToleranceEmbeddedStorage"),
        (f"{CONFIG}/gcsFaultToleranceOptions", {"redisPassword": {}}, "redisAddress: missing"),
        (f"{HEAD}/rayStartParams/redis-password", "x", "write gcsFaultToleranceOptions.redisPassword"),
        (f"{HEAD}/rayStartParams/redis-username", "x", "write gcsFaultToleranceOptions.redisUsername"),
        (ENV, {"name": "REDIS_PASSWORD", "value": "x"}, "write gcsFaultToleranceOptions.redisPassword"),
        (ENV, {"name": "RAY_REDIS_ADDRESS", "value": "x"}, "write gcsFaultToleranceOptions.redisAddress"),
        ("metadata/annotations", {"ray.io/ft-enabled": "true"}, "leave the annotation out"),
        ("metadata/annotations", {"ray.io/initializing-timeout": "soon"}, "is no positive duration"),
        ("spec/upgradeStrategy/type", "Recreate", "is none of NewCluster"),
        ("spec/upgradeStrategy/type", "NewClusterWithIncrementalUpgrade", "needs enableInTreeAutoscaling"),
        ("spec/rayClusterDeletionDelaySeconds", -1, "must not be negative"),
        (f"{HEAD}/headService", {"metadata": {"name": "x"}}, "names its head's Service itself"),
        (f"{HEAD}/template/spec/containers/0/ports", [{"containerPort": 8265}], "no port is called `serve`"),
        (f"{CONFIG}/rayVersion", ..., "authOptions.mode token needs it"),
    ],
)
def test_what_kuberay_would_not_act_on_is_refused(path: str, value: Any, expected: str) -> None:
    assert any(expected in one for one in rule(path, value))


def test_a_service_that_is_not_ours_is_checked_as_far_as_serves_own_schema(tmp_path: Path) -> None:
    ours = yaml.safe_load(SERVICE)
    serve = "applications:\n  - name: other\n    import_path: other.module:app\n"
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump({**ours, "spec": {**ours["spec"], "serveConfigV2": serve}}, default_style="|"))
    assert [found.title for found in manifest_check.check(file)] == ["RayService deepseek-r1"]
    found = problems(tmp_path, file.read_text().replace("import_path", "import_pth"))
    assert any("applications[0].import_pth" in problem.field for problem in found)


@pytest.mark.parametrize("junk", [None, [], "x", {"a": None}])
def test_whatever_stands_anywhere_is_refused_or_valid_and_never_a_crash(junk: Any) -> None:
    whole = yaml.safe_load(SERVICE)
    whole["spec"]["serveConfigV2"] = "applications: []"
    for place in _places(whole, 6):
        changed = copy.deepcopy(whole)
        inner = changed
        for part in place[:-1]:
            inner = inner[part]
        inner[place[-1]] = junk
        if validation.is_manifest(Document(changed, {})):
            validation.check(Document(changed, {}))
            rules.check(Document(changed, {}))


def _places(value: Any, depth: int, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if depth:
        for key, inner in items:
            yield from _places(inner, depth - 1, (*path, key))


def test_what_kuberay_acts_on_breaks_no_rule() -> None:
    assert rule("spec/suspend", False) == []
    assert rule("metadata/annotations", {"ray.io/initializing-timeout": "1h30m"}) == []


def test_a_crd_becomes_a_schema_that_refuses_what_an_api_server_would_drop() -> None:
    properties = {
        "spec": {
            "type": "object",
            "required": ["size", "mode", "port"],
            "properties": {
                "size": {"type": "integer", "minimum": 1},
                "mode": {"type": "string", "default": "a", "enum": ["a", "b"]},
                "port": {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True},
                "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                "type": {"type": "object", "properties": {"type": {"type": "string", "nullable": True}}},
            },
        }
    }
    version = {"name": "v1", "schema": {"openAPIV3Schema": {"type": "object", "properties": properties}}}
    crd = {"spec": {"group": "example.com", "names": {"kind": "Thing"}, "versions": [version]}}
    validator = validation.Draft202012Validator(derive.strict(crd, "v1"))

    def refused(**spec: Any) -> list[str]:
        whole = {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {}, "spec": spec}
        return [str(error.validator) for error in validator.iter_errors(whole)]

    assert refused(size=1, port="http", free={"any": 1}, type={"type": None}) == []
    assert refused(port=80) == ["required"]
    assert refused(size=1, port=80, sise=2) == ["additionalProperties"]
    assert refused(size=0, port=80.5, mode="c") == ["minimum", "enum", "type"]
    with pytest.raises(KeyError):
        derive.strict(crd, "v2")


def test_equal_parts_are_written_once_and_mean_the_same() -> None:
    part = {
        "type": "object",
        "additionalProperties": False,
        "properties": {f"key{i}": {"type": "string"} for i in range(9)},
    }
    made = derive.shared({"type": "object", "properties": {"a": part, "b": part, "type": part}})
    assert len(made["$defs"]) == 1
    validator = validation.Draft202012Validator(made)
    assert validator.is_valid({"a": {"key1": "x"}, "type": {"key2": "y"}})
    assert not validator.is_valid({"b": {"key10": "x"}})


def test_every_schema_says_where_it_is_from() -> None:
    known = validation.known_kinds()
    assert {
        "RayService",
        "RayCluster",
        "RayJob",
        "RayCronJob",
        "PodMonitor",
        "ServiceMonitor",
        "HTTPRoute",
        "ComputeDomain",
    } == set(known)
    assert all(" v" in source and "Apache-2.0" in source for source in known.values())


def test_a_file_of_several_documents_keeps_every_line() -> None:
    first, second = config_file.parse("a: 1\n---\n# here\nb:\n  c: 2\n", "x")
    assert (first.lines[("a",)], second.lines[("b", "c")]) == (1, 5)
    with pytest.raises(ConfigError, match=r"several documents"):
        config_file.read(RENDERED / "deepseek-r1-wideep" / "10-model-cache.yaml")
