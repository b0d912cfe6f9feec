"""The command line of `dynamo-ray manifest`."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dynamo_ray.kubernetes.options import Options

CONFIGURATION, OUTPUT, WEIGHTS, CLUSTER, AROUND = "Configuration", "Output", "Weights", "Cluster", "Around it"


def main(
    file: Annotated[Path, typer.Argument(help="A `serve run` file.", show_default=False)],
    image: Annotated[str, typer.Option(help="With dynamo-ray and the engine; configs/docker has its Dockerfile.")],
    out: Annotated[Path | None, typer.Option(help="A folder to write; without it, to standard output.")] = None,
    helm: Annotated[bool, typer.Option("--helm", help="Values for the chart in configs/helm instead.")] = False,
    name: Annotated[str | None, typer.Option(help="Of the RayService; without it, the application's.")] = None,
    namespace: Annotated[str, typer.Option(help="It is made too.")] = "dynamo-ray",
    kind: Annotated[str, typer.Option(help="rayservice, or raycluster and a Job that deploys on it.")] = "rayservice",
    cloud: Annotated[
        str, typer.Option(help="bare, eks-efa, aks-infiniband or gke-roce.", rich_help_panel=CLUSTER)
    ] = "bare",
    scheduler: Annotated[
        str, typer.Option(help="Gangs: none, kai, volcano, kueue or yunikorn.", rich_help_panel=CLUSTER)
    ] = "none",
    queue: Annotated[str | None, typer.Option(help="Of the scheduler.", rich_help_panel=CLUSTER)] = None,
    topology: Annotated[
        str | None, typer.Option(help="As of plan: what the cluster has.", rich_help_panel=CLUSTER)
    ] = None,
    cpus_per_gpu: Annotated[int, typer.Option(help="Of engines' pods.", rich_help_panel=CLUSTER)] = 10,
    memory_per_gpu: Annotated[int, typer.Option(help="GiB, of engines' pods.", rich_help_panel=CLUSTER)] = 160,
    hf_secret: Annotated[
        str | None, typer.Option(help="An existing Secret, key `token`.", rich_help_panel=WEIGHTS)
    ] = None,
    anonymous: Annotated[
        bool, typer.Option("--anonymous", help="Download without a token.", rich_help_panel=WEIGHTS)
    ] = False,
    model_pvc: Annotated[
        str | None, typer.Option(help="An existing claim that holds them.", rich_help_panel=WEIGHTS)
    ] = None,
    model_source: Annotated[
        str | None, typer.Option(help="In place of the model's name: org/name or s3://...", rich_help_panel=WEIGHTS)
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="The model's config.json, if it is not known.", rich_help_panel=WEIGHTS)
    ] = None,
    storage_class: Annotated[
        str | None, typer.Option(help="Of the claim; it must be ReadWriteMany.", rich_help_panel=WEIGHTS)
    ] = None,
    cache_gib: Annotated[
        int | None, typer.Option(help="Of the claim; without it, by the model's size.", min=1, rich_help_panel=WEIGHTS)
    ] = None,
    redis: Annotated[
        str | None, typer.Option(help="host:port: Ray's control store outlives its head.", rich_help_panel=AROUND)
    ] = None,
    redis_secret: Annotated[
        str | None, typer.Option(help="An existing Secret, key `password`.", rich_help_panel=AROUND)
    ] = None,
    nats: Annotated[bool, typer.Option("--nats", help="A server for KV events.", rich_help_panel=AROUND)] = False,
    monitoring: Annotated[
        bool, typer.Option("--monitoring", help="PodMonitors and a ServiceMonitor.", rich_help_panel=AROUND)
    ] = False,
    gateway: Annotated[
        str | None, typer.Option(help="An existing Gateway to route from.", rich_help_panel=AROUND)
    ] = None,
    aiperf: Annotated[bool, typer.Option("--aiperf", help="A benchmark Job.", rich_help_panel=AROUND)] = False,
) -> None:
    """Write the Kubernetes manifests of a file, for KubeRay 1.7; nothing is applied, and no cluster is asked."""
    from dynamo_ray.cli import manifest
    from dynamo_ray.config_file import read
    from dynamo_ray.kubernetes import options as choices
    from dynamo_ray.kubernetes import render

    options = choices.Options(
        image=image,
        name=name or _first_name(read(file).value),
        namespace=namespace,
        kind=choices.kind(kind),
        cloud=choices.cloud(cloud),
        scheduler=choices.scheduler(scheduler),
        queue=queue,
        hf_secret=hf_secret,
        anonymous=anonymous,
        model_pvc=model_pvc,
        model_source=model_source,
        storage_class=storage_class,
        cache_gib=cache_gib,
        redis=redis,
        redis_secret=redis_secret,
        nats=nats,
        monitoring=monitoring,
        gateway=gateway,
        aiperf=aiperf,
        cpus_per_gpu=cpus_per_gpu,
        memory_gib_per_gpu=memory_per_gpu,
    )
    parts = manifest.objects(file, options, topology, model_config)
    made = render.helm_values(parts) if helm else render.files(parts)
    header = f"{manifest.HEADER}{command_line(file, options)}{' --helm' if helm else ''}"
    if out is None:
        typer.echo(f"{header}\n" + "---\n".join(made.values()), nl=False)
        return
    manifest.write(made, out, header)
    for written in made:
        typer.echo(str(out / written))


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
