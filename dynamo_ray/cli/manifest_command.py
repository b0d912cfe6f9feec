"""The command line of `dynamo-ray manifest`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dynamo_ray.kubernetes.options import Options

CLUSTER, WEIGHTS, AROUND = "Cluster", "Weights", "Around it"

File = Annotated[Path, typer.Argument(help="A `serve run` file.", show_default=False)]
Image = Annotated[str, typer.Option(help="With dynamo-ray and the engine; configs/docker has its Dockerfile.")]
Out = Annotated[Path | None, typer.Option(help="A folder to write; without it, to standard output.")]
Helm = Annotated[bool, typer.Option("--helm", help="Values for the chart in configs/helm instead.")]
Name = Annotated[str | None, typer.Option(help="Of the RayService; without it, the application's.")]
Namespace = Annotated[str, typer.Option(help="It is made too.")]
Kind = Annotated[str, typer.Option(help="rayservice, or raycluster and a Job that deploys on it.")]

Cloud = Annotated[str, typer.Option(help="bare, eks-efa, aks-infiniband or gke-roce.", rich_help_panel=CLUSTER)]
Scheduler = Annotated[str, typer.Option(help="Gangs: none, kai, volcano, kueue or yunikorn.", rich_help_panel=CLUSTER)]
Queue = Annotated[str | None, typer.Option(help="Of the scheduler.", rich_help_panel=CLUSTER)]
Topology = Annotated[str | None, typer.Option(help="As of plan: what the cluster has.", rich_help_panel=CLUSTER)]
Cpus = Annotated[int, typer.Option(help="Of engines' pods.", rich_help_panel=CLUSTER)]
Memory = Annotated[int, typer.Option("--memory-per-gpu", help="GiB, of engines' pods.", rich_help_panel=CLUSTER)]

HfSecret = Annotated[str | None, typer.Option(help="An existing Secret, key `token`.", rich_help_panel=WEIGHTS)]
Anonymous = Annotated[bool, typer.Option("--anonymous", help="Download without a token.", rich_help_panel=WEIGHTS)]
ModelPvc = Annotated[str | None, typer.Option(help="An existing claim that holds them.", rich_help_panel=WEIGHTS)]
ModelSource = Annotated[
    str | None, typer.Option(help="In place of the model's name: org/name or s3://...", rich_help_panel=WEIGHTS)
]
ModelConfig = Annotated[
    Path | None, typer.Option(help="The model's config.json, if it is not known.", rich_help_panel=WEIGHTS)
]
StorageClass = Annotated[
    str | None, typer.Option(help="Of the claim; it must be ReadWriteMany.", rich_help_panel=WEIGHTS)
]
CacheGib = Annotated[
    int | None, typer.Option(help="Of the claim; without it, by the model's size.", min=1, rich_help_panel=WEIGHTS)
]

Redis = Annotated[
    str | None, typer.Option(help="host:port: Ray's control store outlives its head.", rich_help_panel=AROUND)
]
RedisSecret = Annotated[str | None, typer.Option(help="An existing Secret, key `password`.", rich_help_panel=AROUND)]
EnvSecret = Annotated[
    str | None, typer.Option(help="An existing Secret with the variables that the file names.", rich_help_panel=AROUND)
]
Nats = Annotated[bool, typer.Option("--nats", help="A server for KV events.", rich_help_panel=AROUND)]
Monitoring = Annotated[
    bool, typer.Option("--monitoring", help="PodMonitors and a ServiceMonitor.", rich_help_panel=AROUND)
]
Gateway = Annotated[str | None, typer.Option(help="An existing Gateway to route from.", rich_help_panel=AROUND)]
Aiperf = Annotated[bool, typer.Option("--aiperf", help="A benchmark Job.", rich_help_panel=AROUND)]


def main(
    context: typer.Context,
    file: File,
    image: Image,
    out: Out = None,
    helm: Helm = False,
    name: Name = None,
    namespace: Namespace = "dynamo-ray",
    kind: Kind = "rayservice",
    cloud: Cloud = "bare",
    scheduler: Scheduler = "none",
    queue: Queue = None,
    topology: Topology = None,
    cpus_per_gpu: Cpus = 10,
    memory_gib_per_gpu: Memory = 160,
    hf_secret: HfSecret = None,
    anonymous: Anonymous = False,
    model_pvc: ModelPvc = None,
    model_source: ModelSource = None,
    model_config: ModelConfig = None,
    storage_class: StorageClass = None,
    cache_gib: CacheGib = None,
    redis: Redis = None,
    redis_secret: RedisSecret = None,
    env_secret: EnvSecret = None,
    nats: Nats = False,
    monitoring: Monitoring = False,
    gateway: Gateway = None,
    aiperf: Aiperf = False,
) -> None:
    """Write the Kubernetes manifests of a file, for KubeRay 1.7; nothing is applied, and no cluster is asked."""
    from dynamo_ray.cli import manifest
    from dynamo_ray.kubernetes import render

    options = _options(file, context.params)
    parts = manifest.objects(file, options, topology, model_config)
    made = render.helm_values(parts) if helm else render.files(parts)
    header = f"{manifest.HEADER}{command_line(file, options)}{' --helm' if helm else ''}"
    if out is None:
        typer.echo(f"{header}\n" + "---\n".join(made.values()), nl=False)
        return
    manifest.write(made, out, header)
    for written in made:
        typer.echo(str(out / written))


def _options(file: Path, given: Mapping[str, Any]) -> Options:
    """Of `main`'s parameters those that are named as a field of Options is."""
    from dynamo_ray.config_file import read
    from dynamo_ray.kubernetes import options

    checked = {
        "name": given["name"] or _first_name(read(file).value),
        "kind": options.kind(given["kind"]),
        "cloud": options.cloud(given["cloud"]),
        "scheduler": options.scheduler(given["scheduler"]),
    }
    return options.Options(**{entry.name: given[entry.name] for entry in fields(options.Options)} | checked)


def command_line(file: Path, options: Options) -> str:
    """What, given again, makes the same."""
    words = [str(file)]
    for entry in fields(options):
        value = getattr(options, entry.name)
        flag = "--" + entry.name.replace("_gib_per", "_per").replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not False and value != entry.default:
            words += [flag, str(value)]
    return shlex.join(words)


def _first_name(document: object) -> str:
    """Of the first application; what is wrong with the file is told when it is checked."""
    listed = document.get("applications") if isinstance(document, dict) else None
    first = listed[0] if isinstance(listed, list) and listed else None
    return str(first.get("name", "default")) if isinstance(first, dict) else "default"
