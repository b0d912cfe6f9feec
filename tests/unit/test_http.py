"""The HTTP front as a client sees it: paths, bodies, errors, streams, and what happens when somebody leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from front import END, MODEL, Client, Reply, ScriptedService, Step, make_front, spell, with_logprobs

from backends.engine import Structure, TokenChunk
from dynamo_ray.errors import DeadlineExceeded, InvalidRequest, Overloaded, WorkerLost
from dynamo_ray.models import byte_tokenizer
from dynamo_ray.request.generation import Generation

HELLO = "hello w\u00f6rld"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("byte-tokenizer")
    byte_tokenizer.build(target)
    return target


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService(lambda request: spell(HELLO, cached=2))


@pytest.fixture
def client(folder: Path, service: ScriptedService) -> Client:
    return Client(make_front(folder, service)[0])


def plays(service: ScriptedService, *steps: Step) -> None:
    service.script = lambda request: steps


def texts(reply: Reply, index: int = 0) -> str:
    """A stream's text of one choice."""
    choices = [c for event in reply.events if event != "[DONE]" for c in event["choices"] if c["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


# Answers.


async def test_a_chat_answer_has_openais_shape(client: Client) -> None:
    reply = await client.chat()
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert reply.headers["content-length"] == str(len(reply.body))
    answer = reply.json
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1.7e9
    assert answer.pop("system_fingerprint")
    message = {"role": "assistant", "content": HELLO, "refusal": None}
    assert answer == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 6,
            "completion_tokens": 13,
            "total_tokens": 19,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


async def test_a_completion_has_openais_shape(client: Client, service: ScriptedService) -> None:
    plays(service, *spell("abc", end="length"))
    answer = (await client.complete()).json
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"]["completion_tokens"] == 3


async def test_a_chat_stream_begins_with_the_role_and_ends_with_done(client: Client) -> None:
    reply = await client.chat(stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, done = reply.events
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert choices[1] == {"index": 0, "delta": {"content": "h"}, "logprobs": None, "finish_reason": None}
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert texts(reply) == HELLO


async def test_a_completion_stream_ends_with_its_reason(client: Client, service: ScriptedService) -> None:
    plays(service, *spell("abc", end="length"))
    *chunks, done = (await client.complete(stream=True)).events
    assert done == "[DONE]"
    assert [(c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in chunks] == [
        ("a", None),
        ("b", None),
        ("c", "length"),
    ]


async def test_usage_comes_last_in_a_stream_and_is_null_before(client: Client) -> None:
    *chunks, last, done = (await client.chat(stream=True, stream_options={"include_usage": True})).events
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == (await client.chat()).json["usage"]


async def test_a_stream_and_a_whole_answer_say_the_same(client: Client) -> None:
    for stop in (None, "w\u00f6", ["rl", "lo"]):
        whole = (await client.complete(stop=stop)).json["choices"][0]
        stream = await client.complete(stop=stop, stream=True)
        assert texts(stream) == whole["text"]
        assert stream.events[-2]["choices"][0]["finish_reason"] == whole["finish_reason"]


async def test_text_is_escaped_as_json_demands(client: Client, service: ScriptedService) -> None:
    nasty = 'a"b\\c\n\r\t\x00\x1f\u2028\u20ac\U0001f600</script>data: x\n\n'
    plays(service, *spell(nasty))
    assert texts(await client.chat(stream=True)) == nasty
    assert (await client.chat()).json["choices"][0]["message"]["content"] == nasty


async def test_tokens_that_came_together_go_out_together(client: Client, service: ScriptedService) -> None:
    plays(service, *spell(HELLO, size=5))
    reply = await client.complete(stream=True)
    assert texts(reply) == HELLO
    assert len(reply.events) == 4


# Several choices.


async def test_choices_are_numbered_through_prompts_and_seeds_differ_within_one(
    client: Client, service: ScriptedService
) -> None:
    service.script = lambda request: spell(f"{bytes(request.token_ids).decode()}{request.sampling.seed}", cached=1)
    answer = (await client.complete(prompt=["a", "bb"], n=2, seed=2**63 - 1)).json
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [
        (0, f"a{2**63 - 1}"),
        (1, "a0"),
        (2, f"bb{2**63 - 1}"),
        (3, "bb0"),
    ]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    assert len({request.request_id for request in service.asked}) == 4
    stream = await client.complete(prompt=["a", "bb"], n=2, seed=2**63 - 1, stream=True)
    assert [texts(stream, i) for i in range(4)] == [c["text"] for c in answer["choices"]]
    assert stream.events[-1] == "[DONE]"


async def test_every_choice_of_a_chat_stream_begins_with_its_role(client: Client) -> None:
    events = (await client.chat(n=3, stream=True)).events[:-1]
    for index in range(3):
        own = [event["choices"][0]["delta"] for event in events if event["choices"][0]["index"] == index]
        assert [d.get("role") for d in own] == ["assistant"] + [None] * (len(own) - 1)


async def test_one_failing_choice_ends_the_others(client: Client, service: ScriptedService) -> None:
    never = asyncio.Event()
    failing: Sequence[Step] = [*spell("ab", end="")[:1], WorkerLost("gone")]
    service.script = lambda r: failing if r.request_id.endswith("-1") else [never]
    reply = await client.complete(n=3)
    assert (reply.status, reply.error["code"]) == (502, "worker_lost")
    assert service.open == set()


# Stopping.


async def test_a_stop_string_ends_and_aborts_the_generation(client: Client, service: ScriptedService) -> None:
    plays(service, *spell("one two three", end="")[:9], asyncio.Event())
    for stream in (False, True):
        reply = await client.complete(stop=["two"], stream=stream)
        assert service.open == set()
        if not stream:
            assert reply.json["choices"] == [{"index": 0, "text": "one ", "logprobs": None, "finish_reason": "stop"}]
            assert reply.json["usage"]["completion_tokens"] == 7
    assert texts(reply) == "one "


async def test_eos_reaches_the_engine_unless_it_is_ignored(client: Client, service: ScriptedService) -> None:
    await client.complete(stop_token_ids=[5])
    await client.complete(stop_token_ids=[5], ignore_eos=True)
    assert [request.sampling.stop_token_ids for request in service.asked] == [(5, END), (5,)]


# Logprobs.


async def test_chat_logprobs_have_openais_shape(client: Client, service: ScriptedService) -> None:
    plays(service, *with_logprobs(spell("\u00f6", size=3), [(ord("b"), -0.25), (0xC3, float("-inf"))]))
    whole = (await client.chat(logprobs=True, top_logprobs=2)).json["choices"][0]["logprobs"]
    top = [
        {"token": "b", "logprob": -0.25, "bytes": [98]},
        {"token": "\\xc3", "logprob": -9999.0, "bytes": [0xC3]},
    ]
    assert whole == {
        "content": [
            {"token": "\\xc3", "logprob": -0.5, "bytes": [0xC3], "top_logprobs": top},
            {"token": "\\xb6", "logprob": -0.5, "bytes": [0xB6], "top_logprobs": top},
        ],
        "refusal": None,
    }
    assert service.asked[0].sampling.logprobs == 2
    chunks = (await client.chat(logprobs=True, top_logprobs=2, stream=True)).events[:-1]
    streamed = [e for c in chunks if (found := c["choices"][0]["logprobs"]) for e in found["content"]]
    assert streamed == whole["content"]


async def test_completion_logprobs_have_openais_shape(client: Client, service: ScriptedService) -> None:
    plays(service, *with_logprobs(spell("a\u00f6b", size=2), [(ord("x"), -0.25)]))
    expected = {
        "text_offset": [0, 1, 1, 2],
        "token_logprobs": [-0.5] * 4,
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xb6", "b"],
        "top_logprobs": [
            {"x": -0.25, "a": -0.5},
            {"x": -0.25, "bytes:\\xc3": -0.5},
            {"x": -0.25, "bytes:\\xb6": -0.5},
            {"x": -0.25, "b": -0.5},
        ],
    }
    assert (await client.complete(logprobs=1)).json["choices"][0]["logprobs"] == expected
    chunks = (await client.complete(logprobs=1, stream=True)).events[:-1]
    found = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert {key: [v for part in found for v in part[key]] for key in expected} == expected


async def test_more_logprobs_than_the_engine_has_are_refused(client: Client) -> None:
    assert (await client.complete(logprobs=6)).error["param"] == "logprobs"
    assert (await client.chat(logprobs=True, top_logprobs=6)).error["param"] == "top_logprobs"


# Errors.


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"prompt": [1, 512]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1, 1 << 32]}, "prompt"),
        ({"prompt": [1, [2]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": "x" * 4096}, "prompt"),
        ({"max_tokens": 4095}, "max_tokens"),
        ({"stop_token_ids": [512]}, "stop_token_ids"),
    ],
)
async def test_a_bad_field_is_a_400_that_names_it(client: Client, fields: dict[str, Any], param: str) -> None:
    reply = await client.complete(**fields)
    assert reply.status == 400
    assert set(reply.error) == {"message", "type", "param", "code"}
    assert (reply.error["type"], reply.error["param"]) == ("invalid_request_error", param)


async def test_an_error_before_the_first_token_has_its_status(client: Client, service: ScriptedService) -> None:
    plays(service, Overloaded("full", retry_after_s=2.4))
    for stream in (False, True):
        reply = await client.chat(stream=stream)
        assert (reply.status, reply.headers["retry-after"]) == (429, "2")
        assert reply.error == {"message": "full", "type": "overloaded_error", "param": None, "code": "overloaded"}


async def test_an_error_after_the_first_token_is_the_streams_last_event(
    client: Client, service: ScriptedService
) -> None:
    plays(service, *spell("ab", end="")[:1], DeadlineExceeded("too slow", "x-request-timeout-s"))
    reply = await client.chat(stream=True)
    assert reply.status == 200
    assert reply.events[-1]["error"]["code"] == "deadline_exceeded"
    assert "[DONE]" not in reply.events
    assert service.open == set()


async def test_an_error_after_the_first_token_of_a_whole_answer_has_its_status(
    client: Client, service: ScriptedService
) -> None:
    plays(service, *spell("ab", end="")[:1], WorkerLost("gone"))
    assert (await client.chat()).status == 502


async def test_a_bug_is_a_500_that_tells_nothing_of_the_inside(
    client: Client, service: ScriptedService, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(request: Generation) -> Sequence[Step]:
        raise ZeroDivisionError("secret detail")

    service.script = broken
    reply = await client.chat(stream=True)
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert "secret" not in reply.body.decode()
    assert "secret detail" in caplog.text
    assert reply.headers["x-request-id"] in caplog.text


async def test_an_answer_without_an_end_is_a_500(client: Client, service: ScriptedService) -> None:
    plays(service, TokenChunk("", [97]))
    assert (await client.chat()).status == 500


async def test_nothing_is_served_while_nobody_is_ready(client: Client, service: ScriptedService) -> None:
    service.not_ready = "no decode worker is ready (decode-0 is starting: loading weights)"
    reply = await client.get("/ready")
    assert (reply.status, reply.error["message"]) == (503, service.not_ready)
    assert int(reply.headers["retry-after"]) >= 1
    service.not_ready = None
    assert (await client.get("/ready")).status == 200
    assert (await client.get("/health")).json == {"status": "alive"}


# HTTP.


async def test_models_are_listed_and_described(client: Client) -> None:
    model = (await client.get("/v1/models")).json["data"][0]
    assert (model["id"], model["object"]) == (MODEL, "model")
    assert (await client.get(f"/v1/models/{MODEL}")).json == model
    reply = await client.get("/v1/models/gpt-9")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert MODEL in reply.error["message"]


async def test_an_unknown_path_is_a_404_in_openais_shape(client: Client) -> None:
    for path in ("/", "/v1", "/v1/embeddings", "/v1/chat/completions/"):
        reply = await client.get(path)
        assert (reply.status, reply.error["code"]) == (404, "not_found")


async def test_a_wrong_method_is_a_405_with_what_is_allowed(client: Client) -> None:
    reply = await client.get("/v1/chat/completions")
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    reply = await client.post("/v1/models", {})
    assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")


async def test_head_has_the_headers_of_get_and_no_body(client: Client) -> None:
    for path in ("/health", "/v1/models", "/openapi.json"):
        full, head = await client.get(path), await client.get(path, method="HEAD")
        assert head.body == b""
        assert head.headers["content-length"] == str(len(full.body))


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"null"])
async def test_a_body_that_is_no_json_object_is_a_400(client: Client, raw: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert (await client.post(path, raw)).status == 400


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("content-type", "text/plain", 400),
        ("content-type", "application/x-www-form-urlencoded", 400),
        ("content-type", "application/json; charset=latin-1", 400),
        ("content-type", 'Application/JSON; charset="UTF-8"', 200),
        ("content-encoding", "gzip", 400),
        ("x-request-timeout-s", "0", 400),
        ("x-request-timeout-s", "nan", 400),
        ("x-request-timeout-s", "soon", 400),
        ("x-request-timeout-s", "601", 400),
        ("x-request-timeout-s", "1.5", 200),
        ("x-request-id", "a b", 400),
        ("x-request-id", "x" * 129, 400),
    ],
)
async def test_headers_are_checked(client: Client, header: str, value: str, status: int) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x"}).encode()
    reply = await client.request("POST", "/v1/completions", body, {header: value})
    assert reply.status == status
    if status == 400:
        assert reply.error["param"].lower() == header


