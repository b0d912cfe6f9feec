"""Pod templates: the head, the pods of the ingress, and the pods of each role's engines."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from pathlib import Path
from typing import Any

from dynamo_ray import models, secrets
from dynamo_ray.config import HAPROXY_ENVIRONMENT, DeploymentConfig, RoleConfig
from dynamo_ray.kubernetes import clouds
from dynamo_ray.kubernetes.options import Options
from dynamo_ray.priority import PRIORITY_ENVIRONMENT
from placement.topology import NO_ACCELERATOR

Object = dict[str, Any]

LABEL_PREFIX = "dynamo-ray.io"
POOL_LABEL = f"{LABEL_PREFIX}/pool"
"""Both a pod's label and its Ray node's: `ingress` or a role's group."""
NAME_LABEL = f"{LABEL_PREFIX}/name"
"""Of a pod: the RayService or RayCluster."""
INGRESS_POOL = "ingress"
SERVE_PORT = 8000
REPLICA_PORT = 30000
"""On which an ingress replica itself listens, behind HAProxy (Serve's direct ingress): the first free one, and there is
one replica a pod."""
HOME = "/home/ray"
MODELS_FOLDER = f"{HOME}/.cache/dynamo-ray"
"""Where the models that a command makes are."""
CACHE_VOLUME = "models"
OBJECT_STORE_BYTES = 2**30
"""Tokens do not go through it."""
SHM_GIB_PER_GPU = 10
"""As NVIDIA Dynamo's recipes for DeepSeek-R1 have it: 80 GiB for 8 GPUs."""
HEAD_CPUS, HEAD_GIB = 4, 16
INGRESS_CPUS, INGRESS_GIB = 4, 8
RAY_GIB = 2
"""Of a pod on CPUs, for Ray itself."""
DRAIN_MARGIN_S = 60

_RAY_HEALTH = {"path": "/api/healthz", "port": 52365}
"""Of Ray's agent on every node: the raylet's, and on the head the control store's too (Ray 2.53)."""
_PROXY_HEALTH = {"path": "/-/healthz", "port": SERVE_PORT}


def head(options: Options, configs: tuple[DeploymentConfig, ...]) -> Object:
    """Runs Ray's control store and Serve's controller; no worker, no ingress."""
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080, "serve": SERVE_PORT}
    container = _container("ray-head", options, configs, ports)
    container["resources"] = _both({"cpu": str(HEAD_CPUS), "memory": f"{HEAD_GIB}Gi"})
    container["readinessProbe"] = _probe(_RAY_HEALTH, failures=10, timeout_s=5)
    return _pod(options, container, _shm(RAY_GIB), (), "head")


def ingress(options: Options, configs: tuple[DeploymentConfig, ...]) -> Object:
    """One replica of each ingress, and HAProxy in front of it."""
    container = _container(
        "ray-worker", options, configs, {"metrics": 8080, "serve": SERVE_PORT, "ingress": REPLICA_PORT}
    )
    container["env"] += secret_environment(options, [name for config in configs for name in variables(config)])
    container["resources"] = _both({"cpu": str(INGRESS_CPUS), "memory": f"{INGRESS_GIB}Gi"})
    container["readinessProbe"] = _probe(_PROXY_HEALTH, failures=1)
    # It tokenises: it reads the tokenizer's files, not the weights.
    pod = _pod(options, container, _shm(RAY_GIB), configs, INGRESS_POOL)
    pod["spec"]["terminationGracePeriodSeconds"] = _grace_s(configs)
    return pod


