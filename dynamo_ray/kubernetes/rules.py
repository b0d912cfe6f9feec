"""What KubeRay's own controller refuses beyond its schema: a RayService or RayCluster that it would not act on.

Source: ray-operator/controllers/ray/utils/validation.go and constant.go of KubeRay v1.7.0, with its default features.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dynamo_ray.config_file import Document, Place
from dynamo_ray.errors import Problem

LABEL_LENGTH = 63
"""Of a DNS label: of every Kubernetes Service's name."""
SERVE_SERVICE = "-serve-svc"
"""The longest that KubeRay appends to a cluster's name for a Service."""
CLUSTER_SUFFIX_LENGTH = 6
"""Of what it appends to a RayService's name to name its cluster."""
NAME_LIMITS = {
    "RayCluster": LABEL_LENGTH - len(SERVE_SERVICE),
    "RayService": LABEL_LENGTH - len(SERVE_SERVICE) - CLUSTER_SUFFIX_LENGTH,
}
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_NAME = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)")
_LABEL_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_DURATION = re.compile(r"(\d+(\.\d+)?(ns|us|ms|s|m|h))+|\d+")
_SECRET_LENGTH = 50
_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
_UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")

Values = Mapping[str, Any]
Found = Iterator[tuple[Place, str]]


def name_problem(kind: str, name: str) -> str | None:
    """What is wrong with the name of a RayService or RayCluster; None if nothing is."""
    limit = NAME_LIMITS[kind]
    if len(name) > limit:
        suffix = f" and {CLUSTER_SUFFIX_LENGTH} for its cluster's suffix" if kind == "RayService" else ""
        why = f"{LABEL_LENGTH} of a Service's name less {len(SERVE_SERVICE)} for {SERVE_SERVICE}{suffix}"
        return f"{name!r} has {len(name)} characters, KubeRay takes {limit} for a {kind} ({why}); shorten it"
    if not DNS_LABEL.fullmatch(name):
        return f"{name!r} is no DNS label; lower-case letters, digits and -, beginning with a letter"
    return None


def token_secret(cluster: str) -> str:
    """The Secret in which KubeRay keeps a cluster's token: its name is the last 50 characters of the cluster's.

    CheckName in controllers/ray/utils/util.go.
    """
    name = cluster[-_SECRET_LENGTH:]
    return name if name[0].isalpha() else f"r{name[1:]}"


def check(document: Document) -> list[Problem]:
    """Every rule that the object breaks; none for what is neither a RayService nor a RayCluster."""
    value = document.value
    kind = value.get("kind")
    spec = value.get("spec")
    if not isinstance(kind, str) or kind not in NAME_LIMITS or not isinstance(spec, dict):
        return []
    metadata = _mapping(value.get("metadata"))
    found = list(_named(kind, metadata))
    annotations = _mapping(metadata.get("annotations"))
    if kind == "RayCluster":
        found += [*_cluster(("spec",), spec, annotations)]
        found += [*_cluster_upgrade(spec)]
    else:
        found += [*_service(spec, annotations)]
        found += [*_cluster(("spec", "rayClusterConfig"), _mapping(spec.get("rayClusterConfig")), annotations)]
    return [document.problem(place, message) for place, message in found]


def _named(kind: str, metadata: Values) -> Found:
    if "name" not in metadata:
        yield ("metadata", "name"), "missing"
    elif (wrong := name_problem(kind, str(metadata["name"]))) is not None:
        yield ("metadata", "name"), wrong


