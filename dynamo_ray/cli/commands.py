"""The commands of `dynamo-ray`."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import psutil
import typer
from rich.console import Console

from dynamo_ray.cli import control, manifest_command, route, state
from dynamo_ray.cli.display import Progress, table
from dynamo_ray.cli.interrupts import FORCED_EXIT_CODE, Interrupts
from dynamo_ray.cli.options import naming
from dynamo_ray.errors import PreflightError, Problem, StartupError

if TYPE_CHECKING:
    from dynamo_ray.cli.processes import PeakMemory
    from dynamo_ray.cli.up import Deployment

app = typer.Typer(
    name="dynamo-ray",
    help="Serve language models on Ray, prefill and decode apart.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

File = Annotated[Path, typer.Argument(help="A `serve run` file.", show_default=False)]
Address = Annotated[str | None, typer.Option(help="Of a running Ray; without it, a private one.", envvar="RAY_ADDRESS")]
Port = Annotated[int | None, typer.Option(help="HTTP port, in place of the file's.", min=1, max=65535)]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]

DOWN_TIMEOUT_S = 120.0
"""On someone else's Ray, which goes on ending what has not ended by then."""
KILL_TIMEOUT_S = 15.0


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="A `serve run` file, Kubernetes manifests, or a folder of them.")],
) -> None:
    """Check every level of a file; exit code 2 and every mistake at once if anything is wrong."""
    from dynamo_ray.cli import manifest_check
    from dynamo_ray.cli.checked import check_file

    if manifest_check.holds_manifests(file):
        for found in manifest_check.check(file):
            unknown = "" if found.checked else ", but for its own fields: there is no schema of it here"
            typer.echo(f"{found.file}: valid; {found.title}{unknown}")
        return
    checked = check_file(file)
    for application in checked.applications:
        roles = ", ".join(f"{config.replicas} {role.value}" for role, config in application.config.roles.items())
        typer.echo(f"{file}: valid; {application.name} serves {application.config.model.name} with {roles}")


@app.command()
def plan(
    file: File,
    topology: Annotated[str | None, typer.Option(help="13x8xH100, 16x8xH200/4, 18x4xGB200@nvl72, or a file.")] = None,
    address: Annotated[str | None, typer.Option(help="Of a running Ray, instead of --topology.")] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="The model's config.json, if it is not in its folder.")
    ] = None,
    mem_fraction: Annotated[
        float | None, typer.Option(help="Of each GPU's memory; without it, engine_args', else 0.85.", min=0.01, max=1.0)
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="bf16, fp8 or fp8_ds_mla; without it, engine_args', else bf16.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Of a typical request.", min=1)] = 4096,
    answer_tokens: Annotated[int, typer.Option(help="Of a typical request.", min=1)] = 1024,
    out: Annotated[Path | None, typer.Option(help="Draw it there: .svg or .png.")] = None,
    as_json: Json = False,
) -> None:
    """Say where every rank would run, whether it fits and what it costs the network; nothing is reserved."""
    from dynamo_ray.cli import planning

    given = planning.Given(topology, address, model_config, mem_fraction, kv_dtype, prompt_tokens, answer_tokens)
    for layout in planning.layouts(file, given):
        planning.show(layout, as_json, out)


@app.command()
def simulate(
    file: File,
    trace: Annotated[Path | None, typer.Option(help="Mooncake's JSON lines.")] = None,
    workload: Annotated[
        str | None, typer.Option(help="Instead of --trace: conversations, agents, documents or single_turn.")
    ] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Once for each to compare; without it, the file's.")] = None,
    rate: Annotated[float, typer.Option(help="How much faster than recorded requests come.", min=0.001)] = 1.0,
    rank: Annotated[
        str | None, typer.Option(help="How fast a rank is: prefill_tokens_per_s=26000,kv_total_blocks=8192,...")
    ] = None,
    ttft: Annotated[float | None, typer.Option(help="Of the SLO, in seconds.", min=0.001)] = None,
    itl: Annotated[float | None, typer.Option(help="Of the SLO, in seconds.", min=0.001)] = None,
    as_json: Json = False,
) -> None:
    """Replay a trace through a file's router on modelled ranks, in virtual time; nothing is started."""
    from dynamo_ray.cli import simulating

    given = simulating.Given(trace, workload, policy or (), rate, rank, ttft, itl)
    simulating.show(simulating.reports(file, given), as_json)


