"""What the stack costs: our ingresses and worker beside SGLang's own HTTP server, the same engine behind each."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import model  # first: puts the rest on the path
import psutil
from deployments import free_port, http, wait_until
from stacks import ENGINE_ARGS, ISL, OSL, Report, deployed, leave, loaded, num_gpus, prompt, role

from dynamo_ray.cli import load

OURS, THEIRS = "ours", "SGLang's"
INGRESSES = 8
"""Replicas where cost is measured: a burst is taken in by all of them."""
WIDTHS = (64, 256)
"""Streams at once."""
WARM_UP_ROUNDS = 4
REPEATS = {(64, 1): 48, (64, 4): 20, (256, 1): 16, (256, 3): 4}
"""Runs of each peer, by streams and requests a stream; fours, so that who begins and on which cores evens out."""
SINGLES = 12
"""Requests one at a time in each of as many runs."""

T = TypeVar("T")


@dataclass(frozen=True)
class Peer:
    """A server under load, and its engine's scheduler, whose one thread is what a step of a small model takes."""

    url: str
    scheduler: psutil.Process

    def keep_to(self, cores: list[int]) -> None:
        """The scheduler's thread on the first of them, all else of that process on the others."""
        for thread in self.scheduler.threads():
            is_main = thread.id == self.scheduler.pid
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread.id, cores[:1] if is_main else cores[1:])


