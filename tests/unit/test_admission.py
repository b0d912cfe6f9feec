"""What every engine refuses alike."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from backends.admission import check
from backends.engine import EngineError, EngineInfo, GenerateRequest, KVHandoff, Role, Sampling

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
