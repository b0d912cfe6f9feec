"""SGLang on real GPUs through the whole stack, and what the stack costs: one run, one table.

python tests/gpu/report.py --out FOLDER [--sections aggregated,split,wide,nodes,ray,cost]
python tests/gpu/report.py --out FOLDER --pretend 2 --sections aggregated,split,wide,nodes

Needs one GPU (two for what its name says), SGLang, and the tokenizer that `make models` makes. Each section deploys
with `dynamo_ray.up` on a Ray of its own and ends it again. FOLDER gets table.md, results.json and the logs.
`--pretend` shows on a machine without a GPU that the report itself works: Ray is told of that many, and SGLang is its
double.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE), str(ROOT / "tests/support")]

import model  # noqa: E402
import psutil  # noqa: E402
import yaml  # noqa: E402
from deployments import free_port, http, wait_until  # noqa: E402

from dynamo_ray.cli import load  # noqa: E402

ENGINE_ARGS: dict[str, Any] = {
    "load_format": "dummy",
    "page_size": 64,
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "random_seed": 1,
}
"""Kernels that need nothing beyond sgl-kernel and Triton; see docs/gpu.md."""
ENGINE_VERSION = "0.5.16"
OURS, THEIRS = "ours", "SGLang's"
ISL, OSL = 512, 128
INGRESSES = 8
"""Replicas where cost is measured: a burst is taken in by all of them."""
WIDTHS = (64, 256)
"""Streams at once."""
WARM_UP_ROUNDS = 4
REPEATS = {(64, 1): 30, (64, 4): 6, (256, 1): 10, (256, 4): 2}
"""Runs of each peer, by streams and requests a stream; one step of the engine takes 16 to 33 ms, by the moment."""
SINGLES = 10
"""Requests one at a time in each of as many runs."""
GREEDY_TOKENS = 16

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    section: str
    what: str
    value: str
    target: str = ""
    ok: bool | None = None
    """None: recorded, not judged."""


class Report:
    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[Row] = []
        self.started_s = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.started_s:6.1f} s] {line}", flush=True)

    def row(self, section: str, what: str, value: str, target: str = "", ok: bool | None = None) -> None:
        self.rows.append(Row(section, what, value, target, ok))
        self.write()  # a run that is cut off keeps what it has
        self.say(f"{section}: {what}: {value}" + ("" if ok is None else "  ok" if ok else f"  MISSED ({target})"))

    def table(self) -> str:
        lines = ["| section | what | value | target | held |", "| --- | --- | --- | --- | --- |"]
        held = {None: "", True: "yes", False: "**no**"}
        lines += [f"| {r.section} | {r.what} | {r.value} | {r.target} | {held[r.ok]} |" for r in self.rows]
        return "\n".join(lines)

    def write(self) -> None:
        (self.out / "table.md").write_text(self.table() + "\n")
        (self.out / "results.json").write_text(json.dumps([asdict(row) for row in self.rows], indent=1))


# Deployments


@dataclass(frozen=True)
class Stack:
    url: str

    def complete(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        body = {"model": model.NAME, "prompt": prompt, "temperature": 0, "ignore_eos": True, **options}
        status, text = http("POST", f"{self.url}/v1/completions", body, timeout_s=120)
        assert status == 200, text
        answer: dict[str, Any] = json.loads(text)
        return answer

    def outside_engines(self) -> tuple[float, float]:
        """Of one ingress: seconds to first tokens that their requests were not in an engine for, and how many."""
        _, text = http("GET", f"{self.url}/metrics")
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        took_s, count = (float(values[f"dynamo_ray_ttft_outside_engines_seconds_{part}"]) for part in ("sum", "count"))
        return took_s, count

    def metric(self, name: str, **labels: str) -> float:
        _, text = http("GET", f"{self.url}/metrics")
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(part in line for part in wanted))


@dataclass(frozen=True)
class Pretence:
    """GPUs that are not there, and the double of SGLang in its place."""

    gpus: int = 0

    @property
    def path(self) -> list[str]:
        return [str(ROOT / "tests/support/doubles")] if self.gpus else []


pretence = Pretence()


def num_gpus() -> int:
    if pretence.gpus:
        return pretence.gpus
    if shutil.which("nvidia-smi") is None:
        return 0
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return len(found.stdout.splitlines()) if found.returncode == 0 else 0


@contextmanager
def ray_cluster(nodes: list[str], name: str, report: Report) -> Iterator[str]:
    """Raylets on this machine, one a node, each with CUDA_VISIBLE_DEVICES; its address.

    A GPU named twice is two for Ray, which has two workers share it.
    """
    from dynamo_ray.cli import local_ray, processes

    with local_ray.scratch() as folder:
        port, serve = free_port(), local_ray.reserve_serve_ports()
        base = {
            **os.environ,
            **local_ray.environment(folder, serve),
            "PYTHONPATH": os.pathsep.join([*pretence.path, *sys.path]),
        }
        base["SGLANG_DOUBLE_VERSION"] = ENGINE_VERSION
        try:
            for index, node in enumerate(nodes):
                where = (
                    ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder / 'ray'}"]
                    if index == 0
                    else [f"--address=127.0.0.1:{port}"]
                )
                command = [
                    sys.executable, "-m", "ray.scripts.scripts", "start", *where, "--node-ip-address=127.0.0.1",
                    f"--num-gpus={len(node.split(','))}", "--num-cpus=8", "--object-store-memory=100000000",
                    "--disable-usage-stats",
                    f'--labels=ray.io/accelerator-type={gpu_kind()}',
                ]  # fmt: skip
                done = subprocess.run(
                    command,
                    env={**base, "CUDA_VISIBLE_DEVICES": node},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, done.stdout + done.stderr
            yield f"127.0.0.1:{port}"
        finally:
            kept = report.out / "ray" / name
            shutil.copytree(folder / "ray" / "session_latest" / "logs", kept, dirs_exist_ok=True, symlinks=False)
            processes.end(str(folder), patience_s=0.0)  # the workers have ended; a raylet would wait for its head


@contextmanager
def deployed(name: str, args: dict[str, Any], nodes: list[str], report: Report, ingresses: int = 1) -> Iterator[Stack]:
    """One ingress, so that its /metrics are all there are, unless more are asked for."""
    from dynamo_ray import up
    from dynamo_ray.config_file import IMPORT_PATH

    application = {
        "name": "gpu",
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": {**common(report), **args},
        "deployments": [{"name": "Ingress", "num_replicas": ingresses}],
    }
    http_options = {"host": "127.0.0.1", "port": 8000}
    config = report.out / f"{name}.yaml"
    config.write_text(yaml.safe_dump({"http_options": http_options, "applications": [application]}))
    with ray_cluster(nodes, name, report) as address:
        began_s = time.monotonic()
        with up(config, address=address, port=free_port(), progress=report.say, report=_phases(report)) as deployment:
            report.say(f"{name}: ready {time.monotonic() - began_s:.0f} s after it was asked for")
            yield Stack(deployment.url)


def _phases(report: Report) -> Callable[[Any], None]:
    def changed(statuses: Any) -> None:
        report.say("; ".join(f"{each.worker} {each.phase}: {each.detail[:300]}" for each in statuses))

    return changed


def common(report: Report) -> dict[str, Any]:
    return {
        "model": {"name": model.NAME, "path": str(report.out / "model")},
        "backend": "sglang",
        "engine_version": ENGINE_VERSION,
        "accelerator": gpu_kind(),
    }


def gpu_kind() -> str:
    if pretence.gpus:
        return "H100"
    import torch

    return next(kind for kind in ("H200", "H100", "B200", "A100") if kind in torch.cuda.get_device_name(0))


def role(fraction: float, *, wide: bool = False, **engine_args: Any) -> dict[str, Any]:
    return {
        "parallelism": {"attn_dp": 2, "moe_ep": 2} if wide else {},
        "engine_args": {**ENGINE_ARGS, "mem_fraction_static": fraction, **engine_args},
    }


# Prompts


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(f"{length}-{seed}")
    return [rng.randrange(1000, 40000) for _ in range(length)]


LENGTHS = (1, 63, 64, 65, 200, 512, 700, 1024)


def greedy_answers(stack: Stack) -> list[str]:
    return [stack.complete(prompt(length, 7), max_tokens=GREEDY_TOKENS)["choices"][0]["text"] for length in LENGTHS]


def cached(answer: dict[str, Any]) -> int:
    found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


# Sections


def aggregated(report: Report) -> None:
    """One GPU: an aggregated worker, and its answers as the reference for the split ones."""
    with deployed("aggregated", {"aggregated": role(0.5)}, ["0"], report) as stack:
        answers = greedy_answers(stack)
        (report.out / "aggregated.json").write_text(json.dumps(answers))
        distinct = len(set(answers))
        report.row(
            "1 GPU, aggregated", "greedy answers of 8 prompts, distinct", f"{distinct} of 8", ">= 6", distinct >= 6
        )
        ids = prompt(1024, 1)
        first, second = (stack.complete(ids, max_tokens=4) for _ in range(2))
        values = (cached(first), cached(second))
        report.row(
            "1 GPU, aggregated",
            "cached tokens of a 1,024-token prompt, first and again",
            f"{values[0]} and {values[1]}",
            "0 and >= 960",
            values[0] == 0 and values[1] >= 960,
        )
        wait_until(lambda: stack.metric("dynamo_ray_index_blocks") >= 16, 10, "the router's index has the blocks")
        blocks = stack.metric("dynamo_ray_index_blocks")
        report.row(
            "1 GPU, aggregated", "blocks in the router's index by KV events", f"{blocks:.0f}", ">= 16", blocks >= 16
        )
        _leave(report, stack, "1 GPU, aggregated")


def split(report: Report) -> None:
    """Prefill and decode over NIXL: on one GPU, and where there are two, one each."""
    expected = json.loads((report.out / "aggregated.json").read_text())
    layouts = [("prefill and decode on one GPU", "0,0", 0.35)]
    if num_gpus() > 1 and not pretence.gpus:  # to a double a GPU is as good as another
        layouts.append(("prefill on GPU 0, decode on GPU 1", "0,1", 0.6))
    for title, visible, fraction in layouts:
        args = {"prefill": role(fraction, enable_request_time_stats_logging=True), "decode": role(fraction)}
        name = f"split-{visible.replace(',', '-')}"
        with deployed(name, args, [visible], report) as stack:
            first_s = _timed(lambda: stack.complete(prompt(1024, 50), max_tokens=1))
            later_s = statistics.median(
                _timed(lambda seed=seed: stack.complete(prompt(1024, seed), max_tokens=1)) for seed in range(51, 56)
            )
            before = stack.metric("dynamo_ray_transferred_tokens_total")
            answers = greedy_answers(stack)
            moved = stack.metric("dynamo_ray_transferred_tokens_total") - before
            same = sum(a == b for a, b in zip(answers, expected, strict=True))
            report.row(
                title, "greedy answers equal to aggregated", f"{same} of {len(expected)}", "all", same == len(expected)
            )
            report.row(title, "prompt tokens handed over", f"{moved:.0f}", f"{sum(LENGTHS)}", moved == sum(LENGTHS))
            again = [stack.complete(prompt(1024, 60), max_tokens=4) for _ in range(2)]
            report.row(
                title, "cached tokens at prefill, again", f"{cached(again[1])}", ">= 960", cached(again[1]) >= 960
            )
            report.row(title, "1,024-token prompt to the answer's end, first", f"{1000 * first_s:.0f} ms")
            report.row(title, "the same, later (median of 5)", f"{1000 * later_s:.0f} ms")
            _leave(report, stack, title)
        prefilled, computed = _computed(report, name, "prefill"), _computed(report, name, "decode")
        if not pretence.gpus:  # a double writes no such log
            report.row(title, "prompt tokens computed by prefill, by its log", str(prefilled), "> 0", prefilled > 0)
            _transfer_rows(report, title, name)
        report.row(title, "prompt tokens computed by decode, by its log", str(computed), "0", computed == 0)


def wide(report: Report) -> None:
    """Two GPUs: DP attention and expert parallelism, aggregated and behind a prefill worker."""
    if num_gpus() < 2:
        report.say("wide: needs two GPUs")
        return
    title = "2 GPUs, aggregated DEP2"
    with deployed("wide", {"aggregated": role(0.6, wide=True)}, ["0,1"], report) as stack:
        hits, used = _second_turns(stack)
        report.row(title, "second turns that found their first turn's blocks", f"{hits} of 16", "16", hits == 16)
        report.row(title, "DP ranks that served them", str(used), "2", used == 2)
        _leave(report, stack, title)
    title = "2 GPUs, prefill and decode DEP2"
    # Prefill takes memory of one of decode's two GPUs, which SGLang would refuse as an imbalance.
    unbalanced = {"env": {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false"}}
    args = {"prefill": role(0.3), "decode": {**role(0.3, wide=True), **unbalanced}}
    with deployed("split-wide", args, ["0,1,0"], report) as stack:
        before = stack.metric("dynamo_ray_transferred_tokens_total")
        answers = greedy_answers(stack)
        moved = stack.metric("dynamo_ray_transferred_tokens_total") - before
        report.row(title, "answers over both decode ranks", f"{len(answers)} of 8", "8", len(answers) == 8)
        report.row(title, "prompt tokens handed over", f"{moved:.0f}", f"{sum(LENGTHS)}", moved == sum(LENGTHS))
        _leave(report, stack, title)


def ray_launcher(report: Report) -> None:
    """Two GPUs: the same engine with its ranks as Ray actors."""
    if num_gpus() < 2:
        report.say("ray: needs two GPUs")
        return
    title = "2 GPUs, aggregated DEP2, launcher: ray"
    with deployed(
        "ray", {"aggregated": {**role(0.6, wide=True, disable_cuda_graph=True), "launcher": "ray"}}, ["0,1"], report
    ) as stack:
        hits, used = _second_turns(stack)
        report.row(title, "second turns that found their first turn's blocks", f"{hits} of 16", "16", hits == 16)
        report.row(title, "DP ranks that served them", str(used), "2", used == 2)
        _leave(report, stack, title)


@dataclass(frozen=True)
class Peer:
    """A server under load, and its engine's scheduler, whose one thread is what a step of a small model takes."""

    url: str
    scheduler: psutil.Process

    def keep_to(self, cores: list[int]) -> None:
        for thread in self.scheduler.threads():
            os.sched_setaffinity(thread.id, cores[:1] if thread.id == self.scheduler.pid else cores[1:])


