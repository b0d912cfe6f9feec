"""`make run`'s own path: a real model, prefill and decode in separate processes, the KV over NIXL."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import openai
import psutil
import pytest
from deployments import ROOT, Deployment, serve_run, up
from engines import PROMPT_LENGTHS, prompt

MODEL = "smollm2-135m-instruct"
MAX_TOTAL_GIB = 6.0
ANSWER_TOKENS = 12


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    log = tmp_path_factory.mktemp("local") / "up.log"
    with up(ROOT / "configs/local.yaml", MODEL, log) as running:
        yield running


@pytest.fixture(scope="module")
def aggregated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Beside the other one: two engines that share nothing with it, started the other way."""
    log = tmp_path_factory.mktemp("local-aggregated") / "serve.log"
    with serve_run(ROOT / "configs/local-aggregated.yaml", MODEL, log) as running:
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


@pytest.mark.timeout(600)
def test_fifty_answers_are_those_of_an_aggregated_deployment_streamed_and_not(
    deployment: Deployment, aggregated: Deployment
) -> None:
    prompts = [prompt(length, seed=4000 + i) for i, length in enumerate(PROMPT_LENGTHS)]
    before = deployment.metric("dynamo_ray_transferred_tokens_total")
    with ThreadPoolExecutor(6) as pool:
        expected = list(pool.map(partial(tokens, aggregated), prompts))
        # Every other one is streamed: the KV goes the same way for both.
        answers = list(pool.map(partial(tokens, deployment), prompts, itertools.cycle((False, True))))
    assert [len(answer) for answer in expected] == [ANSWER_TOKENS] * len(prompts)
    assert answers == expected
    assert len({token for answer in expected for token in answer}) > 100, "degenerate answers hide errors"
    moved = deployment.metric("dynamo_ray_transferred_tokens_total") - before
    # A prompt of one token has nothing before its last, which the decode engine computes anyhow.
    assert moved == sum(length for length in PROMPT_LENGTHS if length > 1)


def tokens(deployment: Deployment, ids: list[int], stream: bool = False) -> list[str]:
    """The answer, token for token; salted so that it is computed afresh."""
    options = {"max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    options["cache_salt"] = f"streamed: {stream}"
    if not stream:
        answer = deployment.complete(ids, **options)
        return list(answer["choices"][0]["logprobs"]["tokens"])
    found: list[str] = []
    with openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="unused", max_retries=0) as client:
        salt = {"ignore_eos": options.pop("ignore_eos"), "cache_salt": options.pop("cache_salt")}
        for chunk in client.completions.create(model=MODEL, prompt=ids, stream=True, extra_body=salt, **options):
            found += chunk.choices[0].logprobs.tokens if chunk.choices[0].logprobs else []
    return found


def test_a_second_turn_goes_to_the_worker_that_holds_the_first(aggregated: Deployment) -> None:
    for number in range(4):  # wherever the rotation stands
        first = {"role": "user", "content": f"Story {number}: once upon a time there was a river. " * 10}
        messages = [first]
        answer = aggregated.converse(messages, max_tokens=8, temperature=0)
        messages += [answer["choices"][0]["message"], {"role": "user", "content": "And then?"}]
        again = aggregated.converse(messages, max_tokens=2, temperature=0)
        cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= answer["usage"]["prompt_tokens"] - 32
