"""The `openai` Python package against the front, in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from front import MODEL, ScriptedService, make_front, spell, with_logprobs

from dynamo_ray.errors import Overloaded, WorkerLost
from dynamo_ray.models import byte_tokenizer

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx2")


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService(lambda request: spell("hello", cached=2))


@pytest.fixture
async def client(tmp_path: Path, service: ScriptedService) -> AsyncIterator[openai.AsyncOpenAI]:
    byte_tokenizer.build(tmp_path)
    transport = httpx.ASGITransport(make_front(tmp_path, service, api_keys=("sk-test",))[0])
    async with (
        httpx.AsyncClient(transport=transport) as http,
        openai.AsyncOpenAI(base_url="http://front/v1", api_key="sk-test", http_client=http, max_retries=0) as made,
    ):
        yield made


CHAT = [{"role": "user", "content": "hi"}]


async def test_chat_streamed_and_not(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model=MODEL, messages=CHAT)
    assert whole.choices[0].message.content == "hello"
    stream = await client.chat.completions.create(
        model=MODEL, messages=CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    assert whole.usage.prompt_tokens_details.cached_tokens == 2


async def test_an_answer_can_be_sent_back_as_part_of_the_conversation(client: openai.AsyncOpenAI) -> None:
    first = await client.chat.completions.create(model=MODEL, messages=CHAT)
    again = [*CHAT, first.choices[0].message.model_dump(), {"role": "user", "content": "and?"}]
    assert (await client.chat.completions.create(model=MODEL, messages=again)).choices[0].finish_reason == "stop"


async def test_completions_with_several_prompts(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=9)
    assert [choice.text for choice in answer.choices] == ["hello"] * 4


async def test_logprobs_are_parsed(client: openai.AsyncOpenAI, service: ScriptedService) -> None:
    service.script = lambda request: with_logprobs(spell("hi"), [(104, -0.1)])
    chat = await client.chat.completions.create(model=MODEL, messages=CHAT, logprobs=True, top_logprobs=1)
    assert [entry.token for entry in chat.choices[0].logprobs.content] == ["h", "i"]
    text = await client.completions.create(model=MODEL, prompt="x", logprobs=1)
    assert text.choices[0].logprobs.text_offset == [0, 1]


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_errors_become_the_clients_own(client: openai.AsyncOpenAI, service: ScriptedService) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model=MODEL, messages=CHAT, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="gpt-9", messages=CHAT)
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="sk-wrong").models.retrieve(MODEL)
    service.script = lambda request: [Overloaded("full", retry_after_s=1.0)]
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model=MODEL, messages=CHAT)


async def test_an_error_in_a_stream_is_raised_where_it_happened(
    client: openai.AsyncOpenAI, service: ScriptedService
) -> None:
    service.script = lambda request: [*spell("ab", end="")[:1], WorkerLost("gone")]
    stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
    with pytest.raises(openai.APIError, match="gone"):
        async for _ in stream:
            pass
