"""Starts what a user would start, as a process of its own, and checks that stopping it leaves nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
READY_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Deployment:
    url: str
    model: str
    process: subprocess.Popen[str]
    log: Path

    def get(self, path: str, timeout_s: float = 30.0) -> tuple[int, str]:
        return http("GET", self.url + path, timeout_s=timeout_s)

    def post(self, path: str, body: Any, timeout_s: float = 120.0) -> tuple[int, Any]:
        status, text = http("POST", self.url + path, body, timeout_s=timeout_s)
        return status, json.loads(text)

    def chat(self, content: str, **options: Any) -> dict[str, Any]:
        return self.converse([{"role": "user", "content": content}], **options)

    def converse(self, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        status, answer = self.post("/v1/chat/completions", {"model": self.model, "messages": messages, **options})
        assert status == 200, answer
        return answer

    def complete(self, prompt: str | list[int], **options: Any) -> dict[str, Any]:
        status, answer = self.post("/v1/completions", {"model": self.model, "prompt": prompt, **options})
        assert status == 200, answer
        return answer

    def metric(self, name: str) -> float:
        """Sum over all label sets."""
        _, text = self.get("/metrics")
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))
        )

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def http(method: str, url: str, body: Any = None, timeout_s: float = 30.0) -> tuple[int, str]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


_given: set[int] = set()


def free_port() -> int:
    """Below the ports that the kernel gives to whoever asks for any, above those of Ray, our nodes and Serve; another
    each time."""
    while True:
        port = random.randrange(31_001, 32_768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


def wait_until(condition: Any, timeout_s: float, what: str, every_s: float = 0.1) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"after {timeout_s} s still not: {what}"
        time.sleep(every_s)


@contextmanager
def up(config: Path, model: str, log: Path, *options: str) -> Iterator[Deployment]:
    """`dynamo-ray up CONFIG`, ready; at the end Ctrl-C, and every process it had started must be gone."""
    port = free_port()
    command = [str(BIN / "dynamo-ray"), "up", str(config), "--port", str(port), *options]
    with _running(command, port, model, log) as deployment:
        yield deployment


@contextmanager
def serve_run(config: Path, model: str, log: Path) -> Iterator[Deployment]:
    """Plain `serve run CONFIG` on another port, with nothing of ours in the environment; ends as `up` does."""
    port = free_port()
    document = yaml.safe_load(config.read_text())
    document["http_options"]["port"] = port
    moved = log.with_suffix(".yaml")
    moved.write_text(yaml.safe_dump(document))
    # Tests that run in the background of a shell inherit that Ctrl-C is ignored, and Python then does not hear it.
    command = ["env", "--default-signal=INT", str(BIN / "serve"), "run", str(moved)]
    with _running(command, port, model, log) as deployment:
        yield deployment


@contextmanager
def _running(command: list[str], port: int, model: str, log: Path) -> Iterator[Deployment]:
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    deployment = Deployment(f"http://127.0.0.1:{port}", model, process, log)
    started: list[psutil.Process] = []
    try:
        _await_ready(deployment)
        yield deployment
    finally:
        if process.poll() is None:
            started = deployment.descendants()
            os.kill(process.pid, signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            _, alive = psutil.wait_procs(started, timeout=10)
            names = [" ".join(p.cmdline())[:120] for p in alive if p.is_running()]
            for survivor in alive:
                survivor.kill()
        assert not names, f"left running after Ctrl-C: {names}"


def _await_ready(deployment: Deployment) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not _ready(deployment):
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not ready within {READY_TIMEOUT_S:g} s:\n{deployment.log.read_text()[-5000:]}")
        time.sleep(0.1)


def _ready(deployment: Deployment) -> bool:
    if deployment.process.poll() is not None:
        raise AssertionError(f"it ended by itself:\n{deployment.log.read_text()[-5000:]}")
    try:
        return deployment.get("/ready")[0] == 200
    except OSError:
        return False
