from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from backends.engine import EngineError, GenerateRequest, KVHandoff, Role, Sampling, Structure, TokenChunk, TokenLogprob
from backends.vllm_requests import (
    PromptSources,
    chunk,
    prefill_chunk,
    sampling_arguments,
    structure_arguments,
    token_logprobs,
)

HANDOFF = KVHandoff({"remote_request_id": "x"})


@dataclass
class Completion:
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[dict[int, Any]] | None = None


@dataclass
class Entry:
    logprob: float
    rank: int


def request(leg: Role = Role.AGGREGATED, token_ids: list[int] | None = None, **fields: Any) -> GenerateRequest:
    sampling = fields.pop("sampling", Sampling(max_tokens=5))
    return GenerateRequest("r", [1, 2, 3] if token_ids is None else token_ids, sampling, leg, **fields)


def test_a_prefill_leg_asks_for_one_token_and_a_handoff_whatever_was_asked_for() -> None:
    arguments = sampling_arguments(request(Role.PREFILL, sampling=Sampling(max_tokens=50, stop_token_ids=(1,))))
    assert (arguments["max_tokens"], arguments["ignore_eos"]) == (1, True)
    assert "stop_token_ids" not in arguments
    assert arguments["extra_args"]["kv_transfer_params"]["do_remote_decode"] is True


def test_a_decode_leg_passes_the_handoff_on_verbatim() -> None:
    arguments = sampling_arguments(request(Role.DECODE, handoff=HANDOFF))
    assert arguments["extra_args"] == {"kv_transfer_params": HANDOFF.params}
    assert "extra_args" not in sampling_arguments(request())


def test_the_first_chunk_says_where_the_prompts_kv_came_from() -> None:
    sources = PromptSources(cached_tokens=32, transferred_tokens=64)
    decoded = chunk(request(Role.DECODE, handoff=HANDOFF), Completion([7]), sources)
    assert (decoded.cached_tokens, decoded.transferred_tokens) == (32, 64)
    whole = chunk(request(), Completion([7]), sources)
    assert (whole.cached_tokens, whole.transferred_tokens) == (32, None)
    later = chunk(request(), Completion([7]), None)
    assert (later.cached_tokens, later.transferred_tokens) == (None, None)


def test_kv_that_did_not_arrive_is_an_error_to_retry() -> None:
    with pytest.raises(EngineError, match="KV did not arrive") as lost:
        chunk(request(Role.DECODE, handoff=HANDOFF), Completion([], "error"), None)
    assert lost.value.retryable


@dataclass
class Output:
    kv_transfer_params: dict[str, Any] | None
    outputs: list[Completion]


def prefilled(params: dict[str, Any] | None, reason: str = "length") -> TokenChunk:
    return prefill_chunk(request(Role.PREFILL), Output(params, [Completion([7], reason)]), PromptSources(32, 0))


def test_a_prefill_leg_ends_with_its_handoff() -> None:
    made = prefilled({"a": 1})
    assert (made.token_ids, made.finish_reason, made.cached_tokens) == ([], "length", 32)
    assert made.handoff == KVHandoff({"a": 1})


def test_a_prefill_leg_without_a_handoff_is_an_error_unless_it_was_aborted() -> None:
    with pytest.raises(EngineError, match="without a hand-off"):
        prefilled(None)
    assert prefilled(None, "abort") == TokenChunk("r", [], "abort")


def test_the_chosen_token_is_among_the_alternatives_only_by_its_rank() -> None:
    positions = [{9: Entry(-3.0, 40), 5: Entry(-0.5, 1), 6: Entry(-1.0, 2)}]
    assert token_logprobs([9], positions, 2) == [TokenLogprob(9, -3.0, [(5, -0.5), (6, -1.0)])]
    assert token_logprobs([9], [{9: Entry(-3.0, 40)}], 0) == [TokenLogprob(9, -3.0, [])]


@pytest.mark.parametrize(
    ("structure", "arguments"),
    [
        (Structure("json_object"), {"json_object": True}),
        (Structure("json_schema", '{"type": "integer"}'), {"json": '{"type": "integer"}'}),
        (Structure("regex", "[a-z]+"), {"regex": "[a-z]+"}),
        (Structure("grammar", 'root ::= "yes"'), {"grammar": 'root ::= "yes"'}),
    ],
)
def test_a_structure_in_vllms_words(structure: Structure, arguments: dict[str, object]) -> None:
    assert structure_arguments(structure) == arguments


def test_a_complete_structure_ends_the_answer() -> None:
    structured = Sampling(max_tokens=5, structure=Structure("regex", "[a-z]+"))
    assert sampling_arguments(request(sampling=structured))["ignore_eos"] is False
    assert sampling_arguments(request())["ignore_eos"] is True
