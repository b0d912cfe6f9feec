"""What stands around the Ray cluster: namespace, weights, NATS, monitors, a route, a benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

from dynamo_ray.config import DeploymentConfig
from dynamo_ray.config_file import Application
from dynamo_ray.kubernetes import pods
from dynamo_ray.kubernetes.options import Options
from dynamo_ray.kubernetes.pods import Object
from placement.memory import weights
from placement.model_shape import ModelShape
from placement.parallelism import Parallelism
from placement.topology import NO_ACCELERATOR

NATS_IMAGE = "nats:2.12-alpine"
NATS_PORT = 4222
NATS_STORE = "8Gi"
PYTHON_IMAGE = "python:3.12-slim"
AIPERF_VERSION = "0.13.0"
AIPERF_FOLDER = "/artifacts"
CACHE_MARGIN = 1.25
"""The claim, over the weights: tokenizer, and what a download keeps beside a file until it is whole."""
CACHE_STEP_GIB = 50


IMAGE_GROUP = 1000
"""Of the user in configs/docker/Dockerfile."""


def download_command(source: str, folder: str) -> list[str]:
    """What brings a model's files into a folder and verifies them; run again, it goes on where it ended."""
    return ["dynamo-ray", "download", source, folder]


def cache_gib(shape: ModelShape) -> int:
    """The size of a claim that holds the model's weights."""
    gib = weights(shape, Parallelism(1, 1, 1, 1, 1)).total / 2**30
    return ceil(gib * CACHE_MARGIN / CACHE_STEP_GIB) * CACHE_STEP_GIB


def namespace(options: Options) -> list[Object]:
    return [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": options.namespace}}]


def model_cache(options: Options, applications: tuple[Application, ...], size_gib: int) -> list[Object]:
    """One claim that every pod mounts, and a Job that fills it; none where a claim is given, or nothing to download."""
    configs = tuple(application.config for application in applications)
    root = pods.cache_root(configs)
    if root is None or options.model_pvc is not None:
        return []
    claim = f"{options.name}-models"
    spec: Object = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": f"{size_gib}Gi"}}}
    if options.storage_class is not None:
        spec["storageClassName"] = options.storage_class
    made: list[Object] = [_object(options, "v1", "PersistentVolumeClaim", claim, spec)]
    folders = {str(config.model.folder): config for config in configs if pods.is_downloaded(config)}
    for index, (folder, config) in enumerate(folders.items()):
        name = f"{options.name}-download" if len(folders) == 1 else f"{options.name}-download-{index}"
        made.append(_download(options, name, options.model_source or config.model.name, folder, root, claim))
    return made


def _download(options: Options, name: str, source: str, folder: str, root: str, claim: str) -> Object:
    container: Object = {
        "name": "download",
        "image": options.image,
        "command": download_command(source, folder),
        "resources": {"requests": {"cpu": "4", "memory": "8Gi"}, "limits": {"memory": "16Gi"}},
        "volumeMounts": [{"name": pods.CACHE_VOLUME, "mountPath": root}],
    }
    if options.hf_secret is not None:
        token = {"secretKeyRef": {"name": options.hf_secret, "key": "token"}}
        container["env"] = [{"name": "HF_TOKEN", "valueFrom": token}]
    volume = {"name": pods.CACHE_VOLUME, "persistentVolumeClaim": {"claimName": claim}}
    task = _task(container, [volume])
    # A fresh volume belongs to root, and the image's user is another one.
    task["spec"]["securityContext"] = {"fsGroup": IMAGE_GROUP, "fsGroupChangePolicy": "OnRootMismatch"}
    # It resumes, so that another try costs only what was lost.
    return _object(options, "batch/v1", "Job", name, {"backoffLimit": 10, "template": task})


def nats(options: Options) -> list[Object]:
    """One server with JetStream, for KV events that things outside the Ray cluster listen to."""
    name = nats_name(options)
    labels = {"app.kubernetes.io/name": "nats", "app.kubernetes.io/instance": options.name}
    ports = {"client": NATS_PORT, "monitor": 8222}
    container = {
        "name": "nats",
        "image": NATS_IMAGE,
        "args": ["--jetstream", "--store_dir", "/data", "--http_port", "8222"],
        "ports": [{"name": key, "containerPort": port} for key, port in ports.items()],
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": "monitor"}, "periodSeconds": 5},
        "resources": {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "4Gi"}},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": NATS_STORE}}}
    pod = {"automountServiceAccountToken": False, "containers": [container]}
    spec = {
        "serviceName": name,
        "replicas": 1,
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
        "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": claim}],
    }
    service_ports = [{"name": key, "port": port, "targetPort": key} for key, port in ports.items()]
    return [
        _object(options, "v1", "Service", name, {"clusterIP": "None", "selector": labels, "ports": service_ports}),
        _object(options, "apps/v1", "StatefulSet", name, spec),
    ]


def nats_name(options: Options) -> str:
    return f"{options.name}-nats"