def engine(options: Options, config: DeploymentConfig, role: RoleConfig, group: str, hosts: int) -> Object:
    """One node of a worker of that role, which that many pods are one replica of."""
    on_gpus = config.accelerator != NO_ACCELERATOR
    container = _container("ray-worker", options, (config,), {"metrics": 8080})
    container["env"] += secret_environment(options, variables(config, of="nats"))
    # KubeRay puts every worker pod of a RayService behind the Service of the ingress, so that a pod without Serve's
    # proxy must not be ready there: it stays 0/1 by design.
    container["readinessProbe"] = _probe(_PROXY_HEALTH if options.kind == "rayservice" else _RAY_HEALTH, failures=1)
    if not on_gpus:
        memory_gib = ceil(role.resources.memory_gib) + RAY_GIB
        container["resources"] = _both({"cpu": str(max(1, ceil(role.resources.cpus))), "memory": f"{memory_gib}Gi"})
        return _pod(options, container, _shm(memory_gib), (config,), group)
    gpus = role.parallelism.num_ranks // role.nodes
    container["resources"] = _gpu_resources(options, config.accelerator, role, gpus)
    container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    pod = _pod(options, container, _shm(SHM_GIB_PER_GPU * gpus), (config,), group)
    spec = pod["spec"]
    spec["nodeSelector"] = dict(clouds.FABRICS[options.cloud].machines[config.accelerator].selector)
    spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    spec["terminationGracePeriodSeconds"] = _grace_s((config,))
    _add_fabric(options, spec, f"{options.name}-rdma-{gpus}gpu")
    if hosts > 1 and shares_nvlink(config, role):
        _add_domain(spec, f"{options.name}-{group}", pod["metadata"]["labels"])
    return pod


def variables(config: DeploymentConfig, of: str | None = None) -> list[str]:
    """Those that its secrets are in, or those of one field."""
    named = (secrets.variable(value) for place, value in config.given_secrets.items() if of in (None, place[0]))
    return [name for name in named if name is not None]


def first_key_variable(config: DeploymentConfig) -> str | None:
    """Of an API key that is in one."""
    return next(iter(variables(config, of="api_keys")), None)


def secret_environment(options: Options, names: Iterable[str]) -> list[Object]:
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": options.env_secret, "key": name}}}
        for name in dict.fromkeys(names)
    ]


def shares_nvlink(config: DeploymentConfig, role: RoleConfig) -> bool:
    """Whether a worker of that role spans nodes over NVLink, for which it needs a ComputeDomain."""
    return role.one_nvlink_domain and role.nodes > 1 and config.accelerator != NO_ACCELERATOR


def channel_name(domain: str) -> str:
    """Of the ResourceClaimTemplate that NVIDIA's driver makes for a ComputeDomain."""
    return f"{domain}-channel"


def cache_root(configs: tuple[DeploymentConfig, ...]) -> str | None:
    """Where the claim with the weights is mounted: the folder that all downloaded models are in; None for none."""
    folders = [config.model.folder for config in configs if is_downloaded(config)]
    return str(folders[0].parent) if folders else None


def is_downloaded(config: DeploymentConfig) -> bool:
    """Whether its model comes from elsewhere; others are made by `dynamo-ray model` in each pod."""
    return models.key_of(config.model.folder) is None


def _grace_s(configs: tuple[DeploymentConfig, ...]) -> int:
    return ceil(max(config.limits.drain_timeout_s for config in configs)) + DRAIN_MARGIN_S


def _container(name: str, options: Options, configs: tuple[DeploymentConfig, ...], ports: dict[str, int]) -> Object:
    return {
        "name": name,
        "image": options.image,
        "env": [{"name": key, "value": value} for key, value in _environment(configs).items()],
        "ports": [{"name": key, "containerPort": port} for key, port in ports.items()],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
        # As KubeRay's own: ten minutes without a healthy Ray, and the container starts anew.
        "livenessProbe": _probe(_RAY_HEALTH, failures=120, timeout_s=5),
    }


def _environment(configs: tuple[DeploymentConfig, ...]) -> dict[str, str]:
    """What Ray and Serve read when they start, on every pod; as `dynamo-ray up` sets it."""
    longest_s = max(config.limits.request_timeout_s for config in configs)
    return {
        **HAPROXY_ENVIRONMENT,
        **PRIORITY_ENVIRONMENT,
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(INGRESS_CPUS),
        # HAProxy cuts what still streams this long after a reload (ray#66056).
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(ceil(longest_s)),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HOME": HOME,
    }


