"""`dynamo-ray plan`: a file and a cluster in, layouts out, shown as a table, a drawing or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dynamo_ray.cli import drawing
from dynamo_ray.cli.checked import check_file
from dynamo_ray.cli.picture import draw
from dynamo_ray.cluster.assumptions import Assumptions
from dynamo_ray.cluster.layout import Layout, as_json, plan, read_shape
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.errors import ConfigError, Problem
from placement.gpus import GIB
from placement.memory import Fit
from placement.model_shape import KvDtype
from placement.topology import Topology, TopologyError
from placement.traffic import Traffic


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line says beside the file."""

    topology: str | None
    address: str | None
    model_config: Path | None
    mem_fraction: float | None
    kv_dtype: str | None
    prompt_tokens: int
    answer_tokens: int


def layouts(file: Path, given: Given) -> Iterator[tuple[str, Layout]]:
    """The layout of every application in the file, with its name.

    Raises:
        ConfigError: The file, the cluster or the command line is wrong, or it does not fit; everything at once.
        PreflightError: No Ray answers at the address.
    """
    if (given.topology is None) == (given.address is None):
        raise ConfigError((Problem("--topology", "say either --topology, or --address of a running Ray"),))
    if given.kv_dtype not in (None, *KvDtype):
        raise ConfigError((Problem("--kv-dtype", f"{given.kv_dtype!r} is none of {', '.join(KvDtype)}"),))
    kv_dtype = None if given.kv_dtype is None else KvDtype(given.kv_dtype)
    assumed = Assumptions(given.mem_fraction, kv_dtype, given.prompt_tokens, given.answer_tokens)
    shape = None if given.model_config is None else read_shape(given.model_config, "--model-config")
    for application in check_file(file).applications:
        try:
            cluster = _live(str(given.address), application.config) if given.topology is None else given.topology
            yield application.name, plan(application.config, cluster, assumed, shape)
        except ConfigError as error:
            path = f"applications[{application.index}].args"
            problems = (_under(path, problem) for problem in error.problems)
            raise ConfigError(tuple(problems)) from error


def show(named: tuple[str, Layout], in_json: bool, out: Path | None) -> None:
    """Raises ConfigError for an `out` that is neither an SVG nor a PNG, or cannot be written."""
    name, layout = named
    roles = {group.name: group.name for group in layout.groups}
    picture = draw(layout.topology, layout.plan.workers, roles, layout.plan.spares, title=name)
    if out is not None:
        try:
            drawing.save(picture, out)
        except (ValueError, OSError) as error:
            raise ConfigError((Problem("--out", str(error)),)) from error
    if in_json:
        print(json.dumps({"application": name, **as_json(layout)}))
        return
    console = Console(highlight=False)
    console.print(_workers(layout))
    console.print(drawing.terminal(picture))
    for found in layout.fits.values():
        console.print(found.explain(), soft_wrap=True)
    for line in _costs(layout):
        console.print(line, soft_wrap=True)


def _live(address: str, config: DeploymentConfig) -> Topology:
    from dynamo_ray.cli import serving
    from placement import reserve

    with serving.driver(address):
        try:
            return reserve.observe(leaf_label=config.placement.leaf_label)
        except TopologyError as error:
            raise ConfigError(tuple(Problem("placement.leaf_label", problem) for problem in error.problems)) from error


def _under(path: str, problem: Problem) -> Problem:
    """The argument of `plan` is the option here; all else is the application's."""
    if problem.field == "topology":
        return Problem("--topology", problem.message)
    return problem if problem.field.startswith("--") else Problem(f"{path}.{problem.field}", problem.message)


def _workers(layout: Layout) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("worker", "nodes", "ranks", "leaves", "weights/GPU", "KV tokens/GPU"):
        name = column in ("worker", "nodes")
        made.add_column(column, justify="left" if name else "right", no_wrap=name)
    leaf = {node.node_id: node.leaf for node in layout.topology.nodes}
    for worker in layout.plan.workers:
        found: Fit | None = layout.fits.get(worker.group)
        addresses = [bundle.address for bundle in worker.bundles]
        made.add_row(
            worker.worker,
            addresses[0] if len(addresses) == 1 else f"{addresses[0]} .. {addresses[-1]} ({len(addresses)})",
            str(sum(len(bundle.ranks) for bundle in worker.bundles)),
            str(len({leaf[bundle.node_id] for bundle in worker.bundles})),
            "" if found is None else f"{found.weights.total / GIB:.1f} GiB",
            "" if found is None else f"{found.kv_tokens:,}",
        )
    return made


def _costs(layout: Layout) -> Iterator[str]:
    request = layout.request
    for name, assumed in layout.memory.items():
        share = f"{assumed.mem_fraction:g} of free memory for KV" if assumed.of_free else ""
        yield f"assumed of {name}: {share or f'mem_fraction {assumed.mem_fraction:g}'}, KV in {assumed.kv_dtype}"
    yield f"assumed of requests: {request.prompt_tokens:,} + {request.answer_tokens:,} tokens"
    if len({node.leaf for node in layout.topology.nodes}) == 1:
        yield "traffic between leaves: none, all nodes are in one, or no label says which"
        return
    for name, cost in (("this layout", layout.cost), ("no layout below", layout.bound), ("random", layout.random)):
        yield f"between leaves, {name}: {_traffic(cost, request.prompt_tokens + request.answer_tokens)}"


def _traffic(cost: Traffic, num_tokens: int) -> str:
    alltoall = f"{cost.alltoall_bytes / num_tokens / 1e6:.2f} MB of all-to-all a token"
    return f"{alltoall}, {cost.handoff_bytes / 1e6:.1f} MB of KV hand-off a request"