def _service(spec: Values, annotations: Values) -> Found:
    cluster = _mapping(spec.get("rayClusterConfig"))
    head = _mapping(cluster.get("headGroupSpec"))
    if _mapping(_mapping(head.get("headService")).get("metadata")).get("name"):
        place: Place = ("spec", "rayClusterConfig", "headGroupSpec", "headService", "metadata", "name")
        yield place, "a RayService names its head's Service itself; leave it out"
    if _mapping(cluster.get("authOptions")).get("enableK8sTokenAuth"):
        yield ("spec", "rayClusterConfig", "authOptions", "enableK8sTokenAuth"), "not with a RayService; leave it out"
    strategy = _mapping(spec.get("upgradeStrategy"))
    kind = strategy.get("type")
    if kind is not None and kind not in _UPGRADES:
        yield ("spec", "upgradeStrategy", "type"), f"{kind!r} is none of {', '.join(_UPGRADES)}"
    if kind == "NewClusterWithIncrementalUpgrade":
        yield from _incremental(cluster, strategy)
    # Without any port KubeRay takes its own default ones.
    ports = [_mapping(port) for container in [*_containers(head)][:1] for port in container.get("ports") or ()]
    if ports and not any(_is_serving(port) for port in ports) and spec.get("serveService") is None:
        place = ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "containers", 0, "ports")
        yield place, "no port is called `serve`, so KubeRay makes no Service for clients; add {containerPort: 8000}"
    delay = spec.get("rayClusterDeletionDelaySeconds")
    if isinstance(delay, int) and delay < 0:
        yield ("spec", "rayClusterDeletionDelaySeconds"), f"must not be negative; it is {delay}"
    timeout = annotations.get("ray.io/initializing-timeout")
    if timeout and (not _DURATION.fullmatch(str(timeout)) or not re.search("[1-9]", str(timeout))):
        place = ("metadata", "annotations", "ray.io/initializing-timeout")
        yield place, f"{timeout!r} is no positive duration; write 45m or a number of seconds"


def _incremental(cluster: Values, strategy: Values) -> Found:
    here: Place = ("spec", "upgradeStrategy")
    if not cluster.get("enableInTreeAutoscaling"):
        yield (*here, "type"), "NewClusterWithIncrementalUpgrade needs enableInTreeAutoscaling: true"
    options = _mapping(strategy.get("clusterUpgradeOptions"))
    if not options:
        yield (*here, "clusterUpgradeOptions"), "missing: NewClusterWithIncrementalUpgrade needs it"
        return
    step, surge = options.get("stepSizePercent"), options.get("maxSurgePercent", 100)
    if not isinstance(step, int) or not 0 <= step <= surge <= 100:
        yield (
            (*here, "clusterUpgradeOptions", "stepSizePercent"),
            "must be 0 <= stepSizePercent <= maxSurgePercent <= 100",
        )
    if not isinstance(options.get("intervalSeconds"), int) or options["intervalSeconds"] <= 0:
        yield (*here, "clusterUpgradeOptions", "intervalSeconds"), "must be greater than 0"


def _cluster_upgrade(spec: Values) -> Found:
    kind = _mapping(spec.get("upgradeStrategy")).get("type")
    if kind not in (None, "Recreate", "None"):
        yield ("spec", "upgradeStrategy", "type"), f"{kind!r} is none of Recreate, None"


def _cluster(path: Place, spec: Values, annotations: Values) -> Found:
    head = _mapping(spec.get("headGroupSpec"))
    yield from _group((*path, "headGroupSpec"), head)
    groups = spec.get("workerGroupSpecs")
    seen: set[str] = set()
    for index, group in enumerate(groups if isinstance(groups, list) else []):
        if isinstance(group, dict):
            here: Place = (*path, "workerGroupSpecs", index)
            yield from _group(here, group)
            yield from _replicas(here, group)
            if group.get("idleTimeoutSeconds") is not None and not spec.get("enableInTreeAutoscaling"):
                yield (*here, "idleTimeoutSeconds"), "only the autoscaler reads it, and it is off; leave it out"
            name = str(group.get("groupName"))
            if name in seen:
                yield (*here, "groupName"), f"{name!r} is an earlier group's; every group needs its own"
            seen.add(name)
    yield from _storage(path, spec, annotations)
    if _mapping(spec.get("authOptions")).get("mode") == "token" and not spec.get("rayVersion"):
        yield (*path, "rayVersion"), "missing: authOptions.mode token needs it, 2.52.0 or newer"


def _group(path: Place, group: Values) -> Found:
    containers = list(_containers(group))
    if not containers:
        yield (*path, "template", "spec", "containers"), "must hold a container, Ray's first"
    params = _mapping(group.get("rayStartParams"))
    if "labels" in params:
        yield (*path, "rayStartParams", "labels"), "KubeRay does not take it; write the group's own `labels`"
    if group.get("resources"):
        for key in (key for key in _RESOURCES if params.get(key)):
            yield (*path, "rayStartParams", key), "the group's `resources` say it too; keep one of them"
    for key, value in _mapping(group.get("labels")).items():
        if not _is_label(str(key), str(value)):
            yield (*path, "labels", str(key)), f"{key}: {value!r} is no Kubernetes label"


