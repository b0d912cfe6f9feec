"""What is said of a choice: all candidates, their costs, and a reason; and who may ask for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from data_path import cluster, collect, generation
from front import Client, ScriptedService, make_front, spell
from opentelemetry.sdk.trace import TracerProvider

from backends.engine import Role
from dynamo_ray.cli.route import body_of
from dynamo_ray.config import RouterConfig
from dynamo_ray.errors import ConfigError
from dynamo_ray.models import byte_tokenizer
from dynamo_ray.routing import policies
from dynamo_ray.routing.block_hash import chain_seed
from dynamo_ray.routing.chooser import Chooser, WorkerFacts
from dynamo_ray.routing.explanation import Explanation
from dynamo_ray.routing.policy import Ask
from dynamo_ray.simulator import clock


def test_every_candidate_has_its_overlap_load_and_cost_terms_and_nothing_is_counted() -> None:
    async def main() -> Explanation:
        async with cluster(prefill=2, decode=1) as made:
            await collect(made, generation())
            before = dict(made.dispatch.router.num_legs)
            found = made.dispatch.explain(generation())
            assert dict(made.dispatch.router.num_legs) == before
            assert made.dispatch.router.table.num_bookings == 0
            return found

    found = clock.run(main())
    assert found.policy == "blocks"
    assert found.decode.why == "the only candidate"
    assert found.prefill is not None
    best, other = found.prefill.candidates
    assert (best.worker, best.chosen, best.overlap_blocks) == ("prefill-0", True, 6)
    assert (other.worker, other.chosen, other.overlap_blocks) == ("prefill-1", False, 0)
    assert best.cost == sum(value or 0.0 for value in best.terms.values())
    assert best.cost is not None
    assert other.cost is not None
    assert best.cost < other.cost
    assert found.prefill.why == f"lowest cost of 2; next is prefill-1 rank 0 at {other.cost:.4g}"


def test_equal_costs_are_said_to_be_equal() -> None:
    async def main() -> Explanation:
        async with cluster(prefill=2, decode=1) as made:
            return made.dispatch.explain(generation())

    found = clock.run(main())
    assert found.prefill is not None
    assert found.prefill.why == "lowest cost, like 1 more of 2: fewest requests first, then in turn"


def test_a_term_that_is_the_same_for_all_may_be_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "_REGISTERED", {})
    policies.register_policy("mine", lambda leg: {"requests": leg.num_requests, "base": 2.0})
    chooser = Chooser("m", RouterConfig(policy="mine"))
    for name in ("a", "b"):
        chooser.up(WorkerFacts(name, 1, Role.AGGREGATED, 1, 16, 100))
    explained = chooser.explain(chooser.choose(Ask([1] * 16, chain_seed("m")), None, 0b11, 0.0))
    assert [candidate.terms for candidate in explained.decode.candidates] == [{"requests": 0.0, "base": 2.0}] * 2
    assert chooser.num_policy_errors == 0


def test_a_span_that_records_gets_the_route_as_attributes() -> None:
    async def main() -> None:
        async with cluster() as made:
            with TracerProvider().get_tracer("test").start_as_current_span("request") as span:
                await collect(made, generation())
        attributes = dict(span.attributes or {})  # type: ignore[attr-defined]
        assert attributes["dynamo_ray.route.prefill.worker"] == "prefill-0"
        assert attributes["dynamo_ray.route.decode.dp_rank"] == 0

    clock.run(main())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("byte-tokenizer")
    byte_tokenizer.build(target)
    return target


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService(lambda _: spell("hi"))


@pytest.fixture
def client(folder: Path, service: ScriptedService) -> Client:
    return Client(make_front(folder, service)[0])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_asks_is_told_the_route_in_a_header(client: Client, stream: bool) -> None:
    told = await client.chat_with({"x-dynamo-ray-explain": "1"}, stream=stream)
    route = json.loads(told.headers["x-dynamo-ray-route"])
    assert route["decode"] == {
        "worker": "w",
        "dp_rank": 0,
        "overlap_blocks": 3,
        "cost": 1.5,
        "why": "the only candidate",
    }
    assert "x-dynamo-ray-route" not in (await client.chat(stream=stream)).headers
    assert (await client.chat_with({"x-dynamo-ray-explain": "yes"})).error["param"] == "x-dynamo-ray-explain"


async def test_the_session_is_the_header_s_or_the_body_s(client: Client, service: ScriptedService) -> None:
    await client.chat_with({"x-session-id": "a"}, user="b")
    await client.chat(user="b", prompt_cache_key="c")
    await client.chat(user="b")
    await client.chat()
    assert [asked.session for asked in service.asked] == ["a", "c", "b", None]
    assert (await client.chat_with({"x-session-id": "\u00e9"})).error["param"] == "x-session-id"


async def test_a_dry_run_takes_the_body_of_either_endpoint_and_generates_nothing(
    client: Client, service: ScriptedService
) -> None:
    for body in ({"messages": [{"role": "user", "content": "hi"}]}, {"prompt": [1, 2, 3]}, {"prompt": "hi"}):
        reply = await client.post("/v1/route", {"model": "org/model", **body})
        found = msgspec.json.decode(reply.body, type=Explanation)
        assert found.decode.prompt_tokens == len(service.asked[-1].token_ids)
    assert not service.open
    for wrong, field in (({"prompt": ["a", "b"]}, "prompt"), ({}, "prompt"), ({"messages": []}, "messages")):
        reply = await client.post("/v1/route", {"model": "org/model", **wrong})
        assert (reply.status, reply.error["param"]) == (400, field)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello", {"prompt": "Hello"}),
        ("[1, 2]", {"prompt": [1, 2]}),
        ('[{"role": "user", "content": "x"}]', {"messages": [{"role": "user", "content": "x"}]}),
        ('{"prompt": "x", "cache_salt": "s"}', {"prompt": "x", "cache_salt": "s"}),
        ('{"promt": "x"}', None),
        ("[]", None),
    ],
)
def test_a_prompt_s_file_is_text_or_json(tmp_path: Path, text: str, expected: dict[str, Sequence[int]] | None) -> None:
    file = tmp_path / "prompt"
    file.write_text(text)
    if expected is None:
        with pytest.raises(ConfigError, match="--prompt"):
            body_of(file, "m")
    else:
        assert body_of(file, "m") == {"model": "m", **expected}
    with pytest.raises(ConfigError, match="cannot be read"):
        body_of(tmp_path / "nothing", "m")
