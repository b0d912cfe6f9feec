"""What a token costs on its way out: our framed TCP data plane against a Serve handle, in one run.

    python tests/bench/bench_ingress.py [--streams 64] [--tokens 400] [--step-ms 20 0.25] [--check]

The applications are the same HTTP front in the same Serve (HAProxy mode, one ingress replica) over the same
simulated engine in one worker process, at two paces: a token each 20 ms and stream, as people read, and each 0.25 ms,
which is more than any of them carries. They differ in how tokens come from the worker to the ingress: `tcp` is the
product's data plane; `handle-ray` a streaming `DeploymentHandle` over Ray's object transport, which a plain
`handle.remote()` uses in a Serve without any of our settings; `handle-grpc` the same over gRPC, Serve's choice under
RAY_SERVE_THROUGHPUT_OPTIMIZED=1. CPU is user + system time of the named processes, over the load's duration, per token.
Events per token are below 1 where tokens that have piled up leave in one event, as only `tcp` can; most of what is left
of its cost at the slow pace is the kernel's, one write an event. With --check, exit 1 unless the ingress costs at most
60 CPU-us a token over `tcp` at the slow pace, and 20 times its cost over `handle-ray` at the fast one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    "RAY_AUTH_MODE": "disabled",
}

import psutil
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from backends.engine import GenerateRequest, LaunchSpec, Role, TokenChunk
from backends.simulated import SimulatedEngine
from dynamo_ray import models
from dynamo_ray.app import build
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.request.generation import Generation
from dynamo_ray.request.http import Front, Settings
from dynamo_ray.request.tokens import Tokeniser
from dynamo_ray.telemetry import Telemetry

MAX_INGRESS_US_PER_TOKEN = 60.0
MIN_RATIO = 20.0
JUDGED = "handle-ray"
"""What the product is measured against: a handle as Serve's own defaults make it."""
MODEL = "byte-tokenizer"
HERE = Path(__file__).parent


