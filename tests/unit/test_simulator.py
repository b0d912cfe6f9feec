"""Modelled ranks by hand, and replays through the router's own code."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.engine import Role
from dynamo_ray.config import DeploymentConfig, RouterConfig
from dynamo_ray.errors import ConfigError
from dynamo_ray.routing import policies
from dynamo_ray.routing.policy import Floats
from dynamo_ray.simulator.group import Group
from dynamo_ray.simulator.ideal import ideal_hit_tokens
from dynamo_ray.simulator.rank import Leg, RankModel, What
from dynamo_ray.simulator.replay import simulate
from dynamo_ray.simulator.report import Slo
from dynamo_ray.simulator.traces import TraceRequest, read_trace
from dynamo_ray.simulator.workloads import WORKLOADS, agents, single_turn

SMALL = RankModel(block_size=4, kv_total_blocks=8, max_batched_tokens=8, prefill_tokens_per_s=8.0, step_s=1.0)
MOONCAKE = Path(__file__).parents[1] / "bench" / "traces" / "mooncake_synthetic_trace.jsonl"
LOCAL_SIM = Path(__file__).parents[2] / "configs" / "local-sim.yaml"
LINE = {"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]}
LARGE = RankModel(512, 1024, max_batched_tokens=2048, prefill_tokens_per_s=20_000.0, step_s=0.015)


def aggregated(workers: int, attn_dp: int = 1) -> DeploymentConfig:
    return DeploymentConfig.model_validate(
        {
            "model": {"name": "m", "path": "/nowhere"},
            "backend": "simulated",
            "aggregated": {"replicas": workers, "parallelism": {"attn_dp": attn_dp}},
        }
    )


def leg(number: int, prompt: list[int], answer: int = 1) -> Leg:
    return Leg(number, prompt + [1000 + number] * answer, len(prompt), Role.AGGREGATED)


def run(group: Group, now_s: float = 0.0) -> list[tuple[float, int, str]]:
    """Step until nothing is left: (time, leg, what) of all that happened."""
    happened = []
    end_s = group.begin(now_s)[1]
    while end_s is not None:
        happened += [(end_s, outcome.leg.number, outcome.what.value) for outcome in group.end()]
        end_s = group.begin(end_s)[1]
    return happened


def test_a_prompt_is_computed_in_chunks_and_what_is_cached_is_not_computed_again() -> None:
    group = Group("w", SMALL, 1)
    prompt = list(range(12))
    group.ranks[0].submit(leg(0, prompt, answer=3))
    # Chunks of 8 and 4 tokens: steps of 2 s and 1.5 s; then two that only decode.
    assert run(group) == [(3.5, 0, "first token"), (5.5, 0, "finished")]
    again = leg(1, [*prompt, 77])
    group.ranks[0].submit(again)
    assert run(group) == [(1.125, 1, "first token"), (1.125, 1, "finished")]
    assert again.cached == 12
    assert group.ranks[0].work_tokens == (12 + 3) + (1 + 1)


def test_what_was_used_least_recently_is_evicted_first() -> None:
    group = Group("w", SMALL, 1)
    a, b, c = ([base] * 12 for base in (1, 2, 3))
    cached = []
    for number, prompt in enumerate((a, b, a, c, a, b)):  # each takes 4 blocks of 8 while it runs, and leaves 3
        one = leg(number, prompt)
        group.ranks[0].submit(one)
        run(group)
        cached.append(one.cached)
    # The block with a prompt's last token is always computed. For `c` the end of `b` went, not its beginning.
    assert cached == [0, 0, 8, 0, 8, 4]


def test_ranks_of_a_group_step_together_and_the_slowest_sets_the_pace() -> None:
    group = Group("w", SMALL, 2)
    group.ranks[0].submit(leg(0, [1, 2, 3, 4], answer=2))
    group.ranks[1].submit(leg(1, [5] * 8, answer=1))
    assert run(group) == [
        (2.0, 0, "first token"),
        (2.0, 1, "first token"),
        (2.0, 1, "finished"),
        (3.0, 0, "finished"),
    ]


def test_who_comes_while_equal_steps_run_waits_for_the_end_of_one() -> None:
    group = Group("w", SMALL, 1)
    group.ranks[0].submit(leg(0, [1, 2, 3, 4], answer=9))
    assert group.begin(0.0)[1] == 1.5
    group.end()
    assert group.begin(1.5)[1] == 9.5, "eight steps that only decode"
    group.ranks[0].submit(leg(1, [5, 6, 7, 8]))
    assert group.hurry(4.25) == 4.5
    assert group.hurry(4.3) is None, "that was said before"
    group.end()
    assert run(group, 4.5)[0] == (6.0, 1, "first token")


def test_blocks_are_neither_lost_nor_made_whatever_comes() -> None:
    chance = random.Random(7)
    group = Group("w", replace(SMALL, kv_total_blocks=20, max_running=3), 2)
    waiting, finished, end_s = [leg(n, [chance.randrange(3)] * chance.randrange(1, 60), 9) for n in range(80)], 0, None
    while waiting or end_s is not None:
        for rank in group.ranks:
            if waiting and chance.random() < 0.5:
                rank.submit(waiting.pop())
        if end_s is not None:
            finished += sum(outcome.what is What.FINISHED for outcome in group.end())
        end_s = group.begin(end_s or 0.0)[1]
        for rank in group.ranks:
            assert 0 <= rank.pool.used_blocks <= 20
            assert rank.num_running <= 3
    assert finished == 80
    assert [rank.pool.used_blocks for rank in group.ranks] == [0, 0]


def request(at_s: float, blocks: tuple[int, ...], answer: int = 1, session: str = "") -> TraceRequest:
    return TraceRequest(at_s, blocks, len(blocks) * 512, answer, session)


def test_one_cache_finds_what_least_recent_use_has_left() -> None:
    trace = [request(0, (1, 2, 3)), request(1, (1, 2, 4)), request(2, (9, 8)), request(3, (1, 2, 4, 5))]
    # 0: nothing. 1: blocks 1, 2. 2: nothing. 3: all of 1, 2, 4 if they are still there.
    assert ideal_hit_tokens(trace, 512, 100) == (2 + 3) * 512
    assert ideal_hit_tokens(trace, 512, 4) == (2 + 2) * 512, "of the chain 1, 2, 4 its end goes first"
    assert ideal_hit_tokens([request(0, (1, 2)), request(1, (1, 2))], 512, 9) == 512, "the last token is computed"


def test_the_trace_of_the_bench_is_read_whole() -> None:
    trace = read_trace(MOONCAKE)
    assert len(trace) == 3993
    assert sum(request.prompt_tokens for request in trace) == 61_194_628
    assert len(trace[5].token_ids()) == trace[5].prompt_tokens == 28


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2"),
        ('{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}', "512-token blocks make 2"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": [1]}', "input_length"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1}', "hash_ids"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 1, "hash_ids": [1]}', "timestamp"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}\n' + line)
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert "line 2" in str(caught.value)
    assert says in str(caught.value)


def test_a_trace_that_cannot_be_read_is_named_as_the_caller_named_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        simulate(aggregated(1), tmp_path / "none")
    assert str(caught.value) == f"{tmp_path / 'none'}: cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"config": "configs/local-sim.yaml"}, "config: is a str; give what `load_config` returns"),
        ({"trace": []}, "trace: holds no requests"),
        ({"trace": [{"timestamp": 0}]}, "trace[0]: is a dict; give a TraceRequest"),
        ({"trace": [TraceRequest(at_s, (1,), 9, 1, "") for at_s in (1.0, 0.5)]}, "trace[1]: comes before the one"),
        ({"policy": lambda leg: leg.num_requests}, "policy: is no name; give a policy one by register_policy"),
        ({"policy": "best"}, "policy: no policy is called 'best'"),
        ({"rate": 0}, "rate: 0 is not above 0"),
        ({"rate": float("nan")}, "rate: nan is not above 0"),
        ({"rate": "2"}, "rate: '2' is not above 0"),
        ({"slo": (2.0, 0.1)}, "slo: is a tuple; give Slo(ttft_s, itl_s)"),
        ({"models": LARGE}, "models: give a RankModel for each of aggregated"),
        ({"models": {Role.DECODE: LARGE}}, "models: give a RankModel for each of aggregated"),
    ],
)
def test_a_wrong_argument_is_named(wrong: dict[str, Any], said: str) -> None:
    given = {"config": aggregated(1), "trace": [TraceRequest(0.0, (1,), 9, 1, "")], **wrong}
    with pytest.raises(ConfigError) as caught:
        simulate(**given)
    assert str(caught.value).startswith(said)


def test_what_can_be_no_request_and_no_rank_is_named() -> None:
    for field, values in {
        "arrival_s": (-1.0, (1,), 9, 1),
        "block_ids": (0.0, (1,), 513, 1),
        "prompt_tokens": (0.0, (), 0, 1),
        "answer_tokens": (0.0, (1,), 9, 0),
    }.items():
        with pytest.raises(ValueError, match=f"^{field}: "):
            TraceRequest(*values, session="")
    for given in ({"block_size": 16.5}, {"kv_total_blocks": "9"}, {"step_s": "0"}, {"max_running": 0}):
        with pytest.raises(ValueError, match=f"^{next(iter(given))}: "):
            RankModel(**given)


def test_a_policy_that_fails_is_told_of_with_its_first_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from dynamo_ray.cli.commands import app

    def fails(leg: object) -> Floats:
        raise RuntimeError("no [such] table\nas it was")

    monkeypatch.setattr(policies, "_REGISTERED", {})
    policies.register_policy("fails", fails)
    trace = [request(0.0, (1,)), request(10.0, (2,))]
    fine, failed = (simulate(aggregated(2), trace, policy=name) for name in ("latency", "fails"))
    assert (fine.num_policy_errors, fine.policy_error) == (0, None)
    assert (failed.num_policy_errors, failed.policy_error) == (2, "RuntimeError: no [such] table")
    (tmp_path / "trace.jsonl").write_text(json.dumps(LINE))
    asked = ["simulate", str(LOCAL_SIM), "--trace", str(tmp_path / "trace.jsonl"), "--policy", "fails"]
    assert "fails: failed 2 times, first of RuntimeError: no [such] table" in CliRunner().invoke(app, asked).stdout


def test_a_replay_by_hand() -> None:
    model = RankModel(512, 100, max_batched_tokens=512, prefill_tokens_per_s=512.0, step_s=1.0)
    trace = [request(0.0, (1, 2), answer=3), request(10.0, (1, 2, 3), answer=1)]
    report = simulate(
        aggregated(1), trace, policy="round_robin", models={Role.AGGREGATED: model}, slo=Slo(ttft_s=3.0, itl_s=1.0)
    )
    assert report.hit_tokens == report.ideal_hit_tokens == 1024
    assert (report.ttft_s.p50, report.ttft_s.p99) == (2.0, 4.0)
    assert (report.itl_s.p50, report.num_within_slo, report.duration_s) == (1.0, 1, 12.0)


def test_a_split_deployment_copies_what_the_decode_rank_has_not() -> None:
    config = DeploymentConfig.model_validate(
        {"model": {"name": "m", "path": "/nowhere"}, "backend": "simulated", "prefill": {}, "decode": {}}
    )
    model = RankModel(512, 100, 512, 512, prefill_tokens_per_s=512.0, step_s=1.0, transfer_tokens_per_s=1024.0)
    trace = [request(0.0, (1, 2), answer=2), request(20.0, (1, 2, 3), answer=2)]
    report = simulate(config, trace, policy="round_robin", models={Role.PREFILL: model, Role.DECODE: model})
    # Two steps of 2 s, 1 s of copying, one step; then one step of prefill, half a second for the third block.
    assert (report.ttft_s.p99, report.ttft_s.p50) == (6.0, 3.5)
    assert report.hit_tokens == 1024


@pytest.mark.parametrize(
    ("backend", "engine_args", "caches"),
    [
        ("simulated", {}, True),
        ("simulated", {"prefix_caching": False}, False),
        ("vllm", {"enable_prefix_caching": False}, False),
        ("sglang", {"disable_radix_cache": True}, False),
        ("trtllm", {"kv_cache_config": {"enable_block_reuse": False}}, False),
    ],
)
def test_ranks_find_nothing_again_where_their_engine_args_have_them_cache_nothing(
    backend: str, engine_args: dict[str, object], caches: bool
) -> None:
    config = DeploymentConfig.model_validate(
        {
            "model": {"name": "m", "path": "/nowhere"},
            "backend": backend,
            "aggregated": {"engine_args": engine_args, "resources": {"cpus": 1}},
        }
    )
    trace = [request(0.0, (1, 2)), request(20.0, (1, 2))]
    report = simulate(config, trace, models={Role.AGGREGATED: LARGE})
    assert (report.hit_tokens, report.ideal_hit_tokens) == (512 if caches else 0, 512)


def test_a_decode_rank_that_caches_nothing_is_given_the_whole_prompt_again() -> None:
    model = RankModel(512, 100, 512, 512, prefill_tokens_per_s=512.0, step_s=1.0, transfer_tokens_per_s=1024.0)
    trace = [request(0.0, (1, 2), answer=2), request(20.0, (1, 2, 3), answer=2)]
    values = {"model": {"name": "m", "path": "/nowhere"}, "backend": "sglang", "prefill": {}, "decode": {}}
    config = DeploymentConfig.model_validate(values)
    report = simulate(config, trace, models={Role.PREFILL: model, Role.DECODE: model})
    # SGLang's decode side caches nothing unless it is asked to: one step of prefill, 1.5 s of copying, one step.
    assert (report.ttft_s.p99, report.ttft_s.p50) == (6.0, 4.5)


@pytest.mark.parametrize("policy", ["blocks", "round_robin"])
def test_a_short_prompt_is_computed_by_the_decode_rank_where_the_configuration_allows_it(policy: str) -> None:
    model = RankModel(512, 100, 512, 512, prefill_tokens_per_s=512.0, step_s=1.0, transfer_tokens_per_s=1024.0)
    # Prefill computes one at a time, 2 s a block, and half a second goes by until a block is copied. The last comes
    # while one waits for it, and is computed in 2 s where it needs none of it.
    trace = [request(0.0, (1, 2)), request(0.5, (3, 4)), request(1.0, (5,))]
    roles = {"prefill": {}, "decode": {"replicas": 3}}
    found = {}
    for allowed in (None, 512):
        short = None if allowed is None else {"max_uncached_tokens": allowed}
        router = {"queue": {"busy_requests": 1, "order": "fcfs"}, "prefill_on_decode": short}
        values = {"model": {"name": "m", "path": "/nowhere"}, "backend": "simulated", **roles, "router": router}
        config = DeploymentConfig.model_validate(values)
        report = simulate(config, trace, policy=policy, models=dict.fromkeys((Role.PREFILL, Role.DECODE), model))
        found[allowed] = report.ttft_s.p50, report.ttft_s.p99
    assert found == {None: (9.5, 10.5), 512: (6.0, 9.5)}


def test_what_ranks_cache_is_guessed_where_the_configuration_has_no_events() -> None:
    """A guess ends by itself, though the cache still has the blocks: then nothing draws a prompt to its rank."""
    trace = [request(0.0, (1, 2, 3, 4)), request(1000.0, (1, 2, 3, 4))]
    hits = {}
    for events in ("zmq", "none"):
        config = aggregated(2).model_copy(update={"events": events})
        hits[events] = simulate(config, trace, policy="blocks", models={Role.AGGREGATED: LARGE}).hit_tokens
    assert hits == {"zmq": 3 * 512, "none": 0}


def test_the_same_replay_twice_is_the_same() -> None:
    reports = [
        simulate(aggregated(2, attn_dp=2), agents(10), models={Role.AGGREGATED: LARGE}, policy="blocks")
        for _ in range(2)
    ]
    first, second = (replace(report, decision_cpu_s=0.0) for report in reports)
    assert first == second


def waiting(**queue: object) -> DeploymentConfig:
    """Of one rank that takes one request at a time; the others wait in the ingress."""
    router = RouterConfig.model_validate({"queue": {"busy_requests": 1, "order": "fcfs", **queue}})
    return aggregated(1).model_copy(update={"router": router})


def test_requests_wait_as_the_queue_of_the_configuration_has_it() -> None:
    model = RankModel(512, 100, max_batched_tokens=8192, prefill_tokens_per_s=512.0, step_s=0.0)
    # 4 s of computing, and two that come meanwhile: of 3 s, then of 1 s.
    trace = [request(0.0, (1, 2, 3, 4)), request(1.0, (5, 6, 7)), request(2.0, (8,))]
    found = {}
    for name, config in {
        "fcfs": waiting(),
        "shortest": waiting(order="shortest"),
        "aged": waiting(order="shortest", ageing_tokens_per_s=2000.0),
        "full": waiting(max_waiting=1),
        "none": aggregated(1).model_copy(update={"router": RouterConfig(queue=None)}),
    }.items():
        report = simulate(config, trace, models={Role.AGGREGATED: model})
        found[name] = (report.ttft_s.p50, report.ttft_s.p99, report.num_turned_away)
    assert found == {
        "fcfs": (6.0, 6.0, 0),
        "shortest": (4.0, 7.0, 0),
        "aged": (6.0, 6.0, 0),
        "full": (4.0, 6.0, 1),
        "none": (6.0, 7.0, 0),
    }


def test_requests_that_wait_go_on_after_the_last_has_come() -> None:
    """Ranks go on telling their load: one that said it was full, of requests that share a prefix, does not stay so."""
    trace = [request(n * 0.05, (*range(9), 9 + n), answer=100) for n in range(60)]
    values = {"model": {"name": "m", "path": "/nowhere"}, "backend": "simulated", "prefill": {}, "decode": {}}
    models = {Role.PREFILL: LARGE, Role.DECODE: replace(LARGE, kv_total_blocks=24)}
    reports = [
        simulate(DeploymentConfig.model_validate(values | {"router": router}), trace, models=models)
        for router in ({}, {"queue": None})
    ]
    assert reports[0].ttft_s != reports[1].ttft_s, "some waited here"
    assert reports[0].duration_s < 1.5 * reports[1].duration_s


def test_what_fits_no_rank_is_refused_and_counted() -> None:
    report = simulate(
        aggregated(1), [request(0.0, (1,)), request(1.0, tuple(range(2000)))], models={Role.AGGREGATED: LARGE}
    )
    assert (report.num_requests, report.num_refused, report.prompt_tokens) == (1, 1, 512)


@pytest.mark.parametrize("make", WORKLOADS.values(), ids=WORKLOADS)
def test_a_made_trace_is_in_order_and_the_same_for_the_same_seed(make: Callable[..., tuple[TraceRequest, ...]]) -> None:
    trace = make(20, seed=3)
    assert trace == make(20, seed=3) != make(20, seed=4)
    assert list(trace) == sorted(trace, key=lambda request: request.arrival_s)
    assert all(len(request.token_ids()) == request.prompt_tokens for request in trace)


def load_of(policy: str, trace: tuple[TraceRequest, ...]) -> float:
    report = simulate(aggregated(8), trace, policy=policy, models={Role.AGGREGATED: LARGE})
    assert report.num_requests == len(trace)
    return report.max_over_mean_load


@pytest.mark.parametrize(("policy", "most"), [("latency", 1.1), ("blocks", 1.25)])
def test_prompts_that_share_nothing_starve_no_rank(policy: str, most: float) -> None:
    assert load_of(policy, single_turn(400)) < most


@pytest.mark.parametrize(("policy", "most"), [("latency", 1.3), ("blocks", 1.3)])
def test_a_system_prompt_that_all_share_piles_nothing_up(policy: str, most: float) -> None:
    assert load_of(policy, agents(60, per_s=2.0)) < most


def test_the_command_compares_policies_and_names_what_is_wrong(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from dynamo_ray.cli.commands import app

    trace = tmp_path / "trace.jsonl"
    trace.write_text(f"{json.dumps(LINE)}\n" * 2)
    asked = ["simulate", str(LOCAL_SIM), "--trace", str(trace), "--policy", "blocks", "--policy", "round_robin"]
    run = CliRunner().invoke(app, asked)
    assert "blocks" in run.stdout
    assert "round_robin" in run.stdout
    run = CliRunner().invoke(app, [*asked, "--rank", "speed=3"])
    assert "--rank" in str(run.exception)
    run = CliRunner().invoke(app, [*asked[:2], "--trace", str(tmp_path / "none")])
    assert str(run.exception) == f"--trace {tmp_path / 'none'}: cannot be read: No such file or directory"
    run = CliRunner().invoke(app, [*asked[:4], "--policy", "best"])
    assert str(run.exception).startswith("--policy: no policy is called 'best'; known: ")
    run = CliRunner().invoke(app, [*asked, "--json", "--rate", "2"])
    assert [json.loads(line)["policy"] for line in run.stdout.splitlines()] == ["blocks", "round_robin"]
