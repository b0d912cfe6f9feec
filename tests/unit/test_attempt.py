"""How an answer goes on when its worker has died."""

from __future__ import annotations

from typing import Any

import pytest

from backends.engine import Feature, Role, Sampling, Structure, TokenChunk
from dynamo_ray.errors import InternalError, InvalidRequest, RequestError, WorkerLost
from dynamo_ray.request.attempt import Attempt, resumption
from dynamo_ray.request.connection import LegFailed
from dynamo_ray.request.generation import Generation

LOST = LegFailed("the connection was lost", "decode-0", retryable=True)
JSON = Structure("json_object")


def attempt(delivered: int = 0, **sampling: Any) -> Attempt:
    request = Generation("r", [1, 2, 3], Sampling(max_tokens=10, **sampling), "salt", lora="sql", priority=4)
    made = Attempt(request, deadline_s=60.0)
    if delivered:
        made.deliver(TokenChunk("r.0", list(range(delivered))))
    return made


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"temperature": 0.0}, "continue"),
        ({}, "continue"),
        ({"seed": 1}, "restart"),
        ({"temperature": 0.0, "seed": 1}, "continue"),
        ({"temperature": 0.0, "presence_penalty": 0.1}, "restart"),
        ({"frequency_penalty": 0.1}, None),
        ({"frequency_penalty": 0.1, "seed": 1}, "restart"),
        ({"temperature": 0.0, "structure": JSON}, "restart"),
        ({"seed": 1, "structure": JSON}, "restart"),
        ({"structure": JSON}, None),
    ],
)
def test_an_answer_goes_on_only_where_the_same_tokens_follow(sampling: dict[str, Any], expected: str | None) -> None:
    assert resumption(Sampling(max_tokens=10, **sampling)) == expected


def test_a_structured_answer_is_begun_again_and_what_was_delivered_is_skipped() -> None:
    retried = attempt(4, temperature=0.0, structure=JSON).after(LOST, max_retries=3)
    leg = retried.leg(Role.DECODE, 0, None, (Feature.PRIORITY,))
    assert leg.token_ids == [1, 2, 3], "delivered tokens as prompt would have the engine begin another object"
    assert (leg.sampling.max_tokens, leg.sampling.structure) == (10, JSON)
    fresh = retried.deliver(TokenChunk("r.1", [0, 1, 2, 3, 4, 5]))
    assert fresh is not None
    assert fresh.token_ids == [4, 5]


def test_a_structured_answer_that_would_come_out_otherwise_is_not_begun_again() -> None:
    with pytest.raises(WorkerLost, match="structure"):
        attempt(4, structure=JSON).after(LOST, max_retries=3)


def test_a_structured_answer_of_which_nothing_is_delivered_moves_to_another_worker() -> None:
    retried = attempt(structure=JSON).after(LOST, max_retries=3)
    assert retried.leg(Role.DECODE, 0, None, (Feature.PRIORITY,)).token_ids == [1, 2, 3]


@pytest.mark.parametrize(
    ("field", "structure", "expected"),
    [
        ("logprobs", JSON, (InvalidRequest, "logprobs")),
        ("logprobs", None, (InvalidRequest, "logprobs")),
        (None, JSON, (InvalidRequest, "structure")),
        (None, None, (InternalError, None)),
    ],
)
def test_a_refusal_that_names_no_field_is_about_the_structure_where_there_is_one(
    field: str | None, structure: Structure | None, expected: tuple[type[RequestError], str | None]
) -> None:
    refused = LegFailed("Invalid grammar specification.", "decode-0", retryable=False, field=field)
    with pytest.raises(RequestError) as caught:
        attempt(structure=structure).after(refused, max_retries=3)
    assert (type(caught.value), caught.value.field) == expected


def test_salt_adapter_and_priority_stay_with_the_request() -> None:
    for made in (attempt(), attempt(4).after(LOST, max_retries=3)):
        leg = made.leg(Role.DECODE, 0, None, (Feature.PRIORITY,))
        assert (leg.cache_salt, leg.lora, leg.priority) == ("salt", "sql", 4)
        assert made.leg(Role.DECODE, 0, None, ()).priority == 0, "no engine gets one that it would refuse"
