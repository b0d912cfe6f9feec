"""`make run`'s own path: a real model, prefill and decode in separate processes, the KV over NIXL."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import psutil
import pytest
from deployments import ROOT, Deployment, up

MODEL = "smollm2-135m-instruct"
MAX_TOTAL_GIB = 6.0


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    log = tmp_path_factory.mktemp("local") / "up.log"
    with up(ROOT / "configs/local.yaml", MODEL, log) as running:
        yield running


def test_the_model_answers_a_question_streamed_and_not(deployment: Deployment) -> None:
    with openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="unused", max_retries=0) as client:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=24, temperature=0)
        stream = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=24, temperature=0, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "Paris" in text
    assert text == whole.choices[0].message.content


def test_the_kv_moved_and_decode_computed_no_prompt_block(deployment: Deployment) -> None:
    before = deployment.metric("dynamo_ray_transferred_tokens_total")
    prompt = "The rivers of the world, from the longest to the shortest, are " * 8
    answer = deployment.complete(prompt, max_tokens=4, temperature=0)
    moved = deployment.metric("dynamo_ray_transferred_tokens_total") - before
    prompt_tokens = answer["usage"]["prompt_tokens"]
    assert prompt_tokens > 64
    assert prompt_tokens - 32 <= moved <= prompt_tokens


def test_seeds_repeat_and_differ(deployment: Deployment) -> None:
    def text(seed: int) -> str:
        answer = deployment.complete("Once upon a time", max_tokens=12, temperature=1.0, seed=seed)
        return str(answer["choices"][0]["text"])

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_stop_strings_end_the_text_before_them(deployment: Deployment) -> None:
    whole = deployment.chat("Count from one to ten in words.", max_tokens=40, temperature=0)
    text = whole["choices"][0]["message"]["content"]
    stop = text[10:14]
    cut = deployment.chat("Count from one to ten in words.", max_tokens=40, temperature=0, stop=stop)
    assert cut["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"


def test_logprobs_name_the_tokens_of_the_text(deployment: Deployment) -> None:
    answer = deployment.chat("Say hello.", max_tokens=5, temperature=0, logprobs=True, top_logprobs=2)
    choice = answer["choices"][0]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries).startswith(choice["message"]["content"])
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0 for entry in entries)
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in entries)  # greedy


def test_n_choices_come_back_in_order(deployment: Deployment) -> None:
    answer = deployment.complete("The sky is", max_tokens=6, temperature=1.0, seed=3, n=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 18


def test_a_prompt_beyond_the_context_is_refused_with_numbers(deployment: Deployment) -> None:
    body = {"model": MODEL, "prompt": "word " * 3000, "max_tokens": 1}
    status, answer = deployment.post("/v1/completions", body)
    assert status == 400
    assert answer["error"]["code"] == "context_length_exceeded"
    assert answer["error"]["param"] == "prompt"


def test_the_whole_thing_stays_under_6_gib(deployment: Deployment) -> None:
    total = psutil.Process(deployment.process.pid).memory_full_info().pss
    total += sum(process.memory_full_info().pss for process in deployment.descendants())
    assert total < MAX_TOTAL_GIB * 2**30, f"{total / 2**30:.2f} GiB"


def test_the_openapi_document_describes_what_is_served(deployment: Deployment) -> None:
    document = json.loads(deployment.get("/openapi.json")[1])
    assert set(document["paths"]) >= {"/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/ready"}