def _replicas(path: Place, group: Values) -> Found:
    least, most, replicas = (group.get(key) for key in ("minReplicas", "maxReplicas", "replicas"))
    for key, number in (("minReplicas", least), ("maxReplicas", most)):
        if isinstance(number, int) and number < 0:
            yield (*path, key), f"must not be negative; it is {number}"
    if isinstance(least, int) and isinstance(most, int):
        if least > most:
            yield (*path, "minReplicas"), f"{least} is more than maxReplicas {most}"
        elif isinstance(replicas, int) and not least <= replicas <= most:
            yield (*path, "replicas"), f"{replicas} is not within minReplicas {least} and maxReplicas {most}"
    hosts = group.get("numOfHosts", 1)
    if isinstance(hosts, int) and hosts < 1:
        yield (*path, "numOfHosts"), f"must be at least 1; it is {hosts}"


def _storage(path: Place, spec: Values, annotations: Values) -> Found:
    """Where the GCS keeps what outlives the head: Redis, or RocksDB on a claim."""
    options = spec.get("gcsFaultToleranceOptions")
    head: Place = (*path, "headGroupSpec")
    params = _mapping(_mapping(spec.get("headGroupSpec")).get("rayStartParams"))
    container = next(iter(_containers(_mapping(spec.get("headGroupSpec")))), {})
    env = {str(entry.get("name")): index for index, entry in enumerate(_entries(container.get("env")))}
    variable: Place = (*head, "template", "spec", "containers", 0, "env")
    if "redis-username" in params:
        yield (*head, "rayStartParams", "redis-username"), "write gcsFaultToleranceOptions.redisUsername"
    if "REDIS_USERNAME" in env:
        yield (*variable, env["REDIS_USERNAME"]), "write gcsFaultToleranceOptions.redisUsername"
    if options is None:
        if "RAY_REDIS_ADDRESS" in env and annotations.get("ray.io/ft-enabled") != "true":
            yield (*variable, env["RAY_REDIS_ADDRESS"]), "write gcsFaultToleranceOptions.redisAddress"
        return
    if "redis-password" in params:
        yield (*head, "rayStartParams", "redis-password"), "write gcsFaultToleranceOptions.redisPassword"
    for name, field in (("REDIS_PASSWORD", "redisPassword"), ("RAY_REDIS_ADDRESS", "redisAddress")):
        if name in env:
            yield (*variable, env[name]), f"write gcsFaultToleranceOptions.{field}"
    for name, instead in (
        ("ray.io/ft-enabled", "gcsFaultToleranceOptions says so"),
        ("ray.io/external-storage-namespace", "write gcsFaultToleranceOptions.externalStorageNamespace"),
    ):
        if annotations.get(name):
            yield ("metadata", "annotations", name), f"{instead}; leave the annotation out"
    here: Place = (*path, "gcsFaultToleranceOptions")
    given = _mapping(options)
    if given.get("backend") == "rocksdb":
        yield (*here, "backend"), "rocksdb is behind KubeRay's feature gate GCSFaultToleranceEmbeddedStorage; use redis"
        for key in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
            if given.get(key):
                yield (*here, key), "not with backend rocksdb; leave it out"
    elif given.get("storage") is not None:
        yield (*here, "storage"), "is for backend rocksdb; leave it out"
    elif not given.get("redisAddress"):
        yield (*here, "redisAddress"), "missing: the GCS has nowhere to keep its state"


def _is_label(key: str, value: str) -> bool:
    prefix, slash, name = key.rpartition("/")
    named = len(name) <= LABEL_LENGTH and _LABEL_NAME.fullmatch(name) is not None
    placed = not slash or (len(prefix) <= 253 and _LABEL_PREFIX.fullmatch(prefix) is not None)
    return named and placed and len(value) <= LABEL_LENGTH and (not value or _LABEL_NAME.fullmatch(value) is not None)


def _is_serving(port: Values) -> bool:
    name = str(port.get("name"))
    return name == "serve" or name.startswith("serve-")


def _containers(group: Values) -> Iterator[Values]:
    yield from _entries(_mapping(_mapping(group.get("template")).get("spec")).get("containers"))


def _entries(value: Any) -> Iterator[Values]:
    yield from (entry for entry in (value if isinstance(value, list) else ()) if isinstance(entry, dict))


def _mapping(value: Any) -> Values:
    return value if isinstance(value, dict) else {}