class Duel:
    """Two peers, loaded by turns on the same cores, the other's engine standing still meanwhile.

    On a virtual machine the same step takes a core up to twice as long as the next core, or as the same one a second
    later. So each run has its pair right beside it, and the pairs' differences count.
    """

    def __init__(self, ours: Peer, theirs: Peer) -> None:
        self.peers = {THEIRS: theirs, OURS: ours}
        cores = sorted(os.sched_getaffinity(0))[2:6]
        for peer in self.peers.values():
            peer.keep_to(cores)

    def each(self, repeats: int, run: Callable[[str, int], T]) -> dict[str, list[T]]:
        """What `run` returns of a URL and the turn's number, `repeats` times for each peer; who begins alternates."""
        found: dict[str, list[T]] = {name: [] for name in self.peers}
        for turn in range(repeats):
            for name in sorted(self.peers, reverse=bool(turn % 2)):
                other = next(peer for key, peer in self.peers.items() if key != name)
                other.scheduler.suspend()
                try:
                    found[name].append(run(self.peers[name].url, turn))
                finally:
                    other.scheduler.resume()
        return found


def cost(report: Report) -> None:
    """One GPU each: our stack and SGLang's own server, both up and warm, loaded by turns.

    The server's engine publishes KV events too, and its heap is frozen as ours is: what differs is the stack.
    """
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
                    asyncio.run(_load(url, streams, 1, seed=1000 + seed))
        report.say("both are warm")
        http("POST", f"{theirs.url}/freeze_gc")
        duel = Duel(Peer(ours.url, _scheduler(lambda process: process != theirs.scheduler)), theirs)
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
        _leave(report, ours, "cost of the stack")


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
    """Of each peer's runs, in seconds: judged is the median of the pairs' differences."""
    ours, theirs = (1000 * statistics.median(found[name]) for name in (OURS, THEIRS))
    added = [1000 * (mine - other) for mine, other in zip(found[OURS], found[THEIRS], strict=True)]
    low, middle, high = statistics.quantiles(added, n=4)
    report.row(
        title, f"{what}, ours - SGLang's: median of {len(added)} pairs (quartiles)",
        f"{middle:+.2f} ms ({low:+.1f} to {high:+.1f}); medians {ours:.1f} and {theirs:.1f}", "<= 3 ms", middle <= 3,
    )  # fmt: skip


