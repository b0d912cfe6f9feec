"""The RayService, or the RayCluster and what deploys on it; and ComputeDomains for NVLink across nodes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from backends.engine import Role
from dynamo_ray.config import DeploymentConfig, RoleConfig
from dynamo_ray.config_file import Application
from dynamo_ray.kubernetes import clouds, pods, rules
from dynamo_ray.kubernetes.options import Options
from dynamo_ray.kubernetes.pods import Object
from placement.topology import DOMAIN_LABEL, NO_ACCELERATOR

RAY_VERSION = "2.60.0"
DEPLOY_CONFIG = "serve.yaml"
INGRESS_RESOURCE = "ingress"
"""Of Ray's: pods of the ingress have one for each application and no CPU, so that they hold a replica of each, and no
worker."""
CONTROL_RESOURCE = "control"
"""Of the same pods: orchestrators take a little of it, so that no pod of an engine runs a part of Serve."""


@dataclass(frozen=True, slots=True)
class Group:
    """A KubeRay worker group: pods of one role."""

    name: str
    application: Application
    role: Role
    replicas: int
    hosts: int
    """Pods of one replica: the nodes of a worker."""

    @property
    def config(self) -> DeploymentConfig:
        return self.application.config

    @property
    def role_config(self) -> RoleConfig:
        return self.config.roles[self.role]


def groups(applications: tuple[Application, ...]) -> tuple[Group, ...]:
    """One a role; for a role that stays in an NVLink domain one a worker, because labels are a group's, not a pod's.

    Spare nodes are a group of their own, of pods as the widest role has them.
    """
    found: list[Group] = []
    for application in applications:
        prefix = f"{application.name}-" if len(applications) > 1 else ""
        for role, config in application.config.roles.items():
            name = f"{prefix}{role.value}"
            if config.one_nvlink_domain:
                each = [f"{name}-{index}" for index in range(config.replicas)]
                found += [Group(worker, application, role, 1, config.nodes) for worker in each]
            else:
                found.append(Group(name, application, role, config.replicas, config.nodes))
        if application.config.placement.spares:
            widest = max(application.config.roles, key=lambda role: ranks_per_node(application.config.roles[role]))
            found.append(Group(f"{prefix}spares", application, widest, application.config.placement.spares, 1))
    return tuple(found)


def ranks_per_node(role: RoleConfig) -> int:
    return role.parallelism.num_ranks // role.nodes


def ray_object(options: Options, applications: tuple[Application, ...], document: dict[str, Any]) -> Object:
    """What KubeRay acts on."""
    metadata: Object = {"name": options.name, "namespace": options.namespace}
    labels = gang_labels(options)
    if labels:
        metadata["labels"] = labels
    cluster = _cluster(options, applications, document)
    if options.kind == "raycluster":
        return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": cluster}
    spec = {
        # A new cluster beside the old one would need all GPUs twice.
        "upgradeStrategy": {"type": "None"},
        "excludeHeadPodFromServeSvc": True,
        "serveConfigV2": serve_config(document, applications),
        "rayClusterConfig": cluster,
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": metadata, "spec": spec}


def gang_labels(options: Options) -> dict[str, str]:
    """By which all pods are scheduled, or none. KubeRay copies a RayService's labels to its cluster."""
    queue = options.queue
    match options.scheduler:
        case "none":
            return {}
        case "kai":
            return {"kai.scheduler/queue": str(queue)}
        case "volcano":
            return {} if queue is None else {"volcano.sh/queue-name": queue}
        case "kueue":
            return {"kueue.x-k8s.io/queue-name": str(queue)}
        case "yunikorn":
            return {
                "ray.io/gang-scheduling-enabled": "true",
                "yunikorn.apache.org/app-id": options.name,
                "yunikorn.apache.org/queue": str(queue),
            }


def serve_config(document: dict[str, Any], applications: tuple[Application, ...]) -> str:
    """The file as Serve takes it in a cluster: listening on every pod, its ingress on pods of its own."""
    changed = copy.deepcopy(document)
    changed["proxy_location"] = "EveryNode"
    changed["http_options"] = {**(changed.get("http_options") or {}), "host": "0.0.0.0", "port": pods.SERVE_PORT}
    for application in applications:
        entry = changed["applications"][application.index]
        given = {deployment["name"]: deployment for deployment in entry.get("deployments") or ()}
        for name, resource, amount in (("Ingress", INGRESS_RESOURCE, 1), ("Orchestrator", CONTROL_RESOURCE, 0.01)):
            deployment = given.setdefault(name, {"name": name, "num_replicas": 1})
            actor = {"num_cpus": 0, "resources": {resource: amount}}
            deployment["ray_actor_options"] = {**(deployment.get("ray_actor_options") or {}), **actor}
        entry["deployments"] = list(given.values())
    return yaml.dump(changed, Dumper=Plain, sort_keys=False, allow_unicode=True, width=10_000)


