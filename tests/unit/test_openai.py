"""What a request body may hold, and what each mistake is called."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.engine import Sampling
from dynamo_ray.errors import InvalidRequest, PromptTooLong, RequestError, UnknownModel
from dynamo_ray.request import openai
from dynamo_ray.request.openai import ChatBody, CompletionBody

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> ChatBody:
    return openai.parse_chat(json.dumps({**CHAT, **fields}).encode(), "m")


def text(**fields: Any) -> CompletionBody:
    return openai.parse_completion(json.dumps({**TEXT, **fields}).encode(), "m")


def sampling(body: ChatBody | CompletionBody, num_prompt_tokens: int = 10, context: int = 100) -> Sampling:
    return openai.sampling(body, num_prompt_tokens, context, (257,))


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("temperature", [-0.1, 0.005, 2.1, "hot", True, [1]]),
        ("top_p", [0, -1, 1.01, "x"]),
        ("top_k", [-2, 1.5, "x"]),
        ("min_p", [-0.1, 1.1]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("repetition_penalty", [0, -1, 2.1]),
        ("max_tokens", [0, -1, 1.5, "x"]),
        ("min_tokens", [-1, "x"]),
        ("seed", [-(2**63) - 1, 1.5, 2**63, 2**70, "x"]),
        ("n", [0, 129, "x"]),
        ("stop", ["", ["a", ""], ["a"] * 17, 3, ["x" * 5000]]),
        ("stop_token_ids", ["x", 3]),
        ("stream", ["yes", 1]),
        ("ignore_eos", ["yes"]),
        ("priority", [-(2**31) - 1, 2**31, 1.5, "x"]),
        ("cache_salt", ["", 3]),
        ("logit_bias", [{"5": 1}]),
        ("colour", ["blue"]),
        ("model", [3, None]),
    ],
)
def test_a_bad_value_is_refused_by_both_endpoints_and_its_field_named(field: str, bad: list[Any]) -> None:
    for value in bad:
        for parse in (chat, text):
            with pytest.raises(InvalidRequest) as caught:
                parse(**{field: value})
            assert caught.value.field == field, value
            assert field in str(caught.value) or field == "stop", value


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages[0].mood"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]}, "messages[0].tool_calls"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object", "colour": 1}}, "response_format.colour"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"colour": 1}}, "stream_options.colour"),
        ({"prompt": "hi"}, "prompt"),
    ],
)
def test_what_a_chat_may_not_hold(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.field == named
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_a_completion_may_not_hold(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        text(**fields)
    assert caught.value.field == named


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{", "JSON"),
        (b'{"model": "m",}', "JSON"),
        (b"[]", "object"),
        (b'{"model": "\xff\xfe"}', "UTF-8"),
        (b'{"model": "\\ud800"}', "JSON"),
        (b'\xef\xbb\xbf{"model": "m"}', "JSON"),
        (b'{"model": "m", "messages": ' + b"[" * 100_000 + b"}", "messages"),
        (b'{"model": "m", "logit_bias": ' + b"[" * 100_000 + b"}", "nested"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(raw: bytes, words: str) -> None:
    for parse in (openai.parse_chat, openai.parse_completion):
        if words == "messages" and parse is openai.parse_completion:
            continue
        with pytest.raises(InvalidRequest, match=words):
            parse(raw, "m")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_json_does_not_have_is_named(number: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        openai.parse_completion(b'{"model": "m", "prompt": "x", "temperature": %b}' % number.encode(), "m")
    assert caught.value.field == "temperature"


@given(
    raw=st.one_of(st.binary(max_size=60), st.recursive(st.none() | st.floats() | st.text(), st.lists).map(json.dumps))
)
def test_no_body_causes_anything_but_a_request_error(raw: bytes | str) -> None:
    data = raw if isinstance(raw, bytes) else f'{{"model": "m", "prompt": {raw}, "messages": {raw}}}'.encode()
    for parse in (openai.parse_chat, openai.parse_completion):
        with suppress(RequestError):
            parse(data, "m")


def test_another_model_is_unknown_and_the_served_one_listed() -> None:
    with pytest.raises(UnknownModel, match=r"`gpt-9`.*`m`") as caught:
        chat(model="gpt-9")
    assert (caught.value.status, caught.value.field, caught.value.code) == (404, "model", "model_not_found")


def test_what_a_missing_field_is_called() -> None:
    for parse, field in ((openai.parse_chat, "messages"), (openai.parse_completion, "prompt")):
        with pytest.raises(InvalidRequest, match="missing") as caught:
            parse(b'{"model": "m"}', "m")
        assert caught.value.field == field


def test_values_that_ask_for_nothing_are_taken() -> None:
    harmless = {field: values[0] for field, (values, _) in openai.UNSUPPORTED.items() if values}
    chat(**{field: value for field, value in harmless.items() if field in ChatBody.__struct_fields__})
    text(**{field: value for field, value in harmless.items() if field in CompletionBody.__struct_fields__})
    chat(**dict.fromkeys(set(ChatBody.__struct_fields__) - {"model", "messages"}))
    ours = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "tool_calls": None, "audio": None}
    chat(messages=[*CHAT["messages"], ours], user="u", metadata={"a": "b"}, store=True, service_tier="flex")


def test_every_unsupported_field_exists_and_says_why() -> None:
    fields = {*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__, *openai.Message.__struct_fields__}
    assert set(openai.UNSUPPORTED) <= fields


def test_defaults_are_openais() -> None:
    assert sampling(chat()) == Sampling(max_tokens=90, stop_token_ids=(257,))


def test_every_sampling_field_reaches_the_engine() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.1,
        "seed": 5,
        "min_tokens": 2,
        "max_tokens": 20,
    }
    wanted = Sampling(**fields, stop_token_ids=(3, 257), logprobs=2)
    assert sampling(text(**fields, stop_token_ids=[3], logprobs=2)) == wanted
    assert sampling(chat(**fields, stop_token_ids=[3], logprobs=True, top_logprobs=2)) == wanted


def test_ignored_eos_is_no_stop_token() -> None:
    assert sampling(text(ignore_eos=True, stop_token_ids=[3])).stop_token_ids == (3,)


def test_logprobs_without_alternatives_are_still_logprobs() -> None:
    assert sampling(chat(logprobs=True)).logprobs == 0
    assert sampling(text(logprobs=0)).logprobs == 0
    assert sampling(chat(logprobs=False)).logprobs is None


def test_both_names_of_the_token_limit_work() -> None:
    assert sampling(chat(max_completion_tokens=7)).max_tokens == 7
    assert sampling(chat(max_completion_tokens=7, max_tokens=7)).max_tokens == 7


@pytest.mark.parametrize(
    ("body", "num_prompt_tokens", "field"),
    [
        (chat(), 100, "messages"),
        (text(), 101, "prompt"),
        (text(max_tokens=91), 10, "max_tokens"),
        (chat(max_completion_tokens=91), 10, "max_completion_tokens"),
    ],
)
def test_what_exceeds_the_context_is_said_with_numbers(
    body: ChatBody | CompletionBody, num_prompt_tokens: int, field: str
) -> None:
    with pytest.raises(PromptTooLong, match=rf"100 tokens.*{num_prompt_tokens}") as caught:
        sampling(body, num_prompt_tokens)
    assert (caught.value.field, caught.value.code, caught.value.status) == (field, "context_length_exceeded", 400)


def test_the_context_may_be_filled_exactly() -> None:
    assert sampling(text(max_tokens=90)).max_tokens == 90
    assert sampling(text(), 99).max_tokens == 1


def test_min_tokens_above_the_limit_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        sampling(text(max_tokens=5, min_tokens=6))
    assert caught.value.field == "min_tokens"


def test_text_parts_become_lines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    told = {"role": "tool", "content": "x", "tool_call_id": "1"}
    messages = [{"role": "user", "content": parts, "name": "eve"}, told]
    assert openai.template_messages(chat(messages=messages)) == [
        {"role": "user", "content": "a\nb", "name": "eve"},
        told,
    ]


def test_all_four_kinds_of_prompt() -> None:
    assert openai.prompts(text(prompt="a")) == ["a"]
    assert openai.prompts(text(prompt=["a", "b"])) == ["a", "b"]
    assert openai.prompts(text(prompt=[1, 2])) == [[1, 2]]
    assert openai.prompts(text(prompt=[[1], [2, 3]])) == [[1], [2, 3]]