def _gpu_resources(options: Options, accelerator: str, role: RoleConfig, gpus: int) -> Object:
    memory_gib = max(options.memory_gib_per_gpu * gpus, ceil(role.resources.memory_gib) + SHM_GIB_PER_GPU * gpus)
    cpus = max(options.cpus_per_gpu * gpus, ceil(role.resources.cpus))
    devices = {"nvidia.com/gpu": str(gpus), **clouds.device_limits(options.cloud, accelerator, gpus)}
    fixed = {"memory": f"{memory_gib}Gi", **devices}
    return {"requests": {"cpu": str(cpus), **fixed}, "limits": fixed}


def _pod(
    options: Options, container: Object, volume: Object, configs: tuple[DeploymentConfig, ...], pool: str
) -> Object:
    spec: Object = {
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": [volume],
    }
    root = cache_root(configs)
    if root is not None:
        claim = options.model_pvc or f"{options.name}-models"
        container["volumeMounts"].append({"name": CACHE_VOLUME, "mountPath": root, "readOnly": True})
        spec["volumes"].append({"name": CACHE_VOLUME, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
    made = [key for config in configs if (key := models.key_of(config.model.folder)) is not None]
    if made:
        _add_made_models(options, spec, list(dict.fromkeys(made)))
    return {"metadata": {"labels": {NAME_LABEL: options.name, POOL_LABEL: pool}}, "spec": spec}


def _add_made_models(options: Options, spec: Object, keys: list[str]) -> None:
    mount = {"name": "made-models", "mountPath": MODELS_FOLDER}
    spec["initContainers"] = [
        {
            "name": "make-models",
            "image": options.image,
            "command": ["sh", "-ec", "; ".join(f"dynamo-ray model {key}" for key in keys)],
            "env": [{"name": "HOME", "value": HOME}],
            "volumeMounts": [mount],
        }
    ]
    spec["containers"][0]["volumeMounts"].append(mount)
    spec["volumes"].append({"name": "made-models", "emptyDir": {}})


def _add_fabric(options: Options, spec: Object, claim: str) -> None:
    fabric = clouds.FABRICS[options.cloud]
    container = spec["containers"][0]
    container["env"] += [{"name": key, "value": value} for key, value in fabric.env.items()]
    for index, (mount, path) in enumerate(fabric.host_paths.items()):
        container["volumeMounts"].append({"name": f"host-{index}", "mountPath": mount, "readOnly": True})
        spec["volumes"].append({"name": f"host-{index}", "hostPath": {"path": path}})
    if fabric.device_class is not None:
        _add_claim(spec, "rdma", claim)


def _add_domain(spec: Object, domain: str, labels: Object) -> None:
    """All pods with these labels in one NVLink domain, with a channel of it."""
    _add_claim(spec, "nvlink", channel_name(domain))
    term = {"labelSelector": {"matchLabels": dict(labels)}, "topologyKey": clouds.CLIQUE_LABEL}
    spec["affinity"] = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def _add_claim(spec: Object, name: str, template: str) -> None:
    spec.setdefault("resourceClaims", []).append({"name": name, "resourceClaimTemplateName": template})
    spec["containers"][0]["resources"].setdefault("claims", []).append({"name": name})


def _shm(gib: int) -> Object:
    return {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{gib}Gi"}}


def _both(resources: dict[str, str]) -> Object:
    return {"requests": dict(resources), "limits": dict(resources)}


def _probe(check: Object, failures: int, timeout_s: int = 2) -> Object:
    return {
        "httpGet": dict(check),
        "initialDelaySeconds": 10,
        "periodSeconds": 5,
        "timeoutSeconds": timeout_s,
        "failureThreshold": failures,
    }


def folder_problem(path: str) -> str | None:
    """Why pods could not have their model in that folder; None where they can."""
    if not path.startswith("/") or len(Path(path).parts) < 3:
        return f"{path}: write an absolute folder inside another, such as /models/NAME; the claim is mounted above it"
    return None
