"""`dynamo-ray simulate`: a file and a trace in, what each policy would make of it out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console
from rich.table import Table

from backends.engine import Role
from dynamo_ray.cli.checked import check_file
from dynamo_ray.cli.options import naming
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.errors import ConfigError, Problem
from dynamo_ray.simulator.rank import RankModel
from dynamo_ray.simulator.replay import rank_model, simulate
from dynamo_ray.simulator.report import Report, Slo
from dynamo_ray.simulator.traces import TraceRequest, read_trace
from dynamo_ray.simulator.workloads import WORKLOADS


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line says beside the file."""

    trace: Path | None
    workload: str | None
    policies: Sequence[str]
    rate: float
    rank: str | None
    ttft_s: float | None
    itl_s: float | None


def reports(file: Path, given: Given) -> Iterator[Report]:
    """One for each policy, as soon as it is there.

    Raises:
        ConfigError: The file, the trace or the command line is wrong.
    """
    applications = check_file(file).applications
    if len(applications) > 1:
        names = ", ".join(application.name for application in applications)
        raise ConfigError((Problem("applications", f"one at a time can be simulated, and there are {names}"),))
    config = applications[0].config
    trace, models = _trace(given), _models(config, given.rank)
    slo = Slo()
    slo = Slo(given.ttft_s or slo.ttft_s, given.itl_s or slo.itl_s)
    for policy in given.policies or (None,):
        with naming(policy="--policy", rate="--rate", models="--rank"):
            report = simulate(config, trace, policy=policy, rate=given.rate, models=models, slo=slo)
        if not report.num_requests:
            message = (
                f"none of the trace's {report.num_refused} requests fits a rank; raise block_size * kv_total_blocks"
            )
            raise ConfigError((Problem("--rank", message),))
        yield report


def _trace(given: Given) -> tuple[TraceRequest, ...]:
    if (given.trace is None) == (given.workload is None):
        raise ConfigError((Problem("--trace", f"say either --trace, or --workload {'|'.join(WORKLOADS)}"),))
    if given.trace is not None:
        path = str(given.trace)
        with naming(**{path: f"--trace {path}"}):
            return read_trace(given.trace)
    make = WORKLOADS.get(str(given.workload))
    if make is None:
        raise ConfigError((Problem("--workload", f"{given.workload!r} is none of {', '.join(WORKLOADS)}"),))
    return make()


def _models(config: DeploymentConfig, rank: str | None) -> dict[Role, RankModel]:
    """The configuration's, and on top what --rank says."""
    if rank is None:
        with naming(models="--rank"):
            return {role: rank_model(config, role) for role in config.roles}
    pairs = [pair.partition("=") for pair in rank.split(",")]
    said = {key.strip(): value.strip() for key, _, value in pairs}
    known = get_type_hints(RankModel)
    if unknown := said.keys() - known.keys():
        message = f"{', '.join(sorted(unknown))}: unknown; write name=number,... of {', '.join(sorted(known))}"
        raise ConfigError((Problem("--rank", message),))
    models = {}
    try:
        changes: dict[str, Any] = {key: _number(key, value, known[key]) for key, value in said.items()}
        for role in config.roles:
            base = rank_model(config, role) if config.backend == "simulated" else RankModel()
            models[role] = dataclasses.replace(base, **changes)
    except ValueError as error:
        raise ConfigError((Problem("--rank", str(error)),)) from error
    return models


def _number(key: str, text: str, kind: type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{key}: {text!r} is no {'whole ' if kind is int else ''}number; write {key}=...") from None


def show(made: Iterator[Report], in_json: bool) -> None:
    if in_json:
        for report in made:
            values = {
                "hit_share": report.hit_share,
                "share_of_ideal": report.share_of_ideal,
                "goodput_per_s": report.goodput_per_s,
            }
            print(json.dumps(dataclasses.asdict(report) | values), flush=True)
        return
    found = list(made)
    console = Console(highlight=False)
    console.print(_table(found))
    slo = found[0].slo
    console.print(
        f"{found[0].num_requests} requests over {found[0].num_ranks} ranks. hits: prompt tokens cached, and against "
        f"one cache as large as all ranks' together; goodput: requests/s with TTFT <= {slo.ttft_s:g} s and a mean time "
        f"between tokens <= {slo.itl_s:g} s; load: tokens computed and decoded, the busiest rank's against the mean",
        soft_wrap=True,
    )
    if found[0].num_refused:
        console.print(f"{found[0].num_refused} requests are too long for any rank, and are left out")
    for report in found:
        if report.num_policy_errors:
            console.print(
                f"{report.policy}: failed {report.num_policy_errors} times, first of {report.policy_error}; each time "
                "the rank with the fewest requests was taken, so that these numbers are not the policy's",
                soft_wrap=True,
                markup=False,
            )
        if report.num_turned_away:
            console.print(
                f"{report.policy}: {report.num_turned_away} requests came while router.queue was full (429), and have "
                "neither TTFT nor goodput",
                soft_wrap=True,
            )


def _table(found: Sequence[Report]) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("policy", overflow="fold")
    for column in ("hits", "of 1 cache", "TTFT p50", "p90", "p99 s", "ITL p90 ms", "goodput", "load"):
        table.add_column(column, justify="right", no_wrap=True)
    for report in found:
        ttft = report.ttft_s
        table.add_row(
            report.policy,
            f"{report.hit_share:.1%}",
            f"{report.share_of_ideal:.1%}",
            *(f"{value:.3f}" for value in (ttft.p50, ttft.p90, ttft.p99)),
            f"{report.itl_s.p90 * 1000:.1f}",
            f"{report.goodput_per_s:.2f}",
            f"{report.max_over_mean_load:.2f}",
        )
    return table
