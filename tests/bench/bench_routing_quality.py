"""How good the routing is: a recorded trace replayed through the router's own code, one policy beside the other.

Every rank is one worker of the simulator's model, as fast as one GPU of a GB200 rack prefills DeepSeek-R1 (26,000
tokens/s: LMSYS, 2025-09-25). At every point (ranks, capacity, rate) `latency` is held against these:
hit tokens at least 90% of one cache with the same total capacity, p90 TTFT and goodput better than those of `blocks`,
`round_robin` and `session`, max/mean rank load at most 1.2. Goodput counts as better where it is higher, and where all
requests of both are within the SLO. Load is the work a rank was given: tokens computed and decoded over the run.

    python tests/bench/bench_routing_quality.py [--check] [--queue ORDER|none] [--plot FILE.svg] [--json FILE]

`latency` has the ingress's queue as it is shipped; the others send every request to its rank as it comes. --queue gives
every policy the same: that order, or none. Queues hold as many as the trace has. Replays are in virtual time: the
numbers are the same on every machine, but for the cost of a decision.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from heapq import heapreplace
from itertools import accumulate
from pathlib import Path
from typing import Any

from backends.engine import Role
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.routing.latency import MOST_GIVEN
from dynamo_ray.simulator.rank import RankModel
from dynamo_ray.simulator.replay import simulate
from dynamo_ray.simulator.report import Report, Slo
from dynamo_ray.simulator.traces import TraceRequest, read_trace
from dynamo_ray.simulator.workloads import WORKLOADS

TRACE = Path(__file__).parent / "traces" / "mooncake_synthetic_trace.jsonl"
OURS = "latency"
BEATEN = ("blocks", "round_robin", "session")
POLICIES = (OURS, *BEATEN, "least_loaded", "random")
CAPACITIES_BLOCKS = (512, 1024, 2048)
"""Of 512 tokens, per rank: 262,144 to 1,048,576 tokens."""
LEAST_SHARE_OF_IDEAL, MOST_LOAD = 0.90, 1.2
SLO = Slo(ttft_s=2.0, itl_s=0.1)


@dataclass(frozen=True, slots=True)
class Point:
    trace: str
    """`mooncake`, or one of the made ones."""
    workers: int
    attn_dp: int
    capacity_blocks: int
    rate: float

    def __str__(self) -> str:
        lockstep = f"x{self.attn_dp}" if self.attn_dp > 1 else ""
        return f"{self.trace} W={self.workers}{lockstep} {self.capacity_blocks} blocks x{self.rate:g}"


JUDGED = tuple(
    Point("mooncake", workers, 1, capacity, rate)
    for workers in (8, 64)
    for capacity in CAPACITIES_BLOCKS
    for rate in (1.0, 4.0)
)
SHOWN = (
    *(Point(name, 8, 1, 1024, rate) for name in WORKLOADS for rate in (1.0, 4.0)),
    *(Point("mooncake", 8, 8, 1024, rate) for rate in (1.0, 4.0)),
)
"""Beside what is judged: made traces, and workers of 8 DP ranks in lockstep."""


@cache
def trace_of(name: str) -> tuple[TraceRequest, ...]:
    return read_trace(TRACE) if name == "mooncake" else WORKLOADS[name](seed=1)


def replay(case: tuple[Point, str, str | None]) -> Report:
    """Of a point, a policy, and the order of every policy's queue; None: as `_queue_of` says."""
    point, policy, order = case
    workers = {"replicas": point.workers, "parallelism": {"attn_dp": point.attn_dp}}
    queue = _queue_of(policy, order)
    if queue is not None:
        queue["max_waiting"] = len(trace_of(point.trace))
    return _replayed(point, policy, workers, queue, size=1)


def _queue_of(policy: str, order: str | None) -> dict[str, Any] | None:
    if order is None:
        return {} if policy == OURS else None
    return None if order == "none" else {"order": order}


def one_rank(point: Point) -> Report:
    """The same requests on one rank with the memory and the speed of all of them, where nothing is to be chosen."""
    return _replayed(point, OURS, {"replicas": 1}, None, size=point.workers * point.attn_dp)