@app.command()
def flags(
    file: File,
    topology: Annotated[str | None, typer.Option(help="As of plan: the nodes' addresses, where it knows them.")] = None,
    as_json: Json = False,
) -> None:
    """Print the environment and the command line of every node of every worker; nothing is started."""
    from dynamo_ray.cli import flags as printing

    for application in printing.flags(file, topology):
        typer.echo(json.dumps(printing.as_json(application)) if as_json else printing.text(application))


app.command(name="manifest")(manifest_command.main)


@app.command()
def recipes(
    folder: Annotated[
        Path | None, typer.Option(help="With a catalog.yaml; without it, this checkout's configs/.", show_default=False)
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a table for a README.")] = False,
    into: Annotated[Path | None, typer.Option(help="Write that table there, between its two markers.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes: what each serves, on which cluster, and what its plan says; nothing is started."""
    from dynamo_ray.cli import recipes as listing

    listing.show(folder, as_json=as_json, markdown=markdown, into=into)


@app.command()
def up(
    file: File,
    address: Address = None,
    port: Port = None,
    fake_cluster: Annotated[
        bool, typer.Option("--fake-cluster", help="Fake the GPU nodes it asks for, and simulate its engines.")
    ] = False,
    topology: Annotated[
        str | None, typer.Option(help="Of --fake-cluster, as of plan; without it, as few nodes as it fits on.")
    ] = None,
    first_token: Annotated[
        bool, typer.Option("--first-token", help="When ready, send a request and print how long all of it took.")
    ] = False,
    started_at: Annotated[
        float | None, typer.Option(hidden=True, help="Unix seconds that --first-token counts from.")
    ] = None,
) -> None:
    """Serve a file until Ctrl-C, which ends all of it; a second Ctrl-C does so at once."""
    from dynamo_ray.cli.processes import PeakMemory
    from dynamo_ray.cli.up import up as start

    began_s = started_at if started_at is not None else psutil.Process().create_time()
    interrupts = Interrupts()
    memory: PeakMemory | None = None

    def prepared(deployment: Deployment) -> None:
        nonlocal memory
        interrupts.force = deployment.kill
        if first_token and deployment.mark is not None:
            memory = PeakMemory(deployment.mark)

    try:
        with Progress(began_s) as progress, naming(topology="--topology", address="--address"):
            deployment = start(
                file,
                address=address,
                port=port,
                fake_nodes=fake_cluster,
                topology=topology,
                report=progress.workers,
                progress=progress.step,
                prepared=prepared,
            )
        interrupts.defer()
        with deployment:
            try:
                _announce(deployment, began_s)
                if first_token:
                    _show_first_token(deployment, began_s, memory)
                deployment.follow(interrupts.wait)
            finally:
                typer.echo("ending; Ctrl-C again does so at once")
    except KeyboardInterrupt:
        typer.echo("ended before it was ready")
        raise typer.Exit(FORCED_EXIT_CODE) from None
    typer.echo("ended; nothing is left running")


def _announce(deployment: Deployment, began_s: float) -> None:
    model = deployment.checked.applications[0].config.model.name
    body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello!"}]})
    typer.echo(f"ready in {time.time() - began_s:.1f} s: {deployment.url}")
    typer.echo("try:")
    typer.echo(
        f"  curl -N {deployment.url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


def _show_first_token(deployment: Deployment, began_s: float, memory: PeakMemory | None) -> None:
    from dynamo_ray.cli import serving

    serving.first_token(deployment.url, deployment.checked.applications[0].config)
    took_s = time.time() - began_s
    peak = f"; peak memory {memory.stop() / 2**30:.2f} GiB (PSS)" if memory is not None else ""
    typer.echo(f"first token {took_s:.1f} s after the command began{peak}")


@app.command()
def bench(
    file: Annotated[Path | None, typer.Argument(help="What is served; without it, --url is asked.")] = None,
    url: Annotated[str | None, typer.Option(help="Where; without it, the `up` of this user.")] = None,
    model_name: Annotated[str | None, typer.Option("--model", help="In place of the file's.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="DYNAMO_RAY_API_KEY", help="Where one is asked for.")] = None,
    requests: Annotated[int, typer.Option(help="In all.", min=1)] = 64,
    concurrency: Annotated[int, typer.Option(help="At once.", min=1)] = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Of a request, nearly.", min=1)] = 512,
    answer_tokens: Annotated[int, typer.Option(help="Of a request.", min=1)] = 128,
    shared: Annotated[float, typer.Option(help="Part of a prompt that all begin with.", min=0.0, max=1.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Other prompts for another one.")] = 0,
    as_json: Json = False,
) -> None:
    """Send traffic to what runs and print what its clients saw; exit code 1 if a request failed."""
    from dynamo_ray.cli import bench as benching

    target = benching.target(file, url, model_name, api_key)
    shape = benching.Shape(requests, concurrency, prompt_tokens, answer_tokens, shared, seed)
    figures = benching.run(target, shape)
    benching.show(figures, as_json)
    if figures.ok < figures.requests:
        raise typer.Exit(1)


@app.command()
def status(
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Show the workers of what runs: every `up` of this user, or everything on a Ray at --address."""
    found = _on_ray(address) if address is not None else state.running()
    if as_json:
        workers = [msgspec.to_builtins(worker) for entry in found for worker in entry.workers]
        typer.echo(json.dumps({"deployments": msgspec.to_builtins(found), "workers": workers}))
        return
    if not found:
        typer.echo("nothing runs")
    console = Console(highlight=False)
    for entry in found:
        console.print(f"{', '.join(entry.applications)} ({entry.config}) on {entry.url}")
        console.print(table(entry.workers, time.time()))


@app.command()
def down(
    address: Address = None,
    port: Annotated[int | None, typer.Option(help="Which `up`, if several run.")] = None,
) -> None:
    """End what another terminal runs, as its Ctrl-C would; with --address, the applications on that Ray."""
    if address is not None:
        _down_on_ray(address)
        return
    found = [entry for entry in state.running() if port in (None, entry.port)]
    if not found:
        typer.echo("nothing runs" if port is None else f"nothing runs on port {port}")
        return
    if len(found) > 1:
        ports = ", ".join(str(entry.port) for entry in found)
        raise PreflightError((Problem("--port", f"several run, on ports {ports}; say which"),))
    entry = found[0]
    if not _interrupt(entry.pid, entry.end_timeout_s) and not _interrupt(entry.pid, KILL_TIMEOUT_S):
        typer.echo(f"process {entry.pid} does not end", err=True)
        raise typer.Exit(1)
    typer.echo(f"ended {', '.join(entry.applications)} on {entry.url}")


app.command(name="control")(control.main)
app.command(name="route")(route.main)


def _interrupt(pid: int, timeout_s: float) -> bool:
    """Ctrl-C for another terminal's process; whether it has ended."""
    try:
        process = psutil.Process(pid)
        process.send_signal(signal.SIGINT)
        process.wait(timeout_s)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


@app.command()
def model(
    key: Annotated[str, typer.Argument(help="smollm2-135m-instruct, tiny-deepseek-v3 or byte-tokenizer.")],
) -> None:
    """Make one of the models that the local configurations serve, in the cache folder; prints the folder."""
    from dynamo_ray import models

    try:
        typer.echo(str(models.prepare(key, lambda line: typer.echo(line, err=True))))
    except (models.ModelError, OSError) as error:
        raise PreflightError((Problem("KEY", str(error)),)) from error


@app.command()
def download(
    what: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE|FILE",
            help="org/name (Hugging Face), s3://bucket/prefix or a folder; or a `serve run` file, for its model.path.",
        ),
    ],
    folder: Annotated[Path | None, typer.Argument(help="Where a SOURCE is put.", show_default=False)] = None,
    other: Annotated[str | None, typer.Option("--from", help="A file's SOURCE, in place of its model.name.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub; without it, main.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Paths to leave out, such as 'original/*'; may be given again.")
    ] = None,
) -> None:
    """Bring a model's files, resumed and verified; run again, only what is missing or has changed."""
    from dynamo_ray.cli import downloading

    for one in downloading.wanted(what, folder, other):
        downloading.run(one, revision, exclude or [], lambda line: typer.echo(line, err=True))


def _on_ray(address: str) -> list[state.Running]:
    from dynamo_ray.cli import serving

    with serving.driver(address) as head:
        return [
            state.Running(0, 0, url, 0, "serve", address, (name,), ready=True, workers=tuple(serving.statuses(name)))
            for name, url in serving.ours(head).items()
        ]


def _down_on_ray(address: str) -> None:
    from dynamo_ray.cli import serving

    with serving.driver(address) as head:
        names = tuple(serving.ours(head))
        if not serving.undeploy(names, DOWN_TIMEOUT_S):
            typer.echo(f"{', '.join(names)} still drains; Ray Serve goes on with it", err=True)
            raise typer.Exit(1)
    typer.echo(f"ended {', '.join(names)}" if names else "nothing of ours runs there")


def main() -> None:
    """Exit codes: 0; 2, 3, 4, 5 as in dynamo_ray/errors.py; 130 when interrupted before it was ready."""
    try:
        app()
    except StartupError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
