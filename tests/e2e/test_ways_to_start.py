"""A configuration by plain `serve run`, and from Python; `dynamo-ray up` has modules of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from deployments import BIN, ROOT, free_port, http, serve_run
from engines import TINY_DEEPSEEK, prompt
from reference import answers_of_transformers
from tokenizers import Tokenizer

from dynamo_ray import models

SIM = "byte-tokenizer"

SERVE_FROM_PYTHON = """
import sys
from dynamo_ray import up

with up(sys.argv[1], port=int(sys.argv[2])) as deployment:
    print(deployment.url, flush=True)
    sys.stdin.read()
"""

TWICE = """
import json, os, subprocess, sys, time, urllib.request
import psutil
from dynamo_ray import DeploymentConfig, up

assert "RAY_AUTH_MODE" not in os.environ
command, port = sys.argv[1], int(sys.argv[2])

def environment():
    return {name: value for name, value in os.environ.items() if name.startswith(("RAY_", "DYNAMO_RAY_"))}

def post(deployment, path, messages):
    body = {"model": config.model.name, "messages": messages, "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        deployment.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)

def cached(deployment, messages):
    answer = post(deployment, "/v1/chat/completions", messages)
    reply = {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
    return reply, answer["usage"]["prompt_tokens_details"]["cached_tokens"]

def await_heard(deployment, messages):
    # Until the rank of the last turn is seen to hold it and to be idle again: the policy counts on nothing less.
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        prefill = post(deployment, "/v1/route", messages)["prefill"]
        if any(candidate["chosen"] and candidate["overlap_blocks"] for candidate in prefill["candidates"]):
            return
        time.sleep(0.05)
    raise SystemExit(f"nothing was heard of the first turn: {prefill}")

for text in sys.argv[3:]:
    config = DeploymentConfig.model_validate_json(text)
    before = environment()
    with up(config, port=port) as deployment:
        phases = [status.phase for status in deployment.statuses()]
        subprocess.run([command, "control", "default", "resume"], check=True, stdout=subprocess.DEVNULL)
        assert environment() == before
        started = psutil.Process().children(recursive=True)
        assert len(started) > 5
        lowered = [process.name() for process in started if process.nice() > psutil.Process().nice()]
        assert not lowered, f"{lowered} run behind everything else"
        other = subprocess.Popen(["sleep", "100"])
        found = []
        for number in range(3):
            first = [{"role": "user", "content": f"{number}: tell me about rivers " * 20}]
            reply, _ = cached(deployment, first)
            second = [*first, reply, {"role": "user", "content": "and lakes?"}]
            if config.router.policy == "blocks":
                await_heard(deployment, second)
            _, again = cached(deployment, second)
            found.append(again)
    assert other.poll() is None, "ended with the deployment, though the user started it"
    other.kill()
    other.wait()
    print(json.dumps({"phases": phases, "cached": found}))
"""


def two_by_two(policy: str) -> str:
    """A configuration of two prefill workers of 2 ranks and one decode worker."""
    config = {
        "model": {"name": SIM, "path": f"~/.cache/dynamo-ray/models/{SIM}"},
        "backend": "simulated",
        "prefill": {"replicas": 2, "parallelism": {"attn_dp": 2, "moe_ep": 2}, "resources": {"cpus": 0.2}},
        "decode": {"resources": {"cpus": 0.2}},
        "router": {"policy": policy},
    }
    return json.dumps(config)


@pytest.fixture(scope="module")
def served_twice() -> list[dict[str, list[object]]]:
    """Of one process with Ray's authentication on, which serves under `blocks` and then under `round_robin`: its
    workers' phases, and the cached tokens of the second turns of three conversations."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    configs = [two_by_two("blocks"), two_by_two("round_robin")]
    command = [sys.executable, "-c", TWICE, str(BIN / "dynamo-ray"), str(free_port()), *configs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_plain_serve_run_works_and_says_what_haproxy_mode_would_gain(tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    with serve_run(ROOT / "configs/local-sim.yaml", SIM, log) as deployment:
        assert len(deployment.complete("abc", max_tokens=5)["choices"][0]["text"]) == 5
    assert "RAY_SERVE_ENABLE_HA_PROXY=1" in log.read_text()
    assert "0.3 ms" in log.read_text()


def test_one_python_process_serves_twice_with_ray_s_authentication_on(
    served_twice: list[dict[str, list[object]]],
) -> None:
    assert [served["phases"] for served in served_twice] == [["ready"] * 3] * 2


def test_second_turns_find_the_first_under_kv_aware_routing_and_not_under_round_robin(
    served_twice: list[dict[str, list[int]]],
) -> None:
    by_blocks, in_turn = (served["cached"] for served in served_twice)
    assert len(by_blocks) == 3
    assert all(tokens >= 400 for tokens in by_blocks)
    assert in_turn == [0, 0, 0]


@pytest.mark.filterwarnings("default")
def test_dep_workers_started_from_python_answer_as_transformers_does() -> None:
    """Attention data parallel and expert parallel over 2 ranks, prefill and decode apart, through the whole path."""
    prompts = [prompt(length, seed=11, vocabulary=(0, 256)) for length in (1, 16, 17, 40, 130, 300)]
    tokenizer = Tokenizer.from_file(str(models.prepare(TINY_DEEPSEEK) / "tokenizer.json"))
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers_of_transformers(prompts, 16)]
    command = [sys.executable, "-c", SERVE_FROM_PYTHON, "configs/local-dep.yaml", str(free_port())]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        url = next((line.strip() for line in serving.stdout if line.startswith("http")), None)
        assert url is not None, "it ended by itself"
        body = {"model": TINY_DEEPSEEK, "prompt": prompts, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        status, text = http("POST", f"{url}/v1/completions", body, timeout_s=120)
        _, metrics = http("GET", f"{url}/metrics")
        serving.communicate("", timeout=60)
    assert status == 200, text
    assert [choice["text"] for choice in json.loads(text)["choices"]] == expected
    assert f"dynamo_ray_transferred_tokens_total {sum(len(ids) for ids in prompts[1:])}.0" in metrics
    assert serving.returncode == 0