class Duel:
    """Two peers, loaded by turns, each one's engine on a few cores of its own, which they swap after each turn.

    On a virtual machine the same step takes one core far longer than another, or than itself a minute later. So two
    turns count together, in which either peer has run on the cores of both.
    """

    def __init__(self, ours: Peer, theirs: Peer) -> None:
        self.peers = {THEIRS: theirs, OURS: ours}
        cores = sorted(os.sched_getaffinity(0))
        far = len(cores) // 2
        self.cores = (cores[2:6], cores[far + 2 : far + 6])

    def each(self, repeats: int, run: Callable[[str, int], T]) -> dict[str, list[T]]:
        """What `run` returns of a URL and the turn's number, `repeats` times for each peer; who begins alternates."""
        found: dict[str, list[T]] = {name: [] for name in self.peers}
        for turn in range(repeats):
            for place, peer in enumerate(self.peers.values()):
                peer.keep_to(self.cores[(place + turn) % 2])
            for name in sorted(self.peers, reverse=bool(turn // 2 % 2)):
                found[name].append(run(self.peers[name].url, turn))
        return found


def cost(report: Report) -> None:
    """One GPU each, or one for both: our stack and SGLang's own server, both up and warm, loaded by turns.

    The server's engine publishes KV events too, and its heap is frozen as ours is: what differs is the stack, which has
    its engine take in few requests between two steps.
    """
    num_cores = len(os.sched_getaffinity(0))
    assert num_cores >= 16, f"{num_cores} cores; two engines and their clients need 16"
    last = str(num_gpus() - 1)
    fraction = 0.7 if num_gpus() > 1 else 0.4
    with ExitStack() as stack:
        is_ready = stack.enter_context(_server(report, last, fraction))
        ours = stack.enter_context(deployed("cost", {"aggregated": role(fraction)}, ["0"], report, INGRESSES))
        theirs = is_ready()
        gc.freeze()  # this process is the client of both
        for seed in range(WARM_UP_ROUNDS):  # kernels for these batch sizes
            for streams in WIDTHS:
                for url in (ours.url, theirs.url):
                    asyncio.run(loaded(url, streams, 1, seed=1000 + seed))
        report.say("both are warm")
        http("POST", f"{theirs.url}/freeze_gc")
        duel = Duel(Peer(ours.url, _scheduler(lambda found: found != theirs.scheduler)), theirs)
        single = duel.each(SINGLES, _singles)
        _difference_row(report, "cost of the stack", f"TTFT of one request at a time ({SINGLES} a run)", single)
        for (streams, rounds), repeats in REPEATS.items():
            found = duel.each(repeats, partial(_turn, streams, rounds))
            _cost_rows(report, streams, rounds, found)
        took_s, count = ours.outside_engines()
        report.row(
            "cost of the stack", f"TTFT outside the engine, mean of {count:.0f} at one of {INGRESSES} ingresses",
            f"{1000 * took_s / count:.1f} ms",
        )  # fmt: skip
        leave(report, ours, "cost of the stack")


def _cost_rows(report: Report, streams: int, rounds: int, found: dict[str, list[load.Figures]]) -> None:
    """`rounds` requests a stream: one, and all begin at once; more, and each next one begins when one has ended."""
    pace = "at once" if rounds == 1 else f"kept up over {rounds * streams} requests"
    title = f"cost of the stack, {streams} streams {pace}, {ISL} in, {OSL} out"
    failed = sum(run.requests - run.ok for runs in found.values() for run in runs)
    report.row(title, "requests that failed", str(failed), "0", failed == 0)
    ours, theirs = (statistics.median(run.tokens_per_s for run in found[name]) for name in (OURS, THEIRS))
    report.row(
        title, f"tokens/s, ours / SGLang's own server (median of {len(found[OURS])})",
        f"{ours:.0f} / {theirs:.0f} = {ours / theirs:.3f}", ">= 0.98", ours >= 0.98 * theirs,
    )  # fmt: skip
    _difference_row(report, title, "median TTFT", {name: _medians(found[name], "ttft_s") for name in found})
    ours, theirs = (1000 * statistics.median(_medians(found[name], "itl_s")) for name in (OURS, THEIRS))
    report.row(
        title, "median ITL, ours / SGLang's",
        f"{ours:.2f} / {theirs:.2f} ms = {ours / theirs:.3f}", "<= 1.03", ours <= 1.03 * theirs,
    )  # fmt: skip


def _difference_row(report: Report, title: str, what: str, found: dict[str, list[float]]) -> None:
    """Of each peer's runs, in seconds: judged is the median of the differences, each of two turns on the same cores."""
    ours, theirs = (1000 * statistics.median(found[name]) for name in (OURS, THEIRS))
    pairs = [1000 * (mine - other) for mine, other in zip(found[OURS], found[THEIRS], strict=True)]
    added = [(first + second) / 2 for first, second in zip(pairs[::2], pairs[1::2], strict=True)]
    low, middle, high = statistics.quantiles(added, n=4, method="inclusive")
    report.row(
        title, f"{what}, ours - SGLang's: median of {len(added)} on both cores (quartiles)",
        f"{middle:+.2f} ms ({low:+.1f} to {high:+.1f}); medians {ours:.1f} and {theirs:.1f}", "<= 3 ms", middle <= 3,
    )  # fmt: skip


def _medians(runs: list[load.Figures], name: str) -> list[float]:
    """Each run's own median, in seconds."""
    return [getattr(run, name)["p50"] for run in runs]


def _turn(streams: int, rounds: int, url: str, turn: int) -> load.Figures:
    return asyncio.run(loaded(url, streams, rounds, seed=1 + turn + 100 * rounds))


def _singles(url: str, turn: int) -> float:
    """Median time to first token of one request at a time, seconds."""
    prompts = [prompt(ISL, 5_000 + SINGLES * turn + index) for index in range(SINGLES)]
    found = asyncio.run(load.run(load.Target(url, model.NAME), prompts, 4, concurrency=1)).ttft_s
    assert found is not None, f"{url} answers nothing"
    return found["p50"]


def _scheduler(wanted: Callable[[psutil.Process], bool]) -> psutil.Process:
    """The one scheduler of SGLang, by the title that it gives itself."""
    found = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(part.startswith("sglang::scheduler") for part in process.info["cmdline"] or ()) and wanted(process)
    ]
    assert len(found) == 1, f"one scheduler is expected, there are {len(found)}"
    return found[0]


@contextmanager
def _server(report: Report, gpu: str, fraction: float) -> Iterator[Callable[[], Peer]]:
    """SGLang's own HTTP server, of the same engine arguments; what waits until it serves, and returns it."""
    port = free_port()
    events = {"publisher": "zmq", "endpoint": f"ipc://{report.out}/events"}
    flags = [
        part
        for key, value in {
            **ENGINE_ARGS,
            "mem_fraction_static": fraction,
            "kv_events_config": json.dumps(events),
        }.items()
        for part in (f"--{key.replace('_', '-')}", str(value))
    ]
    command = [
        sys.executable, "-m", "sglang.launch_server", "--model-path", str(report.out / "model"), "--served-model-name",
        model.NAME, "--host", "127.0.0.1", "--port", str(port), "--grammar-backend", "none", *flags,
    ]  # fmt: skip
    log = (report.out / "server.log").open("w")
    process = psutil.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    )
    url = f"http://127.0.0.1:{port}"

    def wait() -> Peer:
        wait_until(lambda: _answers(url, process), 300, f"SGLang's server answers; see {log.name}", every_s=1)
        report.say("SGLang's own server is ready")
        return Peer(url, _scheduler(lambda found: found in process.children(recursive=True)))

    try:
        yield wait
    finally:
        family = [*process.children(recursive=True), process] if process.is_running() else []
        for member in family:
            member.kill()
        process.wait()
        log.close()


def _answers(url: str, process: psutil.Popen) -> bool:
    assert process.poll() is None, "SGLang's server ended"
    try:
        return http("GET", f"{url}/health_generate", timeout_s=5)[0] == 200
    except OSError:
        return False
