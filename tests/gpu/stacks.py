"""What the sections of the report have in common: the table, deployments on a Ray of their own, prompts, load."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import model  # first: puts the rest on the path
import yaml
from deployments import free_port, http, wait_until
from model import ROOT

from dynamo_ray.cli import load

ENGINE_ARGS: dict[str, Any] = {
    "load_format": "dummy",
    "page_size": 64,
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "random_seed": 1,
}
"""Kernels that need nothing beyond sgl-kernel and Triton; see docs/gpu.md."""
ENGINE_VERSION = "0.5.16"
ISL, OSL = 512, 128


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

    with local_ray.scratch() as folder, local_ray.reserve_serve_ports() as serve:
        port = free_port()
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


async def loaded(url: str, streams: int, rounds: int, seed: int) -> load.Figures:
    prompts = [prompt(ISL, 100_000 * seed + 1000 * streams + index) for index in range(streams * rounds)]
    return await load.run(load.Target(url, model.NAME), prompts, OSL, concurrency=streams)


def leave(report: Report, stack: Stack, title: str) -> None:
    """A client that leaves: what it held is free again at once."""
    body = {"model": model.NAME, "prompt": prompt(600, 1234), "max_tokens": 4000, "stream": True, "ignore_eos": True}

    async def go() -> None:
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

    asyncio.run(go())
    began_s = time.monotonic()
    wait_until(lambda: stack.metric("dynamo_ray_worker_kv_used_blocks") == 0, 15, "its KV is free")
    report.row(
        title,
        "KV free after a client left",
        f"{time.monotonic() - began_s:.1f} s",
        "<= 5 s",
        time.monotonic() - began_s <= 5,
    )