def ingress_replicas(document: dict[str, Any], applications: tuple[Application, ...]) -> int:
    """The most that an application has: so many pods hold one of each."""
    counts = [1]
    for application in applications:
        for deployment in document["applications"][application.index].get("deployments") or ():
            if deployment["name"] == "Ingress":
                counts.append(int(deployment.get("num_replicas") or 1))
    return max(counts)


def compute_domains(options: Options, applications: tuple[Application, ...]) -> Iterator[Object]:
    for group in groups(applications):
        if group.hosts > 1 and pods.shares_nvlink(group.config, group.role_config):
            name = f"{options.name}-{group.name}"
            yield {
                "apiVersion": "resource.nvidia.com/v1beta1",
                "kind": "ComputeDomain",
                "metadata": {"name": name, "namespace": options.namespace},
                "spec": {
                    "numNodes": group.role_config.nodes,
                    "channel": {"resourceClaimTemplate": {"name": pods.channel_name(name)}},
                },
            }


def rdma_claims(options: Options, applications: tuple[Application, ...]) -> Iterator[Object]:
    seen: set[str] = set()
    for group in groups(applications):
        config, role = group.config, group.role_config
        if config.accelerator == NO_ACCELERATOR:
            continue
        gpus = ranks_per_node(role)
        name = f"{options.name}-rdma-{gpus}gpu"
        template = clouds.claim_template(options.cloud, config.accelerator, gpus, name)
        if template is not None and name not in seen:
            seen.add(name)
            template["metadata"]["namespace"] = options.namespace
            yield template


def deployer(options: Options, applications: tuple[Application, ...], document: dict[str, Any]) -> list[Object]:
    """For a RayCluster: the configuration, a Job that deploys it, and the Service that a RayService would have."""
    here = {"namespace": options.namespace}
    name = f"{options.name}-serve"
    token = {"secretKeyRef": {"name": rules.token_secret(options.name), "key": "auth_token"}}
    container = {
        "name": "serve-deploy",
        "image": options.image,
        "command": ["serve", "deploy", "--address", f"http://{options.name}-head-svc:8265", f"/config/{DEPLOY_CONFIG}"],
        "env": [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": token}],
        "volumeMounts": [{"name": "config", "mountPath": "/config"}],
    }
    pod = {
        "restartPolicy": "OnFailure",
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": name}}],
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name, **here},
            "data": {DEPLOY_CONFIG: serve_config(document, applications)},
        },
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": f"{options.name}-deploy", **here},
            "spec": {"backoffLimit": 20, "template": {"spec": pod}},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": options.service, **here},
            "spec": {
                "selector": {pods.NAME_LABEL: options.name, pods.POOL_LABEL: pods.INGRESS_POOL},
                "ports": [{"name": "serve", "port": pods.SERVE_PORT, "targetPort": "serve"}],
            },
        },
    ]


def _cluster(options: Options, applications: tuple[Application, ...], document: dict[str, Any]) -> Object:
    configs = tuple(application.config for application in applications)
    store = {"object-store-memory": str(pods.OBJECT_STORE_BYTES)}
    num_ingress = ingress_replicas(document, applications)
    spec: Object = {
        "rayVersion": RAY_VERSION,
        # Ray's ports take only who has the token, which KubeRay puts in a Secret.
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": False,
        "headGroupSpec": {
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0", **store},
            "template": pods.head(options, configs),
        },
        "workerGroupSpecs": [
            {
                "groupName": pods.INGRESS_POOL,
                **_fixed(num_ingress, 1),
                "labels": {pods.POOL_LABEL: pods.INGRESS_POOL},
                "resources": {"CPU": "0", INGRESS_RESOURCE: str(len(applications)), CONTROL_RESOURCE: "1"},
                "rayStartParams": dict(store),
                "template": pods.ingress(options, configs),
            },
            *(_group(options, group, store) for group in groups(applications)),
        ],
    }
    if options.redis is not None:
        spec["gcsFaultToleranceOptions"] = _redis(options)
    return spec


def _group(options: Options, group: Group, store: dict[str, str]) -> Object:
    role = group.role_config
    labels = {pods.POOL_LABEL: group.name}
    if role.one_nvlink_domain and group.hosts > 1:
        labels[DOMAIN_LABEL] = f"{options.name}-{group.name}"
    return {
        "groupName": group.name,
        **_fixed(group.replicas, group.hosts),
        "labels": labels,
        "rayStartParams": dict(store),
        "template": pods.engine(options, group.config, role, group.name, group.hosts),
    }


def _fixed(replicas: int, hosts: int) -> Object:
    """A worker is whole or not at all, so nothing scales a group."""
    return {"replicas": replicas, "minReplicas": replicas, "maxReplicas": replicas, "numOfHosts": hosts}


def _redis(options: Options) -> Object:
    made: Object = {"redisAddress": options.redis}
    if options.redis_secret is not None:
        reference = {"name": options.redis_secret, "key": "password"}
        made["redisPassword"] = {"valueFrom": {"secretKeyRef": reference}}
    return made


class Plain(yaml.SafeDumper):
    """Multi-line strings as literal blocks, lists inside their keys, no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


Plain.add_representer(str, _text)