def _medians(runs: list[load.Figures], name: str) -> list[float]:
    """Each run's own median, in seconds."""
    return [getattr(run, name)["p50"] for run in runs]


def _turn(streams: int, rounds: int, url: str, turn: int) -> load.Figures:
    return asyncio.run(_load(url, streams, rounds, seed=1 + turn + 100 * rounds))


async def _load(url: str, streams: int, rounds: int, seed: int) -> load.Figures:
    prompts = [prompt(ISL, 100_000 * seed + 1000 * streams + index) for index in range(streams * rounds)]
    return await load.run(load.Target(url, model.NAME), prompts, OSL, concurrency=streams)


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


def _second_turns(stack: Stack) -> tuple[int, int]:
    """Of 16 conversations: how many second turns found the first's blocks, and how many ranks held blocks at once."""
    firsts = [prompt(640, 900 + number) for number in range(16)]
    for ids in firsts:
        stack.complete(ids, max_tokens=8)
    wait_until(lambda: stack.metric("dynamo_ray_index_blocks") >= 160, 20, "the index has every block")
    hits = sum(cached(stack.complete([*ids, *prompt(40, 5)], max_tokens=4)) >= 640 for ids in firsts)
    asyncio.run(_load(stack.url, 32, 1, seed=77))
    used = sum(stack.metric("dynamo_ray_routed_legs", dp_rank=str(rank)) > 0 for rank in (0, 1))
    return hits, used


