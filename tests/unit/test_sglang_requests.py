"""Requests in SGLang's words and its answers in ours."""

from __future__ import annotations

from typing import Any

import pytest

from backends.engine import (
    EngineError,
    GenerateRequest,
    KVHandoff,
    Role,
    Sampling,
    Structure,
    TokenLogprob,
)
from backends.sglang_requests import arguments, chunk, finish_reason, prefill_chunk, rid_of, sampling_arguments

HANDOFF = KVHandoff({"bootstrap_address": "10.0.0.1:8998", "bootstrap_room": 21, "prefill_dp_rank": 5})


def request(**fields: Any) -> GenerateRequest:
    given = {"request_id": "r.0", "token_ids": [1, 2, 3], "sampling": Sampling(max_tokens=4), **fields}
    return GenerateRequest(**given)


def output(ids: list[int], reason: dict[str, Any] | None = None, **meta: Any) -> dict[str, Any]:
    return {"output_ids": ids, "meta_info": {"finish_reason": reason, "prompt_tokens": 3, "cached_tokens": 2, **meta}}


def test_no_request_s_name_begins_another_s() -> None:
    assert not rid_of("a.10").startswith(rid_of("a.1"))


def test_both_legs_get_the_same_room_and_decode_prefill_s_rank() -> None:
    prefill = arguments(request(leg=Role.PREFILL, handoff=HANDOFF, dp_rank=5), "0.5.16")
    decode = arguments(request(leg=Role.DECODE, handoff=HANDOFF, dp_rank=1), "0.5.16")
    for args in (prefill, decode):
        assert (args["bootstrap_host"], args["bootstrap_port"], args["bootstrap_room"]) == ("10.0.0.1", 8998, 21)
    assert (prefill["routed_dp_rank"], decode["routed_dp_rank"]) == (5, 1)
    assert decode["disagg_prefill_dp_rank"] == 5
    assert "disagg_prefill_dp_rank" not in prefill


def test_a_salt_goes_by_the_version_s_name() -> None:
    assert arguments(request(cache_salt="tenant"), "0.5.16")["extra_key"] == "tenant"
    assert arguments(request(cache_salt="tenant"), "0.5.23")["cache_salt"] == "tenant"


def test_an_adapter_and_a_priority_are_passed_on() -> None:
    args = arguments(request(lora="sql", priority=3), "0.5.23", priority_order=1)
    assert (args["lora_path"], args["priority"]) == ("sql", 3)
    assert not {"lora_path", "priority"} & arguments(request(), "0.5.23").keys()


def test_where_there_are_priorities_every_request_has_one_and_greater_ones_run_earlier() -> None:
    """SGLang puts one without behind all others, and may have been told that smaller ones run earlier."""
    assert arguments(request(), "0.5.16", priority_order=1)["priority"] == 0
    assert arguments(request(priority=3), "0.5.16", priority_order=-1)["priority"] == -3


def test_stop_tokens_end_an_answer_only_without_ignore_eos() -> None:
    assert sampling_arguments(Sampling(max_tokens=4))["ignore_eos"] is True
    stopping = sampling_arguments(Sampling(max_tokens=4, stop_token_ids=(2,)))
    assert (stopping["ignore_eos"], stopping["stop_token_ids"]) == (False, [2])
    with pytest.raises(EngineError) as refusal:
        sampling_arguments(Sampling(max_tokens=4, stop_token_ids=(2,), ignore_eos=True))
    assert (refusal.value.field, refusal.value.retryable) == ("ignore_eos", False)


@pytest.mark.parametrize(
    ("structure", "key", "value"),
    [
        (Structure("json_schema", '{"type": "integer"}'), "json_schema", '{"type": "integer"}'),
        (Structure("json_object"), "json_schema", '{"type": "object"}'),
        (Structure("regex", "a+"), "regex", "a+"),
        (Structure("grammar", 'root ::= "a"'), "ebnf", 'root ::= "a"'),
    ],
)
def test_a_structure_goes_by_sglang_s_name(structure: Structure, key: str, value: str) -> None:
    assert sampling_arguments(Sampling(max_tokens=4, structure=structure))[key] == value


def test_the_first_chunk_says_where_the_prompt_s_kv_came_from() -> None:
    first = chunk(request(), output([7]), first=True, local_cache=True)
    assert (first.token_ids, first.cached_tokens, first.transferred_tokens) == ([7], 2, None)
    assert chunk(request(), output([8]), first=False, local_cache=True).cached_tokens is None
    decode = chunk(request(leg=Role.DECODE, handoff=HANDOFF), output([7]), first=True, local_cache=False)
    assert (decode.cached_tokens, decode.transferred_tokens) == (0, 3)


def test_a_prefill_leg_ends_without_tokens() -> None:
    ended = prefill_chunk(request(leg=Role.PREFILL, handoff=HANDOFF), output([7], {"type": "length", "length": 1}))
    assert (ended.token_ids, ended.finish_reason, ended.cached_tokens) == ([], "length", 2)


def test_an_abort_that_was_asked_for_is_an_end_and_another_is_an_error() -> None:
    aborted = chunk(request(), output([9], {"type": "abort", "message": "Aborted"}), first=False, local_cache=True)
    assert (aborted.token_ids, aborted.finish_reason) == ([], "abort"), "SGLang repeats the last token here"
    lost = {"type": "abort", "message": "KV transfer failed", "status_code": 500}
    with pytest.raises(EngineError, match="KV transfer failed") as failure:
        finish_reason(request(), lost)
    assert failure.value.retryable
    with pytest.raises(EngineError) as refusal:
        finish_reason(request(), {**lost, "status_code": 400})
    assert not refusal.value.retryable
    compiling = {"type": "abort", "message": "Aborted by AbortReq.", "status_code": 400}
    assert finish_reason(request(), compiling) == "abort", "it was told to, whatever it says of the client"


def test_logprobs_are_those_of_the_chunk_s_own_tokens() -> None:
    meta = {
        "output_token_logprobs": [(-0.5, 7, None), (-0.25, 8, None)],
        "output_top_logprobs": [[(-0.5, 7, None), (-1.5, 9, None)], [(-0.25, 8, None), (-2.0, 4, None)]],
    }
    asked = request(sampling=Sampling(max_tokens=4, logprobs=2))
    assert arguments(asked, "0.5.16")["top_logprobs_num"] == 2
    made = chunk(asked, output([7, 8], **meta), first=True, local_cache=True)
    assert made.logprobs == [
        TokenLogprob(7, -0.5, [(7, -0.5), (9, -1.5)]),
        TokenLogprob(8, -0.25, [(8, -0.25), (4, -2.0)]),
    ]
    with pytest.raises(EngineError, match="2 logprobs for 3 tokens"):
        chunk(asked, output([6, 7, 8], **meta), first=True, local_cache=True)
