"""Two ingress replicas over four simulated workers of two ranks each, through Ray Serve: either knows where KV is."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from deployments import ROOT, Deployment, free_port, up, wait_until

MODEL = "byte-tokenizer"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    document = yaml.safe_load((ROOT / "configs/local-sim.yaml").read_text())
    application = document["applications"][0]
    application["name"] = "two-ingresses"
    application["deployments"] = [{"name": "Ingress", "num_replicas": 2}]
    for role in ("prefill", "decode"):
        application["args"][role]["parallelism"] = {"attn_dp": 2, "moe_ep": 2}
    # A prefix outweighs a request that has just ended, and is not yet known to have, on the same rank.
    application["args"]["router"] = {"policy": "blocks", "prefill_load_scale": 4.0}
    path = tmp_path_factory.mktemp("two-ingresses") / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def deployment(config: Path) -> Iterator[Deployment]:
    with up(config, MODEL, config.with_suffix(".log")) as running:
        yield running


@pytest.fixture(scope="module")
def replicas(deployment: Deployment) -> list[str]:
    """Each ingress replica's own URL: behind HAProxy they answer HTTP themselves."""
    found: list[str] = []

    def both() -> bool:
        found[:] = sorted({url for process in deployment.descendants() for url in served_by(process)})
        return len(found) == 2

    wait_until(both, 30, "two ingress replicas that answer")
    return found


def served_by(process: psutil.Process) -> Iterator[str]:
    try:
        if "ServeReplica:two-ingresses:Ingress" not in " ".join(process.cmdline()):
            return
        listening = [c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:
        return
    for port in listening:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2.0) as response:
                if json.loads(response.read()) == {"status": "ready"}:
                    yield f"http://127.0.0.1:{port}"
        except (OSError, ValueError, http.client.HTTPException):
            continue  # another of its sockets


def post(url: str, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The answer, and the route it took where it tells."""
    headers = {"Content-Type": "application/json", "x-dynamo-ray-explain": "1"}
    request = urllib.request.Request(url + path, json.dumps({"model": MODEL, **body}).encode(), headers)
    with urllib.request.urlopen(request, timeout=30.0) as response:
        return json.loads(response.read()), json.loads(response.headers["x-dynamo-ray-route"] or "null")


def rank(leg: dict[str, Any]) -> tuple[str, int]:
    return leg["worker"], leg["dp_rank"]


def chooses(url: str, body: dict[str, Any], num_blocks: int) -> bool:
    """Whether it would take a prefill rank that holds so many of its blocks: it knows of them, and of no load there."""
    dry, _ = post(url, "/v1/route", body)
    (chosen,) = (candidate for candidate in dry["prefill"]["candidates"] if candidate["chosen"])
    return bool(chosen["overlap_blocks"] >= num_blocks)


def test_a_second_turn_lands_where_the_prefix_is_through_either_replica(replicas: list[str]) -> None:
    for conversation in range(6):
        one, other = replicas if conversation % 2 else reversed(replicas)
        first = f"{conversation} is the number of this conversation. " * 10
        answer, route = post(one, "/v1/completions", {"prompt": first, "max_tokens": 8})
        second = {"prompt": first + answer["choices"][0]["text"] + " And then?", "max_tokens": 8}
        for url in (other, one):
            # What the last turn left is told at once, that it has ended with the rank's next heartbeat.
            wait_until(partial(chooses, url, second, len(first) // 16), 10, f"{url} knows where the first turn is")
            answer, again = post(url, "/v1/completions", second)
            assert rank(again["prefill"]) == rank(route["prefill"])
            assert again["prefill"]["overlap_blocks"] >= len(first) // 16
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(first) - 16


def test_the_command_says_where_a_prompt_would_go(deployment: Deployment, config: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("where would this go? " * 10)
    command = [str(Path(sys.executable).parent / "dynamo-ray"), "route", str(config), "--prompt", str(prompt)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "policy blocks" in done.stdout
    for said in ("prefill-0", "prefill-1", "decode-0", "decode-1", "overlap", "->"):
        assert said in done.stdout
    wrong = [*command, "--url", f"http://127.0.0.1:{free_port()}"]
    done = subprocess.run(wrong, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert "--url: no deployment answers" in done.stderr


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_killed_mid_stream_loses_no_request_of_either_replica(
    deployment: Deployment, replicas: list[str], role: str
) -> None:
    body = {"max_tokens": 150, "temperature": 0}
    prompts = [f"{role} request number {i}. " * 40 for i in range(16)]
    expected = [post(replicas[0], "/v1/completions", {"prompt": p, **body})[0] for p in prompts[:2]]
    victim = next(p for p in deployment.descendants() if f"{role}-0" in " ".join(p.cmdline()))
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [
            pool.submit(post, replicas[i % 2], "/v1/completions", {"prompt": prompt, **body})
            for i, prompt in enumerate(prompts)
        ]
        wait_until(lambda: running(deployment) >= 4, 10, "requests run")
        victim.send_signal(signal.SIGKILL)
        texts = [answer.result(timeout=60)[0]["choices"][0]["text"] for answer in answers]
    assert all(len(text) == 150 for text in texts)
    assert texts[:2] == [answer["choices"][0]["text"] for answer in expected]


def running(deployment: Deployment) -> float:
    return deployment.metric("dynamo_ray_worker_running_requests")