def _transfer_rows(report: Report, title: str, name: str) -> None:
    """What SGLang's prefill scheduler logs of its hand-offs (req_time_stats.py): those of 1,024 tokens, in order."""
    num_bytes = 1024 * model.KV_BYTES_PER_TOKEN
    report.row(title, "bytes of a 1,024-token hand-off, by the model's shape", f"{num_bytes:,}")
    told = re.findall(r"transfer_speed=([0-9.]+) GB/s, transfer_total=([0-9.]+) MB", _log_of(report, name, "prefill"))
    whole = [(float(speed), float(size)) for speed, size in told if float(size) * 2**20 > 0.99 * num_bytes]
    if not whole:
        report.row(title, "hand-offs in SGLang's log", "none", "some", False)
        return

    def words(speed_gb_s: float, size_mb: float) -> str:
        time_ms = 1000 * size_mb / 1024 / speed_gb_s if speed_gb_s else float("nan")
        return f"{size_mb:.2f} MiB in {time_ms:.1f} ms = {speed_gb_s:.2f} GiB/s"

    report.row(title, "the first, by SGLang's log", words(*whole[0]))
    later = sorted(whole[1:])
    if later:
        report.row(title, f"later ones (median of {len(later)})", words(*later[len(later) // 2]))


def _log_of(report: Report, name: str, role_name: str) -> str:
    """What the engine of that role wrote, through its actor's log."""
    logs = [log.read_text(errors="replace") for log in (report.out / "ray" / name).glob("worker-*")]
    return "\n".join(text for text in logs if f"disaggregation_mode='{role_name}'" in text)


def _computed(report: Report, name: str, role_name: str) -> int:
    """Prompt tokens in the log lines that a role's schedulers write of their prefill batches."""
    lines = [line for line in _log_of(report, name, role_name).splitlines() if "Prefill batch" in line]
    return sum(int(line.split("#new-token: ")[1].split(",")[0]) for line in lines if "#new-token: " in line)


def _leave(report: Report, stack: Stack, title: str) -> None:
    """A client that leaves: what it held is free again at once."""
    body = {"model": model.NAME, "prompt": prompt(600, 1234), "max_tokens": 4000, "stream": True, "ignore_eos": True}

    async def leave() -> None:
        host, port = stack.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        raw = json.dumps(body).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(raw) + raw
        )
        while b"data: {" not in await reader.readline():
            pass
        writer.close()

    asyncio.run(leave())
    began_s = time.monotonic()
    wait_until(lambda: stack.metric("dynamo_ray_worker_kv_used_blocks") == 0, 15, "its KV is free")
    report.row(
        title,
        "KV free after a client left",
        f"{time.monotonic() - began_s:.1f} s",
        "<= 5 s",
        time.monotonic() - began_s <= 5,
    )


def _timed(call: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


SECTIONS: dict[str, Callable[[Report], None]] = {
    "aggregated": aggregated,
    "split": split,
    "wide": wide,
    "ray": ray_launcher,
    "cost": cost,
}


def run(out: Path, sections: list[str]) -> list[Row]:
    """Run the sections; one that fails is a row, and the others go on."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # read when Ray is imported
    report = Report(out)
    model.make(out / "model")
    for name in sections:
        try:
            SECTIONS[name](report)
        except Exception as error:  # noqa: BLE001 - the others are worth having
            traceback.print_exc()
            report.row(name, "failed", f"{type(error).__name__}: {error}"[:600].replace("\n", " "), "", False)
    return report.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--pretend", type=int, default=0, metavar="GPUS")
    given = parser.parse_args()
    global pretence
    pretence = Pretence(given.pretend)
    rows = run(given.out, given.sections.split(","))
    print((given.out / "table.md").read_text())
    sys.exit(any(row.ok is False for row in rows))


if __name__ == "__main__":
    main()
