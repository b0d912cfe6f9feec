"""What every engine refuses alike."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from backends.admission import check, wishes
from backends.engine import EngineError, EngineInfo, Feature, GenerateRequest, KVHandoff, Role, Sampling, Structure

DECODE = EngineInfo("vllm", "0.32.0", "name", Role.DECODE, 2, 32, 128, 100, "sequential", max_logprobs=20)
HANDOFF = KVHandoff({"remote_request_id": "x"})


def request(leg: Role = Role.AGGREGATED, token_ids: list[int] | None = None, **fields: Any) -> GenerateRequest:
    sampling = fields.pop("sampling", Sampling(max_tokens=5))
    return GenerateRequest("r", [1, 2, 3] if token_ids is None else token_ids, sampling, leg, **fields)


@pytest.mark.parametrize(
    ("field", "made"),
    [
        ("prompt", request(token_ids=[])),
        ("prompt", request(token_ids=[1] * 128)),
        ("prompt", request(token_ids=[1, 1000])),
        ("prompt", request(token_ids=[-1])),
        ("dp_rank", request(dp_rank=2)),
        ("leg", request(Role.PREFILL)),
        ("handoff", request(Role.DECODE)),
        ("handoff", request(handoff=HANDOFF)),
        ("logprobs", request(sampling=Sampling(max_tokens=1, logprobs=21))),
        ("max_tokens", request(sampling=Sampling(max_tokens=0))),
    ],
)
def test_what_can_never_run_is_refused_with_its_field(field: str, made: GenerateRequest) -> None:
    with pytest.raises(EngineError) as refusal:
        check(made, DECODE, vocab_size=1000)
    assert (refusal.value.retryable, refusal.value.field) == (False, field)


def sampling(**fields: Any) -> Sampling:
    return Sampling(max_tokens=5, **fields)


ASKING = [
    ("seed", Feature.SEED, {"sampling": sampling(seed=1)}),
    ("min_p", Feature.MIN_P, {"sampling": sampling(min_p=0.1)}),
    ("min_tokens", Feature.MIN_TOKENS, {"sampling": sampling(min_tokens=1)}),
    ("cache_salt", Feature.CACHE_SALT, {"cache_salt": "tenant"}),
    ("priority", Feature.PRIORITY, {"priority": -1}),
    ("structure", Feature.JSON_OBJECT, {"sampling": sampling(structure=Structure("json_object"))}),
    ("structure", Feature.JSON_SCHEMA, {"sampling": sampling(structure=Structure("json_schema", "{}"))}),
    ("structure", Feature.REGEX, {"sampling": sampling(structure=Structure("regex", "a"))}),
    ("structure", Feature.GRAMMAR, {"sampling": sampling(structure=Structure("grammar", "a"))}),
]


@pytest.mark.parametrize(("field", "feature", "fields"), ASKING, ids=[feature for _, feature, _ in ASKING])
def test_a_feature_that_the_engine_lacks_is_refused_and_no_other(
    field: str, feature: Feature, fields: dict[str, Any]
) -> None:
    others = msgspec.structs.replace(DECODE, features=tuple(f for f in Feature if f is not feature))
    with pytest.raises(EngineError, match=r"vllm 0\.32\.0 as it was started does not support") as refusal:
        check(request(**fields), others, vocab_size=1000)
    assert (refusal.value.retryable, refusal.value.field) == (False, field)
    check(request(**fields), msgspec.structs.replace(DECODE, features=(feature,)), vocab_size=1000)


def test_every_feature_is_asked_for_by_some_request() -> None:
    assert {feature for _, feature, _ in ASKING} == set(Feature)


def test_an_adapter_that_the_engine_has_not_is_refused_with_those_it_has() -> None:
    check(request(lora="sql"), msgspec.structs.replace(DECODE, loras=("sql", "poems")), vocab_size=1000)
    for loras, words in (((), "it has none"), (("sql", "poems"), "it has sql, poems")):
        with pytest.raises(EngineError, match=words) as refusal:
            check(request(lora="prose"), msgspec.structs.replace(DECODE, loras=loras), vocab_size=1000)
        assert (refusal.value.retryable, refusal.value.field) == (False, "lora")


def test_what_cannot_change_the_answer_is_not_asked_for() -> None:
    greedy = sampling(temperature=0.0, seed=1, min_p=0.5)
    assert wishes(greedy, cache_salt=None, priority=0, lora=None) is None
    check(request(sampling=greedy), DECODE, vocab_size=1000)


def test_what_can_run_is_not_refused() -> None:
    check(request(token_ids=[999] * 127, dp_rank=1), DECODE, vocab_size=1000)
    check(request(Role.DECODE, handoff=HANDOFF), DECODE, vocab_size=1000)


def test_a_prefill_leg_needs_a_handoff_only_where_both_legs_start_with_one() -> None:
    sequential = msgspec.structs.replace(DECODE, role=Role.PREFILL)
    concurrent = msgspec.structs.replace(sequential, handoff="concurrent")
    check(request(Role.PREFILL), sequential, vocab_size=1000)
    check(request(Role.PREFILL, handoff=HANDOFF), concurrent, vocab_size=1000)
    for info, handoff in ((sequential, HANDOFF), (concurrent, None)):
        with pytest.raises(EngineError) as refusal:
            check(request(Role.PREFILL, handoff=handoff), info, vocab_size=1000)
        assert refusal.value.field == "handoff"