def _replayed(point: Point, policy: str, workers: dict[str, Any], queue: dict[str, Any] | None, size: int) -> Report:
    config = DeploymentConfig.model_validate(
        {
            "model": {"name": "bench", "path": "/nowhere"},
            "backend": "simulated",
            "aggregated": workers,
            "router": {"queue": queue},
        }
    )
    model = RankModel(
        block_size=512,
        kv_total_blocks=size * point.capacity_blocks,
        max_batched_tokens=size * 2048,
        prefill_tokens_per_s=size * 26_000.0,
        step_s=0.015,
        sequence_s=50e-6 / size,
        kv_token_s=10e-9 / size,
    )
    models = {Role.AGGREGATED: model}
    return simulate(config, trace_of(point.trace), policy=policy, rate=point.rate, models=models, slo=SLO)


def misses(ours: Report, others: Iterable[Report]) -> list[str]:
    """Every number that is not kept."""
    found = []
    if ours.share_of_ideal < LEAST_SHARE_OF_IDEAL:
        found.append(f"hits are {ours.share_of_ideal:.1%} of one cache's, not {LEAST_SHARE_OF_IDEAL:.0%}")
    if ours.max_over_mean_load > MOST_LOAD:
        found.append(f"the busiest rank has {ours.max_over_mean_load:.2f} times the mean, not {MOST_LOAD}")
    for other in others:
        if ours.ttft_s.p90 >= other.ttft_s.p90:
            found.append(f"p90 TTFT {ours.ttft_s.p90:.3f} s; {other.policy} has {other.ttft_s.p90:.3f} s")
        all_within = ours.num_within_slo == other.num_within_slo == ours.num_requests
        if ours.goodput_per_s <= other.goodput_per_s and not all_within:
            found.append(f"goodput {ours.goodput_per_s:.3f}/s; {other.policy} has {other.goodput_per_s:.3f}/s")
    return found


@dataclass(frozen=True, slots=True)
class Evened:
    """Max/mean load where nothing but evening out counts: a prompt's work is what a boundless cache has not of it."""

    planned: float
    """All is known beforehand; the most work first, each to whoever was given least."""
    as_they_come: float
    """Each to whoever was given least so far."""
    best_fit: float
    """Each to whoever was given most and stays within `MOST_GIVEN` of the mean, else to whoever was given least."""

    @classmethod
    def of(cls, trace: Sequence[TraceRequest], workers: int) -> Evened:
        work = list(_work(trace))
        share = sum(work) / workers
        planned, as_they_come = (_most(order, workers) for order in (sorted(work, reverse=True), work))
        return cls(planned / share, as_they_come / share, _best_fit(work, workers) / share)


def _work(trace: Sequence[TraceRequest]) -> Iterator[int]:
    seen: set[int] = set()
    for request in trace:
        cached = next((n for n, block in enumerate(request.block_ids) if block not in seen), len(request.block_ids))
        seen.update(request.block_ids)
        yield max(0, request.prompt_tokens - cached * 512) + request.answer_tokens


def _most(work: Iterable[int], workers: int) -> int:
    given = [0] * workers
    for tokens in work:
        heapreplace(given, given[0] + tokens)
    return max(given)


def _best_fit(work: Iterable[int], workers: int) -> int:
    given = [0] * workers  # in order
    for came, tokens in zip(accumulate(work), work, strict=True):
        fitting = bisect_right(given, MOST_GIVEN * came / workers - tokens)
        insort(given, given.pop(max(0, fitting - 1)) + tokens)
    return given[-1]


def table(point: Point, reports: Sequence[Report]) -> str:
    lines = [f"{point!s:34} hits  of one cache   TTFT p50    p90    p99   goodput   load  decision"]
    for report in reports:
        ttft = report.ttft_s
        lines.append(
            f"  {report.policy:30}{report.hit_share:7.1%}{report.share_of_ideal:14.1%}{ttft.p50:10.3f}{ttft.p90:7.3f}"
            f"{ttft.p99:7.3f}{report.goodput_per_s:8.3f}/s{report.max_over_mean_load:7.2f}"
            f"{report.decision_cpu_s * 1e6:7.0f} us"
        )
    return "\n".join(lines)


