"""`dynamo-ray up configs/local-sim.yaml`: the whole stack with simulated engines, and what happens when parts die."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from deployments import ROOT, Deployment, up, wait_until

MODEL = "byte-tokenizer"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    log = tmp_path_factory.mktemp("local-sim") / "up.log"
    with up(ROOT / "configs/local-sim.yaml", MODEL, log) as running:
        yield running


@pytest.fixture
def client(deployment: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_the_openai_client_gets_the_same_answer_streamed_and_not(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hello there"}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=20, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len(text) == 20
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == chunks[-1].usage.prompt_tokens
    assert whole.choices[0].finish_reason == "length"


def test_curl_streams_server_sent_events(deployment: Deployment) -> None:
    body = {"model": MODEL, "prompt": "abc", "max_tokens": 3, "stream": True, "temperature": 0}
    done = subprocess.run(
        ["curl", "-sN", f"{deployment.url}/v1/completions", "--json", json.dumps(body)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    events = [line for line in done.stdout.splitlines() if line]
    assert events[-1] == "data: [DONE]"
    assert all(event.startswith("data: ") for event in events)


def test_64_streams_at_once_all_finish(deployment: Deployment) -> None:
    shape = ["--requests", "64", "--concurrency", "64", "--prompt-tokens", "200", "--answer-tokens", "100"]
    done = subprocess.run(
        [sys.executable, "-m", "dynamo_ray", "bench", "--url", deployment.url, *shape, "--shared", "0.5", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    figures = json.loads(done.stdout)
    assert figures["errors"] == {}
    assert figures["ok"] == 64
    assert figures["answer_tokens"] == 6400
    assert abs(figures["prompt_tokens"] - 64 * 200) <= 64


def kv_used(deployment: Deployment) -> float:
    return deployment.metric("dynamo_ray_worker_kv_used_blocks")


def test_a_client_that_leaves_mid_stream_frees_both_engines_within_2_s(deployment: Deployment) -> None:
    host, port = deployment.url.removeprefix("http://").split(":")
    body = json.dumps({"model": MODEL, "prompt": "x" * 500, "max_tokens": 5000, "stream": True}).encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        assert b"data: " in connection.recv(65536) + connection.recv(65536)
        wait_until(lambda: kv_used(deployment) > 0, 5, "the request holds KV")
    wait_until(lambda: kv_used(deployment) == 0, 2.5, "freed; a heartbeat tells us each second")


def test_killing_a_decode_worker_mid_stream_loses_no_request(deployment: Deployment) -> None:
    prompts = [f"request number {i}" for i in range(32)]
    expected = [deployment.complete(p, max_tokens=150, temperature=0)["choices"][0]["text"] for p in prompts[:4]]
    victim = next(p for p in deployment.descendants() if "decode-0" in " ".join(p.cmdline()))
    with ThreadPoolExecutor(32) as pool:
        answers = [pool.submit(deployment.complete, p, max_tokens=150, temperature=0) for p in prompts]
        wait_until(lambda: deployment.metric("dynamo_ray_worker_running_requests") >= 16, 10, "requests run")
        victim.send_signal(signal.SIGKILL)
        texts = [answer.result()["choices"][0]["text"] for answer in answers]
    assert all(len(text) == 150 for text in texts)
    assert texts[:4] == expected
    wait_until(lambda: "decode-0" in _workers(deployment, "ready"), 60, "decode-0 rebuilt")


def _workers(deployment: Deployment, phase: str) -> set[str]:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "dynamo-ray"), "status", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return {row["worker"] for row in json.loads(done.stdout)["workers"] if row["phase"] == phase}


def test_a_second_turn_goes_where_the_first_one_is(client: openai.OpenAI) -> None:
    first = [{"role": "user", "content": "tell me about rivers " * 20}]
    answer = client.chat.completions.create(model=MODEL, messages=first, max_tokens=40, temperature=0)
    assert answer.usage is not None
    second = [*first, {"role": "assistant", "content": answer.choices[0].message.content}]
    second.append({"role": "user", "content": "and lakes?"})
    cached = []
    for _ in range(4):  # wherever the rotation stands, the exact index must win every time
        time.sleep(0.3)
        again = client.chat.completions.create(model=MODEL, messages=second, max_tokens=1, temperature=0)
        assert again.usage is not None
        assert again.usage.prompt_tokens_details is not None
        cached.append(again.usage.prompt_tokens_details.cached_tokens or 0)
    assert min(cached) >= 400


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "top_p": 1.5}, "top_p"),
        ({"prompt": "x", "colour": "blue"}, "colour"),
        ({"prompt": "x" * 20_000, "max_tokens": 1}, "prompt"),
        ({"prompt": "x", "regex": "a+"}, "regex"),  # what the simulated engine has not
        ({"prompt": "x", "min_p": 0.1}, "min_p"),
    ],
)
def test_bad_values_are_400_and_name_the_field(deployment: Deployment, body: dict[str, object], field: str) -> None:
    status, answer = deployment.post("/v1/completions", {"model": MODEL, **body})
    assert status == 400
    assert answer["error"]["param"] == field


def test_invalid_json_and_utf8_are_400(deployment: Deployment) -> None:
    for raw in (b"{", b'{"model": "\xff\xfe"}', b""):
        status, answer = deployment.post("/v1/completions", raw)
        assert status == 400, answer
        assert answer["error"]["type"] == "invalid_request_error"


def test_an_unknown_model_is_404_and_lists_the_one_served(deployment: Deployment) -> None:
    status, answer = deployment.post("/v1/completions", {"model": "gpt-9", "prompt": "x"})
    assert status == 404
    assert MODEL in answer["error"]["message"]


def test_the_other_endpoints_answer(deployment: Deployment) -> None:
    assert deployment.get("/health")[0] == 200
    assert deployment.get("/ready")[0] == 200
    assert json.loads(deployment.get("/v1/models")[1])["data"][0]["id"] == MODEL
    assert "/v1/chat/completions" in json.loads(deployment.get("/openapi.json")[1])["paths"]
    assert "dynamo_ray_" in deployment.get("/metrics")[1]


def test_its_ray_starts_nothing_that_only_an_autoscaler_or_a_reader_of_logs_would_want(deployment: Deployment) -> None:
    commands = [" ".join(process.cmdline()) for process in deployment.descendants()]
    assert any("gcs_server" in command for command in commands)
    assert [command for command in commands if "monitor.py" in command] == []


def _control(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "dynamo-ray"), "control", "local-sim", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_paused_workers_are_503_until_they_are_resumed_and_new_weights_answer_otherwise(
    deployment: Deployment, tmp_path: Path
) -> None:
    body = {"model": MODEL, "prompt": "abc", "max_tokens": 20, "temperature": 0}
    old = deployment.complete("abc", max_tokens=20, temperature=0)["choices"][0]["text"]
    assert _control("pause", "--worker", "decode").returncode == 0
    status, answer = deployment.post("/v1/completions", body)
    assert (status, answer["error"]["code"]) == (503, "not_ready")
    assert "decode-1 is paused" in answer["error"]["message"]
    assert _control("resume").returncode == 0
    assert deployment.complete("abc", max_tokens=20, temperature=0)["choices"][0]["text"] == old
    missing = _control("update-weights", "--path", str(tmp_path / "missing"))
    assert (missing.returncode, missing.stderr.count("there is no folder")) == (5, 4)
    done = _control("update-weights", "--path", str(tmp_path))
    assert done.stdout.splitlines() == [
        f"{worker}: update-weights done" for worker in ("prefill-0", "prefill-1", "decode-0", "decode-1")
    ]
    assert deployment.complete("abc", max_tokens=20, temperature=0)["choices"][0]["text"] != old


def test_many_short_requests_in_parallel_leave_nothing_behind(deployment: Deployment) -> None:
    errors: list[object] = []

    def burst(index: int) -> None:
        try:
            deployment.complete(f"p{index}", max_tokens=3, n=2)
        except AssertionError as error:
            errors.append(error)

    threads = [threading.Thread(target=burst, args=(i,)) for i in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    wait_until(lambda: kv_used(deployment) == 0, 3, "all KV freed")
