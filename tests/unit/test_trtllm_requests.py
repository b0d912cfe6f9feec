"""Requests in TensorRT-LLM's words and back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from backends.engine import EngineError, GenerateRequest, KVHandoff, Role, Sampling, Structure, TokenLogprob
from backends.trtllm_requests import (
    call_arguments,
    disaggregation_arguments,
    finish_reason,
    guide_arguments,
    handoff,
    priority,
    sampling_arguments,
    scheduling_arguments,
    token_logprobs,
)


def request(**fields: Any) -> GenerateRequest:
    return GenerateRequest("r", [1, 2, 3], Sampling(max_tokens=9), **fields)


def told(logprob: float, rank: int = 1) -> Any:
    return SimpleNamespace(logprob=logprob, rank=rank)


def test_sampling_is_told_in_full_and_stop_tokens_are_part_of_the_answer() -> None:
    sampling = Sampling(9, 0.7, 0.9, 40, 0.1, 0.2, 0.3, 1.1, seed=5, stop_token_ids=(7, 8), logprobs=2)
    assert sampling_arguments(sampling, Role.DECODE, "1.3") == {
        "end_id": -1,
        "pad_id": 0,
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "seed": 5,
        "stop_token_ids": [7, 8],
        "logprobs": 2,
        "detokenize": False,
        "include_stop_str_in_output": True,
    }


def test_logprobs_of_the_token_alone_are_asked_for_as_one_and_not_over_a_hand_off_in_1_2() -> None:
    sampling = Sampling(9, logprobs=0)
    assert sampling_arguments(sampling, Role.AGGREGATED, "1.2")["logprobs"] == 1
    assert sampling_arguments(sampling, Role.PREFILL, "1.3")["logprobs"] == 1
    for leg in (Role.PREFILL, Role.DECODE):
        with pytest.raises(EngineError) as refusal:
            sampling_arguments(sampling, leg, "1.2")
        assert (refusal.value.retryable, refusal.value.field) == (False, "logprobs")


def test_prefill_ends_by_length_alone() -> None:
    args = sampling_arguments(Sampling(9, stop_token_ids=(7,), min_tokens=4), Role.PREFILL, "1.3")
    assert args["max_tokens"] == 1
    assert "stop_token_ids" not in args
    assert (args["end_id"], args.get("min_tokens")) == (-1, None)


def test_min_tokens_holds_back_the_one_stop_token_there_is() -> None:
    args = sampling_arguments(Sampling(9, stop_token_ids=(7,), min_tokens=4), Role.AGGREGATED, "1.3")
    assert (args["end_id"], args["min_tokens"]) == (7, 4)
    assert "min_tokens" not in sampling_arguments(Sampling(9, min_tokens=4), Role.AGGREGATED, "1.3"), (
        "nothing would end it"
    )
    with pytest.raises(EngineError) as refusal:
        sampling_arguments(Sampling(9, stop_token_ids=(7, 8), min_tokens=4), Role.AGGREGATED, "1.3")
    assert (refusal.value.retryable, refusal.value.field) == (False, "min_tokens")


@pytest.mark.parametrize(
    ("structure", "args"),
    [
        (None, None),
        (Structure("json_object"), {"json_object": True}),
        (Structure("json_schema", "{}"), {"json": "{}"}),
        (Structure("regex", "a+"), {"regex": "a+"}),
        (Structure("grammar", "root ::= x"), {"grammar": "root ::= x"}),
    ],
)
def test_structures(structure: Structure | None, args: dict[str, Any] | None) -> None:
    assert guide_arguments(Sampling(9, structure=structure)) == args


def test_priorities_keep_their_order_within_0_and_1() -> None:
    values = [priority(ours) for ours in (-1000, -2, -1, 0, 1, 2, 1000)]
    assert values == sorted(set(values))
    assert (values[3], values[0] > 0, values[-1] < 1) == (0.5, True, True)


def test_a_call_by_version() -> None:
    made = request(cache_salt="tenant", priority=1)
    plain = {"inputs": [1, 2, 3], "streaming": True}
    assert call_arguments(made, "1.3") == plain | {"cache_salt": "tenant", "priority": 0.75}
    assert call_arguments(made, "1.2") == plain | {"cache_salt": "tenant"}
    assert call_arguments(request(), "1.3") == plain


def test_a_rank_is_pinned_without_relaxing() -> None:
    assert scheduling_arguments(3) == {"attention_dp_rank": 3, "attention_dp_relax": False}


def test_what_prefill_tells_reaches_decode_as_it_is() -> None:
    state = bytes(range(256))
    params = SimpleNamespace(
        first_gen_tokens=[5], ctx_request_id=9, opaque_state=state, draft_tokens=None, ctx_dp_rank=1
    )
    made = handoff(params, [{5: told(-0.5), 6: told(-1.5, 2)}], "1.3")
    assert made.params == {
        "first_gen_tokens": [5],
        "ctx_request_id": 9,
        "opaque_state": state,
        "ctx_dp_rank": 1,
        "first_logprobs": [[[5, -0.5, 1], [6, -1.5, 2]]],
    }
    args = disaggregation_arguments(request(leg=Role.DECODE, handoff=made), "1.3")
    assert args == {
        "request_type": "generation_only",
        "first_gen_tokens": [5],
        "ctx_request_id": 9,
        "opaque_state": state,
        "ctx_dp_rank": 1,
    }
    assert "ctx_dp_rank" not in handoff(params, [], "1.2").params


def test_the_legs_of_one_request() -> None:
    assert disaggregation_arguments(request(), "1.3") is None
    assert disaggregation_arguments(request(leg=Role.PREFILL), "1.2") == {"request_type": "context_only"}
    ids = {disaggregation_arguments(request(leg=Role.PREFILL), "1.3")["disagg_request_id"] for _ in range(99)}  # type: ignore[index]
    assert len(ids) == 99
    assert all(1 << 42 <= each < 1 << 63 for each in ids)


@pytest.mark.parametrize("params", [None, SimpleNamespace(opaque_state=None)])
def test_a_prefill_leg_without_kv_is_lost(params: Any) -> None:
    with pytest.raises(EngineError) as error:
        handoff(params, [], "1.3")
    assert error.value.retryable


def test_reasons() -> None:
    given = (None, "stop", "length", "not_finished", "cancelled")
    assert [finish_reason(reason) for reason in given] == [None, "stop", "length", "length", "abort"]
    with pytest.raises(EngineError, match="timeout"):
        finish_reason("timeout")


def test_logprobs_are_of_the_token_and_its_likeliest_alternatives() -> None:
    entries = [{6: told(-2.0, 2), 5: told(-0.1)}, {6: told(-0.2), 5: told(-0.9, 2), 9: told(-7.0, 30)}]
    assert token_logprobs([5, 9], entries, 2) == [
        TokenLogprob(5, -0.1, [(5, -0.1), (6, -2.0)]),
        TokenLogprob(9, -7.0, [(6, -0.2), (5, -0.9)]),
    ]
    assert token_logprobs([5], entries, 0) == [TokenLogprob(5, -0.1, [])]
    with pytest.raises(EngineError, match="1 logprobs for 2"):
        token_logprobs([5, 9], entries[:1], 2)


def test_a_hand_off_without_an_optional_field_is_given_without_it() -> None:
    made = request(leg=Role.DECODE, handoff=KVHandoff({"opaque_state": b"x", "disagg_request_id": 3}))
    assert disaggregation_arguments(made, "1.2") == {"request_type": "generation_only", "opaque_state": b"x"}
