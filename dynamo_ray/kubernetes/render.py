"""objects(options, applications, ...): what to apply, or all that is in the way. Pure; behind `dynamo-ray manifest`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from dynamo_ray import secrets
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.config_file import Application, dotted
from dynamo_ray.errors import ConfigError, Problem
from dynamo_ray.kubernetes import clouds, platform, pods, ray_objects, rules
from dynamo_ray.kubernetes import options as checks
from dynamo_ray.kubernetes.options import Options
from dynamo_ray.kubernetes.pods import Object
from placement.gpus import GPU_TYPES, gpu_type
from placement.model_shape import ModelShape
from placement.topology import NO_ACCELERATOR


def objects(
    options: Options,
    applications: tuple[Application, ...],
    document: dict[str, Any],
    shapes: Mapping[str, ModelShape],
) -> dict[str, list[Object]]:
    """Kubernetes objects by the file they belong in, in the order in which they are to be applied.

    Args:
        options: of the cluster.
        applications: ours in the file; at least one.
        document: the whole file, as Serve takes it.
        shapes: of the models that are known, by model name; they size the claim for the weights.

    Raises:
        ConfigError: The configuration does not fit the cluster, or the options are wrong; everything at once.
    """
    problems = [*_problems(options, applications, document)]
    size_gib = options.cache_gib or _cache_gib(applications, shapes)
    if _fills_cache(options, applications) and size_gib is None:
        problems.append(Problem("--cache-gib", "the model's size is not known here; say how large its claim must be"))
    if problems:
        raise ConfigError(tuple(problems))
    pointed = _pointed_to_nats(options, applications, document)
    parts: dict[str, list[Object]] = {
        "00-namespace": platform.namespace(options),
        "10-model-cache": platform.model_cache(options, applications, size_gib or 0),
        "20-network": [
            *ray_objects.compute_domains(options, applications),
            *ray_objects.rdma_claims(options, applications),
        ],
        "30-nats": platform.nats(options) if options.nats else [],
        f"40-{options.kind}": [ray_objects.ray_object(options, applications, pointed)],
        "50-serve": ray_objects.deployer(options, applications, pointed) if options.kind == "raycluster" else [],
        "60-route": platform.route(options, applications) if options.gateway is not None else [],
        "70-monitoring": platform.monitors(options, applications) if options.monitoring else [],
        "80-aiperf": [*platform.benchmarks(options, applications)] if options.aiperf else [],
    }
    return {f"{name}.yaml": made for name, made in parts.items() if made}


def files(parts: Mapping[str, list[Object]]) -> dict[str, str]:
    """For `kubectl apply`: file name -> YAML. Equal objects give equal text."""
    return {name: _dump_all(made) for name, made in parts.items()}


def helm_values(parts: Mapping[str, list[Object]]) -> dict[str, str]:
    """For the chart in configs/helm, which installs them into its release's namespace: one file of values."""
    made = [one for part in parts.values() for one in part if one["kind"] != "Namespace"]
    return {"values.yaml": _dump_all([{"objects": made}])}


def _dump_all(made: list[Object]) -> str:
    return yaml.dump_all(made, Dumper=ray_objects.Plain, sort_keys=False, allow_unicode=True, width=10_000)


def _problems(options: Options, applications: tuple[Application, ...], document: dict[str, Any]) -> Iterator[Problem]:
    downloads = any(pods.is_downloaded(application.config) for application in applications)
    yield from checks.problems(options, downloads)
    if options.env_secret is not None and not any(pods.variables(one.config) for one in applications):
        yield Problem("--env-secret", "the file names no variable, as in `api_keys: [${API_KEY}]`; leave it out")
    if options.monitoring and len(applications) > 1:
        yield Problem("--monitoring", "which port of a pod is whose ingress is not fixed with several; leave it out")
    if options.aiperf and not all(pods.is_downloaded(application.config) for application in applications):
        yield Problem("--aiperf", "AIPerf needs a tokenizer's files, and a model made in each pod is on no claim")
    for application in applications:
        yield from _application_problems(options, application, document)
    folders = {
        application.config.model.folder.parent: application.index
        for application in applications
        if pods.is_downloaded(application.config)
    }
    for index in [*folders.values()][1:]:
        message = "every model of a file must be in one folder, where the claim with the weights is mounted"
        yield Problem(f"applications[{index}].args.model.path", message)
    for group in ray_objects.groups(applications):
        yield from _group_name(options, group)