async def test_a_deadline_and_a_cache_salt_reach_the_generation(client: Client, service: ScriptedService) -> None:
    body = {"model": MODEL, "prompt": "x", "cache_salt": "mine"}
    before_s = asyncio.get_running_loop().time()
    await client.post("/v1/completions", body, x_request_timeout_s="1.5")
    (asked,) = service.asked
    assert asked.deadline_s is not None
    assert 1.5 <= asked.deadline_s - before_s < 1.5 + 1.0
    assert asked.cache_salt == "mine"


async def test_any_64_bit_seed_is_taken(client: Client, service: ScriptedService) -> None:
    await client.complete(seed=-1, n=2)
    assert {asked.sampling.seed for asked in service.asked} == {2**63 - 1, 0}


async def test_no_request_has_more_than_64_choices_at_once(client: Client, service: ScriptedService) -> None:
    gate = asyncio.Event()
    plays(service, gate, *spell("a"))
    asking = asyncio.create_task(client.complete(prompt=["x"] * 100, n=2))
    while len(service.open) < 64:
        await asyncio.sleep(0)
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(service.open) == 64
    gate.set()
    assert [choice["index"] for choice in (await asking).json["choices"]] == list(range(200))


async def test_a_request_id_is_echoed_and_never_shared_with_the_engines(
    client: Client, service: ScriptedService
) -> None:
    for _ in range(2):
        reply = await client.request("POST", "/v1/completions", b"{", {"x-request-id": "mine"})
        assert (reply.status, reply.headers["x-request-id"]) == (400, "mine")
        body = json.dumps({"model": MODEL, "prompt": "x"}).encode()
        assert (await client.request("POST", "/v1/completions", body, {"x-request-id": "mine"})).status == 200
    first, second = service.asked
    assert first.request_id != second.request_id
    assert (await client.get("/health")).headers["x-request-id"]