def monitors(options: Options, applications: tuple[Application, ...]) -> list[Object]:
    """What Prometheus' operator scrapes: each ingress replica past HAProxy, and every Ray node."""
    # Behind HAProxy a scrape would reach any replica; on its own port each pod answers for itself.
    paths = [f"{(application.route_prefix or '').rstrip('/')}/metrics" for application in applications]
    ingress = {
        "selector": {"matchLabels": {pods.NAME_LABEL: options.name, pods.POOL_LABEL: pods.INGRESS_POOL}},
        "podMetricsEndpoints": [{"port": "ingress", "path": path, "interval": "15s"} for path in paths],
    }
    nodes = {
        "selector": {"matchLabels": {pods.NAME_LABEL: options.name, "ray.io/node-type": "worker"}},
        "podMetricsEndpoints": [{"port": "metrics", "interval": "30s"}],
    }
    head = {
        "selector": {"matchLabels": {"ray.io/node-type": "head"}},
        "endpoints": [{"port": "metrics", "interval": "30s"}],
    }
    api = "monitoring.coreos.com/v1"
    return [
        _object(options, api, "PodMonitor", f"{options.name}-ingress", ingress),
        _object(options, api, "PodMonitor", f"{options.name}-ray-workers", nodes),
        _object(options, api, "ServiceMonitor", f"{options.name}-ray-head", head),
    ]


def route(options: Options, applications: tuple[Application, ...]) -> list[Object]:
    """From a Gateway to the ingress; a stream may take as long as the configuration lets it."""
    rules = []
    for application in applications:
        seconds = f"{ceil(application.config.limits.request_timeout_s)}s"
        rules.append(
            {
                "matches": [{"path": {"type": "PathPrefix", "value": application.route_prefix or "/"}}],
                "timeouts": {"request": seconds, "backendRequest": seconds},
                "backendRefs": [{"name": options.service, "port": pods.SERVE_PORT}],
            }
        )
    spec = {"parentRefs": [{"name": options.gateway}], "rules": rules}
    return [_object(options, "gateway.networking.k8s.io/v1", "HTTPRoute", options.name, spec)]


def benchmarks(options: Options, applications: tuple[Application, ...]) -> Iterator[Object]:
    """One AIPerf Job an application: it waits until the model is served, then measures it.

    The flags are those of NVIDIA Dynamo's perf.yaml; its load is the Job's environment, to be changed there.
    """
    root = pods.cache_root(tuple(application.config for application in applications))
    for application in applications:
        config = application.config
        name = f"{options.name}-aiperf" if len(applications) == 1 else f"{options.name}-aiperf-{application.index}"
        url = f"http://{options.service}:{pods.SERVE_PORT}{(application.route_prefix or '').rstrip('/')}"
        env = {
            "URL": url,
            "MODEL": config.model.name,
            "TOKENIZER": str(config.model.folder),
            "ISL": "1024",
            "OSL": "1024",
            "CONCURRENCY": str(default_concurrency(config)),
        }
        container: Object = {
            "name": "aiperf",
            "image": PYTHON_IMAGE,
            "command": ["sh", "-ec", _AIPERF],
            "env": [{"name": key, "value": value} for key, value in env.items()],
            "resources": {"requests": {"cpu": "8", "memory": "16Gi"}},
            "volumeMounts": [{"name": "artifacts", "mountPath": AIPERF_FOLDER}],
        }
        key = pods.first_key_variable(config)
        if key is not None:
            reference = {"name": options.env_secret, "key": key}
            container["env"].append({"name": "API_KEY", "valueFrom": {"secretKeyRef": reference}})
        volumes: list[Object] = [{"name": "artifacts", "emptyDir": {}}]
        if root is not None:
            claim = {"claimName": options.model_pvc or f"{options.name}-models", "readOnly": True}
            container["volumeMounts"].append({"name": pods.CACHE_VOLUME, "mountPath": root, "readOnly": True})
            volumes.append({"name": pods.CACHE_VOLUME, "persistentVolumeClaim": claim})
        spec = {"backoffLimit": 0, "template": _task(container, volumes, restart="Never")}
        yield _object(options, "batch/v1", "Job", name, spec)


def default_concurrency(config: DeploymentConfig) -> int:
    """How many requests the benchmark keeps in flight, unless told otherwise: by GPU, or one a rank on CPUs."""
    ranks = sum(role.replicas * role.parallelism.num_ranks for role in config.roles.values())
    return ranks * (CONCURRENCY_PER_GPU if config.accelerator != NO_ACCELERATOR else 1)


CONCURRENCY_PER_GPU = 16

_ASK = (
    "import os, urllib.request as u; key = {'Authorization': 'Bearer ' + os.environ.get('API_KEY', '')}; "
    "u.urlopen(u.Request(os.environ['URL'] + '/v1/models', headers=key), timeout=5)"
)
_AIPERF = f"""pip install --quiet aiperf=={AIPERF_VERSION}
until python -c "{_ASK}" 2>/dev/null; do
  echo "waiting for $URL"; sleep 5
done
exec aiperf profile --model "$MODEL" --tokenizer "$TOKENIZER" --url "$URL" --endpoint-type chat --streaming \\
  ${{API_KEY:+--api-key "$API_KEY"}} \\
  --synthetic-input-tokens-mean "$ISL" --synthetic-input-tokens-stddev 0 \\
  --output-tokens-mean "$OSL" --output-tokens-stddev 0 \\
  --extra-inputs "max_tokens:$OSL" --extra-inputs "min_tokens:$OSL" --extra-inputs ignore_eos:true \\
  --extra-inputs temperature:0 --concurrency "$CONCURRENCY" --request-count "$((CONCURRENCY * 10))" \\
  --warmup-request-count "$CONCURRENCY" --random-seed 100 --ui simple --artifact-dir {AIPERF_FOLDER}
"""


def _task(container: Object, volumes: list[Any], restart: str = "OnFailure") -> Object:
    spec = {"restartPolicy": restart, "automountServiceAccountToken": False, "containers": [container]}
    return {"spec": {**spec, "volumes": volumes}}


def _object(options: Options, api_version: str, kind: str, name: str, spec: Object) -> Object:
    metadata = {"name": name, "namespace": options.namespace}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, "spec": spec}