def _application_problems(options: Options, application: Application, document: dict[str, Any]) -> Iterator[Problem]:
    path = f"applications[{application.index}].args"
    config = application.config
    if pods.is_downloaded(config):
        wrong = pods.folder_problem(config.model.path)
        if wrong is not None:
            yield Problem(f"{path}.model.path", wrong)
        if options.model_source is None and config.model.name.count("/") != 1 and options.model_pvc is None:
            message = f"{config.model.name!r} is no Hugging Face id (ORGANISATION/NAME); say where its files are"
            yield Problem("--model-source", message)
        for name, folder in config.model.loras.items():
            if not folder.startswith(f"{config.model.folder.parent}/"):
                yield Problem(f"{path}.model.loras.{name}", f"{folder} is not on the claim; put it beside the model")
    if config.placement.leaf_label is not None:
        message = "KubeRay gives all pods of a group the same labels, so that no pod can say its own leaf; leave it out"
        yield Problem(f"{path}.placement.leaf_label", message)
    if application.route_prefix is None:
        yield Problem(
            f"applications[{application.index}].route_prefix", "null leaves no way in; write a path such as /"
        )
    yield from _secret_problems(options, config, path)
    yield from _gpu_problems(options, application, path)
    yield from _event_problems(options, application, document)


def _secret_problems(options: Options, config: DeploymentConfig, path: str) -> Iterator[Problem]:
    for place, value in config.given_secrets.items():
        field, variable = f"{path}.{dotted(place)}", secrets.variable(value)
        if secrets.is_literal(value):
            message = "would stand readable in the manifest; write ${NAME}, and name the Secret with it by --env-secret"
            yield Problem(field, message)
        elif variable is not None and options.env_secret is None:
            message = f"missing: {field} is the variable {variable}; name an existing Secret with that key"
            yield Problem("--env-secret", message)
    if options.aiperf and config.api_keys and pods.first_key_variable(config) is None:
        yield Problem("--aiperf", f"AIPerf's pod is given an API key that is a variable; write one in {path}.api_keys")


def _gpu_problems(options: Options, application: Application, path: str) -> Iterator[Problem]:
    config = application.config
    if config.accelerator == NO_ACCELERATOR:
        return
    if config.accelerator not in GPU_TYPES:
        try:
            gpu_type(config.accelerator)
        except ValueError as error:
            yield Problem(f"{path}.accelerator", str(error))
        return
    wrong = clouds.problem(options.cloud, config.accelerator)
    if wrong is not None:
        yield Problem(f"{path}.{wrong.field}", wrong.message)
    most = GPU_TYPES[config.accelerator].gpus_per_node
    for role, role_config in config.roles.items():
        gpus = role_config.parallelism.num_ranks // role_config.nodes
        if gpus > most:
            nodes = role_config.parallelism.num_ranks // most
            message = f"{gpus} GPUs a node, and a machine of {config.accelerator} has {most}; write {nodes}"
            yield Problem(f"{path}.{role.value}.nodes", message)


def _event_problems(options: Options, application: Application, document: dict[str, Any]) -> Iterator[Problem]:
    path = f"applications[{application.index}].args"
    by_nats = str(application.config.events) == "nats"
    if options.nats and not by_nats:
        yield Problem(f"{path}.events", f"{application.config.events}: nothing would use --nats; write nats")
    if by_nats and not options.nats and not _nats_urls(document, application):
        yield Problem("--nats", "missing: KV events go by NATS, and nats.urls names no server")


def _group_name(options: Options, group: ray_objects.Group) -> Iterator[Problem]:
    """Its name is a label of its pods; with ours before it, of nodes of one NVLink domain."""
    if not rules.DNS_LABEL.fullmatch(group.name) or len(group.name) > rules.LABEL_LENGTH:
        message = f"{group.name!r}, of the application and its role, is no DNS label; rename the application"
        yield Problem(f"applications[{group.application.index}].name", message)
    made = f"{options.name}-{group.name}"
    if group.role_config.one_nvlink_domain and len(made) > rules.LABEL_LENGTH:
        left = rules.LABEL_LENGTH - len(group.name) - 1
        message = f"the label {made!r} of an NVLink domain has {len(made)} characters; {left} are left for the name"
        yield Problem("--name", message)


def _fills_cache(options: Options, applications: tuple[Application, ...]) -> bool:
    return options.model_pvc is None and any(pods.is_downloaded(one.config) for one in applications)


def _cache_gib(applications: tuple[Application, ...], shapes: Mapping[str, ModelShape]) -> int | None:
    """Of all models together; None where one's size is not known."""
    names = {one.config.model.name for one in applications if pods.is_downloaded(one.config)}
    if not names <= shapes.keys():
        return None
    return sum(platform.cache_gib(shapes[name]) for name in sorted(names))


def _pointed_to_nats(
    options: Options, applications: tuple[Application, ...], document: dict[str, Any]
) -> dict[str, Any]:
    """The document with our NATS server where it names none."""
    if not options.nats:
        return document
    changed = copy.deepcopy(document)
    for application in applications:
        if not _nats_urls(document, application):
            args = changed["applications"][application.index]["args"]
            url = f"nats://{platform.nats_name(options)}:{platform.NATS_PORT}"
            args["nats"] = {**(args.get("nats") or {}), "urls": [url]}
    return changed


def _nats_urls(document: dict[str, Any], application: Application) -> list[str]:
    args = document["applications"][application.index]["args"]
    return list((args.get("nats") or {}).get("urls") or ())