async def test_a_body_over_the_limit_is_a_413_announced_or_not(folder: Path, service: ScriptedService) -> None:
    client = Client(make_front(folder, service, max_body_bytes=100)[0])
    body = b'{"model": "m", "prompt": "' + b"x" * 100 + b'"}'
    for headers in ({}, {"content-length": str(len(body))}):
        reply = await client.request("POST", "/v1/completions", body, headers)
        assert (reply.status, reply.error["code"]) == (413, "payload_too_large")
    assert service.asked == []


async def test_a_key_is_asked_for_under_v1_only(folder: Path, service: ScriptedService) -> None:
    client = Client(make_front(folder, service, api_keys=("k1", "k\u00e9y2"))[0])
    for headers in ({}, {"authorization": "Bearer k"}, {"authorization": "Basic k1"}, {"authorization": "k1"}):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions")):
            reply = await client.request(method, path, b"{}", headers)
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
    for key in ("k1", "k\u00e9y2"):
        assert (await client.get("/v1/models", authorization=f"Bearer {key}")).status == 200
    assert (await client.get("/health")).status == 200


async def test_a_route_prefix_is_not_part_of_the_path(client: Client) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/r1/health", "root_path": "/r1", "headers": []}
    await client.front(scope, lambda: asyncio.sleep(0, {}), send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 200


async def test_lifespan_and_websockets_are_answered(client: Client) -> None:
    incoming = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await client.front({"type": "lifespan"}, receive, send)
    await client.front({"type": "websocket"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]


async def test_the_openapi_document_describes_every_path(client: Client) -> None:
    document = (await client.get("/openapi.json")).json
    assert set(document["paths"]) == {
        "/v1/models",
        "/v1/models/{model}",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/route",
        "/health",
        "/ready",
        "/metrics",
        "/openapi.json",
    }
    schemas = document["components"]["schemas"]
    assert "min_p" in schemas["ChatBody"]["properties"]
    assert json.dumps(document).count("#/components/schemas/") > 0
    assert schemas["ChatBody"]["additionalProperties"] is False


# Who leaves, and who is slow.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_client_that_leaves_ends_its_generations(
    folder: Path, service: ScriptedService, stream: bool, n: int
) -> None:
    front, telemetry = make_front(folder, service)
    client = Client(front)
    plays(service, *spell("ab", end="")[:1], asyncio.Event())
    asking = asyncio.create_task(client.chat(stream=stream, n=n))
    while len(service.open) < n or (stream and len(client.messages) < 1 + n):
        await asyncio.sleep(0)
    client.gone.set()
    reply = await asking
    assert service.open == set()
    assert reply.status == (200 if stream else 0)
    assert 'requests_total{endpoint="/v1/chat/completions",status="499"} 1.0' in telemetry.exposition().decode()
    assert "in_flight 0.0" in telemetry.exposition().decode()


@pytest.mark.parametrize("n", [1, 2])
async def test_a_cancelled_request_ends_its_generations(client: Client, service: ScriptedService, n: int) -> None:
    plays(service, asyncio.Event())
    asking = asyncio.create_task(client.chat(stream=True, n=n))
    while len(service.open) < n:
        await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert service.open == set()


async def test_a_client_that_leaves_before_its_body_is_whole_asks_for_nothing(
    client: Client, service: ScriptedService
) -> None:
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    await client.front({"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}, receive, send)
    assert service.asked == []


async def test_a_slow_client_holds_up_its_own_generation_only(folder: Path, service: ScriptedService) -> None:
    front, _ = make_front(folder, service)
    pulled: list[int] = []
    open_gate = asyncio.Event()

    class Watched(ScriptedService):
        async def generate(self, request: Generation) -> Any:
            async for chunk in super().generate(request):
                pulled.append(chunk.token_ids[0])
                yield chunk

    watched = Watched(lambda request: spell("abcdef"))
    front, _ = make_front(folder, watched)
    body = json.dumps({"model": MODEL, "prompt": "x", "stream": True}).encode()
    incoming = [{"type": "http.request", "body": body}]

    async def receive() -> Any:
        return incoming.pop(0) if incoming else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await open_gate.wait()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asking = asyncio.create_task(front(scope, receive, send))
    while not pulled:
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert pulled == [ord("a")]
    open_gate.set()
    await asking
    assert len(pulled) == 7


# Metrics.


async def test_metrics_count_requests_tokens_and_latencies(folder: Path, service: ScriptedService) -> None:
    front, _ = make_front(folder, service)
    client = Client(front)
    await client.chat()
    await client.chat(stream=True)
    await client.complete(temperature=9)
    await client.get("/nowhere/at/all")
    reply = await client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = dict(line.rsplit(" ", 1) for line in reply.body.decode().splitlines() if not line.startswith("#"))
    assert values['dynamo_ray_requests_total{endpoint="/v1/chat/completions",status="200"}'] == "2.0"
    assert values['dynamo_ray_requests_total{endpoint="/v1/completions",status="400"}'] == "1.0"
    assert values['dynamo_ray_requests_total{endpoint="other",status="404"}'] == "1.0"
    assert values['dynamo_ray_errors_total{code="invalid_value"}'] == "1.0"
    assert values["dynamo_ray_prompt_tokens_total"] == "12.0"
    assert values["dynamo_ray_generated_tokens_total"] == "26.0"
    assert values["dynamo_ray_cached_tokens_total"] == "4.0"
    assert values["dynamo_ray_ttft_seconds_count"] == "2.0"
    assert values["dynamo_ray_itl_seconds_count"] == "2.0"
    assert values["dynamo_ray_ttft_outside_engines_seconds_count"] == "0.0", (
        "a service of one's own tells nothing of it"
    )
    assert values["dynamo_ray_request_seconds_count"] == "2.0"


# Adapters, structures, priorities.


async def test_an_adapter_is_asked_for_by_its_name_as_the_model(folder: Path, service: ScriptedService) -> None:
    client = Client(make_front(folder, service, loras=("sql", "org/poems"))[0])
    for name, lora in ((MODEL, None), ("sql", "sql"), ("org/poems", "org/poems")):
        answer = (await client.complete(model=name)).json
        assert answer["model"] == name
        assert service.asked[-1].lora == lora


async def test_adapters_are_listed_with_their_parent(folder: Path, service: ScriptedService) -> None:
    client = Client(make_front(folder, service, loras=("sql", "org/poems"))[0])
    models = (await client.get("/v1/models")).json["data"]
    assert [(model["id"], model.get("parent")) for model in models] == [
        (MODEL, None),
        ("sql", MODEL),
        ("org/poems", MODEL),
    ]
    assert (await client.get("/v1/models/org/poems")).json == models[2]


async def test_an_unknown_model_names_the_base_and_the_adapters(folder: Path, service: ScriptedService) -> None:
    client = Client(make_front(folder, service, loras=("sql", "org/poems"))[0])
    for reply in (await client.complete(model="gpt-9"), await client.get("/v1/models/gpt-9")):
        assert (reply.status, reply.error["code"]) == (404, "model_not_found")
        assert all(name in reply.error["message"] for name in (MODEL, "sql", "org/poems"))


async def test_structure_and_priority_reach_every_choice(client: Client, service: ScriptedService) -> None:
    schema = {"type": "object"}
    asked = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    await client.chat(n=2, priority=-3, **asked)
    await client.complete(prompt=["a", "b"], regex="[ab]")
    made = [(generation.sampling.structure, generation.priority) for generation in service.asked]
    assert made == [(Structure("json_schema", '{"type":"object"}'), -3)] * 2 + [(Structure("regex", "[ab]"), 0)] * 2


async def test_a_structure_that_an_engine_refuses_has_the_clients_name(
    client: Client, service: ScriptedService
) -> None:
    plays(service, InvalidRequest("vllm cannot compile this", "structure"))
    for stream in (False, True):
        reply = await client.complete(structured_outputs={"regex": "("}, stream=stream)
        assert (reply.status, reply.error["param"]) == (400, "structured_outputs.regex")
        assert reply.error["message"] == "vllm cannot compile this"