def summary(found: dict[Point, list[Report]]) -> str:
    """The judged points, each number of `latency` before those of `blocks`, `round_robin` and `session`."""
    lines = [
        "| ranks, blocks, rate | hits of one cache's | p90 TTFT, s | goodput, /s | max/mean load |",
        "|---|---|---|---|---|",
    ]
    for point in (point for point in found if point in JUDGED):
        by_name = {report.policy: report for report in found[point]}
        shown = [by_name[name] for name in (OURS, *BEATEN) if name in by_name]
        cells = (
            " / ".join(f"{report.share_of_ideal:.1%}" for report in shown),
            " / ".join(f"{report.ttft_s.p90:.3f}" for report in shown),
            " / ".join(f"{report.goodput_per_s:.3f}" for report in shown),
            " / ".join(f"{report.max_over_mean_load:.2f}" for report in shown),
        )
        lines.append(f"| {point.workers}, {point.capacity_blocks}, x{point.rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[Point, list[Report]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "routing quality"
    from matplotlib import pyplot

    points = [point for point in found if point in JUDGED]
    figure, axes = pyplot.subplots(3, 1, figsize=(9, 9), sharex=True, layout="constrained")
    rows = (
        ("hits, of one cache's", lambda report: report.share_of_ideal, LEAST_SHARE_OF_IDEAL),
        ("p90 TTFT (s)", lambda report: report.ttft_s.p90, None),
        ("max/mean rank load", lambda report: report.max_over_mean_load, MOST_LOAD),
    )
    for axis, (label, value, target) in zip(axes, rows, strict=True):
        for place, policy in enumerate(POLICIES):
            values = [value(report) for point in points for report in found[point] if report.policy == policy]
            if not values:
                continue
            style = {"zorder": 3, "markersize": 9} if policy == OURS else {"alpha": 0.8, "markersize": 6}
            axis.plot(range(len(points)), values, "os^DvP"[place], label=policy, color=f"C{place}", **style)
        if target is not None:
            axis.axhline(target, color="grey", linewidth=0.8, linestyle="--")
        axis.set_ylabel(label)
        axis.grid(axis="y", linewidth=0.3)
    axes[1].set_yscale("log")
    labels = [f"{p.workers} ranks\n{p.capacity_blocks}\nx{p.rate:g}" for p in points]
    axes[2].set_xticks(range(len(points)), labels)
    axes[2].set_xlabel("ranks, blocks of 512 tokens in each, arrival rate")
    axes[0].legend(ncols=3, fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a judged number is missed")
    parser.add_argument("--plot", type=Path, help="draw the judged points there, as SVG; needs matplotlib")
    parser.add_argument("--json", type=Path, help="write every report there")
    parser.add_argument("--only", default="", help="points whose name holds this")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), help="others are left out, and not judged by")
    parser.add_argument("--queue", choices=("fcfs", "shortest", "none"), help="of every policy, in the ingress")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    given = parser.parse_args()
    points = [point for point in (*JUDGED, *SHOWN) if given.only in str(point)]
    cases = [(point, policy, given.queue) for point in points for policy in given.policies]
    found: dict[Point, list[Report]] = {point: [] for point in points}
    missed = 0
    print(f"queue in the ingress: {given.queue or f'of {OURS} as shipped, of the others none'}")
    with ProcessPoolExecutor(given.jobs) as pool:
        for (point, policy, _), report in zip(cases, pool.map(replay, cases), strict=True):
            found[point].append(report)
            if policy != given.policies[-1]:
                continue
            print(table(point, found[point]), flush=True)
            by_name = {made.policy: made for made in found[point]}
            if OURS in by_name:
                wrong = misses(by_name[OURS], [by_name[name] for name in BEATEN if name in by_name])
                missed += bool(wrong) and point in JUDGED
                if by_name[OURS].share_of_ideal < LEAST_SHARE_OF_IDEAL:
                    print(f"  one rank with the memory and speed of all: {one_rank(point).share_of_ideal:.1%} of it")
                for miss in wrong:
                    print(f"  {'MISS' if point in JUDGED else 'not judged, but'}: {miss}", flush=True)
    print(summary(found))
    for workers in sorted({point.workers for point in JUDGED}):
        evened = Evened.of(trace_of("mooncake"), workers)
        print(
            f"{workers} ranks, whatever is cached where: load {evened.planned:.2f} planned beforehand; "
            f"{evened.as_they_come:.2f} each prompt to the one given least; {evened.best_fit:.2f} by best fit"
        )
    judged = sum(point in JUDGED for point in points)
    print(f"{judged - missed} of {judged} judged points keep every number")
    if given.json is not None:
        rows = [
            {"point": str(point), "queue": given.queue, **dataclasses.asdict(report)}
            for point in points
            for report in found[point]
        ]
        given.json.write_text(json.dumps(rows, indent=1))
    if given.plot is not None:
        plot(found, given.plot)
    return 1 if given.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