class Engine:
    """The simulated engine as a Serve deployment of its own."""

    async def __init__(self, engine_args: dict[str, Any]) -> None:
        self._engine = SimulatedEngine(
            LaunchSpec("engine", Role.AGGREGATED, MODEL, "", kv_events=False, engine_args=engine_args)
        )
        self._info = await self._engine.start()

    async def max_model_len(self) -> int:
        return self._info.max_model_len

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk]:
        async with aclosing(self._engine.generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk


class HandleService:
    """Tokens through a DeploymentHandle: what Serve offers."""

    max_logprobs = 0

    def __init__(self, handle: DeploymentHandle, max_model_len: int) -> None:
        self._handle = handle
        self.max_model_len = max_model_len

    def ready(self) -> str | None:
        return None

    async def generate(self, request: Generation) -> AsyncGenerator[TokenChunk]:
        leg = GenerateRequest(request.request_id, request.token_ids, request.sampling)
        async for chunk in self._handle.generate.remote(leg):
            yield chunk


class HandleIngress:
    async def __init__(self, folder: str, by_reference: bool, engine: DeploymentHandle) -> None:
        self._folder = Path(folder)
        limit = await engine.max_model_len.remote()
        self._service = HandleService(engine.options(stream=True, _by_reference=by_reference), limit)

    async def __serve_build_asgi_app__(self) -> Front:
        return Front(self._service, Tokeniser(self._folder), Settings(MODEL), Telemetry())


def handle_application(engine_args: dict[str, Any], folder: Path, by_reference: bool) -> serve.Application:
    options: dict[str, Any] = {"max_ongoing_requests": 10_000, "ray_actor_options": {"num_cpus": 0}}
    options["logging_config"] = {"enable_access_log": False}
    engine = serve.deployment(Engine, name="Engine", **options).bind(engine_args)
    ingress = serve.deployment(serve.ingress()(HandleIngress), name="Ingress", **options)
    return ingress.bind(str(folder), by_reference, engine)


def tcp_application(engine_args: dict[str, Any], folder: Path) -> serve.Application:
    return build(
        DeploymentConfig.model_validate(
            {
                "model": {"name": MODEL, "path": str(folder)},
                "backend": "simulated",
                "aggregated": {"resources": {"cpus": 0.1}, "engine_args": engine_args},
                "events": "none",
            }
        )
    )


@dataclass(frozen=True)
class Cost:
    """CPU-us per token of one run."""

    ingress: float
    worker: float
    proxy: float
    tokens: int
    events: int
    ttft_p50_ms: float
    itl_p50_ms: float

    @property
    def events_per_token(self) -> float:
        return self.events / self.tokens


def processes(app: str) -> dict[str, list[psutil.Process]]:
    """The processes of one application, by part, from the titles Ray gives them."""
    found: dict[str, list[psutil.Process]] = {"ingress": [], "worker": [], "proxy": []}
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if f"ServeReplica:{app}:Ingress" in title:
            found["ingress"].append(process)
        elif f"ServeReplica:{app}:Engine" in title or "EngineNode aggregated-0" in title:
            found["worker"].append(process)
        elif "haproxy" in process.name():
            found["proxy"].append(process)
    return found


def cpu_s(group: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in group)


def run_load(url: str, streams: int, tokens: int) -> dict[str, Any]:
    shape = ["--requests", str(streams), "--concurrency", str(streams), "--answer-tokens", str(tokens)]
    command = [sys.executable, "-m", "dynamo_ray", "bench", "--url", url, "--model", MODEL, "--prompt-tokens", "200"]
    done = subprocess.run([*command, *shape, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the load failed: {done.stdout}{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return {
        "tokens": figures["answer_tokens"],
        "events": figures["events"],
        "ttft_p50_ms": 1000 * figures["ttft_s"]["p50"],
        "itl_p50_ms": 1000 * figures["itl_s"]["p50"],
    }


def measure(app: str, application: serve.Application, port: int, streams: int, tokens: int, repeats: int) -> list[Cost]:
    """Deploy, warm up, measure, remove."""
    serve.run(application, name=app, route_prefix="/")
    url = f"http://127.0.0.1:{port}"
    await_ready(url)
    run_load(url, streams, 20)
    costs = []
    for _ in range(repeats):
        parts = processes(app)
        if not parts["ingress"] or not parts["worker"]:
            raise SystemExit(f"{app}: its processes were not found: {parts}")
        before = {name: cpu_s(group) for name, group in parts.items()}
        figures = run_load(url, streams, tokens)
        spent = {name: 1e6 * (cpu_s(group) - before[name]) / figures["tokens"] for name, group in parts.items()}
        costs.append(Cost(**spent, **{key: figures[key] for key in ("tokens", "events", "ttft_p50_ms", "itl_p50_ms")}))
    serve.delete(app)
    return costs


def await_ready(url: str) -> None:
    deadline_s = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)


def median(costs: list[Cost], part: str) -> float:
    return statistics.median(getattr(cost, part) for cost in costs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[20.0, 0.25])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=18_400)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    folder = models.prepare(MODEL)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"] = f"{scratch}/admin.sock"
        os.environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"] = f"{scratch}/haproxy.cfg"
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
        serve.start(http_options={"host": "127.0.0.1", "port": args.port}, proxy_location="HeadOnly")
        try:
            results = {step_ms: at_pace(step_ms, folder, args) for step_ms in sorted(args.step_ms, reverse=True)}
        finally:
            serve.shutdown()
            ray.shutdown()
    for step_ms, costs in results.items():
        report(step_ms, costs)
    ours, judged = median(results[max(results)]["tcp"], "ingress"), ratio(results[min(results)], JUDGED)
    if args.check and (ours > MAX_INGRESS_US_PER_TOKEN or judged < MIN_RATIO):
        raise SystemExit(f"missed: at most {MAX_INGRESS_US_PER_TOKEN} us, at least {MIN_RATIO}x against {JUDGED}")


def at_pace(step_ms: float, folder: Path, args: argparse.Namespace) -> dict[str, list[Cost]]:
    """Every path, one after the other, with an engine of that pace."""
    engine_args = {"step_s": step_ms / 1000}
    applications = {
        "tcp": tcp_application(engine_args, folder),
        "handle-grpc": handle_application(engine_args, folder, by_reference=False),
        "handle-ray": handle_application(engine_args, folder, by_reference=True),
    }
    return {
        app: measure(app, application, args.port, args.streams, args.tokens, args.repeats)
        for app, application in applications.items()
    }


def report(step_ms: float, results: dict[str, list[Cost]]) -> None:
    print(f"a token each {step_ms:g} ms and stream; CPU-us per token, median of the repeats, [range] of the ingress")
    print(f"{'path':<12} {'ingress':>9} {'worker':>9} {'haproxy':>9} {'events/token':>13}")
    for app, costs in results.items():
        ingress = [cost.ingress for cost in costs]
        print(
            f"{app:<12} {median(costs, 'ingress'):>9.1f} {median(costs, 'worker'):>9.1f} {median(costs, 'proxy'):>9.1f}"
            f" {median(costs, 'events_per_token'):>13.2f}"
            f"   [{min(ingress):.1f}..{max(ingress):.1f}]  ttft p50 {median(costs, 'ttft_p50_ms'):.0f} ms,"
            f" itl p50 {median(costs, 'itl_p50_ms'):.1f} ms"
        )
    ours = results["tcp"]
    for app in ("handle-ray", "handle-grpc"):
        both = (median(results[app], "ingress") + median(results[app], "worker")) / (
            median(ours, "ingress") + median(ours, "worker")
        )
        print(f"{app} / tcp: {ratio(results, app):.1f}x in the ingress, {both:.1f}x in ingress + worker")


def ratio(results: dict[str, list[Cost]], app: str) -> float:
    return median(results[app], "ingress") / median(results["tcp"], "ingress")


if __name__ == "__main__":
    main()
